"""The optimizer against optax.adamw, step by step, and its schedules against their definitions."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxrl.errors import InputError
from jaxrl.training.optimizer import OptimizerConfig, learning_rate_schedule, make_optimizer
from tests.tiny_model import QUICK, random_params

STEPS = 12
MATRICES = {'embedding', 'head', 'q', 'k', 'v', 'o', 'gate', 'up', 'down'}


def is_matrix(path):
  return path[-1].key in MATRICES


def gradients(params, step):
  rng = np.random.default_rng(step)
  return jax.tree.map(lambda p: rng.normal(size=p.shape).astype(np.float32), params)


@pytest.mark.parametrize('schedule', ['constant', 'linear', 'cosine'])
def test_every_step_is_that_of_optax_adamw(schedule):
  config = OptimizerConfig(
      3e-3, schedule, warmup_steps=4, b1=0.8, b2=0.97, weight_decay=0.2, clip_norm=None)
  rate = learning_rate_schedule(config, STEPS)
  params = jax.tree.map(jnp.asarray, random_params())
  ours = theirs = params
  reference = optax.adamw(
      rate, b1=0.8, b2=0.97, weight_decay=0.2,
      mask=lambda p: jax.tree.map_with_path(lambda path, _: is_matrix(path), p))
  tx = make_optimizer(config)
  state, reference_state = tx.init(params), reference.init(params)

  @functools.partial(jax.jit, compiler_options=QUICK)
  def both(ours, theirs, state, reference_state, grads, lr):
    directions, state = tx.update(grads, state, ours)
    ours = optax.apply_updates(ours, jax.tree.map(lambda d: -lr * d, directions))
    updates, reference_state = reference.update(grads, reference_state, theirs)
    return ours, optax.apply_updates(theirs, updates), state, reference_state

  for step in range(STEPS):
    before = ours
    ours, theirs, state, reference_state = both(
        ours, theirs, state, reference_state, gradients(params, step), np.float32(rate(step)))
    for (path, a), b, c in zip(
        jax.tree.leaves_with_path(ours), jax.tree.leaves(theirs), jax.tree.leaves(before),
        strict=True):
      np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7, err_msg=jax.tree_util.keystr(path))
      assert not np.array_equal(a, c)


def test_only_matrices_decay():
  """With zero gradients the decay alone moves weights; norms of stacked layers stay."""
  params = random_params()
  tx = make_optimizer(OptimizerConfig(1e-3, weight_decay=0.25))

  @functools.partial(jax.jit, compiler_options=QUICK)
  def direction(params):
    return tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)[0]

  directions = direction(params)
  for path, d in jax.tree.leaves_with_path(directions):
    p = params
    for key in path:
      p = p[key.key]
    np.testing.assert_allclose(
        d, 0.25 * p if is_matrix(path) else np.zeros_like(p), err_msg=jax.tree_util.keystr(path))


def expected_rate(schedule, step, warmup, steps, peak=2.0):
  if step < warmup:      # in equal parts from peak / warmup to peak, which step `warmup` has
    return peak / warmup + step * (peak - peak / warmup) / warmup
  share = (step - warmup) / (steps - warmup)
  return {'constant': peak, 'linear': peak * (1 - share),
          'cosine': peak * (1 + math.cos(math.pi * share)) / 2}[schedule]


@pytest.mark.parametrize('warmup', [0, 1, 5])
@pytest.mark.parametrize('schedule', ['constant', 'linear', 'cosine'])
def test_learning_rates(schedule, warmup):
  rate = learning_rate_schedule(OptimizerConfig(2.0, schedule, warmup), 20)
  for step in range(21):
    assert float(rate(step)) == pytest.approx(
        expected_rate(schedule, step, warmup, 20), abs=1e-6), step


@pytest.mark.parametrize(('scale', 'clip_norm', 'expected'), [
    (10.0, 0.5, 0.5), (0.01, 0.5, 0.01), (10.0, None, 10.0)])
def test_gradients_are_clipped_by_their_global_norm(scale, clip_norm, expected):
  """Seen in Adam's first moment, which after one step is (1 - b1) times the clipped gradient."""
  params = {'a': jnp.ones((3, 4)), 'b': jnp.ones(5)}
  grads = gradients(params, 0)
  grads = jax.tree.map(lambda g: g * scale / optax.global_norm(grads), grads)
  tx = make_optimizer(OptimizerConfig(1e-3, b1=0.9, clip_norm=clip_norm))
  _, state = tx.update(grads, tx.init(params), params)
  moment = optax.tree.get(state, 'mu')
  np.testing.assert_allclose(optax.global_norm(moment), 0.1 * expected, rtol=1e-5)
  ratio = jax.tree.map(lambda m, g: m / g, moment, grads)
  np.testing.assert_allclose(
      np.concatenate([np.ravel(r) for r in jax.tree.leaves(ratio)]), 0.1 * expected / scale,
      rtol=1e-5)


