"""ScPO's pairs: worked examples, properties by brute force, and rows from samples."""

import collections

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxrl.preferences.scpo import VoteConfig, build_vote_pairs, scpo_pair

EIGHT = ['18', '18', '20', '18', None, '18', '20', '7']


@pytest.mark.parametrize(('answers', 'extra', 'tau', 'unparsed', 'chosen', 'rejected', 'weight'), [
    (EIGHT, [], 0.5, True, (0, 1, 3, 5), (4,), 0.5),
    (EIGHT, [], 0.5, False, (0, 1, 3, 5), (7,), 0.375),
    (['5'] * 8, ['5', '6', None, '5'], 0.5, True, tuple(range(8)), (9, 10), 1.0),
    (['5'] * 8, ['5', '6', None, '5'], 0.5, False, tuple(range(8)), (9,), 1.0),
    (['9', '3', '3', '9', '1'], [], 0.4, True, (0, 3), (4,), 0.2),      # a tie: the first seen
])
def test_worked_pairs(answers, extra, tau, unparsed, chosen, rejected, weight):
  pair = scpo_pair(answers, extra, tau_fraction=tau, allow_unparsed_rejected=unparsed)
  assert pair.chosen_candidates == chosen and pair.rejected_candidates == rejected
  assert pair.weight == pytest.approx(weight)
  assert pair.votes_chosen - pair.votes_rejected == pytest.approx(weight * len(answers))


@pytest.mark.parametrize(('answers', 'tau'), [
    (EIGHT, 0.625), (['5'] * 8, 0.5), (['1', '1', '2', '2'], 0.5), (['1'], 1.0),
    ([None, None], 0.5), (['1', None, None], 0.5)])
def test_no_pair(answers, tau):
  assert scpo_pair(answers, tau_fraction=tau, allow_unparsed_rejected=True) is None


@pytest.mark.parametrize(('answers', 'tau'), [([], 0.5), (EIGHT, 0.0), (EIGHT, 1.01)])
def test_bad_input(answers, tau):
  with pytest.raises(ValueError):
    scpo_pair(answers, tau_fraction=tau)


some_answers = st.lists(st.sampled_from(['1', '2', '3', None]), min_size=1, max_size=9)


@given(some_answers, some_answers | st.just([]), st.sampled_from([0.1, 0.5, 0.75, 1.0]),
       st.booleans())
def test_against_brute_force(answers, extra, tau, unparsed):
  k = len(answers)
  count = {a: sum(b == a for b in answers) for a in {*answers, *extra} if a is not None}
  vote = [count.get(a, 0) for a in answers + extra]
  candidates = [n for n in range(k + len(extra)) if unparsed or (answers + extra)[n] is not None]
  best = max(vote[:k])
  pair = scpo_pair(answers, extra, tau_fraction=tau, allow_unparsed_rejected=unparsed)
  possible = best >= tau * k - 1e-9 and best > min((vote[n] for n in candidates), default=best)
  assert (pair is not None) == possible
  if pair is not None:
    assert 0 < pair.weight <= 1
    assert all(vote[n] == best for n in pair.chosen_candidates)
    assert len({answers[n] for n in pair.chosen_candidates}) == 1
    assert {vote[n] for n in pair.rejected_candidates} == {min(vote[n] for n in candidates)}


def rows(prompt_id, answers, *, cut=(), verdicts=None):
  return [
      {'prompt_id': prompt_id, 'sample_index': n, 'prompt_ids': [1, 2], 'answer': answer,
       'response_ids': [3, n], 'finish_reason': 'length' if n in cut else 'eos',
       'verdict': verdicts[n] if verdicts else 'wrong'}
      for n, answer in enumerate(answers)]


CONFIG = VoteConfig(base_samples=8, tau_fraction=0.5, allow_unparsed_rejected=True, weighted=True,
                    max_pairs=None, max_length=10, seed=0)


def test_rows_from_samples():
  samples = rows('a', EIGHT) + rows('b', ['1'] * 8) + rows('c', ['1', '2', '3', '4'] * 2) + rows(
      'd', ['5'] * 8 + ['6', '5'])
  pairs, counts = build_vote_pairs(samples, set(), CONFIG)
  assert [(p['prompt_id'], p['weight'], p['rejected_index']) for p in pairs] == [
      ('a', 0.5, 4), ('d', 1.0, 8)]
  assert pairs[0]['chosen_index'] in (0, 1, 3, 5)
  assert pairs[0]['chosen_ids'] == [3, pairs[0]['chosen_index']]
  assert pairs[0]['chosen_why'] == 'answer 18, 4 of 8 votes'
  assert counts['pairs/prompts_unanimous'] == 1 and counts['pairs/prompts_below_threshold'] == 1
  assert counts['pairs/count'] == 2 and counts['pairs/weight_mean'] == 0.75
  assert build_vote_pairs(samples, set(), CONFIG)[0] == pairs           # the seed decides


def test_a_truncated_response_is_never_chosen():
  seen = collections.Counter()
  for seed in range(20):
    config = VoteConfig(**(vars(CONFIG) | {'seed': seed}))
    pairs, _ = build_vote_pairs(rows('a', EIGHT, cut=(0, 1, 5)), set(), config)
    seen[pairs[0]['chosen_index']] += 1
  assert set(seen) == {3}


def test_weights_can_be_switched_off():
  config = VoteConfig(**(vars(CONFIG) | {'weighted': False}))
  assert build_vote_pairs(rows('a', EIGHT), set(), config)[0][0]['weight'] == 1.0


def test_labelled_prompts_pair_right_with_wrong_whatever_the_votes_say():
  verdicts = ['wrong', 'wrong', 'correct', 'wrong', 'unparseable_answer', 'wrong', 'correct',
              'timeout']
  pairs, counts = build_vote_pairs(rows('a', EIGHT, verdicts=verdicts), {'a'}, CONFIG)
  assert pairs[0]['chosen_index'] in (2, 6) and pairs[0]['rejected_index'] in (0, 1, 3, 4, 5)
  assert pairs[0]['weight'] == 1.0 and counts['pairs/prompts_labelled'] == 1
  pairs, counts = build_vote_pairs(rows('a', EIGHT), {'a'}, CONFIG)
  assert not pairs and counts['pairs/prompts_labelled_one_sided'] == 1


def test_overlong_and_identical_pairs_are_counted():
  samples = rows('a', EIGHT)
  config = VoteConfig(**(vars(CONFIG) | {'max_length': 3}))
  assert build_vote_pairs(samples, set(), config)[1]['data/dropped_overlong'] == 1
  same = [row | {'response_ids': [3]} for row in samples]
  assert build_vote_pairs(same, set(), CONFIG)[1]['data/identical_pairs'] == 1
