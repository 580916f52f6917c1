"""Draws follow the filtered softmax, by chi-square against a float64 definition in numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from jaxrl.errors import InputError
from jaxrl.sampling.filters import draw_tokens, filter_logits
from jaxrl.sampling.requests import SamplingConfig

V, DRAWS = 40, 10_000
LOGITS = np.random.default_rng(0).normal(scale=1.5, size=V).astype(np.float32)


def distribution(logits, temperature, top_k, top_p):
  """[V] probabilities: the k most probable, then the smallest set of those that reaches top_p."""
  logits = logits.astype(np.float64) / temperature
  p = np.exp(logits - logits.max())
  order = np.argsort(-p)
  kept = order[:top_k]
  share = np.cumsum(p[kept] / p[kept].sum())
  kept = kept[:np.searchsorted(share, top_p) + 1]
  out = np.zeros_like(p)
  out[kept] = p[kept] / p[kept].sum()
  return out


def draw(logits, temperature, *, top_k=None, top_p=1.0):
  keys = jax.vmap(lambda n: jax.random.fold_in(jax.random.key(3), n))(
      jnp.arange(DRAWS, dtype=jnp.uint32))
  rows = jnp.broadcast_to(jnp.asarray(logits)[None], (DRAWS, len(logits)))
  return draw_tokens(
      keys, rows, jnp.full((DRAWS,), temperature, jnp.float32), top_k=top_k, top_p=top_p)


@pytest.mark.parametrize(('temperature', 'top_k', 'top_p'), [
    (1.0, None, 1.0), (0.5, None, 1.0), (1.7, None, 1.0), (1.0, 5, 1.0), (1.0, None, 0.8),
    (0.7, 12, 0.6), (1.3, 30, 0.95), (1.0, V, 1.0), (1.0, V + 10, 0.9),
])
def test_draws_follow_the_filtered_softmax(temperature, top_k, top_p):
  tokens, _ = draw(LOGITS, temperature, top_k=top_k, top_p=top_p)
  expected = DRAWS * distribution(LOGITS, temperature, top_k, top_p)
  counts = np.bincount(tokens, minlength=V)
  assert counts[expected == 0].sum() == 0
  large = expected >= 5
  counts, expected = (
      np.append(x[large], x[~large].sum()) for x in (counts, expected))
  keep = expected > 0
  assert stats.chisquare(counts[keep], expected[keep]).pvalue > 1e-3


@pytest.mark.parametrize('filters', [{'top_k': 1}, {'top_p': 1e-6}, {'top_k': 1, 'top_p': 0.5}])
def test_the_most_probable_token_is_always_left(filters):
  tokens, _ = draw(LOGITS, 2.0, **filters)
  assert set(np.asarray(tokens).tolist()) == {int(LOGITS.argmax())}


@pytest.mark.parametrize('filters', [{'top_k': None}, {'top_k': V}, {'top_k': V + 1}])
def test_filters_that_keep_everything_change_nothing(filters):
  np.testing.assert_array_equal(
      filter_logits(jnp.asarray(LOGITS[None]), top_p=1.0, **filters)[0], LOGITS)


def test_ties_at_the_border_are_all_kept():
  logits = jnp.log(jnp.asarray([[0.3, 0.3, 0.2, 0.1, 0.1]]))
  for filters in ({'top_k': 1, 'top_p': 1.0}, {'top_k': None, 'top_p': 0.2}):
    kept = np.isfinite(filter_logits(logits, **filters))[0]
    assert kept.tolist() == [True, True, False, False, False]
  kept = np.isfinite(filter_logits(logits, top_k=None, top_p=0.85))[0]
  assert kept.all(), 'the two last are equally probable, and one of them is needed'


def test_top_p_is_of_what_top_k_left():
  logits = jnp.log(jnp.asarray([[0.4, 0.3, 0.2, 0.1]]))
  # Of the first two the first has 4/7 = 0.571: enough for 0.55, while 0.4 alone would not be.
  assert np.isfinite(filter_logits(logits, top_k=2, top_p=0.55))[0].tolist() == [1, 0, 0, 0]
  assert np.isfinite(filter_logits(logits, top_k=None, top_p=0.55))[0].tolist() == [1, 1, 0, 0]


def test_log_probs_are_unfiltered_at_temperature_one():
  tokens, logps = draw(LOGITS, 0.3, top_k=3, top_p=0.7)
  expected = jax.nn.log_softmax(jnp.asarray(LOGITS))[tokens]
  np.testing.assert_allclose(logps, expected, rtol=1e-6)


@pytest.mark.parametrize('temperature', [0.0, 1e-6, 1e-30])
def test_low_temperatures_are_greedy(temperature):
  tokens, _ = draw(LOGITS, temperature, top_k=7, top_p=0.9)
  assert set(np.asarray(tokens).tolist()) == {int(LOGITS.argmax())}


@pytest.mark.parametrize(('changes', 'message'), [
    ({'max_new_tokens': 0}, '--max_new_tokens: .*at least 1; found 0'),
    ({'top_p': 0.0}, '--top_p: .*found 0.0'),
    ({'top_p': 1.01}, '--top_p: .*found 1.01'),
    ({'top_k': 0}, '--top_k: .*found 0'),
])
def test_settings_out_of_range_are_errors(changes, message):
  with pytest.raises(InputError, match=message):
    SamplingConfig(**({'max_new_tokens': 4} | changes))
