"""Pairs of IRPO: the worked examples, the policies, and counts that add up."""

import collections

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxrl.errors import InputError
from jaxrl.preferences.irpo import (
    GOLD_POLICIES,
    Judged,
    PairConfig,
    build_pairs,
    cap,
    cycle_pairs,
    split_winners,
)
from jaxrl.rewards.checking import Verdict


def judged(*verdicts, truncated=()):
  return [Judged(n, v, n in truncated) for n, v in enumerate(verdicts)]


def of_rewards(rewards, k, *, dedup=False):
  verdicts = ['correct' if reward else 'wrong' for reward in rewards]
  return cycle_pairs(
      *split_winners(judged(*verdicts), has_gold_solution=False, gold='never'), k, dedup=dedup)


def test_worked_pairs():
  assert of_rewards([1, 0, 0, 1, 0, 1, 0, 0], 10) == [
      (0, 1), (3, 2), (5, 4), (0, 6), (3, 7), (5, 1), (0, 2), (3, 4), (5, 6), (0, 7)]
  assert of_rewards([1, 0], 3) == [(0, 1)] * 3
  assert of_rewards([1, 0], 3, dedup=True) == [(0, 1)]
  assert of_rewards([1, 1], 4) == of_rewards([0, 0], 4) == of_rewards([1, 0], 0) == []


def test_dedup_keeps_first_occurrences_in_order():
  assert cycle_pairs('ab', 'xy', 5, dedup=True) == [('a', 'x'), ('b', 'y')]
  assert cycle_pairs('ab', 'xyz', 9, dedup=True) == [
      ('a', 'x'), ('b', 'y'), ('a', 'z'), ('b', 'x'), ('a', 'y'), ('b', 'z')]


def test_a_negative_number_of_pairs_is_an_error():
  with pytest.raises(InputError, match='--pairs_per_prompt: .*found -1'):
    cycle_pairs([1], [2], -1)


@pytest.mark.parametrize(('gold', 'verdicts', 'winners'), [
    ('always', ['wrong', 'correct'], [1, None]),
    ('always', ['wrong'], [None]),
    ('if_empty', ['wrong', 'correct'], [1]),
    ('if_empty', ['wrong'], [None]),
    ('never', ['wrong'], []),
])
def test_gold_policies(gold, verdicts, winners):
  assert split_winners(judged(*verdicts), has_gold_solution=True, gold=gold) == (winners, [0])
  without = [w for w in winners if w is not None]
  assert split_winners(judged(*verdicts), has_gold_solution=False, gold=gold) == (without, [0])


def test_who_wins_and_who_loses():
  samples = judged('correct', 'wrong', 'unparseable_answer', 'timeout', 'unparseable_gold',
                   'correct', 'wrong', truncated=(5, 6))
  assert split_winners(samples, has_gold_solution=False, gold='never') == ([0], [1, 2, 6])


def test_gold_stands_in_when_the_only_right_sample_was_cut():
  samples = judged('correct', 'wrong', truncated=(0,))
  assert split_winners(samples, has_gold_solution=True, gold='if_empty') == ([None], [1])


CONFIG = PairConfig(
    pairs_per_prompt=4, gold_in_winners='never', dedup=False, max_pairs=None, max_length=100,
    seed=0)


def config(**changes):
  return PairConfig(**(vars(CONFIG) | changes))


def sample(prompt_id, index, verdict, response_ids, *, finish_reason='eos'):
  answer = None if verdict == 'unparseable_answer' else {'correct': '7'}.get(verdict, f'x{index}')
  return {
      'prompt_id': prompt_id, 'sample_index': index, 'verdict': verdict, 'answer': answer,
      'prompt_ids': [1, 2, 3], 'response_ids': response_ids, 'finish_reason': finish_reason}


def test_rows_of_pairs():
  samples = [
      sample('a', 0, 'wrong', [10]), sample('a', 1, 'correct', [11, 12]),
      sample('a', 2, 'unparseable_answer', [13]),
      sample('a', 3, 'wrong', [14], finish_reason='length'),
      sample('b', 0, 'wrong', [15]), sample('c', 0, 'correct', [16]),
      sample('d', 0, 'timeout', [17])]
  rows, counts = build_pairs(samples, {}, config(pairs_per_prompt=3))
  columns = ('prompt_id', 'pair_index', 'chosen_index', 'rejected_index')
  assert [tuple(r[name] for name in columns) for r in rows] == [
      ('a', 0, 1, 0), ('a', 1, 1, 2), ('a', 2, 1, 3)]
  assert [(r['prompt_ids'], r['chosen_ids'], r['rejected_ids'], r['weight']) for r in rows] == [
      ([1, 2, 3], [11, 12], [10], 1.0), ([1, 2, 3], [11, 12], [13], 1.0),
      ([1, 2, 3], [11, 12], [14], 1.0)]
  assert [r['rejected_why'] for r in rows] == [
      'wrong answer x0', 'no answer could be read', 'cut by the length limit']
  assert {r['chosen_why'] for r in rows} == {'right answer 7'}
  assert counts == {
      'pairs/prompts_mixed': 1, 'pairs/prompts_all_correct': 1, 'pairs/prompts_all_wrong': 1,
      'pairs/prompts_unusable': 1, 'data/dropped_overlong': 0, 'data/identical_pairs': 0,
      'data/dropped_over_cap': 0, 'pairs/count': 3, 'pairs/prompts_used': 1}


