"""Embeddings of texts without a model: hashed n-grams of words.

Good for tests and for a figure that does not move with the model. What DIVE uses by default are the
reference model's own hidden states, `jaxrl/training/embed.py`.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import numpy as np


def hashed_ngrams(
    texts: Sequence[str], *, width: int = 256, orders: Sequence[int] = (1, 2)
) -> np.ndarray:              # [n, width] float32
  """Signed counts of hashed word n-grams, L2-normalised; a text without words is the zero vector.

  The same text gives the same vector everywhere. Two n-grams that fall into one place add or cancel
  by chance, so that cosines are right on average (Weinberger et al. 2009).

  Raises:
    ValueError: `width` or an order is below 1.
  """
  if width < 1 or min(orders, default=0) < 1:
    raise ValueError(f'width and orders must be at least 1; found {width} and {tuple(orders)}')
  counts = np.zeros((len(texts), width))
  for row, text in enumerate(texts):
    tokens = text.lower().split()
    hashes = np.array([
        zlib.crc32(' '.join(tokens[n:n + order]).encode())
        for order in orders for n in range(len(tokens) - order + 1)], np.int64)
    # The sign is a bit that the place does not depend on.
    place, rest = hashes % width, hashes // width
    np.add.at(counts[row], place, 1.0 - 2.0 * (rest & 1))
  norms = np.linalg.norm(counts, axis=1)[:, None]
  return (counts / np.where(norms > 0, norms, 1.0)).astype(np.float32)
