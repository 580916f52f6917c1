"""Pairs of DIVE: pools, the four variants, what is left out, and the check on clusters."""

import collections
import dataclasses
import itertools
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxrl.errors import InputError
from jaxrl.evaluation.diversity import embedding_diversity
from jaxrl.evaluation.text_embedding import hashed_ngrams
from jaxrl.preferences.dive import DiveConfig, build_diverse_pairs, pick, pool_rows
from jaxrl.preferences.diverse_selection import OBJECTIVES, greedy_select
from jaxrl.preferences.isolation_forest import inliers
from jaxrl.rewards.checking import Verdict
from tests.shared_data import SHARED, needs_shared

VANILLA = DiveConfig(
    pairs_per_prompt=2, global_pool=False, selection=False, max_pairs=None, max_length=100, seed=0)


def config(**changes):
  return dataclasses.replace(VANILLA, **changes)


def sample(prompt_id, index, verdict, response_ids, *, finish_reason='eos', iteration=1):
  answer = None if verdict == 'unparseable_answer' else {'correct': '7'}.get(verdict, f'x{index}')
  return {
      'prompt_id': prompt_id, 'sample_index': index, 'verdict': verdict, 'answer': answer,
      'prompt_ids': [1, 2, 3], 'response_ids': response_ids, 'finish_reason': finish_reason,
      'response': ' '.join(map(str, response_ids)), 'iteration': iteration}


def build(samples, settings):
  embeddings = hashed_ngrams([row['response'] for row in samples]) if settings.selection else None
  return build_diverse_pairs(samples, embeddings, settings)


def indices(rows):
  return [(row['prompt_id'], row['chosen_index'], row['rejected_index']) for row in rows]


ROUNDS = [
    [sample('a', 0, 'correct', [10], iteration=1), sample('a', 1, 'wrong', [11], iteration=1),
     sample('b', 0, 'wrong', [12], iteration=1), sample('b', 1, 'wrong', [13], iteration=1)],
    [sample('a', 0, 'correct', [14], iteration=2), sample('a', 1, 'correct', [15], iteration=2),
     sample('b', 0, 'correct', [16], iteration=2), sample('b', 1, 'correct', [17], iteration=2)]]


def test_pools():
  def keys(pool):
    return [(row['prompt_id'], row['iteration'], row['sample_index']) for row in pool]
  assert keys(pool_rows(ROUNDS, global_pool=False)) == [
      ('a', 2, 0), ('a', 2, 1), ('b', 2, 0), ('b', 2, 1)]
  assert keys(pool_rows(ROUNDS, global_pool=True)) == [
      ('a', 1, 0), ('a', 1, 1), ('a', 2, 0), ('a', 2, 1),
      ('b', 1, 0), ('b', 1, 1), ('b', 2, 0), ('b', 2, 1)]
  assert pool_rows([], global_pool=True) == pool_rows([], global_pool=False) == []


def test_the_older_pool_makes_pairs_the_new_one_cannot():
  rows, counts = build(pool_rows(ROUNDS, global_pool=False), config(pairs_per_prompt=5))
  assert rows == [] and counts['pairs/prompts_all_correct'] == 2
  rows, counts = build(
      pool_rows(ROUNDS, global_pool=True), config(pairs_per_prompt=5, global_pool=True))
  # One wrong response of `a`; two of each side of `b`: paired place by place, without cycling.
  assert [row['prompt_id'] for row in rows] == ['a', 'b', 'b']
  assert {row['rejected_why'] for row in rows} == {
      'wrong answer x1 (iteration 1)', 'wrong answer x0 (iteration 1)'}
  assert {row['chosen_why'] for row in rows[1:]} == {'right answer 7 (iteration 2)'}
  assert {tuple(row['chosen_ids']) for row in rows[1:]} == {(16,), (17,)}
  assert {tuple(row['rejected_ids']) for row in rows[1:]} == {(12,), (13,)}


