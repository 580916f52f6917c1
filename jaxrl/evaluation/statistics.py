"""Intervals that say what a difference means, from scipy."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
from scipy import stats


@dataclasses.dataclass(frozen=True)
class Estimate:
  """A value with its 95% interval, in the unit of the data."""

  value: float
  low: float
  high: float


def proportion(successes: int, n: int) -> Estimate:
  """Share of successes with the Wilson score interval; 0 with [0, 1] for n = 0."""
  if n == 0:
    return Estimate(0.0, 0.0, 1.0)
  interval = stats.binomtest(successes, n).proportion_ci(0.95, method='wilson')
  return Estimate(successes / n, float(interval.low), float(interval.high))


def paired_difference(before: Sequence[bool], after: Sequence[bool]) -> Estimate:
  """mean(after) - mean(before) over the same items, with a normal interval of the differences.

  Raises:
    ValueError: the two differ in length or hold fewer than two items.
  """
  if len(before) != len(after) or len(before) < 2:
    raise ValueError(
        f'need two equally long lists of at least 2; found {len(before)} and {len(after)}')
  difference = np.asarray(after, float) - np.asarray(before, float)
  mean, error = float(difference.mean()), float(stats.sem(difference))
  if error == 0:
    return Estimate(mean, mean, mean)
  low, high = stats.norm.interval(0.95, loc=mean, scale=error)
  return Estimate(mean, float(low), float(high))


def mean_estimate(values: Sequence[float]) -> Estimate:
  """Mean of independent values with a t interval; a single value has no width.

  Raises:
    ValueError: no values.
  """
  if not len(values):
    raise ValueError('a mean needs at least one value')
  if len(values) == 1:
    return Estimate(float(values[0]), float(values[0]), float(values[0]))
  mean, error = float(np.mean(values)), float(stats.sem(values))
  if error == 0:
    return Estimate(mean, mean, mean)
  low, high = stats.t.interval(0.95, len(values) - 1, loc=mean, scale=error)
  return Estimate(mean, float(low), float(high))
