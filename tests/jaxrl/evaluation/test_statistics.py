"""Intervals against values worked by hand or with other software."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxrl.evaluation.statistics import mean_estimate, paired_difference, proportion

Z = 1.959964


@pytest.mark.parametrize(('successes', 'n', 'low', 'high'), [
    (7, 10, 0.396778, 0.892209),
    (0, 5, 0.0, Z**2 / (5 + Z**2)),      # the formula of a share of 0
    (5, 5, 5 / (5 + Z**2), 1.0),
])
def test_wilson_intervals(successes, n, low, high):
  found = proportion(successes, n)
  assert found.value == successes / n
  assert (found.low, found.high) == pytest.approx((low, high), abs=1e-6)


@pytest.mark.parametrize(('successes', 'n', 'low', 'high'), [
    (81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611),
    (1, 29, 0.0061, 0.1718)])
def test_wilson_intervals_of_newcombe_1998(successes, n, low, high):
  found = proportion(successes, n)
  assert (found.low, found.high) == pytest.approx((low, high), abs=5e-5)


@given(n=st.integers(1, 400), share=st.floats(0, 1))
def test_a_wilson_interval_solves_its_equation(n, share):
  """Its ends are the shares p at which the observed one is Z standard errors of p away."""
  successes = round(share * n)
  found = proportion(successes, n)
  assert 0 <= found.low <= found.value <= found.high <= 1
  for p in (found.low, found.high):
    assert abs(found.value - p) == pytest.approx(Z * math.sqrt(p * (1 - p) / n), abs=1e-6)


def test_nothing_counted_says_nothing():
  assert vars(proportion(0, 0)) == {'value': 0.0, 'low': 0.0, 'high': 1.0}


def test_paired_difference_by_hand():
  """Differences 0, -1, 0, 0, -1, 0: mean -1/3, standard error sqrt((4/15) / 6) = 0.210819."""
  before, after = [1, 1, 0, 1, 1, 0], [1, 0, 0, 1, 0, 0]
  found = paired_difference([bool(x) for x in before], [bool(x) for x in after])
  assert found.value == pytest.approx(-1 / 3)
  assert (found.low, found.high) == pytest.approx(
      (-1 / 3 - Z * 0.210819, -1 / 3 + Z * 0.210819), abs=1e-5)
  swapped = paired_difference(after, before)
  assert (swapped.value, swapped.low, swapped.high) == pytest.approx(
      (-found.value, -found.high, -found.low))


def test_a_pairing_that_cancels_narrows_the_interval():
  """80 of 100 and 90 of 100: ten gained and none lost, against the same totals unrelated."""
  before = [True] * 80 + [False] * 20
  nested = paired_difference(before, [True] * 90 + [False] * 10)
  crossed = paired_difference(before, [False] * 10 + [True] * 90)
  assert nested.value == pytest.approx(0.1) and crossed.value == pytest.approx(0.1)
  assert nested.low > 0 and crossed.high - crossed.low > 1.5 * (nested.high - nested.low)


def test_no_difference_at_all():
  same = [True, False, True]
  assert vars(paired_difference(same, same)) == {'value': 0.0, 'low': 0.0, 'high': 0.0}


@pytest.mark.parametrize(
    ('before', 'after'), [([True], [True]), ([True] * 3, [True] * 2), ([], [])])
def test_lists_that_cannot_be_paired(before, after):
  with pytest.raises(ValueError, match=f'found {len(before)} and {len(after)}'):
    paired_difference(before, after)


def test_mean_with_its_t_interval():
  """1, 2, 3, 6: mean 3, standard deviation sqrt(14/3), t of 3 degrees of freedom 3.182446."""
  found = mean_estimate([1.0, 2.0, 3.0, 6.0])
  half = 3.182446 * math.sqrt(14 / 3) / 2
  assert (found.value, found.low, found.high) == pytest.approx((3.0, 3 - half, 3 + half), rel=1e-6)
  with pytest.raises(ValueError, match='at least one value'):
    mean_estimate([])


def test_a_95_percent_interval_holds_the_truth_95_times_in_100():
  rng = np.random.default_rng(0)
  held = [
      estimate.low <= 0.3 <= estimate.high
      for estimate in (proportion(int(k), 100) for k in rng.binomial(100, 0.3, 1000))]
  assert 0.92 < np.mean(held) < 0.98