@pytest.mark.parametrize('selection', [False, True])
def test_rows_of_pairs(selection):
  samples = [
      sample('a', 0, 'wrong', [10]), sample('a', 1, 'correct', [11, 12]),
      sample('b', 0, 'unparseable_answer', [13]), sample('b', 1, 'correct', [14]),
      sample('c', 0, 'wrong', [14], finish_reason='length'), sample('c', 1, 'correct', [15]),
      sample('d', 0, 'wrong', [15]), sample('e', 0, 'correct', [16]),
      sample('f', 0, 'timeout', [17])]
  rows, counts = build(samples, config(selection=selection))
  assert rows[0] == {
      'prompt_id': 'a', 'pair_index': 0, 'chosen_index': 1, 'rejected_index': 0,
      'prompt_ids': [1, 2, 3], 'chosen_ids': [11, 12], 'rejected_ids': [10], 'weight': 1.0,
      'chosen_why': 'right answer 7', 'rejected_why': 'wrong answer x0'}
  assert [row['rejected_why'] for row in rows[1:]] == [
      'no answer could be read', 'cut by the length limit']
  assert counts == {
      'pairs/prompts_mixed': 3, 'pairs/prompts_all_correct': 1, 'pairs/prompts_all_wrong': 1,
      'pairs/prompts_unusable': 1, 'pairs/duplicates': 0, 'pairs/outliers': 0,
      'data/dropped_overlong': 0, 'data/identical_pairs': 0, 'data/dropped_over_cap': 0,
      'pairs/count': 3, 'pairs/prompts_used': 3}


def test_a_truncated_response_is_never_chosen():
  samples = [sample('a', 0, 'correct', [10], finish_reason='length'),
             sample('a', 1, 'wrong', [11])]
  rows, counts = build(samples, VANILLA)
  assert rows == [] and counts['pairs/prompts_all_wrong'] == 1


def test_repeats_go_before_selection_and_stay_without():
  samples = [sample('a', n, 'correct', ids) for n, ids in enumerate([[5], [5], [6], [5]])]
  samples += [sample('a', 4 + n, 'wrong', [n]) for n in range(4)]
  for seed in range(20):
    rows, counts = build(samples, config(selection=True, pairs_per_prompt=4, seed=seed))
    assert sorted(row['chosen_index'] for row in rows) == [0, 2], 'the first of equals stays'
    assert counts['pairs/duplicates'] == 2
  rows, counts = build(samples, config(pairs_per_prompt=4))
  assert sorted(row['chosen_index'] for row in rows) == [0, 1, 2, 3]
  assert counts['pairs/duplicates'] == 0


def test_a_random_draw_is_uniform_and_without_replacement():
  samples = [sample('a', n, 'correct', [n]) for n in range(4)]
  samples += [sample('a', 4 + n, 'wrong', [4 + n]) for n in range(4)]
  seen = collections.Counter()
  for seed in range(400):
    rows, _ = build(samples, config(seed=seed))
    assert len(rows) == 2 and len({row['chosen_index'] for row in rows}) == 2
    assert len({row['rejected_index'] for row in rows}) == 2
    seen.update((row['chosen_index'], row['rejected_index']) for row in rows)
  # 50 each of 16 pairs, deviation below 7.
  assert len(seen) == 16 and max(abs(count - 50) for count in seen.values()) < 30


def test_selection_filters_and_then_picks_greedily():
  rng = np.random.default_rng(0)
  samples = [sample('z', 0, 'wrong', [0])] + [     # another prompt, so that offsets matter
      sample('a', n, 'correct' if n % 2 else 'wrong', [n]) for n in range(40)]
  embeddings = rng.normal(size=(41, 4))
  settings = config(selection=True, pairs_per_prompt=3, contamination=0.25, seed=9)
  rows, counts = build_diverse_pairs(samples, embeddings, settings)
  draws = np.random.default_rng((9, 1))
  expected = []
  for first in (1, 0):                             # right responses, then wrong ones
    side = embeddings[1:][first::2]
    kept = inliers(side, keep_at_least=3, contamination=0.25, rng=draws)
    chosen = greedy_select(3, embeddings=side[kept], rng=draws)
    expected.append([2 * int(kept[n]) + first for n in chosen.order])
  assert indices(rows) == [('a', *pair) for pair in zip(*expected, strict=True)]
  assert counts['pairs/outliers'] == 10
  assert 0 < counts['pairs/diversity_chosen'] < 2


def test_the_objective_is_read():
  samples = [sample('a', n, 'correct' if n % 2 else 'wrong', [n % 7, n % 5, n]) for n in range(20)]
  embeddings = np.random.default_rng(0).normal(size=(20, 3))
  found = {
      objective: str(build_diverse_pairs(
          samples, embeddings, config(selection=True, pairs_per_prompt=4, diversity=objective)))
      for objective in OBJECTIVES}
  assert len(set(found.values())) == 3


