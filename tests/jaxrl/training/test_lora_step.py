"""Training an adapter: its gradients alone, on a base that is neither moved nor copied."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from etils import epath

from jaxrl.data.batches import pair_arrays, sequence_arrays, shuffled_batches
from jaxrl.models import lora
from jaxrl.models.config import Lora
from jaxrl.models.params import is_spec, param_shardings
from jaxrl.parallel.mesh import make_mesh
from jaxrl.training.checkpoint import Checkpoints
from jaxrl.training.loop import LoopConfig, NonFiniteError, put_batch, train
from jaxrl.training.objectives import preference_objective, sft_objective
from jaxrl.training.optimizer import guarded
from jaxrl.training.step import init_state, train_step
from tests import tiny_training as tiny
from tests.tiny_model import CONFIG, QUICK, random_params

ADAPTED = dataclasses.replace(CONFIG, lora=Lora(3, 6.0, lora.TARGETS))
OPTIONS = {'dpo': {'beta': 0.1}, 'irpo': {'beta': 0.1, 'alpha': 1.0}}
PLAIN = guarded(optax.identity())      # an update is the gradient
ROWS = 8


def objective(loss, c=ADAPTED):
  if loss == 'sft':
    return sft_objective(c, tiny.POLICY)
  return preference_objective(loss, OPTIONS[loss], c, tiny.POLICY)


def batch_of(loss, seed=0):
  pairs = tiny.random_pairs(ROWS, seed)
  if loss == 'sft':
    return sequence_arrays([p.chosen for p in pairs], tiny.LENGTHS, tiny.PAD)
  return pair_arrays(pairs, tiny.LENGTHS, tiny.PAD)


def random_adapter(seed=1):
  rng = np.random.default_rng(seed)
  return jax.tree.map(
      lambda s: rng.normal(scale=0.2, size=s.shape).astype(np.float32), lora.lora_specs(ADAPTED),
      is_leaf=is_spec)


@functools.cache
def compiled(loss='irpo', tx=PLAIN, micro_batches=1):
  return jax.jit(
      functools.partial(train_step, objective=objective(loss), tx=tx, micro_batches=micro_batches),
      donate_argnums=0, compiler_options=QUICK)


def placed(mesh, adapter=None):
  """(base, adapter) where they rest; the adapter is a copy, for a step may donate it."""
  adapter = random_adapter() if adapter is None else adapter
  return (jax.device_put(random_params(), param_shardings(CONFIG, mesh)),
          jax.device_put(jax.tree.map(np.array, adapter), lora.adapter_shardings(ADAPTED, mesh)))


def one_step(loss='irpo', *, mesh=None, tx=PLAIN, micro_batches=1, batch=None, rate=1.0):
  mesh = mesh or tiny.one_device()
  with jax.set_mesh(mesh):
    base, adapter = placed(mesh)
    batch = put_batch(batch or batch_of(loss), mesh)
    return compiled(loss, tx, micro_batches)(init_state(adapter, tx), batch, np.float32(rate), base)


def gradients(state):
  """What a step of rate 1 with PLAIN took off the adapter."""
  return jax.tree.map(lambda old, new: old - np.asarray(new), random_adapter(), state.params)


@functools.cache
def merged_loss(loss):
  """The loss of the merged model, which knows nothing of adapters, as a function of the adapter."""
  plain, batch = objective(loss, CONFIG), batch_of(loss)
  counts = plain.counts(batch)

  def value(adapter):
    params = lora.merge(lora.attach(random_params(), adapter), ADAPTED)
    terms, _ = plain.totals(params, batch)
    return sum(total / counts[kind] for total, kind in terms.values())

  return jax.jit(jax.value_and_grad(value), compiler_options=QUICK)


@pytest.mark.parametrize('loss', ['sft', 'dpo', 'irpo'])
def test_gradients_are_those_of_the_merged_model(loss):
  state, metrics = one_step(loss)
  value, expected = merged_loss(loss)(random_adapter())
  np.testing.assert_allclose(metrics['loss'].value(), value, rtol=1e-5)
  for (path, found), wanted in zip(
      jax.tree.leaves_with_path(gradients(state)), jax.tree.leaves(expected), strict=True):
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-4 * np.abs(wanted).max(),
                               err_msg=jax.tree_util.keystr(path))
    assert np.abs(wanted).max() > 1e-5


def test_gradients_are_finite_differences():
  grads = gradients(one_step('sft')[0])['layers']
  rng = np.random.default_rng(0)
  for name, factor in (('q', 'a'), ('o', 'b'), ('down', 'a'), ('gate', 'b')):
    direction = rng.normal(size=grads[name][factor].shape).astype(np.float32)
    values = []
    for sign in (1, -1):
      moved = random_adapter()
      moved['layers'][name][factor] += sign * 5e-3 * direction
      values.append(float(merged_loss('sft')(moved)[0]))
    slope = np.sum(grads[name][factor] * direction)
    np.testing.assert_allclose((values[0] - values[1]) / 1e-2, slope, rtol=0.02, atol=2e-4)


def test_only_the_adapter_has_state_and_is_donated():
  mesh = tiny.one_device()
  tx = tiny.transformation()
  with jax.set_mesh(mesh):
    base, adapter = placed(mesh)
    state = init_state(adapter, tx)
    shapes = sorted(x.shape for x in jax.tree.leaves(adapter))
    pointers = [x.unsafe_buffer_pointer() for x in jax.tree.leaves(base)]
    state, _ = compiled('irpo', tx)(
        state, put_batch(batch_of('irpo'), mesh), np.float32(1e-3), base)
  held = sorted(x.shape for x in jax.tree.leaves(state.opt_state) if x.ndim)
  assert held == sorted(2 * shapes)            # Adam's two averages
  assert all(x.is_deleted() for x in jax.tree.leaves(adapter))
  # The arrays that the reference scores with are these very ones, untouched.
  assert [x.unsafe_buffer_pointer() for x in jax.tree.leaves(base)] == pointers
  jax.tree.map(np.testing.assert_array_equal, base, random_params())


@pytest.mark.parametrize('loss', ['dpo', 'irpo'])
def test_a_fresh_adapter_starts_at_ln_2(loss):
  """With the base's log-probs, computed without any adapter, as the reference."""
  pairs = tiny.own_reference(tiny.random_pairs(ROWS), random_params())
  mesh = tiny.one_device()
  fresh = lora.init_adapter(jax.random.key(0), ADAPTED)
  with jax.set_mesh(mesh):
    base, adapter = placed(mesh, fresh)
    batch = put_batch(pair_arrays(pairs, tiny.LENGTHS, tiny.PAD), mesh)
    state, metrics = compiled(loss)(init_state(adapter, PLAIN), batch, np.float32(1.0), base)
  found = metrics.get('loss/preference', metrics['loss']).value()
  np.testing.assert_allclose(found, math.log(2), rtol=1e-6)
  # Where B is zero only B has a gradient.
  for name, factors in state.params['layers'].items():
    np.testing.assert_array_equal(factors['a'], fresh['layers'][name]['a'])
    assert np.abs(factors['b']).max() > 0


