"""Self-consistency votes over canonical answers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence


def votes(answers: Sequence[str | None]) -> list[int]:
  """For each answer, how many of `answers` equal it; 0 for None, which never forms a cluster."""
  return votes_among(answers, answers)


def votes_among(
    electorate: Sequence[str | None], answers: Sequence[str | None]
) -> list[int]:
  """For each of `answers`, how many of `electorate` equal it; 0 for None."""
  counts = Counter(answer for answer in electorate if answer is not None)
  return [0 if answer is None else counts[answer] for answer in answers]


def majority_vote(answers: Sequence[str | None]) -> tuple[str | None, int]:
  """The most frequent answer and its votes; a tie goes to the one seen first; (None, 0) if none."""
  counts = Counter(answer for answer in answers if answer is not None)
  if not counts:
    return None, 0
  # max returns the first of equals, and a Counter keeps the order of first appearance.
  answer = max(counts, key=lambda each: counts[each])
  return answer, counts[answer]