def test_prompts_draw_apart():
  """What a prompt gives does not depend on the responses to others."""
  samples = [sample(p, n, 'correct' if n % 2 else 'wrong', [n]) for p in 'ab' for n in range(30)]
  for selection in (False, True):
    settings = config(selection=selection, pairs_per_prompt=3)
    both = build(samples, settings)[0]
    cut = build(samples[20:], settings)[0]
    assert [row for row in both if row['prompt_id'] == 'b'] == [
        row for row in cut if row['prompt_id'] == 'b']
    a, b = (indices(both)[:3], indices(both)[3:])
    assert [pair[1:] for pair in a] != [pair[1:] for pair in b]


@pytest.mark.parametrize(('chosen', 'rejected', 'kept'), [
    ([1] * 7, [2] * 7, True), ([1] * 8, [2], False), ([1], [2] * 8, False)])
def test_overlong_pairs_are_dropped_and_counted(chosen, rejected, kept):
  samples = [sample('a', 0, 'correct', chosen), sample('a', 1, 'wrong', rejected)]
  rows, counts = build(samples, config(max_length=10))
  assert (len(rows), counts['data/dropped_overlong']) == ((1, 0) if kept else (0, 1))


@pytest.mark.parametrize(('changes', 'message'), [
    ({'pairs_per_prompt': -1}, '--pairs_per_prompt: .*found -1'),
    ({'contamination': 0.6}, 'contamination: .*found 0.6'),
    ({'diversity': 'cosine'}, "--diversity: .*found 'cosine'")])
def test_bad_settings(changes, message):
  with pytest.raises(InputError, match=message):
    config(**changes)


def test_embeddings_have_to_fit():
  samples = [sample('a', 0, 'correct', [1]), sample('a', 1, 'wrong', [2])]
  chosen = config(selection=True)
  for count in (1, 3):
    with pytest.raises(InputError, match=f'expected {count} responses'):
      build_diverse_pairs(samples, np.ones((count, 2)), chosen)
  with pytest.raises(InputError, match='embeddings row 1: .*not finite'):
    build_diverse_pairs(samples, np.array([[1.0], [np.nan]]), chosen)
  with pytest.raises(InputError, match='one width'):
    build_diverse_pairs(samples, [[1.0], [1.0, 2.0]], chosen)
  for embeddings, other in ((None, chosen), (np.ones((2, 2)), VANILLA)):
    with pytest.raises(TypeError, match='go with selection'):
      build_diverse_pairs(samples, embeddings, other)


def test_nothing_to_pair():
  assert build([], VANILLA)[1]['pairs/count'] == 0
  rows, _ = build([sample('a', 0, 'correct', [1]), sample('a', 1, 'wrong', [2])],
                  config(pairs_per_prompt=0, selection=True))
  assert rows == []


def clusters_and_outliers(seed):
  """Three clusters of six directions, then two directions that look the other way."""
  centres = np.array([[1, 0, 0]] * 6 + [[0, 1, 0]] * 6 + [[0, 0, 1]] * 6 + [
      [-1, -0.3, -0.3], [-0.3, -1, -0.3]])
  points = centres + np.random.default_rng(seed).normal(scale=0.05, size=(20, 3))
  return points / np.linalg.norm(points, axis=1)[:, None]


