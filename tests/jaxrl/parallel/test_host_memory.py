"""Optimizer state goes to the memory of the host and comes back as it was."""

import jax
import numpy as np
import pytest

from jaxrl.parallel.host_memory import to_device, to_host
from jaxrl.parallel.mesh import make_mesh
from tests.tiny_training import start_state


@pytest.fixture(scope='module')
def state():
  return start_state(make_mesh(data=2, fsdp=2, tensor=2))


def kinds(tree):
  return {x.sharding.memory_kind for x in jax.tree.leaves(tree)}


def on_devices(tree):
  """Bytes of the arrays of a tree that are not deleted and not in the memory of the host."""
  return sum(x.nbytes for x in jax.tree.leaves(tree)
             if not x.is_deleted() and x.sharding.memory_kind == 'device')


def test_there_and_back(state):
  # Distinct numbers, so that no two arrays could be exchanged.
  opt_state = jax.tree.map(
      lambda x: jax.device_put(
          np.arange(x.size, dtype=x.dtype).reshape(x.shape) + np.array(x.ndim, x.dtype),
          x.sharding), state.opt_state)
  values, shardings = jax.device_get(opt_state), jax.tree.map(lambda x: x.sharding, opt_state)
  assert on_devices(opt_state) > 0 and kinds(opt_state) == {'device'}
  parked = to_host(opt_state)
  assert kinds(parked) == {'pinned_host'} and on_devices((opt_state, parked)) == 0
  assert jax.tree.structure(parked) == jax.tree.structure(opt_state)
  for x, sharding in zip(jax.tree.leaves(parked), jax.tree.leaves(shardings), strict=True):
    assert x.sharding == sharding.with_memory_kind('pinned_host')
  jax.tree.map(np.testing.assert_array_equal, jax.device_get(parked), values)

  found = to_device(parked, opt_state)
  assert all(x.is_deleted() for x in jax.tree.leaves(parked))
  assert jax.tree.map(lambda x: x.sharding, found) == shardings
  jax.tree.map(np.testing.assert_array_equal, jax.device_get(found), values)
  # The program of a step was compiled for arrays as these.
  step = jax.jit(lambda tree: jax.tree.map(lambda x: x + x, tree), donate_argnums=0)
  jax.tree.map(lambda x, value: np.testing.assert_array_equal(x, value + value),
               step(found), values)


def test_what_is_there_already_is_kept():
  mesh = make_mesh()
  x = jax.device_put(np.arange(16.0), jax.NamedSharding(mesh, jax.P('fsdp')))
  shape = jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)
  assert to_device({'x': x}, {'x': shape})['x'] is x and not x.is_deleted()
  parked = to_host([x, x])
  assert x.is_deleted() and not any(y.is_deleted() for y in parked)
  again = to_host(parked)
  np.testing.assert_array_equal(again[1], np.arange(16.0))