def test_adafactor_takes_the_steps_of_optax():
  """Of its own recipe, with an absolute learning rate."""
  rng = np.random.default_rng(0)
  ours = theirs = {'matrix': jnp.asarray(rng.normal(size=(3, 128, 256)), jnp.float32),
                   'norm': jnp.ones(7)}
  tx = make_optimizer(OptimizerConfig(1.0, optimizer='adafactor', clip_norm=None))
  reference = optax.adafactor(0.01, multiply_by_parameter_scale=False)

  @functools.partial(jax.jit, compiler_options=QUICK)
  def both(ours, theirs, state, reference_state, grads):
    directions, state = tx.update(grads, state, ours)
    updates, reference_state = reference.update(grads, reference_state, theirs)
    ours = optax.apply_updates(ours, jax.tree.map(lambda d: -0.01 * d, directions))
    return ours, optax.apply_updates(theirs, updates), state, reference_state

  state, reference_state = tx.init(ours), reference.init(theirs)
  for step in range(4):
    before = ours
    ours, theirs, state, reference_state = both(
        ours, theirs, state, reference_state, gradients(ours, step))
    for name in ours:
      np.testing.assert_allclose(ours[name], theirs[name], rtol=1e-6, atol=1e-7)
      assert not np.array_equal(ours[name], before[name])


def test_a_bfloat16_first_moment_is_that_of_optax():
  params, tx = random_params(), make_optimizer(
      OptimizerConfig(1.0, clip_norm=None, moment_dtype='bfloat16'))
  reference = optax.scale_by_adam(b1=0.9, b2=0.95, mu_dtype=jnp.bfloat16)
  grads = gradients(params, 0)
  directions, (state,) = tx.update(grads, tx.init(params), params)
  expected, expected_state = reference.update(grads, reference.init(params), params)
  # To the last bits: optax compiles parts of its formula, which rounds them elsewhere.
  for ours, theirs, rtol in ((directions, expected, 3e-7), (state.nu, expected_state.nu, 3e-7),
                             (state.mu, expected_state.mu, 2**-8)):
    jax.tree.map(lambda a, b, rtol=rtol: np.testing.assert_allclose(
        a.astype(jnp.float32), b.astype(jnp.float32), rtol=rtol), ours, theirs)
  assert {x.dtype for x in jax.tree.leaves(state.mu)} == {jnp.dtype('bfloat16')}
  assert {x.dtype for x in jax.tree.leaves(state.nu)} == {jnp.dtype('float32')}


@pytest.mark.parametrize(('options', 'message'), [
    ({'optimizer': 'sgd'}, '--optimizer: .*adamw, adafactor, adamw8bit; found sgd'),
    ({'moment_dtype': 'float16'}, '--moment_dtype: .*float32, bfloat16; found float16'),
    ({'optimizer': 'adamw8bit', 'moment_dtype': 'bfloat16'},
     '--moment_dtype: .*--optimizer=adamw; found adamw8bit'),
    ({'optimizer': 'adafactor', 'b1': 0.8}, '--adam_b1: .*adamw or adamw8bit; found adafactor'),
    ({'optimizer': 'adafactor', 'b2': 0.8}, '--adam_b2: .*does not apply'),
    ({'moment_block': 64}, '--moment_block: .*--optimizer=adamw8bit; found adamw'),
    ({'optimizer': 'adamw8bit', 'moment_block': 0}, '--moment_block: .*at least 1; found 0'),
])
def test_optimizers_that_cannot_be(options, message):
  with pytest.raises(InputError, match=message):
    make_optimizer(OptimizerConfig(1.0, **options))


@pytest.mark.parametrize(('config', 'message'), [
    (OptimizerConfig(1.0, 'exponential'), '--schedule: .*constant, linear, cosine; found exp'),
    (OptimizerConfig(1.0, warmup_steps=10), '--warmup_steps: .*fewer than the 10 .*found 10'),
])
def test_schedules_that_cannot_be(config, message):
  with pytest.raises(InputError, match=message):
    learning_rate_schedule(config, 10)
