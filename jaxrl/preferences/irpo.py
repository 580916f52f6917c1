"""Preference pairs of IRPO: right answers against wrong ones (Pang et al. 2024, section 2)."""

from __future__ import annotations

import collections
import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Literal, TypeVar

import numpy as np

from jaxrl.errors import InputError

Item = TypeVar('Item')
GoldPolicy = Literal['always', 'if_empty', 'never']
GOLD_POLICIES: tuple[GoldPolicy, ...] = ('always', 'if_empty', 'never')


def cycle_pairs(
    winners: Sequence[Item], losers: Sequence[Item], k: int, *, dedup: bool = False
) -> list[tuple[Item, Item]]:
  """pair_j = (W[j mod |W|], L[j mod |L|]) for j < k; empty when either list is.

  `dedup` keeps the first occurrence of each pair.

  Raises:
    InputError: k is negative.
  """
  if k < 0:
    raise InputError('the number of pairs is negative', where='--pairs_per_prompt',
                     expected='at least 0', found=k)
  if not winners or not losers:
    return []
  pairs = [(winners[j % len(winners)], losers[j % len(losers)]) for j in range(k)]
  return list(dict.fromkeys(pairs)) if dedup else pairs


@dataclasses.dataclass(frozen=True)
class Judged:
  """What pairing needs to know of one sample."""

  index: int                  # sample_index
  verdict: str                # a `Verdict` value
  truncated: bool             # cut by the length limit


def split_winners(
    samples: Sequence[Judged], *, has_gold_solution: bool, gold: GoldPolicy
) -> tuple[list[int | None], list[int]]:
  """(winners, losers) as sample indices in sampling order; None stands for the gold solution.

  A truncated response never wins. A timed-out check is neither right nor wrong, so it does neither.
  """
  winners: list[int | None] = [
      s.index for s in samples if s.verdict == 'correct' and not s.truncated]
  losers = [s.index for s in samples if s.verdict in ('wrong', 'unparseable_answer')]
  if has_gold_solution and (gold == 'always' or (gold == 'if_empty' and not winners)):
    winners.append(None)
  return winners, losers


def cap(rows: Sequence[Item], limit: int | None, seed: int) -> list[Item]:
  """A uniform random subset of `limit` rows in their order; all of them when there are fewer."""
  if limit is None or len(rows) <= limit:
    return list(rows)
  kept = np.random.default_rng(seed).choice(len(rows), size=limit, replace=False)
  return [rows[n] for n in sorted(kept)]


@dataclasses.dataclass(frozen=True)
class PairConfig:
  """How pairs are built; the paper's settings are in experiments/flags."""

  pairs_per_prompt: int
  gold_in_winners: GoldPolicy
  dedup: bool
  max_pairs: int | None
  max_length: int             # ids of prompt and response together
  seed: int


def build_pairs(
    samples: Sequence[Mapping], gold_ids: Mapping[str, list[int]], config: PairConfig
) -> tuple[list[dict], dict[str, int]]:
  """Pair rows of all prompts in order, and why prompts and pairs were left out.

  `samples` are rows joined with their scores, draws of a prompt together and in order; `gold_ids`
  holds the response ids of worked gold solutions, by prompt id.
  """
  counts: collections.Counter[str] = collections.Counter()
  rows: list[dict] = []
  for prompt_id, group in itertools.groupby(samples, key=lambda row: row['prompt_id']):
    drawn = {row['sample_index']: row for row in group}
    judged = [
        Judged(n, row['verdict'], row['finish_reason'] == 'length') for n, row in drawn.items()]
    winners, losers = split_winners(
        judged, has_gold_solution=prompt_id in gold_ids, gold=config.gold_in_winners)
    counts[f'pairs/prompts_{_outcome(winners, losers)}'] += 1
    prompt_ids = next(iter(drawn.values()))['prompt_ids']
    kept = 0
    for chosen, rejected in cycle_pairs(
        winners, losers, config.pairs_per_prompt, dedup=config.dedup):
      chosen_ids = gold_ids[prompt_id] if chosen is None else drawn[chosen]['response_ids']
      rejected_ids = drawn[rejected]['response_ids']
      if len(prompt_ids) + max(len(chosen_ids), len(rejected_ids)) > config.max_length:
        counts['data/dropped_overlong'] += 1
      elif list(chosen_ids) == list(rejected_ids):
        counts['data/identical_pairs'] += 1
      else:
        rows.append({
            'prompt_id': prompt_id, 'pair_index': kept, 'chosen_index': chosen,
            'rejected_index': rejected, 'prompt_ids': prompt_ids, 'chosen_ids': chosen_ids,
            'rejected_ids': rejected_ids, 'weight': 1.0,
            'chosen_why': 'gold solution' if chosen is None else
                f'right answer {drawn[chosen]["answer"]}',
            'rejected_why': _why_rejected(drawn[rejected])})
        kept += 1
  kept_rows = cap(rows, config.max_pairs, config.seed)
  counts['data/dropped_over_cap'] = len(rows) - len(kept_rows)
  return kept_rows, {name: counts[name] for name in COUNTS} | {
      'pairs/count': len(kept_rows),
      'pairs/prompts_used': len({row['prompt_id'] for row in kept_rows})}


COUNTS = (
    'pairs/prompts_mixed', 'pairs/prompts_all_correct', 'pairs/prompts_all_wrong',
    'pairs/prompts_unusable', 'data/dropped_overlong', 'data/identical_pairs',
    'data/dropped_over_cap')


def _outcome(winners: Sequence, losers: Sequence) -> str:
  """What the samples of a prompt were; a gold solution among the winners does not change it."""
  if any(winner is not None for winner in winners):
    return 'mixed' if losers else 'all_correct'
  return 'all_wrong' if losers else 'unusable'


def _why_rejected(row: Mapping) -> str:
  if row['finish_reason'] == 'length':
    return 'cut by the length limit'
  if row['answer'] is None:
    return 'no answer could be read'
  return f'wrong answer {row["answer"]}'
