"""The step: the same update however a batch is split over micro-batches and devices."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxrl.data.batches import TokenRow, pair_arrays, sequence_arrays
from jaxrl.models.params import param_shardings
from jaxrl.parallel.mesh import make_mesh
from jaxrl.training.logps import ComputePolicy
from jaxrl.training.objectives import sft_objective
from jaxrl.training.optimizer import guarded
from jaxrl.training.step import init_state, train_step
from tests import tiny_training as tiny
from tests.tiny_model import CONFIG, QUICK, random_params

ROWS = 16


def batches(loss, count=2):
  """Rows of very unequal lengths, the longest together: parts differ in their numbers of tokens."""
  made = []
  for seed in range(count):
    pairs = tiny.random_pairs(ROWS, seed)
    pairs.sort(key=lambda p: len(p.chosen.response_ids))
    made.append(
        sequence_arrays([p.chosen for p in pairs], tiny.LENGTHS, tiny.PAD) if loss == 'sft'
        else pair_arrays(pairs, tiny.LENGTHS, tiny.PAD))
  return made


@functools.cache
def whole_batch(loss):
  """Two steps of the whole batch on one device."""
  mesh = tiny.one_device()
  step = tiny.compiled_step(loss, optimizer=None)
  return tiny.take_steps(step, tiny.start_state(mesh, None), batches(loss), mesh)


def assert_same(found, expected):
  """Parameters and momentum to 1e-5 of their largest entry, metrics to 1e-5."""
  for (path, a), b in zip(
      jax.tree.leaves_with_path(found[0]), jax.tree.leaves(expected[0]), strict=True):
    np.testing.assert_allclose(
        a, b, rtol=1e-5, atol=1e-5 * np.abs(b).max(), err_msg=jax.tree_util.keystr(path))
  assert found[1].keys() - {'noise_scale'} == expected[1].keys()   # which takes parts
  assert found[1]['row_finite'].all()
  for name in expected[1].keys() - {'row_finite'}:
    mean = found[1][name]
    np.testing.assert_allclose(
        mean.total / mean.count, expected[1][name].total / expected[1][name].count, rtol=2e-5,
        err_msg=name)


@pytest.mark.parametrize(('loss', 'micro_batches'), [
    ('irpo_token', 2), ('irpo_token', 16), ('sft', 4)])
def test_micro_batches_give_the_update_of_the_whole_batch(loss, micro_batches):
  mesh = tiny.one_device()
  step = tiny.compiled_step(loss, optimizer=None, micro_batches=micro_batches)
  found = tiny.take_steps(step, tiny.start_state(mesh, None), batches(loss), mesh)
  assert_same(found, whole_batch(loss))
  moved = [not np.array_equal(a, b) for a, b in zip(
      jax.tree.leaves(found[0].params), jax.tree.leaves(tiny.random_params()), strict=True)]
  assert all(moved)


@pytest.mark.parametrize(('sizes', 'micro_batches'), [
    ((1, 8, 1), 2), ((2, 4, 1), 1), ((2, 4, 1), 2), ((2, 2, 2), 4)])
def test_meshes_give_the_update_of_one_device(sizes, micro_batches):
  data, fsdp, tensor = sizes
  mesh = make_mesh(data=data, fsdp=fsdp, tensor=tensor)
  step = tiny.compiled_step('irpo_token', optimizer=None, micro_batches=micro_batches)
  before = step._cache_size()
  found = tiny.take_steps(step, tiny.start_state(mesh, None), batches('irpo_token'), mesh)
  assert_same(found, whole_batch('irpo_token'))
  for leaf, rests in zip(
      jax.tree.leaves(found[0].params), jax.tree.leaves(param_shardings(CONFIG, mesh)),
      strict=True):
    assert leaf.sharding.is_equivalent_to(rests, leaf.ndim)
  assert step._cache_size() == before + 1, 'the second step finds the state laid out as the first'


def test_bfloat16_parameters_keep_float32_moments_and_follow_the_float32_ones():
  """Same first direction; what is lost is the rounding of the parameters themselves."""
  tx = guarded(optax.scale_by_adam())
  params = random_params()
  batch = {key: jnp.asarray(x) for key, x in sequence_arrays(
      [TokenRow([1, 2, 3], [4, 5, 6]), TokenRow([7], [8, 9])], (8,), 0).items()}
  policy = ComputePolicy('float32', 8, 'all')
  step = jax.jit(functools.partial(
      train_step, objective=sft_objective(CONFIG, policy), tx=tx), compiler_options=QUICK)
  wide = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16).astype(jnp.float32), params)
  narrow = jax.tree.map(lambda x: x.astype(jnp.bfloat16), wide)
  rate = np.float32(0.05)
  one, _ = step(init_state(wide, tx), batch, rate)
  other, metrics = step(init_state(narrow, tx), batch, rate)
  assert all(x.dtype == jnp.bfloat16 for x in jax.tree.leaves(other.params))
  assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(other.opt_state.mu))
  assert metrics['nonfinite'].total == 0
  for a, b in zip(jax.tree.leaves(one.params), jax.tree.leaves(other.params), strict=True):
    np.testing.assert_allclose(b.astype(jnp.float32), a, rtol=2**-7, atol=1e-3)
