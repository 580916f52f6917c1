"""Isolation Forest: outliers of a small pool of embeddings (Liu et al. 2008).

All trees grow together, one level at a time, on NumPy arrays: a pool is scored in about a
millisecond, and a tree is never stored. Points that no tree was grown on walk along.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple, TypeAlias

import numpy as np

from jaxrl.errors import InputError

TREES = 100
SUBSAMPLE = 256
SMALLEST_POOL = 8             # fewer points say too little about what is usual
AUTO_SCORE = 0.5              # 'auto' drops what scores above it
REDRAWS = 2                   # of a feature that does not vary, before looking at all of them
SLICE = 2**21                 # numbers held at a time while looking at all of them

Contamination: TypeAlias = float | Literal['auto']


def check_embeddings(embeddings, where: str = 'embeddings') -> np.ndarray:
  """`embeddings` as a float array [n, d].

  Raises:
    InputError: rows of different width, numbers that are not finite, or not two dimensions.
  """
  try:
    points = np.asarray(embeddings)
    points = points if points.dtype in (np.float32, np.float64) else points.astype(np.float64)
  except (TypeError, ValueError):
    raise InputError('the rows are not numbers of one width', where=where,
                     expected='an array [responses, width]') from None
  if points.ndim != 2:
    raise InputError('the embeddings have the wrong shape', where=where,
                     expected='[responses, width]', found=list(points.shape))
  bad = np.flatnonzero(~np.isfinite(points).all(axis=1))
  if len(bad):
    raise InputError('an embedding is not finite', where=f'{where} row {bad[0]}',
                     expected='finite numbers', found=f'{len(bad)} such rows')
  return points


def average_path(size: np.ndarray | int) -> np.ndarray:
  """c(n), the mean path of an unsuccessful search among n points; 0 for n <= 1, 1 for n = 2."""
  n = np.asarray(size, np.float64)
  many = np.maximum(n, 3.0)
  long = 2.0 * (np.log(many - 1.0) + np.euler_gamma) - 2.0 * (many - 1.0) / many
  return np.where(n > 2, long, np.where(n == 2, 1.0, 0.0))


def isolation_scores(
    embeddings: np.ndarray,   # [n, d]
    *,
    trees: int = TREES,
    subsample: int = SUBSAMPLE,
    rng: np.random.Generator,
) -> np.ndarray:              # [n] float64
  """s(x) = 2 ^ (-mean path / c(psi)) in (0, 1), psi = min(subsample, n); near 1 is an outlier.

  A split takes a random feature among those that vary in the node and a uniform threshold between
  its extremes there; a leaf is a node of one point, of equal points, or at depth ceil(log2 psi).
  One point, or equal points, score 0.5.

  Raises:
    InputError: embeddings that `check_embeddings` refuses, or fewer than one tree or point of each.
  """
  points = check_embeddings(embeddings)
  if trees < 1 or subsample < 1:
    raise InputError('the forest is empty', where='isolation forest',
                     expected='at least one tree and one point in each',
                     found=f'{trees} trees of {subsample} points')
  n = len(points)
  psi = min(subsample, n)
  varying = np.ptp(points, axis=0) > 0 if n else np.zeros(points.shape[1], bool)
  if not varying.any():
    return np.full(n, 0.5)
  if not varying.all():
    points = points[:, varying]
  seen = None
  if psi < n:
    seen = np.zeros((trees, n), bool)
    drawn = rng.random((trees, n)).argpartition(psi, axis=1)[:, :psi]
    np.put_along_axis(seen, drawn, True, axis=1)
  paths = path_lengths(points, seen, trees=trees, limit=math.ceil(math.log2(psi)), rng=rng)
  return np.exp2(-paths / trees / average_path(psi)) if psi > 1 else np.full(n, 0.5)


class Nodes(NamedTuple):
  """The nodes of one depth, of all trees in order.

  An entry is one point in one tree; those of a node lie beside each other. Trees see some of the
  points; the others walk along.
  """

  row: np.ndarray             # [entries] the point
  seen: np.ndarray | None     # [entries] bool, whether the tree grows on it; None: all do
  counts: np.ndarray          # [nodes] entries
  sizes: np.ndarray           # [nodes] entries that the tree grows on

  def keep(self, chosen: np.ndarray) -> Nodes:
    """The nodes where `chosen` [nodes] is True."""
    if chosen.all():
      return self
    entries = np.repeat(chosen, self.counts)
    return Nodes(self.row[entries], None if self.seen is None else self.seen[entries],
                 self.counts[chosen], self.sizes[chosen])

  def starts(self) -> np.ndarray:
    return np.cumsum(self.counts) - self.counts


def path_lengths(
    points: np.ndarray,       # [n, d]
    seen: np.ndarray | None,  # [trees, n] bool: the points each tree grows on; None for all
    *,
    trees: int,
    limit: int,
    rng: np.random.Generator,
) -> np.ndarray:              # [n] float64
  """Per point the sum over trees of h(x) = edges to its leaf + c(points the tree saw there)."""
  n, d = points.shape
  by_feature = np.ascontiguousarray(points.T).ravel()
  nodes = Nodes(
      np.tile(np.arange(n), trees), None if seen is None else seen.ravel(), np.full(trees, n),
      np.full(trees, n) if seen is None else seen.sum(axis=1))
  total = np.zeros(n)
  for _ in range(limit):
    # Two points add c(2) = 1 whether they are split, equal or at the limit; one adds c(1) = 0.
    total += _per_row(nodes, nodes.sizes == 2, n)
    nodes = nodes.keep(nodes.sizes > 2)
    value, low, high = _extremes(by_feature, n, nodes, rng.integers(d, size=len(nodes.counts)))
    for draw in (_any_feature,) * REDRAWS + (_varying_feature,):
      stuck = low == high
      if not stuck.any():
        break
      some = nodes.keep(stuck)
      value[np.repeat(stuck, nodes.counts)], low[stuck], high[stuck] = _extremes(
          by_feature, n, some, draw(points, some, rng))
    equal = low == high
    if equal.any():                                                 # equal points: a leaf
      total += _per_row(nodes, np.where(equal, average_path(nodes.sizes), 0.0), n)
      value, low, high = value[np.repeat(~equal, nodes.counts)], low[~equal], high[~equal]
      nodes = nodes.keep(~equal)
    if not len(nodes.row):
      return total
    threshold = low + rng.random(len(low)).astype(low.dtype) * (high - low)
    threshold = np.where(threshold < high, threshold, low)          # rounding must not reach high
    total += np.bincount(nodes.row, minlength=n)                    # one edge for every entry
    nodes = _children(nodes, value > np.repeat(threshold, nodes.counts))
  return total + _per_row(nodes, average_path(nodes.sizes), n)


def _per_row(nodes: Nodes, added: np.ndarray, n: int) -> np.ndarray:
  """[n]: what every point gets where each entry of a node gets that node's `added`."""
  some = added != 0
  return np.bincount(
      nodes.row[np.repeat(some, nodes.counts)], np.repeat(added[some], nodes.counts[some]),
      minlength=n)