def test_gold_solutions_as_winners():
  samples = [sample('a', 0, 'wrong', [10]), sample('b', 0, 'correct', [11])]
  rows, counts = build_pairs(
      samples, {'a': [20, 21], 'b': [22]}, config(gold_in_winners='always', pairs_per_prompt=1))
  (row,) = rows
  assert (row['chosen_index'], row['chosen_ids'], row['chosen_why']) == (
      None, [20, 21], 'gold solution')
  assert counts['pairs/prompts_all_wrong'] == 1, 'the samples were, whatever the gold solution is'


@pytest.mark.parametrize(('chosen', 'rejected', 'kept'), [
    ([1] * 7, [2] * 7, True), ([1] * 8, [2], False), ([1], [2] * 8, False)])
def test_overlong_pairs_are_dropped_and_counted(chosen, rejected, kept):
  samples = [sample('a', 0, 'correct', chosen), sample('a', 1, 'wrong', rejected)]
  rows, counts = build_pairs(samples, {}, config(max_length=10, pairs_per_prompt=2))
  assert (len(rows), counts['data/dropped_overlong']) == ((2, 0) if kept else (0, 2))


def test_identical_pairs_are_dropped_and_counted():
  samples = [sample('a', 0, 'correct', [5, 6]), sample('a', 1, 'wrong', [5, 6]),
             sample('a', 2, 'wrong', [5, 7])]
  rows, counts = build_pairs(samples, {}, config(pairs_per_prompt=4))
  assert [(r['pair_index'], r['rejected_index']) for r in rows] == [(0, 2), (1, 2)]
  assert counts['data/identical_pairs'] == 2


def test_the_cap_is_a_uniform_subset_in_order():
  assert cap('abc', None, 0) == cap('abc', 3, 0) == ['a', 'b', 'c']
  rows = list(range(8))
  drawn = [cap(rows, 3, seed) for seed in range(2000)]
  assert all(kept == sorted(set(kept)) and len(kept) == 3 for kept in drawn)
  assert drawn == [cap(rows, 3, seed) for seed in range(2000)]
  counts = collections.Counter(row for kept in drawn for row in kept)
  # 750 each with a standard deviation of 21.7.
  assert all(abs(counts[row] - 750) < 100 for row in rows)


@st.composite
def runs(draw):
  samples, golds = [], {}
  for prompt in range(draw(st.integers(1, 5))):
    for n in range(draw(st.integers(1, 6))):
      samples.append(sample(
          f'p{prompt}', n, draw(st.sampled_from([str(v) for v in Verdict])),
          draw(st.lists(st.integers(0, 2), min_size=1, max_size=5)),
          finish_reason=draw(st.sampled_from(['eos', 'length']))))
    if draw(st.booleans()):
      golds[f'p{prompt}'] = draw(st.lists(st.integers(0, 2), min_size=1, max_size=5))
  return samples, golds, config(
      pairs_per_prompt=draw(st.integers(0, 8)),
      gold_in_winners=draw(st.sampled_from(GOLD_POLICIES)),
      dedup=draw(st.booleans()), max_length=draw(st.sampled_from([6, 100])),
      max_pairs=draw(st.sampled_from([None, 0, 3])))


@given(runs())
@settings(deadline=None)
def test_counts_add_up(run):
  samples, golds, settings = run
  rows, counts = build_pairs(samples, golds, settings)
  assert build_pairs(samples, golds, settings) == (rows, counts)
  prompts = {row['prompt_id'] for row in samples}
  assert sum(v for k, v in counts.items() if k.startswith('pairs/prompts_')) == (
      len(prompts) + counts['pairs/prompts_used'])
  dropped = sum(v for k, v in counts.items() if k.startswith('data/'))
  assert counts['pairs/count'] == len(rows)
  assert counts['pairs/prompts_used'] == len({row['prompt_id'] for row in rows})
  assert settings.max_pairs is None or len(rows) <= settings.max_pairs
  by_key = {(row['prompt_id'], row['sample_index']): row for row in samples}
  made = 0
  for prompt in prompts:
    mine = [row for row in samples if row['prompt_id'] == prompt]
    winners, losers = split_winners(
        [Judged(r['sample_index'], r['verdict'], r['finish_reason'] == 'length') for r in mine],
        has_gold_solution=prompt in golds, gold=settings.gold_in_winners)
    made += len(cycle_pairs(winners, losers, settings.pairs_per_prompt, dedup=settings.dedup))
  assert made == len(rows) + dropped
  for row in rows:
    if row['chosen_index'] is not None:
      chosen = by_key[row['prompt_id'], row['chosen_index']]
      assert chosen['verdict'] == 'correct' and chosen['finish_reason'] == 'eos'
      assert row['chosen_ids'] == chosen['response_ids']
    rejected = by_key[row['prompt_id'], row['rejected_index']]
    assert rejected['verdict'] in ('wrong', 'unparseable_answer')
    assert row['rejected_ids'] == rejected['response_ids'] != row['chosen_ids']
    assert 3 + max(len(row['chosen_ids']), len(row['rejected_ids'])) <= settings.max_length
