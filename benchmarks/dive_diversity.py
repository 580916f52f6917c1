"""What DIVE's selection does to real responses: diversity and length of chosen and rejected sets.

    python -m benchmarks.dive_diversity --responses=PATH [--seeds=20] [--pick=3]

PATH is `math_votes/math_cot_8_responses.jsonl` of the shared data: 50 problems, 8 responses each.
Embeddings are hashed n-grams, since no model is at hand. Printed per rule: the metrics of
`jaxrl/evaluation/diversity.py`, averaged over problems with at least two pairs and over seeds, and
the mean number of words of a response. `vanilla` draws at random.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from jaxrl.evaluation.diversity import by_side, words
from jaxrl.evaluation.text_embedding import hashed_ngrams
from jaxrl.preferences.dive import DiveConfig, build_diverse_pairs
from jaxrl.preferences.diverse_selection import OBJECTIVES


def read_samples(path: Path) -> list[dict]:
  """Scored sample rows; the response's words stand in for its ids."""
  samples = []
  for line in path.read_text().splitlines():
    row = json.loads(line)
    for n, (text, right) in enumerate(zip(row['code'], row['score'], strict=True)):
      samples.append({
          'prompt_id': str(row['idx']), 'sample_index': n, 'prompt_ids': [0], 'response': text,
          'response_ids': words(text), 'answer': row['pred'][n], 'finish_reason': 'eos',
          'verdict': 'correct' if right else 'wrong', 'iteration': 1})
  return samples


def measure(samples: Sequence[dict], config: DiveConfig) -> dict[str, float]:
  """Diversity and length of what `config` picks."""
  embeddings = hashed_ngrams([row['response'] for row in samples])
  pairs, _ = build_diverse_pairs(samples, embeddings if config.selection else None, config)
  place = {(row['prompt_id'], row['sample_index']): n for n, row in enumerate(samples)}
  picked = [
      place[pair['prompt_id'], pair[side]]
      for pair in pairs for side in ('chosen_index', 'rejected_index')]
  found = by_side([samples[n] for n in picked], embeddings[picked])
  for side, places in (('positive', picked[::2]), ('negative', picked[1::2])):
    found[f'{side}/words'] = float(np.mean([len(samples[n]['response_ids']) for n in places]))
  return found


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--responses', type=Path, required=True)
  parser.add_argument('--seeds', type=int, default=20)
  parser.add_argument('--pick', type=int, default=3, help='pairs of a problem at most')
  options = parser.parse_args()
  samples = read_samples(options.responses)
  names = [f'{side}/{name}' for name in ('distinct_n', 'embedding', 'words')
           for side in ('positive', 'negative')]
  print(f'| rule | problems | {" | ".join(names)} |\n|{"---|" * (len(names) + 2)}')
  for rule in (None, *OBJECTIVES):
    seen = [
        measure(samples, DiveConfig(
            pairs_per_prompt=options.pick, global_pool=False, selection=rule is not None,
            diversity=rule or 'embedding', max_pairs=None, max_length=10**9, seed=seed))
        for seed in range(options.seeds)]
    means = ' | '.join(f'{np.mean([each[name] for each in seen]):.3g}' for name in names)
    print(f'| {"vanilla" if rule is None else f"selection, {rule}"} | '
          f'{seen[0]["positive/questions"]} | {means} |')


if __name__ == '__main__':
  main()