def assert_same(found, expected):
  for (path, a), b in zip(
      jax.tree.leaves_with_path(gradients(found[0])), jax.tree.leaves(gradients(expected[0])),
      strict=True):
    np.testing.assert_allclose(a, b, rtol=0, atol=1e-4 * np.abs(b).max(),
                               err_msg=jax.tree_util.keystr(path))
  assert found[1]['row_finite'].all()
  for name in expected[1].keys() - {'row_finite'}:
    mean = expected[1][name]
    np.testing.assert_allclose(found[1][name].value(), mean.value(), rtol=2e-5, err_msg=name)


def test_micro_batches_give_the_update_of_the_whole_batch():
  assert_same(one_step(micro_batches=4), one_step())


@pytest.mark.parametrize('sizes, micro_batches', [((1, 8, 1), 1), ((2, 2, 2), 2)])
def test_meshes_give_the_update_of_one_device(sizes, micro_batches):
  data, fsdp, tensor = sizes
  mesh = make_mesh(data=data, fsdp=fsdp, tensor=tensor)
  found = one_step(mesh=mesh, micro_batches=micro_batches)
  assert_same(found, one_step())
  for leaf, rests in zip(
      jax.tree.leaves(found[0].params), jax.tree.leaves(lora.adapter_shardings(ADAPTED, mesh)),
      strict=True):
    assert leaf.sharding.is_equivalent_to(rests, leaf.ndim)


def test_a_step_that_is_not_finite_changes_nothing():
  batch = batch_of('irpo')
  batch['ref_logps'] = np.where(batch['mask'], np.float32(np.nan), 0)
  state, metrics = one_step(batch=batch, rate=1e-3)
  assert float(metrics['nonfinite'].total) == 1
  jax.tree.map(np.testing.assert_array_equal, state.params, random_adapter())


# The loop: checkpoints hold the adapter and its optimizer state.

LOOP = LoopConfig(steps=5, log_every=1, save_every=2)


def run_loop(folder, *, steps=LOOP.steps, spoil=None):
  mesh, tx = tiny.one_device(), tiny.transformation()
  batches = shuffled_batches(
      tiny.random_pairs(12), batch_size=4, seed=3,
      collate=functools.partial(pair_arrays, lengths=tiny.LENGTHS, pad_id=tiny.PAD))
  log = []
  with jax.set_mesh(mesh):
    base, adapter = placed(mesh, lora.init_adapter(jax.random.key(0), ADAPTED))
    frozen = base if spoil is None else jax.tree.map(spoil, base)
    state = train(
        init_state(adapter, tx), batches,
        lambda state, batch, rate: compiled('irpo', tx)(state, batch, rate, frozen),
        config=dataclasses.replace(LOOP, steps=steps), learning_rate=lambda step: 1e-2, mesh=mesh,
        checkpoints=epath.Path(folder), on_log=lambda step, numbers: log.append(
            (step, numbers['loss'])))
  return jax.tree.map(np.asarray, state), log


def test_a_run_goes_on_from_its_checkpoint_with_the_same_bits(tmp_path):
  whole, whole_log = run_loop(tmp_path / 'whole')
  assert [n for n, _ in whole_log] == [1, 2, 3, 4, 5]
  _, first = run_loop(tmp_path / 'cut', steps=3)          # the checkpoint of step 2 is the newest
  again, rest = run_loop(tmp_path / 'cut')
  assert first[:2] + rest == whole_log
  for a, b in zip(jax.tree.leaves(again), jax.tree.leaves(whole), strict=True):
    np.testing.assert_array_equal(a, b)
  size = sum(x.size for x in jax.tree.leaves(random_adapter()))
  with jax.set_mesh(tiny.one_device()):
    _, restored = Checkpoints(tmp_path / 'whole').restore(jax.tree.map(jnp.asarray, whole))
  assert sum(x.size for x in jax.tree.leaves(restored)) == 3 * size + 3   # and three counts


def test_nan_in_the_base_stops_training(tmp_path):
  with pytest.raises(NonFiniteError, match='step 1'):
    run_loop(tmp_path, steps=2, spoil=lambda x: x * jnp.float32(np.nan))
