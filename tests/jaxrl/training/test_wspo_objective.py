"""WSPO on tiny models: the strong log-ratio becomes the weak one over gamma, however split."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from jaxrl.data.batches import TokenRow, WeakRow, weak_arrays
from jaxrl.parallel.mesh import make_mesh
from jaxrl.training.logps import target_logps
from jaxrl.training.loop import put_batch
from jaxrl.training.objectives import wspo_objective
from jaxrl.training.optimizer import OptimizerConfig
from jaxrl.training.score import score_rows
from jaxrl.training.step import train_step
from tests import tiny_training as tiny
from tests.tiny_model import CONFIG, QUICK, random_params

# Another architecture with the same ids.
WEAK = dataclasses.replace(CONFIG, d_model=16, n_layers=1, n_heads=2, n_kv=1, d_mlp=24)
ADAM = OptimizerConfig(learning_rate=1.0)     # the rate is an argument of the step
ROWS = 16


def logps_of(params, rows, config):
  mesh = tiny.one_device()
  with jax.set_mesh(mesh):
    return score_rows(params, rows, config, tiny.POLICY, mesh=mesh, lengths=tiny.LENGTHS,
                      batch_size=8, pad_id=tiny.PAD)


@functools.cache
def weak_rows(count=8, change=0.03):
  """Rows with the strong reference and the log-ratio of a weak model that moved by `change`."""
  rng = np.random.default_rng(0)
  rows = [tiny.random_row(rng) for _ in range(count)]
  base = random_params(WEAK, seed=1)
  moved = jax.tree.map(
      lambda x: x + change * rng.normal(size=x.shape).astype(np.float32), base)
  strong = logps_of(random_params(), rows, CONFIG)
  gaps = [b - a for a, b in zip(logps_of(base, rows, WEAK), logps_of(moved, rows, WEAK))]
  return [WeakRow(*columns) for columns in zip(rows, strong, gaps)]


def arrays(rows):
  return weak_arrays(rows, tiny.LENGTHS, tiny.PAD)


@functools.cache
def compiled(gamma=0.5, level='token', optimizer=None, micro_batches=1):
  objective = wspo_objective({'gamma': gamma, 'level': level}, CONFIG, tiny.POLICY)
  return jax.jit(
      functools.partial(train_step, objective=objective, tx=tiny.transformation(optimizer),
                        micro_batches=micro_batches),
      donate_argnums=0, compiler_options=QUICK)


@pytest.mark.parametrize('gamma', [1.0, 0.5])
def test_the_strong_log_ratio_converges_to_the_weak_one_over_gamma(gamma):
  rows, mesh = weak_rows(), tiny.one_device()
  step, batch = compiled(gamma, optimizer=ADAM), arrays(rows)
  state = tiny.start_state(mesh, ADAM)
  with jax.set_mesh(mesh):
    placed = put_batch(batch, mesh)
    for n in range(200):
      state, _ = step(state, placed, np.float32(3e-3 * (1 - n / 200)))
  after = logps_of(jax.tree.map(np.asarray, state.params), [row.row for row in rows], CONFIG)
  strong = np.concatenate([new - row.ref for new, row in zip(after, rows)])
  weak = np.concatenate([row.weak_gap for row in rows])
  assert np.abs(weak).mean() > 0.1                 # there was something to learn
  assert np.abs(strong - weak / gamma).mean() < 0.02


def test_without_a_weak_difference_there_is_no_gradient():
  """Evaluated op by op: two compiled programs may round the policy and its reference apart."""
  batch = arrays([dataclasses.replace(row, weak_gap=np.zeros_like(row.weak_gap))
                  for row in weak_rows()])
  params = random_params()
  logps = target_logps(params, batch['inputs'], batch['targets'], CONFIG, tiny.POLICY)
  batch['ref_logps'] = np.where(batch['mask'], np.asarray(logps), 0)
  objective = wspo_objective({'gamma': 0.5}, CONFIG, tiny.POLICY)

  def loss(params):
    terms, _ = objective.totals(params, batch)
    return terms['preference'][0]

  value, grads = jax.value_and_grad(loss)(params)
  assert float(value) == 0
  for leaf in jax.tree.leaves(grads):
    np.testing.assert_array_equal(leaf, 0)


@pytest.mark.parametrize('level', ['token', 'sequence'])
def test_the_first_loss_is_the_mean_of_the_squared_weak_log_ratio(level):
  rows, mesh = weak_rows(), tiny.one_device()
  _, metrics = tiny.take_steps(
      compiled(0.5, level), tiny.start_state(mesh, None), [arrays(rows)], mesh)
  expected = np.mean([
      np.mean(row.weak_gap ** 2) if level == 'token' else
      np.sum(row.weak_gap) ** 2 / len(row.weak_gap) for row in rows])
  np.testing.assert_allclose(metrics['loss'].value(), expected, rtol=1e-4)


def unequal():
  """Two batches, long responses together, so that parts differ in their numbers of ids."""
  rng = np.random.default_rng(3)
  made = []
  for _ in range(2):
    rows = sorted((tiny.random_row(rng) for _ in range(ROWS)), key=lambda r: len(r.response_ids))
    made.append(arrays([
        WeakRow(row, *(rng.normal(size=(2, len(row.response_ids))))) for row in rows]))
  return made


@functools.cache
def whole_batch():
  mesh = tiny.one_device()
  return tiny.take_steps(compiled(), tiny.start_state(mesh, None), unequal(), mesh)


@pytest.mark.parametrize(('sizes', 'micro_batches'), [
    ((1, 1, 1), 4), ((1, 8, 1), 1), ((2, 2, 2), 2)])
def test_micro_batches_and_devices_give_the_update_of_the_whole_batch(sizes, micro_batches):
  data, fsdp, tensor = sizes
  mesh = make_mesh(data=data, fsdp=fsdp, tensor=tensor, devices=jax.devices()[:np.prod(sizes)])
  found = tiny.take_steps(
      compiled(micro_batches=micro_batches), tiny.start_state(mesh, None), unequal(), mesh)
  expected = whole_batch()
  for (path, a), b in zip(
      jax.tree.leaves_with_path(found[0]), jax.tree.leaves(expected[0]), strict=True):
    np.testing.assert_allclose(
        a, b, rtol=1e-5, atol=1e-5 * np.abs(b).max(), err_msg=jax.tree_util.keystr(path))
  assert found[1]['row_finite'].all()
  for name in expected[1].keys() - {'row_finite'}:
    np.testing.assert_allclose(
        found[1][name].value(), expected[1][name].value(), rtol=2e-5, err_msg=name)
  moved = [not np.array_equal(a, b) for a, b in zip(
      jax.tree.leaves(found[0].params), jax.tree.leaves(random_params()), strict=True)]
  assert all(moved)


def test_padding_says_nothing():
  row = TokenRow([1, 2, 3], [4, 5])
  made = weak_arrays([WeakRow(row, [-1.0, -2.0], [0.5, -0.25])], (4, 16), 7)
  np.testing.assert_array_equal(made['weak_gap'], [[0, 0, 0.5, -0.25]])
  np.testing.assert_array_equal(made['ref_logps'], [[0, 0, -1, -2]])
