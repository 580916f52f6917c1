"""Isolation Forest: hand-worked values, the distribution of a plain recursion, and the filter."""

import math

import numpy as np
import pytest

from jaxrl.errors import InputError
from jaxrl.preferences import isolation_forest
from jaxrl.preferences.isolation_forest import (
    average_path,
    check_embeddings,
    inliers,
    isolation_scores,
    path_lengths,
)


def rng(seed=0):
  return np.random.default_rng(seed)


@pytest.mark.parametrize(('n', 'expected'), [
    (0, 0), (1, 0), (2, 1), (3, 1.207392), (4, 1.851656), (8, 3.296252), (10, 3.748880),
    (50, 6.978072), (60, 7.342840), (256, 10.244771)])
def test_average_path(n, expected):
  assert average_path(n) == pytest.approx(expected, abs=1e-6)


class Scripted:
  """A generator whose thresholds are given, as shares of the way from low to high."""

  def __init__(self, *levels):
    self.levels = iter(levels)

  def integers(self, high, size):
    return np.zeros(size, int)

  def random(self, size):
    values = np.array(next(self.levels))
    assert values.shape == (size,)
    return values


def test_the_hand_tree():
  """Points 0, 1, 2, 10: the root splits at 6, its left child at 0.5."""
  points = np.array([[0.0], [1.0], [2.0], [10.0]])
  found = path_lengths(points, None, trees=1, limit=2, rng=Scripted([0.6], [0.25]))
  np.testing.assert_array_equal(found, [2, 3, 3, 1])
  np.testing.assert_allclose(
      2 ** (-found / average_path(4)), [0.472991, 0.325297, 0.325297, 0.687744], atol=1e-6)


def test_points_a_tree_did_not_see_walk_along():
  """The tree sees 0, 2 and 10; 1 ends beside 2, where it saw one point, and 12 beside 10."""
  points = np.array([[0.0], [1.0], [2.0], [10.0], [12.0]])
  seen = np.array([[True, False, True, True, False]])
  found = path_lengths(points, seen, trees=1, limit=2, rng=Scripted([0.6], [0.25]))
  np.testing.assert_array_equal(found, [2, 2, 2, 1, 1])
  shallow = path_lengths(points, seen, trees=1, limit=1, rng=Scripted([0.6]))
  np.testing.assert_array_equal(shallow, [2, 2, 2, 1, 1], 'c(2) = 1 for 0 and 2, seen there')


def test_equal_points_are_a_leaf():
  points = np.array([[0.0, 1.0]] * 3 + [[5.0, 1.0]])
  scores = isolation_scores(points, trees=7, rng=rng())
  c = average_path(4)
  np.testing.assert_allclose(
      scores, 2 ** -np.array([(1 + average_path(3)) / c] * 3 + [1 / c]))
  np.testing.assert_array_equal(isolation_scores(np.ones((5, 3)), rng=rng()), [0.5] * 5)
  np.testing.assert_array_equal(isolation_scores(np.ones((1, 3)), rng=rng()), [0.5])
  assert isolation_scores(np.zeros((0, 3)), rng=rng()).shape == (0,)


def recursive_paths(points, *, trees, subsample, rng):
  """[trees, n] by the algorithm as it is written: tree after tree, node after node."""
  psi = min(subsample, len(points))
  limit = math.ceil(math.log2(psi))

  def grow(rows, depth):
    varying = np.flatnonzero(np.ptp(rows, axis=0))
    if depth == limit or len(rows) <= 1 or not len(varying):
      return len(rows)
    f = rng.choice(varying)
    t = rng.uniform(rows[:, f].min(), rows[:, f].max())
    right = rows[:, f] > t
    return f, t, grow(rows[~right], depth + 1), grow(rows[right], depth + 1)

  def path(x, node):
    if isinstance(node, tuple):
      return 1 + path(x, node[3] if x[node[0]] > node[1] else node[2])
    return float(average_path(node))

  forest = [grow(points[rng.permutation(len(points))[:psi]], 0) for _ in range(trees)]
  return np.array([[path(x, tree) for x in points] for tree in forest])


POOLS = {
    'dense': rng(1).normal(size=(30, 4)) * np.array([[5]] + [[1]] * 29),
    # Few features vary in a node, and some points are equal.
    'sparse': np.where(rng(2).random((30, 24)) < 0.06, 1.0, 0.0),
    'grid': rng(3).integers(0, 3, (30, 2)).astype(float)}


@pytest.mark.parametrize('pool', POOLS)
@pytest.mark.parametrize('subsample', [256, 12])
def test_paths_are_those_of_a_plain_recursion(pool, subsample):
  """Mean paths agree within five standard errors of 300 trees there; 6000 here hardly vary."""
  points = POOLS[pool]
  theirs = recursive_paths(points, trees=300, subsample=subsample, rng=rng(4))
  scores = isolation_scores(points, trees=6000, subsample=subsample, rng=rng(5))
  ours = -np.log2(scores) * average_path(min(subsample, 30))
  errors = theirs.std(axis=0) / math.sqrt(300)
  np.testing.assert_array_less(abs(ours - theirs.mean(axis=0)), 5 * errors + 1e-9)


