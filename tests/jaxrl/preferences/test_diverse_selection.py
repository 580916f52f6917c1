"""Greedy selection: the worked examples, and the result of recomputing the metric every time."""

import collections

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from jaxrl.errors import InputError
from jaxrl.evaluation.diversity import distinct_n, embedding_diversity
from jaxrl.preferences import diverse_selection
from jaxrl.preferences.diverse_selection import OBJECTIVES, greedy_select

DEGREES = np.radians([0, 15, 90, 100, 45])
VECTORS = np.stack([np.cos(DEGREES), np.sin(DEGREES)], axis=1)
TEXTS = ['a b c d', 'a b c e', 'f g h i', 'a b c d', 'f g h j']


@pytest.mark.parametrize(('p', 'order', 'diversity'), [
    (3, [0, 3, 2], 0.729613), (5, [0, 3, 2, 1, 4], 0.502312), (9, [0, 3, 2, 1, 4], 0.502312),
    (1, [0], 0.0), (0, [], 0.0)])
def test_worked_embeddings(p, order, diversity):
  found = greedy_select(p, embeddings=VECTORS, first=0)
  assert found.order == order
  assert found.diversity == pytest.approx(diversity, abs=1e-6)


def test_worked_texts():
  found = greedy_select(3, texts=TEXTS, diversity='distinct_n', first=0)
  assert found.order == [0, 2, 1]
  assert found.diversity == pytest.approx(0.840278, abs=1e-6)


def test_small_pools():
  assert greedy_select(3, embeddings=np.ones((1, 2)), rng=np.random.default_rng(0)).order == [0]
  alone = greedy_select(1, texts=['b b'], diversity='distinct_n', first=0)
  assert alone.diversity == distinct_n(['b b']) == 0.75
  for objective in OBJECTIVES:
    empty = greedy_select(
        3, embeddings=np.zeros((0, 2)), texts=[], diversity=objective, rng=np.random.default_rng(0))
    assert (empty.order, empty.diversity) == ([], 0.0)


def direct(p, score, n, first):
  """The definition: the metric of S + [c], from nothing, for every c that remains."""
  order = [first][:p]
  while order and len(order) < min(p, n):
    left = [c for c in range(n) if c not in order]
    values = [score([*order, c]) for c in left]
    best = max(values)
    order.append(next(c for c, value in zip(left, values, strict=True) if value >= best - 1e-12))
  return order, score(order)


@st.composite
def pools(draw):
  n = draw(st.integers(1, 9))
  # Few words and whole numbers, so that ties, repeats, zero vectors and empty texts are common.
  texts = draw(st.lists(
      st.lists(st.sampled_from('abcABd'), max_size=8).map(' '.join), min_size=n, max_size=n))
  vectors = draw(st.lists(
      st.lists(st.integers(-2, 2), min_size=3, max_size=3), min_size=n, max_size=n))
  return texts, np.array(vectors, np.float64), draw(st.integers(0, n - 1)), draw(st.integers(0, 10))


@pytest.mark.parametrize('objective', OBJECTIVES)
@given(pools())
@example((['', 'a', ''], np.zeros((3, 3)), 0, 3))
@settings(deadline=None, max_examples=60)
def test_the_same_as_recomputing(objective, pool):
  texts, vectors, first, p = pool

  def score(order):
    by_embedding = embedding_diversity(vectors[order])
    by_ngrams = distinct_n([texts[n] for n in order])
    return {'embedding': by_embedding, 'distinct_n': by_ngrams,
            'mix': (by_embedding + by_ngrams) / 2}[objective]

  order, diversity = direct(p, score, len(texts), first)
  found = greedy_select(p, embeddings=vectors, texts=texts, diversity=objective, first=first)
  assert found.order == order
  assert found.diversity == pytest.approx(diversity, abs=1e-12)


