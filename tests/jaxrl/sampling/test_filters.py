"""Borders of top-k, top-p and min-p against sorting in float64, and against transformers."""

import functools
import itertools
from unittest import mock

import hypothesis.extra.numpy as arrays
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxrl.errors import InputError
from jaxrl.sampling import filters
from jaxrl.sampling.filters import FEW, lowest_kept
from jaxrl.sampling.requests import SamplingConfig

R, V = 3, 12
HUGE = 3e38
OFF = {'top_k': None, 'top_p': 1.0, 'min_p': 0.0}
CONFIGS = [OFF | changed for changed in (
    {'top_p': 0.0}, {'top_p': 0.3}, {'top_p': 0.999}, {'top_k': 1}, {'top_k': 5},
    {'top_k': V - 1, 'top_p': 0.9}, {'top_k': 4, 'top_p': 0.5}, {'min_p': 0.2}, {'min_p': 1.0},
    {'top_k': 8, 'top_p': 0.8, 'min_p': 0.1})]


def name_of(config):
  return ', '.join(f'{k} {v}' for k, v in config.items() if v != OFF[k])


@functools.cache
def compiled(few=FEW, **config):
  def find(logits, temperature):
    with mock.patch.object(filters, 'FEW', few):      # read while the program is traced
      return lowest_kept(logits, temperature, **config)
  return jax.jit(find)


def ours(logits, temperature, **config):
  """[R, V] bool, True where a token may be drawn."""
  border = compiled(**config)(jnp.asarray(logits), jnp.asarray(temperature))
  kept = logits > -np.inf
  return kept if border is None else kept & (logits >= np.asarray(border)[:, None])


def kept_by_sorting(logits, temperature, top_k, top_p, min_p):
  """[V] bool: the definition, for one row; ties at a border are kept."""
  logits = logits.astype(np.float64)
  weights = np.exp((logits - logits.max()) / temperature)
  ordered = np.sort(logits)[::-1]
  keep = logits >= ordered[min(top_k or V, V) - 1]
  levels = np.unique(logits[keep])[::-1]
  if top_p < 1:
    above = np.array([weights[keep & (logits > level)].sum() for level in levels])
    keep &= logits >= levels[above < max(top_p * weights[keep].sum(), 1e-300)].min()
  return keep & (weights >= min_p) & (logits > -np.inf)


some_logits = st.one_of(
    st.integers(-20, 20).map(lambda n: n / 2),
    st.floats(-60, 60, width=32, allow_subnormal=False).map(lambda x: round(x, 2)),
    st.sampled_from([-np.inf, -np.inf, HUGE, -HUGE, 0.0, -0.0]))
some_rows = arrays.arrays(np.float32, (R, V), elements=some_logits, fill=some_logits)


@pytest.mark.parametrize('few', [V, 0], ids=['in order', 'bisection'])
@pytest.mark.parametrize('config', CONFIGS, ids=name_of)
@settings(max_examples=50, deadline=None)
@given(rows=some_rows, temperature=st.sampled_from([0.3, 1.0, 1.7]))
def test_the_same_tokens_as_by_sorting(config, few, rows, temperature):
  rows[:, 0] = np.maximum(rows[:, 0], -HUGE)                              # not all are banned
  found = ours(rows, np.full((R,), temperature, np.float32), few=few, **config)
  # A share or a ratio within float32 rounding of the setting may fall on either side.
  p, m = config['top_p'], config['min_p']
  for row, kept in zip(rows, found, strict=True):
    fewest = kept_by_sorting(row, temperature, config['top_k'],
                             p * (1 - 1e-5), min(m * (1 + 1e-5), 1.0))
    most = kept_by_sorting(row, temperature, config['top_k'],
                           min(p * (1 + 1e-5), 1.0), m * (1 - 1e-5))
    assert (fewest <= kept).all() and (kept <= most).all()


def random_rows(rows, width, seed=0):
  return np.random.default_rng(seed).normal(scale=2, size=(rows, width)).astype(np.float32)


@pytest.mark.parametrize('width', [50, 700], ids=['few', 'many'])
@pytest.mark.parametrize('config', [
    {'top_p': 0.0}, {'top_p': 0.7}, {'top_p': 0.99}, {'top_k': 1}, {'top_k': 7}, {'top_k': 600},
    {'top_k': 2000, 'top_p': 0.9}, {'min_p': 0.05}, {'min_p': 1.0},
    {'top_k': 20, 'top_p': 0.9, 'min_p': 0.1},
    {'top_k': 300, 'top_p': 0.6, 'min_p': 0.02},
], ids=str)
def test_the_same_tokens_as_transformers(width, config):
  torch = pytest.importorskip('torch')
  transformers = pytest.importorskip('transformers')
  warpers = [transformers.TemperatureLogitsWarper(0.7)]
  for key, warper in (('top_k', transformers.TopKLogitsWarper),
                      ('top_p', transformers.TopPLogitsWarper),
                      ('min_p', transformers.MinPLogitsWarper)):
    if key in config:
      warpers.append(warper(config[key]))
  rows = random_rows(8, width)
  scores = torch.tensor(rows)
  for warper in warpers:
    scores = warper(None, scores)
  found = ours(rows, np.full((8,), 0.7, np.float32), **(OFF | config))
  np.testing.assert_array_equal(found, np.isfinite(scores.numpy()))


