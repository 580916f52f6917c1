"""What a step says and keeps, of a loss worked by hand: bad rows, noise, skips, parked moments."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl.losses.mean import Mean
from jaxrl.parallel.mesh import make_mesh
from jaxrl.runs.process import count_programs
from jaxrl.training.loop import put_batch
from jaxrl.training.objectives import Objective
from jaxrl.training.optimizer import OptimizerConfig, make_optimizer
from jaxrl.training.step import init_state, offload_optimizer, offloaded_step, train_step
from tests.tiny_model import QUICK

SIZE = 16        # of the one parameter, w [SIZE, 256]
MESHES = [(1, 1), (2, 4)]        # data, fsdp


def totals(params, part):
  """Half the squared distance of w to each row's target; its gradient is the difference."""
  losses = 0.5 * jnp.sum((params['w'][None] - part['x']) ** 2, axis=(1, 2))
  return {'all': (jnp.sum(losses), 'rows')}, {'row_finite': jnp.isfinite(losses)}


def counts(batch):
  return {'rows': jnp.float32(batch['x'].shape[0])}


def start(mesh, optimizer):
  with jax.set_mesh(mesh):
    params = {'w': jnp.ones((SIZE, 256))}
    return jax.jit(functools.partial(init_state, tx=make_optimizer(optimizer)))(params)


@functools.cache
def compiled(optimizer, micro_batches=1):
  return jax.jit(functools.partial(
      train_step, objective=Objective(totals, counts), tx=make_optimizer(optimizer),
      micro_batches=micro_batches), compiler_options=QUICK)


def mesh_of(data, fsdp):
  return make_mesh(data=data, fsdp=fsdp, devices=jax.devices()[:data * fsdp])


def rows(seed, count=16, noise=3.0):
  """Targets 0.5 from w = 1 on average, in every entry, with this deviation."""
  rng = np.random.default_rng(seed)
  x = (0.5 + noise * rng.normal(size=(count, SIZE, 256))).astype(np.float32)
  return {'x': x, 'mask': np.ones((count, 4), bool)}


def step_of(optimizer, mesh, state, batch, micro_batches=1):
  with jax.set_mesh(mesh):
    return compiled(optimizer, micro_batches)(state, put_batch(batch, mesh), np.float32(0.1))


ADAM = OptimizerConfig(0.1, clip_norm=None)


@pytest.mark.parametrize('sizes', MESHES)
@pytest.mark.parametrize('micro_batches', [1, 2])
def test_rows_that_are_not_finite_are_found_where_they_lie(sizes, micro_batches):
  mesh, batch = mesh_of(*sizes), rows(0)
  batch['x'][[3, 4, 13], 0, 0] = [np.nan, np.inf, -np.inf]
  state = start(mesh, ADAM)
  after, metrics = step_of(ADAM, mesh, state, batch, micro_batches)
  assert metrics['row_finite'].is_fully_replicated
  assert np.flatnonzero(~np.asarray(metrics['row_finite'])).tolist() == [3, 4, 13]
  assert metrics['nonfinite'].total == 1 and int(after.step) == 1
  for a, b in zip(jax.tree.leaves((after.params, after.opt_state)),
                  jax.tree.leaves((state.params, state.opt_state)), strict=True):
    np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def test_skips_in_a_row_are_counted_in_the_state():
  mesh, bad = mesh_of(1, 1), rows(0)
  bad['x'][0] = np.nan
  state, seen = start(mesh, ADAM), []
  for batch in (bad, bad, rows(0), bad):
    state, metrics = step_of(ADAM, mesh, state, batch)
    seen.append((int(state.skipped), int(metrics['skipped_in_a_row'].total)))
  assert seen == [(1, 1), (2, 2), (0, 0), (1, 1)] and int(state.step) == 4
  assert int(state.opt_state[0].count) == 1, 'Adam has seen one gradient'


