"""One digest for the same values, on any mesh and in blocks of any size; another for others."""

import hashlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl.models import identity as identity_file
from jaxrl.models import params as params_lib
from jaxrl.models.identity import identity
from jaxrl.parallel import sharding
from jaxrl.parallel.mesh import make_mesh
from tests.tiny_model import CONFIG, random_params


@pytest.fixture(scope='module')
def params():
  return random_params()


def of_whole_arrays(params):
  """The digest as it is defined: names, shapes, types and bytes in the order of the names."""
  digest = hashlib.sha256()
  for path, x in sorted(
      (jax.tree_util.keystr(path), x) for path, x in jax.tree.leaves_with_path(params)):
    digest.update(f'{path} {x.shape} {x.dtype}\n'.encode())
    digest.update(np.ascontiguousarray(x).tobytes())
  return digest.hexdigest()[:32]


@pytest.mark.parametrize('block', [1, 5000, 2**26])
def test_the_digest_is_that_of_all_bytes_wherever_they_lie(params, monkeypatch, block):
  monkeypatch.setattr(identity_file, 'BLOCK_BYTES', block)
  expected = of_whole_arrays(params)
  assert identity(params) == expected
  assert identity(jax.tree.map(jnp.asarray, params)) == expected
  for sizes in ((1, 8, 1), (2, 2, 2)):
    mesh = make_mesh(data=sizes[0], fsdp=sizes[1], tensor=sizes[2])
    spread = jax.tree.map(
        lambda s, x, mesh=mesh: jax.device_put(x, sharding.stored(mesh, s.axes)),
        params_lib.decoder_specs(CONFIG), params, is_leaf=params_lib.is_spec)
    assert identity(spread) == expected


def test_any_change_changes_it(params, monkeypatch):
  monkeypatch.setattr(identity_file, 'BLOCK_BYTES', 5000)
  seen = {identity(params), identity(jax.tree.map(lambda x: x.astype(np.float16), params))}
  leaves, tree = jax.tree.flatten(params)
  for n, x in enumerate(leaves):
    for at in (0, -1):
      changed = x.copy()
      changed.flat[at] += 1
      seen.add(identity(jax.tree.unflatten(tree, [*leaves[:n], changed, *leaves[n + 1:]])))
  assert len(seen) == 2 + 2 * len(leaves)
  assert identity({'a': np.float32(1)}) != identity({'a': np.ones(1, np.float32)})
