"""The embedded world: multi-step arithmetic word problems with a programmatic ground truth.

Every problem is drawn from its own (seed, split, index), so any split of any size is reproducible
and splits share no problem: a problem's text decides by its hash which split it may belong to.
Worked solutions may be in several styles of reasoning (`STYLES`); questions and answers are the
same whatever the number of styles.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
from collections.abc import Iterator, Sequence

import numpy as np

NAMES = ('Ana', 'Ben', 'Cleo', 'Dan', 'Eve', 'Finn', 'Gus', 'Hana')
THINGS = ('apples', 'books', 'coins', 'pens', 'shells', 'cards')
GAINS = ('finds', 'buys', 'gets')
LOSSES = ('loses', 'sells', 'gives')
SPLITS = ('sft', 'train', 'dev', 'test')
LARGEST = 99
STYLE_STREAM = 1             # the style's own random numbers: the problem does not depend on them


@dataclasses.dataclass(frozen=True)
class WorldProblem:
  """One word problem, its written-out reasoning and its answer."""

  id: str
  question: str
  reasoning: str              # one line per step, then the 'Final answer:' line
  answer: int


def _draw(rng: np.random.Generator, steps: int) -> tuple[str, int, list[int]]:
  """A question, the number that its story starts with, and by how much each step changes it."""
  name, thing = rng.choice(NAMES), rng.choice(THINGS)
  start = total = int(rng.integers(10, 60))
  clauses, changes = [f'{name} has {total} {thing}'], []
  for _ in range(steps):
    gain = bool(rng.random() < 0.5)
    room = LARGEST - total if gain else total
    if room < 2:
      gain, room = not gain, LARGEST - room
    amount = int(rng.integers(2, min(room, 5) + 1)) if room > 2 else 2
    verb = rng.choice(GAINS if gain else LOSSES)
    clauses.append(f'{verb} {amount}')
    changes.append(amount if gain else -amount)
    total += changes[-1]
  return f'{", ".join(clauses)}. How many now?', start, changes


def step_by_step(start: int, changes: Sequence[int]) -> list[str]:
  """12+3=15, 15-4=11."""
  totals = itertools.accumulate(changes, initial=start)
  return [f'{total}{change:+d}={total + change}'
          for total, change in zip(totals, changes, strict=False)]


def turned_round(start: int, changes: Sequence[int]) -> list[str]:
  """Amounts first, and a loss by the sum that undoes it: 3+12=15, 11+4=15."""
  totals = itertools.accumulate(changes, initial=start)
  return [f'{change}+{total}={total + change}' if change > 0 else
          f'{total + change}+{-change}={total}'
          for total, change in zip(totals, changes, strict=False)]


def net_change(start: int, changes: Sequence[int]) -> list[str]:
  """The changes by themselves, then one step: 3-4=-1, 12-1=11."""
  return [*step_by_step(changes[0], changes[1:]), *step_by_step(start, [sum(changes)])]


def last_first(start: int, changes: Sequence[int]) -> list[str]:
  """The steps from the last one to the first, whose order does not matter: 12-4=8, 8+3=11."""
  return step_by_step(start, changes[::-1])


STYLES = (step_by_step, turned_round, net_change, last_first)


def _split_of(question: str) -> str:
  """The split a text belongs to; half of all texts are test or dev, so that none is short."""
  bucket = hashlib.sha256(question.encode()).digest()[0]
  return ('sft', 'train', 'dev', 'test')[bucket % 4]


def problems(
    split: str, count: int, *, seed: int, min_steps: int = 2, max_steps: int = 4, styles: int = 1
) -> Iterator[WorldProblem]:
  """`count` distinct problems of a split, of `min_steps` to `max_steps` operations each.

  The solution of each is in one of the first `styles` of `STYLES`, all equally likely.

  Raises:
    ValueError: unknown split, an empty range of steps, or not so many styles.
  """
  if split not in SPLITS:
    raise ValueError(f'split must be one of {SPLITS}; found {split!r}')
  if not 1 <= min_steps <= max_steps:
    raise ValueError(f'need 1 <= min_steps <= max_steps; found {min_steps} and {max_steps}')
  if not 1 <= styles <= len(STYLES):
    raise ValueError(f'styles must be from 1 to {len(STYLES)}; found {styles}')
  seen: set[str] = set()
  index = 0
  while len(seen) < count:
    place = (seed, SPLITS.index(split), index)
    rng = np.random.default_rng(place)
    index += 1
    question, start, changes = _draw(rng, int(rng.integers(min_steps, max_steps + 1)))
    if question in seen or _split_of(question) != split:
      continue
    style = STYLES[np.random.default_rng((*place, STYLE_STREAM)).integers(styles)]
    answer = start + sum(changes)
    lines = [*style(start, changes), f'Final answer: {answer}']
    yield WorldProblem(f'{split}-{len(seen):05d}', question, '\n'.join(lines), answer)
    seen.add(question)