@pytest.mark.parametrize(('sizes', 'micro_batches'), [((1, 1), 2), ((1, 1), 4), ((2, 4), 2)])
def test_the_noise_scale_is_that_of_its_formula(sizes, micro_batches):
  """McCandlish et al. 2018, equations A.2: B_small = 16 / parts, B_big = 16."""
  mesh, batch = mesh_of(*sizes), rows(1)
  _, metrics = step_of(ADAM, mesh, start(mesh, ADAM), batch, micro_batches)
  gradients = (1 - batch['x']).astype(np.float64)
  parts = np.array([gradients[j::micro_batches].mean(axis=0) for j in range(micro_batches)])
  small, big = np.mean(np.sum(parts ** 2, axis=(1, 2))), np.sum(parts.mean(axis=0) ** 2)
  b, whole = 16 / micro_batches, 16
  np.testing.assert_allclose(
      metrics['noise_scale'].count, (whole * big - b * small) / (whole - b), rtol=1e-4)
  np.testing.assert_allclose(
      metrics['noise_scale'].total, (small - big) / (1 / b - 1 / whole), rtol=1e-4)


def test_the_noise_scale_of_a_window_is_the_true_one():
  """Deviation 3 against a mean gradient of 0.5: 36 rows, in 2 parts of 8 over 20 batches."""
  mesh = mesh_of(1, 1)
  state = start(mesh, ADAM)
  scale = sum((step_of(ADAM, mesh, state, rows(seed), 2)[1]['noise_scale']
               for seed in range(20)), Mean(0.0, 0.0))
  assert 0.9 < float(scale.value()) / 36 < 1.1


def test_ratio_of_the_update_and_padding():
  mesh, batch = mesh_of(1, 1), rows(0)
  batch['mask'] = np.arange(8)[None] < np.arange(16)[:, None] % 5 + 4
  state = start(mesh, ADAM)
  after, metrics = step_of(ADAM, mesh, state, batch)
  moved = np.linalg.norm(np.asarray(after.params['w'] - state.params['w']))
  reached = np.linalg.norm(np.asarray(after.params['w']))
  np.testing.assert_allclose(metrics['update_ratio'].value(), moved / reached, rtol=1e-3)
  assert float(metrics['padding'].value()) == 1 - batch['mask'].sum() / batch['mask'].size
  packed = batch | {'end': np.where(np.arange(9) < 5, np.arange(9) + 1, 0)[None].repeat(16, 0)}
  _, metrics = step_of(ADAM, mesh, state, packed)
  np.testing.assert_allclose(metrics['padding'].value(), 4 / 9)


@pytest.mark.parametrize('optimizer', [
    ADAM, dataclasses.replace(ADAM, optimizer='adamw8bit', moment_block=32),
    dataclasses.replace(ADAM, optimizer='adafactor')], ids=lambda o: o.optimizer)
def test_an_offloaded_optimizer_takes_the_same_steps_and_stays_in_the_host(optimizer):
  mesh = mesh_of(2, 4)
  offloaded = offloaded_step(objective=Objective(totals, counts), tx=make_optimizer(optimizer))

  def steps(state, step):
    for seed in range(3):
      if seed == 1:
        programs = count_programs()
      with jax.set_mesh(mesh):
        state, metrics = step(state, put_batch(rows(seed), mesh), np.float32(0.1))
    assert programs() == 0, 'the state lies as the first step found it'
    return state, metrics

  def kinds(tree):
    return {x.sharding.memory_kind for x in jax.tree.leaves(tree) if x.ndim}

  plain = steps(start(mesh, optimizer), compiled(optimizer))
  state = offload_optimizer(start(mesh, optimizer))
  assert kinds(state.opt_state) == {'pinned_host'}
  parked = steps(state, offloaded)
  assert kinds(parked[0].opt_state) == {'pinned_host'} and kinds(parked[0].params) == {'device'}
  assert int(parked[0].step) == 3
  for a, b in zip(jax.tree.leaves(parked), jax.tree.leaves(plain), strict=True):
    np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=1e-5, atol=1e-6)
