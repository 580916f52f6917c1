"""Preference pairs of DIVE: diverse right answers against diverse wrong ones (Qin et al. 2025).

Per question the pool of responses, of this iteration or of all so far, is split by correctness;
on each side outliers are removed and a diverse subset is picked, or responses are drawn at random;
the two sides are then paired place by place.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from jaxrl.errors import InputError
from jaxrl.preferences.diverse_selection import OBJECTIVES, Objective, greedy_select
from jaxrl.preferences.irpo import Judged, cap, split_winners
from jaxrl.preferences.isolation_forest import (
    Contamination,
    check_contamination,
    check_embeddings,
    inliers,
)


@dataclasses.dataclass(frozen=True)
class DiveConfig:
  """How pairs are built; both switches off is the vanilla self-improvement baseline."""

  pairs_per_prompt: int       # P
  global_pool: bool           # responses of all iterations so far, not of this one only
  selection: bool             # outlier filter and greedy selection, not a random draw
  max_pairs: int | None
  max_length: int             # ids of prompt and response together
  seed: int
  diversity: Objective = 'embedding'
  contamination: Contamination = 0.1

  def __post_init__(self):
    if self.pairs_per_prompt < 0:
      raise InputError('the number of pairs is negative', where='--pairs_per_prompt',
                       expected='at least 0', found=self.pairs_per_prompt)
    if self.diversity not in OBJECTIVES:
      raise InputError('there is no such measure of diversity', where='--diversity',
                       expected=' or '.join(OBJECTIVES), found=repr(self.diversity))
    check_contamination(self.contamination)


def pool_rows(
    rounds: Sequence[Iterable[Mapping]], *, global_pool: bool
) -> list[Mapping]:
  """The rows to build pairs from: draws of a prompt together, older iterations first.

  `rounds` are the scored samples of the iterations so far, oldest first. Without `global_pool` they
  are those of the last.
  """
  groups: dict[str, list[Mapping]] = {}
  for rows in rounds if global_pool else rounds[-1:]:
    for row in rows:
      groups.setdefault(row['prompt_id'], []).append(row)
  return list(itertools.chain.from_iterable(groups.values()))


@dataclasses.dataclass(frozen=True)
class Picked:
  """Responses of one side of a pool, in the order in which they are paired."""

  places: list[int]           # indices into the side
  duplicates: int             # left out before selection
  outliers: int
  diversity: float | None     # of the picked set; None for a random draw


def pick(
    side: Sequence[Mapping],
    embeddings: np.ndarray | None,              # [side, d]; read with `config.selection` only
    config: DiveConfig,
    rng: np.random.Generator,
) -> Picked:
  """Up to P responses of one side: diverse ones without outliers and repeats, or random ones."""
  p = config.pairs_per_prompt
  if not config.selection:
    drawn = rng.choice(len(side), size=min(p, len(side)), replace=False)
    return Picked(drawn.tolist(), 0, 0, None)
  assert embeddings is not None
  first_of = {tuple(row['response_ids']): n for n, row in reversed(list(enumerate(side)))}
  unique = np.array(sorted(first_of.values()), np.intp)
  kept = unique[inliers(
      embeddings[unique], keep_at_least=p, contamination=config.contamination, rng=rng)]
  selected = greedy_select(
      p, embeddings=embeddings[kept], texts=[side[n]['response'] for n in kept],
      diversity=config.diversity, rng=rng)
  return Picked(kept[selected.order].tolist(), len(side) - len(unique), len(unique) - len(kept),
                selected.diversity)


COUNTS = (
    'pairs/prompts_mixed', 'pairs/prompts_all_correct', 'pairs/prompts_all_wrong',
    'pairs/prompts_unusable', 'pairs/duplicates', 'pairs/outliers', 'data/dropped_overlong',
    'data/identical_pairs', 'data/dropped_over_cap')


def build_diverse_pairs(
    samples: Iterable[Mapping], embeddings: np.ndarray | None, config: DiveConfig
) -> tuple[list[dict], dict[str, float]]:
  """At most P pair rows per prompt, in order, and why prompts and responses were left out.

  `samples` are rows of `pool_rows`, joined with their scores. `embeddings` [samples, d], in the
  same order, are read with `config.selection` and must be None without. The draws of a prompt
  depend on (seed, number of the prompt) alone. A response that was cut by the length limit is
  never chosen. `chosen_index` and `rejected_index` count within the iteration that drew the
  response, which the reasons name with `config.global_pool`.

  Raises:
    InputError: embeddings that do not fit the samples, are of different widths or not finite.
  """
  if (embeddings is None) == config.selection:
    raise TypeError('embeddings go with selection, and with selection alone')
  embedded = None if embeddings is None else check_embeddings(embeddings)
  counts: collections.Counter[str] = collections.Counter()
  diversity: dict[str, list[float]] = {'chosen': [], 'rejected': []}
  rows: list[dict] = []
  seen = 0
  for number, (_, group) in enumerate(
      itertools.groupby(samples, key=lambda row: row['prompt_id'])):
    drawn = list(group)
    begin, seen = seen, seen + len(drawn)
    if embedded is not None and seen > len(embedded):
      raise _misfit(len(embedded), f'more than {seen - 1} responses')
    winners, losers = split_winners(
        [Judged(n, row['verdict'], row['finish_reason'] == 'length')
         for n, row in enumerate(drawn)], has_gold_solution=False, gold='never')
    counts[f'pairs/prompts_{_outcome(winners, losers)}'] += 1
    if not winners or not losers:
      continue
    rng = np.random.default_rng((config.seed, number))
    sides = {}
    for name, places in (('chosen', winners), ('rejected', losers)):
      side = [drawn[n] for n in places if n is not None]
      here = None if embedded is None else embedded[begin + np.array(places, np.intp)]
      picked = pick(side, here, config, rng)
      counts['pairs/duplicates'] += picked.duplicates
      counts['pairs/outliers'] += picked.outliers
      if picked.diversity is not None and len(picked.places) > 1:
        diversity[name].append(picked.diversity)
      sides[name] = [side[n] for n in picked.places]
    rows += _paired(sides['chosen'], sides['rejected'], config, counts)
  if embedded is not None and seen < len(embedded):
    raise _misfit(len(embedded), f'{seen} responses')
  kept = cap(rows, config.max_pairs, config.seed)
  counts['data/dropped_over_cap'] = len(rows) - len(kept)
  return kept, {name: counts[name] for name in COUNTS} | {
      'pairs/count': len(kept), 'pairs/prompts_used': len({row['prompt_id'] for row in kept}),
  } | {f'pairs/diversity_{name}': float(np.mean(each)) for name, each in diversity.items() if each}


def _misfit(embeddings: int, responses: str) -> InputError:
  return InputError('embeddings and responses differ in number', where='DIVE',
                    expected=f'{embeddings} responses', found=responses)


def _paired(
    chosen: Sequence[Mapping], rejected: Sequence[Mapping], config: DiveConfig,
    counts: collections.Counter[str]
) -> list[dict]:
  """Rows of the pairs place by place, as many as the shorter side has."""
  rows: list[dict] = []
  for right, wrong in zip(chosen, rejected, strict=False):
    longest = max(len(right['response_ids']), len(wrong['response_ids']))
    if len(right['prompt_ids']) + longest > config.max_length:
      counts['data/dropped_overlong'] += 1
    elif list(right['response_ids']) == list(wrong['response_ids']):
      counts['data/identical_pairs'] += 1
    else:
      rows.append({
          'prompt_id': right['prompt_id'], 'pair_index': len(rows),
          'chosen_index': right['sample_index'], 'rejected_index': wrong['sample_index'],
          'prompt_ids': right['prompt_ids'], 'chosen_ids': right['response_ids'],
          'rejected_ids': wrong['response_ids'], 'weight': 1.0,
          'chosen_why': f'right answer {right["answer"]}{_origin(right, config)}',
          'rejected_why': f'{_why_rejected(wrong)}{_origin(wrong, config)}'})
  return rows


def _outcome(winners: Sequence, losers: Sequence) -> str:
  if winners:
    return 'mixed' if losers else 'all_correct'
  return 'all_wrong' if losers else 'unusable'


def _origin(row: Mapping, config: DiveConfig) -> str:
  return f' (iteration {row["iteration"]})' if config.global_pool else ''


def _why_rejected(row: Mapping) -> str:
  if row['finish_reason'] == 'length':
    return 'cut by the length limit'
  if row['answer'] is None:
    return 'no answer could be read'
  return f'wrong answer {row["answer"]}'