def test_filters_that_keep_everything_are_left_out():
  rows, temperature = jnp.zeros((2, V)), jnp.ones((2,))
  for top_k in (None, V, V + 1):
    assert lowest_kept(rows, temperature, top_k=top_k, top_p=1.0, min_p=0.0) is None


@pytest.mark.parametrize('few', [FEW, 0], ids=['in order', 'bisection'])
@pytest.mark.parametrize(('shares', 'config', 'count'), [
    ((0.3, 0.3, 0.2, 0.1, 0.1), {'top_k': 1}, 2),
    ((0.3, 0.3, 0.2, 0.1, 0.1), {'top_p': 0.2}, 2),
    ((0.3, 0.3, 0.2, 0.1, 0.1), {'top_p': 0.85}, 5),
    ((0.3, 0.3, 0.2, 0.1, 0.1), {'top_k': 4}, 5),
    ((0.3, 0.3, 0.2, 0.1, 0.1), {'top_k': 4, 'top_p': 0.95}, 5),
    ((0.3, 0.3, 0.2, 0.1, 0.1), {'min_p': 1.0}, 2),
    # Ties that top-k keeps count for top-p: 0.4 is less than half of all four.
    ((0.4, 0.2, 0.2, 0.2), {'top_k': 2, 'top_p': 0.5}, 4),
])
def test_ties_at_a_border_are_all_kept(shares, config, count, few):
  row = np.log(np.array([shares], np.float32))
  kept = ours(row, np.ones((1,), np.float32), few=few, **(OFF | config))[0]
  assert kept.tolist() == [True] * count + [False] * (len(shares) - count)


@pytest.mark.parametrize('few', [FEW, 0], ids=['in order', 'bisection'])
def test_top_p_is_of_what_top_k_left(few):
  row = np.log(np.array([[0.4, 0.3, 0.2, 0.1]], np.float32))
  # Of the first two the first has 4/7 = 0.571: enough for 0.55, while 0.4 alone would not be.
  for top_k, count in ((2, 1), (None, 2)):
    kept = ours(row, np.ones((1,), np.float32), few=few, **(OFF | {'top_k': top_k, 'top_p': 0.55}))
    assert kept.sum() == count


@pytest.mark.parametrize('config', [{'top_p': 0.9}, {'top_k': 300, 'top_p': 0.9, 'min_p': 0.01}])
def test_a_border_does_not_depend_on_other_rows(config):
  rows = random_rows(6, 3000)
  rows[2] = 1.0                                                           # all of them tied
  rows[3] *= 0.01
  rows[4] = -np.inf                                                       # all of them banned
  heat = np.array([0.5, 1, 1, 1, 1, 0], np.float32)
  find = compiled(**(OFF | config))
  together = np.asarray(find(rows, heat))
  for order in itertools.islice(itertools.permutations(range(6)), 0, 720, 240):
    np.testing.assert_array_equal(find(rows[list(order)], heat[list(order)]), together[list(order)])
  for n in range(6):
    np.testing.assert_array_equal(find(rows[n:n + 1], heat[n:n + 1]), together[n:n + 1])


@pytest.mark.parametrize('config', [{'top_k': 300}, {'top_p': 0.9}, {'top_k': 300, 'top_p': 0.5}])
def test_rows_together_and_one_by_one_are_the_same(config, monkeypatch):
  """Accelerators find the borders of all rows at once."""
  rows, heat = random_rows(4, 1000), np.array([0.5, 1.0, 1.5, 0.0], np.float32)
  one_by_one = compiled(**(OFF | config))(rows, heat)
  monkeypatch.setattr(
      jax.lax, 'platform_dependent', lambda *arguments, cpu, default: default(*arguments))
  together = jax.jit(functools.partial(lowest_kept, **(OFF | config)))(rows, heat)
  kept = [rows >= np.asarray(border)[:, None] for border in (one_by_one, together)]
  np.testing.assert_array_equal(*kept)


@pytest.mark.parametrize(('changes', 'message'), [
    ({'top_p': -0.01}, '--top_p: .*found -0.01'), ({'top_p': 1.01}, '--top_p: .*found 1.01'),
    ({'top_k': 0}, '--top_k: .*found 0'), ({'min_p': -0.5}, '--min_p: .*found -0.5'),
    ({'min_p': 2.0}, '--min_p: .*found 2.0'),
])
def test_filters_out_of_range_are_errors(changes, message):
  with pytest.raises(InputError, match=message):
    SamplingConfig(max_new_tokens=4, **changes)
