"""Draws follow the filtered softmax, by chi-square against a float64 definition in numpy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from jaxrl.sampling import draw
from jaxrl.sampling.draw import ONE_BLOCK, draw_tokens, picked_logprob

V, DRAWS = 40, 10_000
LOGITS = np.random.default_rng(0).normal(scale=1.5, size=V).astype(np.float32)
OFF = {'top_k': None, 'top_p': 1.0, 'min_p': 0.0}


def distribution(logits, temperature, *, top_k, top_p, min_p):
  """[V] probabilities: the k most probable, the fewest of those that reach top_p, then min_p."""
  logits = logits.astype(np.float64) / temperature
  p = np.exp(logits - logits.max())
  kept = np.argsort(-p)[:top_k]
  if top_p < 1:
    share = np.cumsum(p[kept] / p[kept].sum())
    kept = kept[:np.searchsorted(share, top_p) + 1]
  kept = kept[p[kept] >= min_p]
  out = np.zeros_like(p)
  out[kept] = p[kept] / p[kept].sum()
  return out


def keys(count, seed=3):
  return jax.vmap(lambda n: jax.random.fold_in(jax.random.key(seed), n))(
      jnp.arange(count, dtype=jnp.uint32))


def draws(logits, temperature, count=DRAWS, **changes):
  """[count] tokens drawn from one row of logits, each with its own key."""
  rows = jnp.broadcast_to(jnp.asarray(logits)[None], (count, len(logits)))
  program = jax.jit(functools.partial(draw_tokens, **(OFF | changes)))
  return np.asarray(program(keys(count), rows, jnp.full((count,), temperature, jnp.float32)))


def assert_follows(tokens, shares):
  expected = len(tokens) * shares
  counts = np.bincount(tokens, minlength=len(shares))
  assert len(counts) == len(shares) and counts[expected == 0].sum() == 0
  large = expected >= 5
  counts, expected = (np.append(x[large], x[~large].sum()) for x in (counts, expected))
  keep = expected > 0
  assert stats.chisquare(counts[keep], expected[keep]).pvalue > 1e-3


@pytest.fixture(params=[ONE_BLOCK, 8], ids=['one block', 'blocks'])
def blocks(request, monkeypatch):
  """Whether the small vocabulary of these tests is cut into blocks."""
  monkeypatch.setattr(draw, 'ONE_BLOCK', request.param)


@pytest.mark.usefixtures('blocks')
@pytest.mark.parametrize(('temperature', 'config'), [
    (1.0, {}), (0.5, {}), (1.7, {}), (1.0, {'top_k': 5}), (1.0, {'top_p': 0.8}),
    (1.0, {'min_p': 0.1}), (0.7, {'top_k': 12, 'top_p': 0.6}),
    (1.3, {'top_k': 30, 'top_p': 0.95, 'min_p': 0.05}), (1.0, {'top_k': V + 10, 'top_p': 0.9}),
], ids=str)
def test_draws_follow_the_filtered_softmax(temperature, config):
  config = OFF | config
  assert_follows(
      draws(LOGITS, temperature, **config), distribution(LOGITS, temperature, **config))


@pytest.mark.parametrize('config', [
    {}, {'top_p': 0.8}, {'top_k': 40}, {'top_k': 400, 'top_p': 0.9, 'min_p': 0.02}], ids=str)
def test_draws_from_a_large_vocabulary_follow_the_filtered_softmax(config):
  size, config = ONE_BLOCK + 7, OFF | config                              # a prime: padded blocks
  logits = np.random.default_rng(1).normal(scale=2, size=size).astype(np.float32)
  logits[-1] = logits.max()
  assert_follows(
      draws(logits, 0.8, count=4000, **config), distribution(logits, 0.8, **config))


@pytest.mark.usefixtures('blocks')
@pytest.mark.parametrize(('temperature', 'config'), [
    (2.0, {'top_k': 1}), (2.0, {'top_p': 0.0}), (2.0, {'top_p': 1e-6}), (2.0, {'min_p': 1.0}),
    (0.0, {'top_k': 7, 'top_p': 0.9}), (0.0, {}), (1e-6, {}), (1e-30, {}), (1e-42, {'top_p': 0.9}),
], ids=str)
def test_draws_of_the_most_probable(temperature, config):
  assert set(draws(LOGITS, temperature, count=500, **config)) == {LOGITS.argmax()}


@pytest.mark.parametrize('size', [V, ONE_BLOCK])
def test_small_vocabularies_are_drawn_with_noise_for_every_token(size):
  rows = jnp.asarray(np.random.default_rng(2).normal(size=(64, size)), jnp.float32)
  heat = jnp.linspace(0.3, 2, 64)
  found = jax.jit(functools.partial(draw_tokens, **OFF))(keys(64), rows, heat)
  for key, row, temperature, token in zip(keys(64), rows, heat, found, strict=True):
    noise = jax.random.gumbel(key, (size,), jnp.float32)
    assert int(token) == int(jnp.argmax(row / temperature + noise))


@pytest.mark.parametrize('size', [V, 1500, 1511])
def test_greedy_takes_the_first_of_the_largest(size):
  rows = np.zeros((4, size), np.float32)
  for row, largest in zip(rows, ([size - 1], [3, 4], [30, size - 1], [0]), strict=True):
    row[largest] = 2
  program = jax.jit(functools.partial(draw_tokens, **(OFF | {'top_p': 0.9})))
  assert program(keys(4), rows, jnp.zeros((4,))).tolist() == [size - 1, 3, 30, 0]


@pytest.mark.parametrize('size', [V, 1511])
@pytest.mark.parametrize('config', [{}, {'top_k': 5, 'top_p': 0.5, 'min_p': 0.1}, {'top_k': 200}])
def test_banned_tokens_are_never_drawn(size, config):
  rows = np.zeros((90, size), np.float32)
  rows[:, 7:] = -np.inf
  rows[60:] = -np.inf                                                     # nothing left at all
  heat = jnp.asarray([0.0, 1.0, 50.0] * 30)
  found = np.asarray(
      jax.jit(functools.partial(draw_tokens, **(OFF | config)))(keys(90), rows, heat))
  assert set(found[:60]) == set(range(7))
  assert set(found[60:]) == {0}


@pytest.mark.parametrize('size', [V, 1511])
@pytest.mark.parametrize('config', [{}, {'top_k': 200, 'top_p': 0.9, 'min_p': 0.01}])
def test_a_draw_does_not_depend_on_its_company(size, config):
  rows = np.random.default_rng(5).normal(scale=2, size=(48, size)).astype(np.float32)
  heat, all_keys = np.linspace(0, 2, 48, dtype=np.float32), keys(48)
  program = jax.jit(functools.partial(draw_tokens, **(OFF | config)))
  together = np.asarray(program(all_keys, rows, heat))
  order = np.random.default_rng(6).permutation(48)
  np.testing.assert_array_equal(
      program(all_keys[order], rows[order], heat[order]), together[order])
  alone = [program(all_keys[n:n + 1], rows[n:n + 1], heat[n:n + 1])[0] for n in range(48)]
  np.testing.assert_array_equal(alone, together)


def test_log_probs_are_of_the_softmax_at_temperature_one():
  rows = np.stack([LOGITS, 5 * LOGITS, LOGITS - 1000])
  tokens = np.array([0, 7, 39], np.int32)
  expected = np.asarray(jax.nn.log_softmax(jnp.asarray(rows)))[np.arange(3), tokens]
  np.testing.assert_allclose(picked_logprob(jnp.asarray(rows), tokens), expected, rtol=1e-5)