def test_one_of_each_cluster_and_no_outlier():
  """Over 100 seeds: the filter takes the outliers, the selection one of each cluster, and no set of
  three drawn at random from what the filter left is on average as diverse."""
  for seed in range(100):
    points = clusters_and_outliers(seed)
    kept = inliers(points, keep_at_least=3, rng=np.random.default_rng(seed))
    assert kept.tolist() == list(range(18)), seed
    chosen = greedy_select(3, embeddings=points[kept], rng=np.random.default_rng(seed))
    assert sorted(kept[chosen.order] // 6) == [0, 1, 2], seed
    rng = np.random.default_rng(seed)
    random = [embedding_diversity(points[rng.choice(kept, 3, replace=False)]) for _ in range(20)]
    assert chosen.diversity >= np.mean(random), seed


def test_a_side_of_the_clusters():
  side = [sample('a', n, 'correct', [n]) for n in range(20)]
  picked = pick(side, clusters_and_outliers(0), config(selection=True, pairs_per_prompt=3),
                np.random.default_rng(0))
  assert sorted(n // 6 for n in picked.places) == [0, 1, 2]
  assert (picked.duplicates, picked.outliers) == (0, 2)


@needs_shared
def test_selection_makes_sets_more_diverse_on_real_responses():
  """Eight responses to each of the problems in `math_votes`, right and wrong ones apart."""
  path = SHARED / 'math_votes' / 'math_cot_8_responses.jsonl'
  samples = []
  for line in itertools.islice(path.open(), 60):
    row = json.loads(line)
    for n, (text, right) in enumerate(zip(row['code'], row['score'], strict=True)):
      samples.append(
          sample(str(row['idx']), n, 'correct' if right else 'wrong', list(text.encode()))
          | {'response': text})
  embeddings = hashed_ngrams([row['response'] for row in samples])
  place = {(row['prompt_id'], row['sample_index']): n for n, row in enumerate(samples)}
  means = {}
  for selection in (False, True):
    rows, _ = build_diverse_pairs(samples, embeddings if selection else None, config(
        selection=selection, max_length=10**6))
    groups = collections.defaultdict(list)
    for row in rows:
      for side in ('chosen', 'rejected'):
        groups[row['prompt_id'], side].append(place[row['prompt_id'], row[f'{side}_index']])
    means[selection] = np.mean(
        [embedding_diversity(embeddings[group]) for group in groups.values() if len(group) > 1])
  assert means[True] > means[False]


@st.composite
def runs(draw):
  rounds = []
  for iteration in range(draw(st.integers(1, 3))):
    rounds.append([
        sample(f'p{prompt}', n, draw(st.sampled_from([str(v) for v in Verdict])),
               draw(st.lists(st.integers(0, 2), min_size=1, max_size=5)),
               finish_reason=draw(st.sampled_from(['eos', 'length'])), iteration=iteration)
        for prompt in range(3) for n in range(draw(st.integers(1, 5)))])
  return rounds, config(
      pairs_per_prompt=draw(st.integers(0, 6)), global_pool=draw(st.booleans()),
      selection=draw(st.booleans()), max_length=draw(st.sampled_from([6, 100])),
      max_pairs=draw(st.sampled_from([None, 0, 3])), diversity=draw(st.sampled_from(OBJECTIVES)),
      contamination=draw(st.sampled_from([0.0, 0.1, 'auto'])))


@given(runs())
@settings(deadline=None, max_examples=60)
def test_counts_add_up(run):
  rounds, settings = run
  samples = pool_rows(rounds, global_pool=settings.global_pool)
  rows, counts = build(samples, settings)
  assert build(samples, settings) == (rows, counts)
  prompts = {row['prompt_id'] for row in samples}
  assert sum(v for k, v in counts.items() if k.startswith('pairs/prompts_')) == (
      len(prompts) + counts['pairs/prompts_used'])
  assert counts['pairs/count'] == len(rows)
  made = 0
  for prompt in prompts:
    mine = [row for row in samples if row['prompt_id'] == prompt]
    sides = [
        [tuple(r['response_ids']) for r in mine
         if r['verdict'] == 'correct' and r['finish_reason'] != 'length'],
        [tuple(r['response_ids']) for r in mine
         if r['verdict'] in ('wrong', 'unparseable_answer')]]
    sizes = [len(set(side)) if settings.selection else len(side) for side in sides]
    # 15 of a side at most; the filter leaves at least as many as are asked for.
    made += min(settings.pairs_per_prompt, *sizes)
  assert made == len(rows) + sum(v for k, v in counts.items() if k.startswith('data/'))
  by_key = {(r['prompt_id'], r['iteration'], r['sample_index']): r for r in samples}
  for row in rows:
    for side, verdicts in (('chosen', {'correct'}),
                           ('rejected', {'wrong', 'unparseable_answer'})):
      candidates = [
          r for key, r in by_key.items() if key[0] == row['prompt_id']
          and key[2] == row[f'{side}_index'] and r['response_ids'] == row[f'{side}_ids']
          and r['verdict'] in verdicts]
      if side == 'chosen':
        candidates = [r for r in candidates if r['finish_reason'] == 'eos']
      assert candidates
      ends = [f'(iteration {r["iteration"]})' for r in candidates]
      assert any(row[f'{side}_why'].endswith(end) for end in ends) == settings.global_pool