@pytest.mark.parametrize('subsample', [256, 12])
def test_slices_do_not_change_the_scores(monkeypatch, subsample):
  """All nodes at a time, or one after another."""
  points = POOLS['sparse']
  whole = isolation_scores(points, trees=20, subsample=subsample, rng=rng())
  monkeypatch.setattr(isolation_forest, 'SLICE', 1)
  sliced = isolation_scores(points, trees=20, subsample=subsample, rng=rng())
  np.testing.assert_array_equal(sliced, whole)


def test_scores_rank_as_scikit_learn_has_them():
  ensemble = pytest.importorskip('sklearn.ensemble')
  stats = pytest.importorskip('scipy.stats')
  points = POOLS['dense']
  theirs = -ensemble.IsolationForest(
      n_estimators=300, max_samples=len(points), random_state=0).fit(points).score_samples(points)
  ours = isolation_scores(points, trees=3000, rng=rng())
  assert stats.spearmanr(ours, theirs)[0] > 0.97
  np.testing.assert_allclose(ours, theirs, atol=0.03)


def test_the_seed_decides():
  points = POOLS['dense']
  same = [isolation_scores(points, rng=rng((7, 3))) for _ in range(2)]
  np.testing.assert_array_equal(*same)
  assert (isolation_scores(points, rng=rng((7, 4))) != same[0]).any()


def test_neighbouring_floats_are_split():
  """No float lies between the two extremes, so a threshold may round up to the higher one."""
  low = np.float32(1)
  points = np.array([[low], [low], [np.nextafter(low, np.float32(2))]], np.float32)
  found = path_lengths(points, None, trees=50, limit=1, rng=rng())
  np.testing.assert_array_equal(found, [100, 100, 50])


def clusters_and_outliers(seed):
  """Three clusters of six directions, then two directions that look the other way."""
  centres = np.array([[1, 0, 0]] * 6 + [[0, 1, 0]] * 6 + [[0, 0, 1]] * 6 + [
      [-1, -0.3, -0.3], [-0.3, -1, -0.3]])
  points = centres + rng(seed).normal(scale=0.05, size=(20, 3))
  return points / np.linalg.norm(points, axis=1)[:, None]


@pytest.mark.parametrize('seed', range(5))
def test_far_outliers_go_first(seed):
  kept = inliers(clusters_and_outliers(seed), keep_at_least=3, rng=rng(seed))
  assert kept.tolist() == list(range(18))


@pytest.mark.parametrize(('n', 'contamination', 'dropped'), [
    (7, 0.5, 0), (8, 0.1, 0), (9, 0.1, 0), (10, 0.1, 1), (19, 0.1, 1), (20, 0.1, 2), (8, 0.5, 4),
    (30, 0.1, 3), (100, 0.29, 29), (20, 0, 0)])
def test_how_many_are_dropped(n, contamination, dropped):
  points = rng().normal(size=(n, 3))
  kept = inliers(points, keep_at_least=0, contamination=contamination, rng=rng())
  assert len(kept) == n - dropped and sorted(set(kept)) == kept.tolist()


def test_the_highest_scores_are_dropped():
  points = rng().normal(size=(20, 3))
  scores = isolation_scores(points, rng=rng(1))
  kept = inliers(points, keep_at_least=0, contamination=0.3, rng=rng(1))
  assert set(range(20)) - set(kept.tolist()) == set(np.argsort(scores)[-6:].tolist())
  auto = inliers(points, keep_at_least=0, contamination='auto', rng=rng(1))
  assert auto.tolist() == np.flatnonzero(scores <= 0.5).tolist() and 0 < len(auto) < 20


def test_a_pool_never_shrinks_below_what_is_asked():
  points = rng().normal(size=(10, 3))
  def count(keep_at_least, contamination):
    return len(inliers(points, keep_at_least=keep_at_least, contamination=contamination, rng=rng()))
  assert (count(5, 0.5), count(8, 0.5), count(50, 0.5)) == (5, 8, 10)
  assert count(0, 'auto') < 9 == count(9, 'auto')


def test_of_equal_points_the_later_goes():
  kept = inliers(np.ones((10, 2)), keep_at_least=0, contamination=0.2, rng=rng())
  assert kept.tolist() == list(range(8))


@pytest.mark.parametrize('contamination', [-0.1, 0.51, float('nan'), 'most', None, True])
def test_a_share_out_of_range_is_an_error(contamination):
  with pytest.raises(InputError, match="contamination: .*expected a number in .0, 0.5. or 'auto'"):
    inliers(np.ones((3, 2)), keep_at_least=0, contamination=contamination, rng=rng())


@pytest.mark.parametrize(('embeddings', 'message'), [
    ([[1.0, 2.0], [1.0]], 'one width'), ([[1.0], [float('nan')]], 'row 1: .*not finite'),
    ([[float('inf')]], 'row 0: .*not finite'), ([1.0, 2.0], 'wrong shape'),
    ([['a'], ['b']], 'one width')])
def test_bad_embeddings_are_errors(embeddings, message):
  with pytest.raises(ValueError, match=message):
    check_embeddings(embeddings)
  with pytest.raises(InputError, match=message):
    isolation_scores(embeddings, rng=rng())
  with pytest.raises(InputError, match=message):
    inliers(embeddings, keep_at_least=0, rng=rng())


def test_an_empty_forest_is_an_error():
  with pytest.raises(InputError, match='forest is empty'):
    isolation_scores(np.ones((9, 2)), trees=0, rng=rng())
