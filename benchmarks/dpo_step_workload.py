"""Pairs that every contender of the DPO step benchmark trains on.

Only the standard library and numpy are imported: contenders live in environments of their own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from benchmarks.rollout_workload import VOCABULARY

PAIRS_A_STEP = 8
LEARNING_RATE, B1, B2, CLIP_NORM, BETA = 1e-4, 0.9, 0.999, 1.0, 0.1
# Bytes / 4 of GSM8K's test split (github.com/openai/grade-school-math @ 3101c7d507): minimum,
# deciles 1 to 9 and maximum of questions and of answers.
QUESTION = (18, 34, 39, 44, 50, 55, 61, 68, 76, 92, 212)
ANSWER = (12, 35, 43, 50, 59, 68, 77, 86, 99, 123, 268)
DRAWN = 400                   # transformers' length-grouped sampler sorts 50 batches at a time


@dataclasses.dataclass(frozen=True)
class Pair:
  """Ids of a prompt and of two responses to it."""

  prompt: tuple[int, ...]
  chosen: tuple[int, ...]
  rejected: tuple[int, ...]

  @property
  def longest(self) -> int:
    """What the pair costs a padded batch."""
    return len(self.prompt) + max(len(self.chosen), len(self.rejected))

  @property
  def tokens(self) -> int:
    """Ids of both sequences, the prompt counted twice."""
    return 2 * len(self.prompt) + len(self.chosen) + len(self.rejected)


@dataclasses.dataclass(frozen=True)
class Workload:
  """Pairs, and the two orders in which steps take them, `PAIRS_A_STEP` at a time.

  Attributes:
    shuffled: in no order, as trainers do.
    grouped: pairs of about equal length together.
  """

  pairs: tuple[Pair, ...]
  shuffled: tuple[int, ...]
  grouped: tuple[int, ...]

  @property
  def steps(self) -> int:
    """Of one turn, in which each pair is taken once."""
    return len(self.pairs) // PAIRS_A_STEP

  def batches(self, grouped: bool) -> list[list[Pair]]:
    order = self.grouped if grouped else self.shuffled
    return [[self.pairs[n] for n in order[k:k + PAIRS_A_STEP]]
            for k in range(0, len(order), PAIRS_A_STEP)]


def read_workload(fields: dict[str, Any]) -> Workload:
  """Undoes `dataclasses.asdict` and JSON."""
  pairs = tuple(Pair(*(tuple(p[name]) for name in ('prompt', 'chosen', 'rejected')))
                for p in fields['pairs'])
  return Workload(pairs, tuple(fields['shuffled']), tuple(fields['grouped']))


def draw_pairs(count: int, seed: int) -> list[Pair]:
  """Pairs of random ids, of GSM8K's lengths."""
  rng = np.random.default_rng(seed)

  def ids(deciles: Sequence[int]) -> tuple[int, ...]:
    length = np.interp(rng.random(), np.linspace(0, 1, len(deciles)), deciles)
    return tuple(rng.integers(3, VOCABULARY, round(length)).tolist())

  return [Pair(ids(QUESTION), ids(ANSWER), ids(ANSWER)) for _ in range(count)]


def make_workload(steps: int, shuffle: Callable[[int], Sequence[int]], seed: int) -> Workload:
  """Pairs of random ids, of GSM8K's lengths, `shuffle`d.

  `steps` whole batches of those into which `DRAWN` pairs fall when sorted by length, at even
  places of that order: grouping then pads as little here as it does among so many.
  """
  drawn = sorted(draw_pairs(DRAWN, seed), key=lambda pair: pair.longest)
  batches = DRAWN // PAIRS_A_STEP
  kept = [int((k + 0.5) * batches / steps) * PAIRS_A_STEP + n
          for k in range(steps) for n in range(PAIRS_A_STEP)]
  size = len(kept)
  return Workload(tuple(drawn[n] for n in kept), tuple(map(int, shuffle(size))),
                  tuple(range(size)))


def padded_share(batches: list[list[Pair]]) -> float:
  """Share of places that hold no id, where both sequences of each pair are rows of a batch."""
  places = sum(2 * len(batch) * max(p.longest for p in batch) for batch in batches)
  return 1 - sum(p.tokens for batch in batches for p in batch) / places
