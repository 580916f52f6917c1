"""Time of DIVE's selection (outlier filter and greedy choice) beside a direct implementation.

    python -m benchmarks.dive_selection [--pools=5] [--prompts=2000] [--whole]

First table: one pool of 100 responses, five to pick. The direct implementation grows one tree after
another and one node after another, and recomputes the diversity of the whole set for every
candidate, with the metrics of `jaxrl/evaluation/diversity.py`. Both sides see the same pools in
turn, three times each; the median over pools of the least is printed. Both pick the same responses
from what one filter leaves; that is checked.

Second table: `build_diverse_pairs` over many prompts, half the responses of each right and half
wrong, for two numbers of prompts, so that the growth can be seen; the time for 100,000 prompts is
that of the larger number scaled up, or, with --whole, measured.

All times are CPU time of this one process, so that other work on the machine hardly counts.
"""

from __future__ import annotations

import argparse
import functools
import math
import resource
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from jaxrl.evaluation.diversity import distinct_n, embedding_diversity
from jaxrl.preferences.dive import DiveConfig, build_diverse_pairs
from jaxrl.preferences.diverse_selection import OBJECTIVES, Objective, greedy_select
from jaxrl.preferences.isolation_forest import TREES, average_path, inliers

POOL, PICK, WORDS, VOCABULARY, WIDTH = 100, 5, 80, 300, 768
TARGET = 100_000
BANK = 32                     # different prompts; a long run goes through them again and again


