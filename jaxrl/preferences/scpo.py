"""Preference pairs of ScPO: the answer most samples agree on against one that few give.

Prasad et al. 2024 (Self-Consistency Preference Optimization), sections 2 and 3. No gold answer is
read, except of labelled prompts in the semi-supervised variant.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
from collections.abc import Mapping, Sequence, Set

import numpy as np

from jaxrl.preferences.irpo import Judged, cap, split_winners
from jaxrl.rewards.voting import votes_among

TIE = 1e-9   # a share of votes is compared with its threshold as whole numbers would be


@dataclasses.dataclass(frozen=True)
class VotePair:
  """What one prompt's votes allow; candidates are indices into base and then extra answers."""

  answer: str
  votes_chosen: int
  chosen_candidates: tuple[int, ...]
  votes_rejected: int
  rejected_candidates: tuple[int, ...]
  weight: float


def scpo_pair(
    answers: Sequence[str | None],
    extra_answers: Sequence[str | None] = (),
    *,
    tau_fraction: float,
    allow_unparsed_rejected: bool = True,
) -> VotePair | None:
  """The most and the least consistent answers of a prompt; None where no pair can be made.

  Votes are counted among `answers` alone; an extra response has the votes of its answer there, so
  the weight (V_chosen - V_rejected) / k lies in [0, 1]. Of equal top answers the first seen wins.

  Raises:
    ValueError: no answers, or a threshold outside (0, 1].
  """
  if not answers:
    raise ValueError('answers must hold at least one entry')
  if not 0 < tau_fraction <= 1:
    raise ValueError(f'tau_fraction must be in (0, 1]; found {tau_fraction!r}')
  k = len(answers)
  found = votes_among(answers, [*answers, *extra_answers])
  most = max(found[:k])
  if most < tau_fraction * k - TIE:
    return None
  answer = answers[found.index(most)]
  assert answer is not None              # the threshold is above 0, so the answer has a vote
  everything = [*answers, *extra_answers]
  allowed = [
      n for n, each in enumerate(everything) if allow_unparsed_rejected or each is not None]
  least = min(found[n] for n in allowed)
  if least >= most:
    return None
  return VotePair(
      answer=answer, votes_chosen=most,
      chosen_candidates=tuple(n for n in range(k) if answers[n] == answer),
      votes_rejected=least,
      rejected_candidates=tuple(n for n in allowed if found[n] == least),
      weight=(most - least) / k)


@dataclasses.dataclass(frozen=True)
class VoteConfig:
  """How pairs are built from votes; the paper's settings are in experiments/flags."""

  base_samples: int           # draws that vote; further ones only offer rejected responses
  tau_fraction: float
  allow_unparsed_rejected: bool
  weighted: bool              # False: every pair weighs 1 (the paper's ablation)
  max_pairs: int | None
  max_length: int             # ids of prompt and response together
  seed: int


COUNTS = (
    'pairs/prompts_below_threshold', 'pairs/prompts_unanimous', 'pairs/prompts_voted',
    'pairs/prompts_labelled', 'pairs/prompts_labelled_one_sided', 'data/dropped_overlong',
    'data/identical_pairs', 'data/dropped_over_cap')


def build_vote_pairs(
    samples: Sequence[Mapping], labelled: Set[str], config: VoteConfig
) -> tuple[list[dict], dict[str, float]]:
  """At most one pair row per prompt, in order, and why prompts were left out.

  `samples` are rows joined with their scores, draws of a prompt together and in order. Prompts of
  `labelled` give a right against a wrong response with weight 1; of all others only votes are read.
  A response that was cut by the length limit votes, but is never chosen.
  """
  counts: collections.Counter[str] = collections.Counter()
  rows: list[dict] = []
  for number, (prompt_id, group) in enumerate(
      itertools.groupby(samples, key=lambda row: row['prompt_id'])):
    drawn = list(group)
    rng = np.random.default_rng((config.seed, number))
    pair = (_labelled_pair if prompt_id in labelled else _voted_pair)(drawn, config, counts, rng)
    if pair is None:
      continue
    chosen, rejected, weight, why = pair
    longest = max(len(row['response_ids']) for row in (chosen, rejected))
    if len(chosen['prompt_ids']) + longest > config.max_length:
      counts['data/dropped_overlong'] += 1
    elif list(chosen['response_ids']) == list(rejected['response_ids']):
      counts['data/identical_pairs'] += 1
    else:
      rows.append({
          'prompt_id': prompt_id, 'pair_index': 0, 'chosen_index': chosen['sample_index'],
          'rejected_index': rejected['sample_index'], 'prompt_ids': chosen['prompt_ids'],
          'chosen_ids': chosen['response_ids'], 'rejected_ids': rejected['response_ids'],
          'weight': weight, 'chosen_why': why[0], 'rejected_why': why[1]})
  kept = cap(rows, config.max_pairs, config.seed)
  counts['data/dropped_over_cap'] = len(rows) - len(kept)
  return kept, {name: counts[name] for name in COUNTS} | {
      'pairs/count': len(kept), 'pairs/prompts_used': len(kept),
      'pairs/weight_mean': float(np.mean([row['weight'] for row in kept])) if kept else 0.0}


Drawn = tuple[Mapping, Mapping, float, tuple[str, str]]


def _voted_pair(
    drawn: Sequence[Mapping], config: VoteConfig, counts: collections.Counter, rng
) -> Drawn | None:
  k = config.base_samples
  answers = [row['answer'] for row in drawn]
  pair = scpo_pair(
      answers[:k], answers[k:], tau_fraction=config.tau_fraction,
      allow_unparsed_rejected=config.allow_unparsed_rejected)
  whole = () if pair is None else tuple(
      n for n in pair.chosen_candidates if drawn[n]['finish_reason'] != 'length')
  if pair is None or not whole:
    most = max(votes_among(answers[:k], answers[:k]))
    is_low = most < config.tau_fraction * k - TIE
    counts[f'pairs/prompts_{"below_threshold" if is_low else "unanimous"}'] += 1
    return None
  counts['pairs/prompts_voted'] += 1
  chosen, rejected = drawn[rng.choice(whole)], drawn[rng.choice(pair.rejected_candidates)]
  lost = 'no answer could be read' if rejected['answer'] is None else (
      f'answer {rejected["answer"]}, {pair.votes_rejected} of {k} votes')
  return chosen, rejected, pair.weight if config.weighted else 1.0, (
      f'answer {pair.answer}, {pair.votes_chosen} of {k} votes', lost)


def _labelled_pair(
    drawn: Sequence[Mapping], config: VoteConfig, counts: collections.Counter, rng
) -> Drawn | None:
  base = drawn[:config.base_samples]
  winners, losers = split_winners(
      [Judged(n, row['verdict'], row['finish_reason'] == 'length') for n, row in enumerate(base)],
      has_gold_solution=False, gold='never')
  if not winners or not losers:
    counts['pairs/prompts_labelled_one_sided'] += 1
    return None
  counts['pairs/prompts_labelled'] += 1
  chosen, rejected = base[rng.choice(winners)], base[rng.choice(losers)]
  return chosen, rejected, 1.0, (
      f'right answer {chosen["answer"]}', f'wrong answer {rejected["answer"]}'
      if rejected['answer'] is not None else 'no answer could be read')
