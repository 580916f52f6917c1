"""Greedy choice of a diverse subset of responses (DIVE, section 3.2).

Each step adds the response that makes the diversity of the whole set largest. What the set metrics
need is kept as running sums and counters, so that a step costs one cheap update per response
instead of a metric per response; `jaxrl/evaluation/diversity.py` has the metrics themselves.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Literal

import numpy as np

from jaxrl.errors import InputError
from jaxrl.preferences.isolation_forest import check_embeddings

Objective = Literal['embedding', 'distinct_n', 'mix']
OBJECTIVES: tuple[Objective, ...] = ('embedding', 'distinct_n', 'mix')
ORDERS = (1, 2, 3, 4, 5)      # lengths of the n-grams
TIE = 1e-12                   # scores closer than this are equal: the lowest index wins


@dataclasses.dataclass(frozen=True)
class Selection:
  """Indices in the order they were picked, and the diversity of the set they make."""

  order: list[int]
  diversity: float


def greedy_select(
    p: int,
    *,
    embeddings: np.ndarray | None = None,     # [n, d]
    texts: Sequence[str] | None = None,       # n
    diversity: Objective = 'embedding',
    first: int | None = None,
    rng: np.random.Generator | None = None,
) -> Selection:
  """min(p, n) responses of a pool of n: `first`, then always the one that adds most diversity.

  'embedding' reads `embeddings`, 'distinct_n' reads `texts`, 'mix' is the mean of both metrics and
  reads both. Without `first` the start is drawn uniformly from `rng`. Nothing is deduplicated.

  Raises:
    InputError: p is negative, an unknown objective, `first` outside the pool, embeddings that
      `check_embeddings` refuses, or embeddings and texts of different numbers.
    TypeError: what the objective reads is missing, or there is neither `first` nor `rng`.
  """
  if p < 0:
    raise InputError('the number of responses to select is negative', where='greedy selection',
                     expected='at least 0', found=p)
  gains = _gains(embeddings, texts, diversity)
  n = gains[0].size
  if first is not None and not 0 <= first < max(n, 1):
    raise InputError('the first response is not in the pool', where='greedy selection',
                     expected=f'an index below {n}', found=first)
  if first is None and rng is None:
    raise TypeError('greedy selection needs `first` or `rng`')
  if p == 0 or n == 0:
    return Selection([], 0.0)
  order: list[int] = []
  free = np.ones(n, bool)
  picked = int(rng.integers(n)) if rng is not None and first is None else first
  assert picked is not None
  scores = _scores(gains)
  while True:
    order.append(picked)
    reached = float(scores[picked])
    if len(order) == min(p, n):
      return Selection(order, reached)
    free[picked] = False
    for gain in gains:
      gain.add(picked)
    scores = np.where(free, _scores(gains), -np.inf)
    picked = int(np.argmax(scores >= scores.max() - TIE))


def _gains(embeddings, texts, diversity: Objective) -> list[_CosineGain | _NgramGain]:
  if diversity not in OBJECTIVES:
    raise InputError('there is no such measure of diversity', where='greedy selection',
                     expected=' or '.join(OBJECTIVES), found=repr(diversity))
  gains: list[_CosineGain | _NgramGain] = []
  if diversity != 'distinct_n':
    if embeddings is None:
      raise TypeError(f'diversity {diversity!r} reads `embeddings`')
    gains.append(_CosineGain(check_embeddings(embeddings)))
  if diversity != 'embedding':
    if texts is None:
      raise TypeError(f'diversity {diversity!r} reads `texts`')
    gains.append(_NgramGain(texts))
  if len({gain.size for gain in gains}) > 1:
    raise InputError('texts and embeddings are of different responses', where='greedy selection',
                     expected=f'{gains[0].size} texts', found=gains[1].size)
  return gains


def _scores(gains: Sequence[_CosineGain | _NgramGain]) -> np.ndarray:   # [n]
  return np.mean([gain.scores() for gain in gains], axis=0)


class _CosineGain:
  """1 - mean cosine over the pairs of S + [c], for every c, from sums of cosines to S."""

  def __init__(self, embeddings: np.ndarray):
    self.size = len(embeddings)
    # Divided by the largest entry: squares of tiny or huge numbers would leave float64. In place,
    # for a fresh array of this size costs as much as the arithmetic.
    self._rows = embeddings.astype(np.float64)
    largest = np.maximum(self._rows.max(axis=1, initial=0.0), -self._rows.min(axis=1, initial=0.0))
    self._rows /= np.where(largest > 0, largest, 1.0)[:, None]
    norms = np.sqrt(np.einsum('nd,nd->n', self._rows, self._rows))
    self._norms = np.where(norms > 0, norms, 1.0)           # a zero vector has cosine 0 with all
    self._to_set = np.zeros(self.size)                      # sum of cosines to S
    self._within = 0.0                                      # sum over the pairs of S
    self._count = 0

  def scores(self) -> np.ndarray:                           # [n]
    if not self._count:
      return np.zeros(self.size)
    pairs = self._count * (self._count + 1) / 2
    return 1.0 - (self._within + self._to_set) / pairs

  def add(self, picked: int) -> None:
    self._within += self._to_set[picked]
    self._to_set += self._rows @ self._rows[picked] / (self._norms * self._norms[picked])
    self._count += 1


class _NgramGain:
  """distinct_n of S + [c], for every c, from counters of n-grams.

  `_unseen[o, c]` counts the different n-grams of order o of response c that S lacks.
  """

  def __init__(self, texts: Sequence[str]):
    self.size = len(texts)
    split = [text.lower().split() for text in texts]
    flat = list(itertools.chain.from_iterable(split))
    number = {word: n for n, word in enumerate(dict.fromkeys(flat))}
    words = np.fromiter(map(number.__getitem__, flat), np.int64, len(flat))
    lengths = np.array([len(each) for each in split], np.int64)
    self._total = np.maximum(lengths - np.array(ORDERS)[:, None] + 1, 0)     # [orders, n]
    self._in_set = np.zeros((len(ORDERS), 2), np.int64)     # different and all n-grams of S
    self._holders = _ngrams(words, lengths, len(number))
    self._seen = [np.zeros(len(gram), bool) for gram, _ in self._holders]    # by n-gram
    self._unseen = np.stack([
        np.bincount(holder, minlength=self.size) for _, holder in self._holders])

  def scores(self) -> np.ndarray:                           # [n]
    distinct = self._in_set[:, :1] + self._unseen
    total = self._in_set[:, 1:] + self._total
    occurs = total > 0
    return (distinct / np.maximum(total, 1)).sum(axis=0) / np.maximum(occurs.sum(axis=0), 1)

  def add(self, picked: int) -> None:
    self._in_set += np.stack([self._unseen[:, picked], self._total[:, picked]], axis=1)
    for order, (gram, holder) in enumerate(self._holders):
      new = np.zeros(len(gram), bool)
      new[gram[holder == picked]] = True
      new &= ~self._seen[order]
      self._seen[order] |= new
      self._unseen[order] -= np.bincount(holder[new[gram]], minlength=self.size)


def _ngrams(
    words: np.ndarray,        # [all words] int64 below `vocabulary`, response after response
    lengths: np.ndarray,      # [n] words of each
    vocabulary: int,
) -> list[tuple[np.ndarray, np.ndarray]]:
  """Per order (n-gram, response), each such pair once; n-grams are numbered 0, 1, ... per order."""
  owner_bits = max(len(lengths) - 1, 1).bit_length()
  owner = np.repeat(np.arange(len(lengths)), lengths)
  left = np.repeat(np.cumsum(lengths), lengths) - np.arange(len(words))   # words up to the end
  start, gram, codes = np.arange(len(words)), words, vocabulary   # n-grams as codes below `codes`
  found = []
  for order in ORDERS:
    if order > 1:
      if (codes * vocabulary).bit_length() + owner_bits > 62:     # too wide: number them anew
        names, gram = np.unique(gram, return_inverse=True)
        codes = len(names)
      goes_on = left[start] >= order
      start = start[goes_on]
      gram = gram[goes_on] * vocabulary + words[start + order - 1]
      codes *= vocabulary
    pairs = np.sort(gram << owner_bits | owner[start])
    pairs = pairs[np.diff(pairs, prepend=-1) > 0]
    grams = pairs >> owner_bits
    numbered = np.cumsum(np.diff(grams, prepend=-1) > 0) - 1
    found.append((numbered, pairs & ((1 << owner_bits) - 1)))
  return found