def random_pool(rng: np.random.Generator, size: int) -> tuple[list[str], np.ndarray]:
  """Responses of about 80 words that share most of them, and dense float32 embeddings [size, d]."""
  common = rng.integers(0, VOCABULARY, WORDS)
  texts = []
  for _ in range(size):
    words = np.where(rng.random(WORDS) < 0.3, rng.integers(0, VOCABULARY, WORDS), common)
    texts.append(' '.join(f'w{n}' for n in words[:rng.integers(WORDS // 2, WORDS + 1)]))
  embeddings = rng.normal(size=(size, WIDTH)) + 2 * rng.normal(size=WIDTH)
  return texts, (embeddings / np.linalg.norm(embeddings, axis=1)[:, None]).astype(np.float32)


def direct_scores(points: np.ndarray, rng: np.random.Generator) -> np.ndarray:
  """Isolation Forest as it is written down, for pools that every tree sees whole."""
  limit = math.ceil(math.log2(len(points)))

  def grow(rows, depth):
    if depth == limit or len(rows) <= 1:
      return len(rows)
    low, high = rows.min(axis=0), rows.max(axis=0)
    varying = np.flatnonzero(low < high)
    if not len(varying):
      return len(rows)
    f = rng.choice(varying)
    t = rng.uniform(low[f], high[f])
    right = rows[:, f] > t
    return f, t, grow(rows[~right], depth + 1), grow(rows[right], depth + 1)

  leaf = [float(average_path(n)) for n in range(len(points) + 1)]

  def path(x, node):
    depth = 0
    while isinstance(node, tuple):
      node = node[3] if x[node[0]] > node[1] else node[2]
      depth += 1
    return depth + leaf[node]

  forest = [grow(points, 0) for _ in range(TREES)]
  paths = [sum(path(x, tree) for tree in forest) / TREES for x in points]
  return 2.0 ** (-np.array(paths) / leaf[len(points)])


def direct_filter(points: np.ndarray, rng: np.random.Generator) -> np.ndarray:
  scores = direct_scores(points, rng)
  kept = len(points) - len(points) // 10
  return np.sort(np.argsort(scores, kind='stable')[:kept])


def direct_greedy(
    texts: Sequence[str], embeddings: np.ndarray, objective: Objective
) -> list[int]:
  """From response 0: the metric of S + [c], from nothing, for every c that remains."""
  metrics: list[Callable[[list[int]], float]] = []
  if objective != 'distinct_n':
    metrics.append(lambda order: embedding_diversity(embeddings[order]))
  if objective != 'embedding':
    metrics.append(lambda order: distinct_n([texts[n] for n in order]))
  order = [0]
  while len(order) < PICK:
    left = [c for c in range(len(texts)) if c not in order]
    values = [sum(metric([*order, c]) for metric in metrics) / len(metrics) for c in left]
    order.append(next(c for c, v in zip(left, values, strict=True) if v >= max(values) - 1e-12))
  return order


def timed(fn: Callable[[], Any]) -> tuple[float, Any]:
  """The least of three times, in milliseconds, and what `fn` returns."""
  times = []
  for _ in range(3):
    start = time.process_time()
    found = fn()
    times.append(1e3 * (time.process_time() - start))
  return min(times), found


def compare(pools: int) -> dict[str, tuple[float, float]]:
  """Per step the median milliseconds here and of the direct implementation."""
  rng = np.random.default_rng(0)
  seen: dict[str, list[tuple[float, float]]] = {}
  for _ in range(pools):
    texts, points = random_pool(rng, POOL)
    fast, kept = timed(functools.partial(
        inliers, points, keep_at_least=PICK, rng=np.random.default_rng(0)))
    slow, _ = timed(functools.partial(direct_filter, points, np.random.default_rng(0)))
    seen.setdefault('filter', []).append((fast, slow))
    texts, points = [texts[n] for n in kept], points[kept]
    for objective in OBJECTIVES:
      fast, found = timed(functools.partial(
          greedy_select, PICK, embeddings=points, texts=texts, diversity=objective, first=0))
      slow, expected = timed(functools.partial(direct_greedy, texts, points, objective))
      assert found.order == expected, objective
      seen.setdefault(f'greedy, {objective}', []).append((fast, slow))
  medians = {
      name: (statistics.median(a for a, _ in found), statistics.median(b for _, b in found))
      for name, found in seen.items()}
  for objective in OBJECTIVES:
    a, b = medians['filter'], medians[f'greedy, {objective}']
    medians[f'both, {objective}'] = a[0] + b[0], a[1] + b[1]
  return medians


def bank(size: int) -> tuple[list[list[dict]], np.ndarray]:
  """Scored samples of BANK prompts, half right, and their embeddings [BANK, size, d]."""
  rng = np.random.default_rng(1)
  prompts, embeddings = [], []
  for _ in range(BANK):
    texts, points = random_pool(rng, size)
    prompts.append([{
        'sample_index': n, 'prompt_ids': [1], 'response_ids': [n, len(text)], 'response': text,
        'answer': str(n % 2), 'verdict': 'correct' if n % 2 else 'wrong', 'finish_reason': 'eos',
        'iteration': 1} for n, text in enumerate(texts)])
    embeddings.append(points)
  return prompts, np.stack(embeddings)


def many_prompts(
    prompts: Sequence[Sequence[dict]], first: int, count: int
) -> Iterator[dict]:
  for number in range(first, first + count):
    for row in prompts[number % BANK]:
      yield row | {'prompt_id': f'p{number}'}


def scale(size: int, count: int) -> float:
  """Seconds for `count` prompts of `size` responses, in calls of BANK prompts at a time."""
  prompts, embeddings = bank(size)
  flat = embeddings.reshape(BANK * size, -1)
  config = DiveConfig(pairs_per_prompt=PICK, global_pool=True, selection=True, max_pairs=None,
                      max_length=100, seed=0)
  start = time.process_time()
  pairs = 0
  for first in range(0, count, BANK):
    here = min(BANK, count - first)
    rows, _ = build_diverse_pairs(
        many_prompts(prompts, first, here), flat[:here * size], config)
    pairs += len(rows)
  assert pairs == count * min(PICK, size // 2)
  return time.process_time() - start


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--pools', type=int, default=5, help='pools of the first table')
  parser.add_argument('--prompts', type=int, default=2000, help='prompts of the second table')
  parser.add_argument('--whole', action='store_true', help='measure all 100,000 prompts')
  options = parser.parse_args()

  print(f'numpy {np.__version__}, one process; a pool of {POOL} responses of {WORDS // 2} to '
        f'{WORDS} words, embeddings of width {WIDTH}, {TREES} trees, {PICK} to pick; median of '
        f'{options.pools} pools')
  print('| step | here, ms | direct, ms | ratio |\n|---|---|---|---|')
  for name, (fast, slow) in compare(options.pools).items():
    print(f'| {name} | {fast:.2f} | {slow:.0f} | {slow / fast:.0f} |')

  count = TARGET if options.whole else options.prompts
  print(f'\n| responses of a prompt | {count // 4} prompts, s | {count} prompts, s | ms a prompt | '
        f'{TARGET} prompts, s |\n|---|---|---|---|---|')
  for size in (10, 60, 100):
    few, many = scale(size, count // 4), scale(size, count)
    print(f'| {size} | {few:.1f} | {many:.1f} | {1e3 * many / count:.2f} | '
          f'{many * TARGET / count:.0f} |', flush=True)
  peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
  print(f'peak memory {peak:.2f} GiB')


if __name__ == '__main__':
  main()
