"""Accuracy of drawn answers."""

from __future__ import annotations

import collections
from collections.abc import Mapping, Sequence

from jaxrl.rewards.checking import Verdict
from jaxrl.rewards.voting import majority_vote


def majority_correct(rows: Sequence[Mapping]) -> dict[str, bool]:
  """Per prompt whether the most frequent answer is right; ties go to the answer drawn first.

  Prompts whose gold cannot be parsed are left out. A prompt without any parsed answer is wrong.
  """
  groups: dict[str, list[Mapping]] = collections.defaultdict(list)
  for row in rows:
    groups[row['prompt_id']].append(row)
  won = {}
  for prompt_id, group in groups.items():
    if any(row['verdict'] == Verdict.UNPARSEABLE_GOLD for row in group):
      continue
    winner, _ = majority_vote([row['answer'] for row in group])
    won[prompt_id] = winner is not None and any(
        row['verdict'] == Verdict.CORRECT for row in group if row['answer'] == winner)
  return won
