"""WSPO on the embedded world over several seeds and values of gamma, with verdicts.

`python -m experiments.wspo_claims --seeds=0,1,2 --gammas=0.5,0.1,1` runs `experiments.wspo` once
per seed with its world and models, at the first gamma; the other values start from the same models
and learn from the same responses. It prints what the paper claims beside what is seen; verdicts are
computed from the run folders. Every run resumes; the same command again goes on where it stopped.
The folder is --output, by default runs/wspo_claims.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

from absl import flags
from etils import epath

from experiments import claim_runs, common_flags, findings, output_flag, wspo_flags
from experiments.findings import (
    FAILS,
    HOLDS,
    NOT_PUBLISHED,
    OPEN,
    POINTS,
    finding,
    over_seeds,
    remark,
)
from experiments.wspo_table import compare, greedy, points
from jaxrl.evaluation.statistics import Estimate
from jaxrl.runs.manifest import read_manifest
from jaxrl.runs.progress import Progress

FLAGS = flags.FLAGS
for module in (claim_runs, output_flag):
  flags.adopt_module_key_flags(module)
DEFAULT_OUTPUT = 'runs/wspo_claims'        # folder of the runs and summary.json
flags.DEFINE_list('gammas', ['0.5', '0.1', '1'], 'Values of gamma; the claims on accuracy are '
                  'about the first.')


def gammas() -> list[float]:
  """The values of --gammas.

  Raises:
    InputError: none, not numbers, or one twice.
  """
  return claim_runs.different('gammas', float, 'numbers')


def folders(output: epath.Path, seed: int) -> dict[float, epath.Path]:
  """The run folders of one seed by gamma."""
  return {gamma: output / f'seed_{seed}_gamma_{gamma:g}' for gamma in gammas()}


def run_seed(output: epath.Path, seed: int) -> None:
  """The runs of one seed; the first one makes the world and all models."""
  (gamma, first), *others = folders(output, seed).items()
  claim_runs.start_run('wspo', first, [f'--seed={seed}', f'--gamma={gamma:g}'], makes_world=True)
  aligned = sorted((first / 'weak' / 'irpo').glob('iteration_*/model'))[-1]
  for gamma, folder in others:
    claim_runs.start_run('wspo', folder, [
        f'--flagfile={wspo_flags.WORLD_FLAGS}', f'--seed={seed}', f'--gamma={gamma:g}',
        f'--model={first}/seed/model', f'--weak_base={first}/weak/model',
        f'--weak_aligned={aligned}', f'--train={first}/weak/preferences.jsonl',
        f'--test={first}/world/test.jsonl'])


def summarise(runs: Mapping[int, Mapping[float, epath.Path]]) -> dict:
  """Everything the tables and verdicts are made of, from the run folders by seed and gamma."""
  seeds = []
  for seed, by_gamma in runs.items():
    row: dict = {'seed': seed, 'gammas': []}
    for gamma, folder in by_gamma.items():
      right = greedy(folder)
      followed = read_manifest(folder)['iteration_01/follow'].counts
      found = {'gamma': gamma, 'accuracy': {
          model: sum(answers.values()) / len(answers) for model, answers in right.items()}}
      for name, before, after in (('weak gain', 'weak base', 'weak aligned'),
                                  ('over weak aligned', 'weak aligned', 'result'),
                                  ('over strong base', 'strong base', 'result')):
        e = compare(right[before], right[after])
        found[name] = {'value': e.value, 'low': e.low, 'high': e.high, 'text': points(e)}
      found |= {key: followed[key] for key in (
          'ratio', 'ratio_expected', 'error', 'error_at_start', 'explained', 'strong_gap',
          'weak_gap')}
      row['gammas'].append(found)
    seeds.append(row)
  return {'seeds': seeds, 'verdicts': verdicts(seeds)}


def verdicts(seeds: Sequence[Mapping]) -> dict[str, dict]:
  """Each claim with its figure over seeds: holds, does not hold or undecided."""
  first = [row['gammas'][0] for row in seeds]
  claims = {
      'the weak model was aligned: it exceeds its base': ('weak gain', NOT_PUBLISHED),
      'the strong model that learned from the weak pair exceeds the aligned weak model': (
          'over weak aligned', 'win rate on HH dialogue about 0.62 against 0.50 (7B against '
          'aligned 1.5B, temperature 0.7, read off a figure)'),
      'and exceeds its own base': (
          'over strong base', '+9.9 points on Arena-Hard (39.7 to 49.6)')}
  found = {claim: judge([row[name] for row in first], published)
           for claim, (name, published) in claims.items()}
  if len(seeds[0]['gammas']) > 1:
    found['the smaller gamma, the larger the strong log-ratio to the weak one'] = amplifies(seeds)
  return found


def judge(differences: Sequence[Mapping], published: str) -> dict:
  """Whether a paired difference is positive, by every seed's interval or by that over seeds."""
  each = [Estimate(d['value'], d['low'], d['high']) for d in differences]
  mean = over_seeds(each)
  is_above = min(e.low for e in each) > 0 or mean.low > 0
  is_below = max(e.high for e in each) < 0 or mean.high < 0
  return finding(HOLDS if is_above else FAILS if is_below else OPEN, POINTS, mean, each,
                 published=published)


def amplifies(seeds: Sequence[Mapping]) -> dict:
  """Whether the measured slope of d_s on d_w falls as gamma rises, on every seed."""
  orders = []
  for row in seeds:
    ratios = [g['ratio'] for g in sorted(row['gammas'], key=lambda g: g['gamma'])]
    orders.append(all(a > b for a, b in zip(ratios, ratios[1:], strict=False)))
  text = '; '.join(
      f'seed {row["seed"]}: ' + ', '.join(
          f'{g["ratio"]:.2f} at gamma {g["gamma"]:g} (optimum {g["ratio_expected"]:.3g})'
          for g in row['gammas']) for row in seeds)
  return remark(HOLDS if all(orders) else OPEN if any(orders) else FAILS,
                f'slope of d_s on d_w: {text}', published=NOT_PUBLISHED)


def show(summary: Mapping) -> None:
  progress = Progress()
  progress.table(
      'WSPO on the embedded world: greedy accuracy on held-out problems, %',
      ('seed', 'gamma', 'weak base', 'weak aligned', 'strong base', 'result',
       'over weak aligned [95%]', 'over strong base [95%]', 'slope of d_s on d_w'),
      [[row['seed'], f'{g["gamma"]:g}', *(
          f'{100 * g["accuracy"][model]:.1f}'
          for model in ('weak base', 'weak aligned', 'strong base', 'result')),
        g['over weak aligned']['text'], g['over strong base']['text'],
        f'{g["ratio"]:.2f} of {g["ratio_expected"]:.3g}']
       for row in summary['seeds'] for g in row['gammas']])
  progress.table('Claims', findings.COLUMNS, findings.table(summary['verdicts']))


def main(argv) -> None:
  del argv
  output = epath.Path(FLAGS.output or DEFAULT_OUTPUT)
  gammas()                     # refused before the first run
  seeds = claim_runs.seeds()
  for seed in seeds:
    run_seed(output, seed)
  summary = summarise({seed: folders(output, seed) for seed in seeds})
  (output / 'summary.json').write_text(json.dumps(summary, indent=2))
  show(summary)


if __name__ == '__main__':
  common_flags.run(main)
