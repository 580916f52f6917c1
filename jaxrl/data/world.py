"""The embedded world: multi-step arithmetic word problems with a programmatic ground truth.

Every problem is drawn from its own (seed, split, index), so any split of any size is reproducible
and splits share no problem: a problem's text decides by its hash which split it may belong to.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator

import numpy as np

NAMES = ('Ana', 'Ben', 'Cleo', 'Dan', 'Eve', 'Finn', 'Gus', 'Hana')
THINGS = ('apples', 'books', 'coins', 'pens', 'shells', 'cards')
GAINS = ('finds', 'buys', 'gets')
LOSSES = ('loses', 'sells', 'gives')
SPLITS = ('sft', 'train', 'dev', 'test')
LARGEST = 99


@dataclasses.dataclass(frozen=True)
class WorldProblem:
  """One word problem, its written-out reasoning and its answer."""

  id: str
  question: str
  reasoning: str              # one line per step, then the 'Final answer:' line
  answer: int


def _draw(rng: np.random.Generator, steps: int) -> tuple[str, str, int]:
  name, thing = rng.choice(NAMES), rng.choice(THINGS)
  total = int(rng.integers(10, 60))
  clauses, lines = [f'{name} has {total} {thing}'], []
  for _ in range(steps):
    gain = bool(rng.random() < 0.5)
    room = LARGEST - total if gain else total
    if room < 2:
      gain, room = not gain, LARGEST - room
    amount = int(rng.integers(2, min(room, 5) + 1)) if room > 2 else 2
    verb = rng.choice(GAINS if gain else LOSSES)
    clauses.append(f'{verb} {amount}')
    after = total + amount if gain else total - amount
    lines.append(f'{total}{"+" if gain else "-"}{amount}={after}')
    total = after
  lines.append(f'Final answer: {total}')
  return f'{", ".join(clauses)}. How many now?', '\n'.join(lines), total


def _split_of(question: str) -> str:
  """The split a text belongs to; half of all texts are test or dev, so that none is short."""
  bucket = hashlib.sha256(question.encode()).digest()[0]
  return ('sft', 'train', 'dev', 'test')[bucket % 4]


def problems(
    split: str, count: int, *, seed: int, min_steps: int = 2, max_steps: int = 4
) -> Iterator[WorldProblem]:
  """`count` distinct problems of a split, of `min_steps` to `max_steps` operations each.

  Raises:
    ValueError: unknown split or an empty range of steps.
  """
  if split not in SPLITS:
    raise ValueError(f'split must be one of {SPLITS}; found {split!r}')
  if not 1 <= min_steps <= max_steps:
    raise ValueError(f'need 1 <= min_steps <= max_steps; found {min_steps} and {max_steps}')
  seen: set[str] = set()
  index = 0
  while len(seen) < count:
    rng = np.random.default_rng((seed, SPLITS.index(split), index))
    index += 1
    question, reasoning, answer = _draw(rng, int(rng.integers(min_steps, max_steps + 1)))
    if question in seen or _split_of(question) != split:
      continue
    yield WorldProblem(f'{split}-{len(seen):05d}', question, reasoning, answer)
    seen.add(question)
