"""One digest for the values of parameters, wherever they lie."""

from __future__ import annotations

import hashlib

import jax
import numpy as np

from jaxrl.models.gather import gather_rows
from jaxrl.models.params import Params

BLOCK_BYTES = 64 * 2**20


def identity(params: Params) -> str:
  """Hex digest of names, shapes, dtypes and bytes: the same values always give the same string.

  It does not depend on the mesh. The host holds one block of rows of one array at a time (one row
  where that is larger; a row of a stacked parameter is a layer). Where parameters are spread over
  several hosts every host has to call this, and all get the same string.
  """
  digest = hashlib.sha256()
  for path, leaf in sorted(
      (jax.tree_util.keystr(path), leaf) for path, leaf in jax.tree.leaves_with_path(params)):
    digest.update(f'{path} {leaf.shape} {leaf.dtype}\n'.encode())
    rows = leaf.shape[0] if leaf.ndim else 1
    steps = min(max(1, BLOCK_BYTES * rows // max(1, leaf.nbytes)), max(1, rows))
    for begin in range(0, rows, steps):
      # The last block ends with the array, so that one program serves all; what it repeats is cut.
      first = min(begin, rows - steps)
      block = gather_rows(leaf, first, steps)[begin - first:] if leaf.ndim else np.asarray(leaf)
      digest.update(np.ascontiguousarray(block).reshape(-1).view(np.uint8).data)
  return digest.hexdigest()[:32]
