"""How a claim over seeds is said: a computed verdict, the figure and its interval.

A finding is a dict of texts: `verdict`, `seen` (the figure, and that of each seed), `interval`
(95%, of the figure; '-' where it has none) and `published` (what the paper reports).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from jaxrl.evaluation.statistics import Estimate, mean_estimate

HOLDS, FAILS, OPEN = 'holds', 'does not hold', 'undecided'
NOT_PUBLISHED = '[not published]'
NO_INTERVAL = '-'
COLUMNS = ('claim', 'verdict', 'seen', 'interval')      # of the tables in a terminal


@dataclasses.dataclass(frozen=True)
class Unit:
  """How a number is written."""

  scale: float
  format: str
  name: str

  def number(self, value: float) -> str:
    return f'{self.scale * value:{self.format}}'

  def interval(self, e: Estimate) -> str:
    return f'[{self.number(e.low)}, {self.number(e.high)}]'


SHARE = Unit(100, '.1f', '%')
POINTS = Unit(100, '+.1f', ' points')
PERCENT = Unit(100, '+.1f', '%')
CORRELATION = Unit(1, '.2f', '')


def over_seeds(estimates: Sequence[Estimate]) -> Estimate:
  """Mean with its t interval over seeds; of a single seed its own interval."""
  if len(estimates) == 1:
    return estimates[0]
  return mean_estimate([e.value for e in estimates])


def finding(
    verdict: str, unit: Unit, overall: Estimate, each: Sequence[Estimate], *, published: str,
    more: str = '',
) -> dict[str, str]:
  """A claim about one figure: `overall`, and `each` seed's, with their intervals where known."""
  text = f'{unit.number(overall.value)}{unit.name}'
  if len(each) > 1:
    text += '; per seed ' + ', '.join(
        unit.number(e.value) + (f' {unit.interval(e)}' if e.low < e.high else '') for e in each)
  return {'verdict': verdict, 'seen': f'{text}; {more}' if more else text,
          # A single value has no width.
          'interval': unit.interval(overall) if overall.low < overall.high else NO_INTERVAL,
          'published': published}


def remark(verdict: str, seen: str, *, published: str) -> dict[str, str]:
  """A claim that no single figure with an interval stands for."""
  return {'verdict': verdict, 'seen': seen, 'interval': NO_INTERVAL, 'published': published}


def table(verdicts: Mapping[str, Mapping[str, str]]) -> list[list[str]]:
  """Rows for `COLUMNS`."""
  return [[claim, *(found[column] for column in COLUMNS[1:])] for claim, found in verdicts.items()]