@pytest.mark.parametrize('objective', OBJECTIVES)
def test_the_same_as_recomputing_in_a_larger_pool(objective):
  rng = np.random.default_rng(0)
  texts = [' '.join(map(str, rng.integers(0, 12, rng.integers(0, 30)))) for _ in range(30)]
  vectors = rng.normal(size=(30, 6)).astype(np.float32)
  parts = {'embedding': [lambda order: embedding_diversity(vectors[order])],
           'distinct_n': [lambda order: distinct_n([texts[n] for n in order])]}
  parts['mix'] = parts['embedding'] + parts['distinct_n']
  order, diversity = direct(
      12, lambda chosen: np.mean([part(chosen) for part in parts[objective]]), 30, 7)
  found = greedy_select(12, embeddings=vectors, texts=texts, diversity=objective, first=7)
  assert found.order == order
  assert found.diversity == pytest.approx(diversity, abs=1e-12)


def test_many_words_are_numbered_anew():
  """Five of 8,000 words do not fit one code of 62 bits; the result must not show it."""
  rng = np.random.default_rng(0)
  phrases = [' '.join(f'{n}.{m}' for m in range(40)) for n in range(200)]
  texts = [' '.join(rng.choice(phrases, 60)) for _ in range(8)]
  assert len({word for text in texts for word in text.split()}) ** 5 > 2 ** 62
  order, diversity = direct(4, lambda chosen: distinct_n([texts[n] for n in chosen]), 8, 0)
  found = greedy_select(4, texts=texts, diversity='distinct_n', first=0)
  assert found.order == order
  assert found.diversity == pytest.approx(diversity, abs=1e-12)


def test_no_metric_is_recomputed(monkeypatch):
  """One update of the running sums for each pick, whatever the pool."""
  updates = collections.Counter()
  add = diverse_selection._CosineGain.add
  monkeypatch.setattr(diverse_selection._CosineGain, 'add', lambda self, picked: (
      updates.update(['add']), add(self, picked)))
  greedy_select(5, embeddings=np.random.default_rng(0).normal(size=(100, 4)), first=0)
  assert updates['add'] == 4


def test_the_start_is_uniform_and_follows_the_seed():
  rng = np.random.default_rng(0)
  starts = collections.Counter(
      greedy_select(1, embeddings=VECTORS, rng=rng).order[0] for _ in range(1000))
  assert set(starts) == set(range(5)) and min(starts.values()) > 140   # 200, deviation 12.6
  same = [greedy_select(4, embeddings=VECTORS, rng=np.random.default_rng((3, 1))) for _ in range(2)]
  assert same[0] == same[1]


def test_scale_does_not_matter():
  for scale in (1e-200, 1e200):
    assert greedy_select(5, embeddings=VECTORS * scale, first=0).order == [0, 3, 2, 1, 4]


@pytest.mark.parametrize(('changes', 'message'), [
    ({'p': -1}, 'is negative.*found -1'), ({'first': 5}, 'index below 5.*found 5'),
    ({'first': -1}, 'found -1'), ({'diversity': 'cosine'}, "distinct_n or mix; found 'cosine'"),
    ({'embeddings': VECTORS * np.nan}, 'row 0: .*not finite'),
    ({'embeddings': [[1.0], [1.0, 2.0]]}, 'one width'),
    ({'diversity': 'mix', 'texts': TEXTS[:4]}, 'expected 5 texts; found 4')])
def test_bad_input(changes, message):
  options = {'p': 3, 'embeddings': VECTORS, 'first': 0} | changes
  with pytest.raises(InputError, match=message):
    greedy_select(options.pop('p'), **options)


def test_what_is_missing_is_named():
  with pytest.raises(TypeError, match='reads `texts`'):
    greedy_select(2, embeddings=VECTORS, diversity='mix', first=0)
  with pytest.raises(TypeError, match='reads `embeddings`'):
    greedy_select(2, texts=TEXTS, first=0)
  with pytest.raises(TypeError, match='`first` or `rng`'):
    greedy_select(2, embeddings=VECTORS)
