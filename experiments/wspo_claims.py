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

from experiments import claims, common_flags, output_flag, wspo_flags
from experiments.wspo_table import compare, greedy, points
from jaxrl.errors import InputError
from jaxrl.evaluation.statistics import mean_estimate
from jaxrl.runs.manifest import read_manifest
from jaxrl.runs.progress import Progress

FLAGS = flags.FLAGS
for module in (claims, output_flag):
  flags.adopt_module_key_flags(module)
DEFAULT_OUTPUT = 'runs/wspo_claims'        # folder of the runs and summary.json
GAMMAS = flags.DEFINE_list('gammas', ['0.5', '0.1', '1'], 'Values of gamma; the claims on accuracy '
                           'are about the first.')


def run_all(output: epath.Path, seeds: Sequence[int], gammas: Sequence[float]) -> dict:
  """Seed -> gamma -> run folder."""
  folders: dict[int, dict[float, epath.Path]] = {}
  for seed in seeds:
    first = output / f'seed_{seed}_gamma_{gammas[0]:g}'
    claims.start_run('wspo', first, [f'--seed={seed}', f'--gamma={gammas[0]:g}'],
                     makes_world=True)
    folders[seed] = {gammas[0]: first}
    aligned = sorted((first / 'weak' / 'irpo').glob('iteration_*/model'))[-1]
    for gamma in gammas[1:]:
      folder = output / f'seed_{seed}_gamma_{gamma:g}'
      claims.start_run('wspo', folder, [
          f'--flagfile={wspo_flags.WORLD_FLAGS}', f'--seed={seed}', f'--gamma={gamma:g}',
          f'--model={first}/seed/model', f'--weak_base={first}/weak/model',
          f'--weak_aligned={aligned}', f'--train={first}/weak/preferences.jsonl',
          f'--test={first}/world/test.jsonl'])
      folders[seed][gamma] = folder
  return folders


def summarise(folders: Mapping[int, Mapping[float, epath.Path]]) -> dict:
  """Everything the tables and verdicts are made of."""
  seeds = []
  for seed, by_gamma in folders.items():
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
      'the weak model was aligned: it exceeds its base': 'weak gain',
      'the strong model that learned from the weak pair exceeds the aligned weak model':
          'over weak aligned',
      'and exceeds its own base': 'over strong base'}
  found = {claim: judge([row[name] for row in first]) for claim, name in claims.items()}
  if len(seeds[0]['gammas']) > 1:
    found['the smaller gamma, the larger the strong log-ratio to the weak one'] = amplifies(seeds)
  return found


def judge(differences: Sequence[Mapping]) -> dict:
  """Whether a paired difference is positive, by every seed's interval or by that over seeds."""
  values = [d['value'] for d in differences]
  each = ', '.join(d['text'] for d in differences)
  low, high = min(d['low'] for d in differences), max(d['high'] for d in differences)
  text = f'per seed {each}'
  is_above, is_below = low > 0, high < 0
  if len(values) > 1:
    e = mean_estimate(values)
    is_above, is_below = is_above or e.low > 0, is_below or e.high < 0
    text = f'mean {points(e)}; {text}'
  return {'verdict': 'holds' if is_above else 'does not hold' if is_below else 'undecided',
          'seen': text}


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
  return {'verdict': 'holds' if all(orders) else 'undecided' if any(orders) else 'does not hold',
          'seen': text}


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
  progress.table('Claims', ('claim', 'verdict', 'seen'),
                 [[claim, v['verdict'], v['seen']] for claim, v in summary['verdicts'].items()])


def main(argv) -> None:
  del argv
  try:
    gammas = [float(gamma) for gamma in GAMMAS.value]
  except ValueError:
    raise InputError('the list cannot be read', where='--gammas', expected='numbers',
                     found=','.join(GAMMAS.value)) from None
  if not gammas or len({*gammas}) < len(gammas):
    raise InputError('the list cannot be used', where='--gammas',
                     expected='at least one number, each once', found=','.join(GAMMAS.value))
  output = epath.Path(FLAGS.output or DEFAULT_OUTPUT)
  summary = summarise(run_all(output, claims.seeds(), gammas))
  (output / 'summary.json').write_text(json.dumps(summary, indent=2))
  show(summary)


if __name__ == '__main__':
  common_flags.run(main)