def _extremes(
    by_feature: np.ndarray,   # [d * n]
    n: int,
    nodes: Nodes,
    feature: np.ndarray,      # [nodes]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Each entry's value of its node's feature, and per node the extremes of what its tree sees."""
  if not len(nodes.counts):
    return by_feature[:0], by_feature[:0], by_feature[:0]
  value = by_feature[np.repeat(feature * n, nodes.counts) + nodes.row]
  starts = nodes.starts()
  if nodes.seen is None:
    return value, np.minimum.reduceat(value, starts), np.maximum.reduceat(value, starts)
  infinity = value.dtype.type(np.inf)
  return (value, np.minimum.reduceat(np.where(nodes.seen, value, infinity), starts),
          np.maximum.reduceat(np.where(nodes.seen, value, -infinity), starts))


def _any_feature(points: np.ndarray, nodes: Nodes, rng: np.random.Generator) -> np.ndarray:
  return rng.integers(points.shape[1], size=len(nodes.counts))


def _varying_feature(points: np.ndarray, nodes: Nodes, rng: np.random.Generator) -> np.ndarray:
  """Per node a uniform draw among the features that vary in it; any feature where none does."""
  row = nodes.row if nodes.seen is None else nodes.row[nodes.seen]
  ends = np.cumsum(nodes.sizes)
  found = np.zeros(len(ends), np.intp)
  first = begin = 0
  while first < len(ends):
    # As many nodes as fit a slice, and at least one.
    last = max(first + 1, int(np.searchsorted(ends, begin + SLICE // points.shape[1], 'right')))
    block = points[row[begin:ends[last - 1]]]
    starts = ends[first:last] - nodes.sizes[first:last] - begin
    varying = np.minimum.reduceat(block, starts) < np.maximum.reduceat(block, starts)
    # The k-th feature that varies, k uniform below their number.
    rank = (rng.random(last - first) * varying.sum(axis=1)).astype(np.intp)
    found[first:last] = np.argmax(np.cumsum(varying, axis=1) > rank[:, None], axis=1)
    first, begin = last, int(ends[last - 1])
  return found


def _children(nodes: Nodes, right: np.ndarray) -> Nodes:
  """Both children of every node in its place, left before right, entries in their old order."""
  # Nearly sorted already, which the stable sort is quick to see.
  order = np.argsort(
      np.repeat(2 * np.arange(len(nodes.counts)), nodes.counts) + right, kind='stable')
  counts = _halves(right, nodes.counts, nodes.counts)
  if nodes.seen is None:
    return Nodes(nodes.row[order], None, counts, counts)
  return Nodes(nodes.row[order], nodes.seen[order], counts,
               _halves(right & nodes.seen, nodes.counts, nodes.sizes))


def _halves(right: np.ndarray, counts: np.ndarray, of: np.ndarray) -> np.ndarray:
  """[2 nodes]: of each node's `of` how many go left and how many right; no node is empty."""
  rights = np.diff(np.cumsum(right)[np.cumsum(counts) - 1], prepend=0)
  return np.stack([of - rights, rights], axis=1).ravel()


def inliers(
    embeddings: np.ndarray,   # [n, d]
    *,
    keep_at_least: int,
    contamination: Contamination = 0.1,
    trees: int = TREES,
    subsample: int = SUBSAMPLE,
    rng: np.random.Generator,
) -> np.ndarray:              # [kept] indices, ascending
  """The pool without its extreme outliers.

  Drops the floor(contamination * n) highest scores, or with 'auto' all above 0.5; of equal scores
  the later point goes first. A pool of fewer than 8 is kept whole, and min(keep_at_least, n) points
  always stay.

  Raises:
    InputError: bad embeddings, or a contamination that is neither 'auto' nor in [0, 0.5].
  """
  check_contamination(contamination)
  points = check_embeddings(embeddings)
  n = len(points)
  if n < SMALLEST_POOL or contamination == 0:
    return np.arange(n)
  scores = isolation_scores(points, trees=trees, subsample=subsample, rng=rng)
  if contamination == 'auto':
    drop = int(np.sum(scores > AUTO_SCORE))
  else:
    drop = math.floor(contamination * n + 1e-9)                     # 0.29 * 100 is 28.999...
  kept = max(n - drop, min(keep_at_least, n))
  return np.sort(np.argsort(scores, kind='stable')[:kept])


def check_contamination(contamination: Contamination) -> None:
  """Raises InputError unless it is 'auto' or a number in [0, 0.5]."""
  is_number = isinstance(contamination, int | float) and not isinstance(contamination, bool)
  if contamination != 'auto' and not (is_number and 0 <= contamination <= 0.5):
    raise InputError('the share of outliers is out of range', where='contamination',
                     expected="a number in [0, 0.5] or 'auto'", found=repr(contamination))
