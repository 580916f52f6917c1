"""IRPO with and without its NLL term on the embedded world, over several seeds.

`python -m experiments.irpo_ablation --seeds=0,1,2` runs `experiments.irpo` twice per seed, with the
world's --nll_alpha and with 0, from the same seed model and with the same first samples, and prints
what the paper claims beside what is seen. Verdicts are computed from the run folders. Every run
resumes; the same command again goes on where it stopped. The folder is --output, by default
runs/irpo_ablation.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping

from absl import flags
from etils import epath

from experiments import claims, common_flags, irpo_flags, output_flag
from jaxrl.evaluation.statistics import Estimate, mean_estimate, paired_difference
from jaxrl.runs.manifest import read_manifest
from jaxrl.runs.progress import Progress
from jaxrl.runs.tables import EVALUATION, read_table

FLAGS = flags.FLAGS
for module in (claims, output_flag):
  flags.adopt_module_key_flags(module)
DEFAULT_OUTPUT = 'runs/irpo_ablation'      # folder of the runs and summary.json

VARIANTS = ('with NLL', 'without NLL')


def greedy(folder: epath.Path, iteration: int) -> dict[str, bool]:
  """Whether the greedy answer of each held-out problem is right."""
  table = read_table(folder / f'iteration_{iteration:02d}' / 'evaluation.parquet', EVALUATION)
  return {row['prompt_id']: row['verdict'] == 'correct'
          for row in table.to_pylist() if row['kind'] == 'greedy'}


def compare(before: Mapping[str, bool], after: Mapping[str, bool]) -> Estimate:
  """Paired difference after - before over the same problems."""
  keys = sorted(before)
  return paired_difference([before[key] for key in keys], [after[key] for key in keys])


def last_iteration(folder: epath.Path) -> int:
  stages = read_manifest(folder)
  return max(int(name[10:12]) for name in stages if name.endswith('/evaluation'))


def shifts(folder: epath.Path) -> list[Mapping]:
  """Per iteration how training moved the log-probs of chosen and rejected responses."""
  stages = read_manifest(folder)
  return [stages[name].counts for name in sorted(stages) if name.endswith('/shift')]


def summarise(folders: Mapping[int, Mapping[str, epath.Path]]) -> dict:
  """Everything the tables and verdicts are made of."""
  seeds = []
  for seed, by_variant in folders.items():
    base = greedy(by_variant['with NLL'], 0)
    row: dict = {'seed': seed, 'seed_accuracy': sum(base.values()) / len(base), 'n': len(base)}
    finals = {}
    for variant, folder in by_variant.items():
      finals[variant] = greedy(folder, last_iteration(folder))
      difference = compare(base, finals[variant])
      row[variant] = {
          'accuracy': sum(finals[variant].values()) / len(base),
          'by_iteration': [
              sum(greedy(folder, n).values()) / len(base)
              for n in range(last_iteration(folder) + 1)],
          'gain': difference.value, 'gain_low': difference.low, 'gain_high': difference.high,
          'shifts': shifts(folder)}
    nll = compare(finals['without NLL'], finals['with NLL'])
    row['nll_effect'] = {'value': nll.value, 'low': nll.low, 'high': nll.high}
    seeds.append(row)
  return {'seeds': seeds, 'verdicts': verdicts(seeds)}


def verdicts(seeds: list[dict]) -> dict[str, dict]:
  """Each claim with its figure over seeds and whether it holds."""
  gains = [row['with NLL']['gain'] for row in seeds]
  effects = [row['nll_effect']['value'] for row in seeds]
  return {
      'every seed model starts between 30% and 60%': _verdict(
          all(0.3 <= row['seed_accuracy'] <= 0.6 for row in seeds),
          ', '.join(f'{100 * row["seed_accuracy"]:.1f}%' for row in seeds)),
      'IRPO gains at least 15 points on every seed, and its 95% interval excludes 0': _verdict(
          all(row['with NLL']['gain'] >= 0.15 and row['with NLL']['gain_low'] > 0
              for row in seeds),
          f'{_points(gains)}; per seed ' + ', '.join(
              f'{100 * row["with NLL"]["gain"]:+.1f} [{100 * row["with NLL"]["gain_low"]:+.1f}, '
              f'{100 * row["with NLL"]["gain_high"]:+.1f}]' for row in seeds)),
      'with NLL the log-prob of chosen responses rises in training': _verdict(
          _shift(seeds, 'with NLL').low > 0, _shift_text(seeds, 'with NLL')),
      'without NLL the log-prob of chosen responses falls in training': _verdict(
          _shift(seeds, 'without NLL').high < 0, _shift_text(seeds, 'without NLL')),
      'accuracy ends lower without NLL': _verdict(
          all(row['nll_effect']['low'] > 0 for row in seeds)
          or (len(effects) > 1 and mean_estimate(effects).low > 0),
          f'with minus without {_points(effects)}; per seed ' + ', '.join(
              f'{100 * row["nll_effect"]["value"]:+.1f} [{100 * row["nll_effect"]["low"]:+.1f}, '
              f'{100 * row["nll_effect"]["high"]:+.1f}]' for row in seeds)),
  }


def _verdict(holds: bool, seen: str) -> dict:
  return {'verdict': 'holds' if holds else 'does not hold', 'seen': seen}


def _points(values: list[float]) -> str:
  if len(values) < 2:
    return f'{100 * values[0]:+.1f} points'
  estimate = mean_estimate(values)
  return (f'mean {100 * estimate.value:+.1f} points, 95% interval over seeds '
          f'[{100 * estimate.low:+.1f}, {100 * estimate.high:+.1f}]')


def _shift(seeds: list[dict], variant: str) -> Estimate:
  """Mean change of the chosen log-prob per iteration: over iterations first, then over seeds."""
  return mean_estimate([
      statistics.fmean(x['chosen/change'] for x in row[variant]['shifts']) for row in seeds])


def _shift_text(seeds: list[dict], variant: str) -> str:
  estimate = _shift(seeds, variant)
  each = [x['chosen/change'] for row in seeds for x in row[variant]['shifts']]
  return (f'mean {estimate.value:+.2f} nats per response and iteration, 95% interval over seeds '
          f'[{estimate.low:+.2f}, {estimate.high:+.2f}]; {sum(x > 0 for x in each)} of {len(each)} '
          'iterations rise')


def main(argv) -> None:
  del argv
  output = epath.Path(FLAGS.output or DEFAULT_OUTPUT)
  folders: dict[int, dict[str, epath.Path]] = {}
  for seed in claims.seeds():
    first = output / f'seed_{seed}_with_nll'
    second = output / f'seed_{seed}_without_nll'
    claims.start_run('irpo', first, [f'--seed={seed}'], makes_world=True)
    claims.start_run('irpo', second, [
        f'--flagfile={irpo_flags.WORLD_FLAGS}', f'--seed={seed}', '--nll_alpha=0',
        f'--model={first}/seed/model', f'--train={first}/world/train.jsonl',
        f'--test={first}/world/test.jsonl'])
    folders[seed] = {'with NLL': first, 'without NLL': second}
  summary = summarise(folders)
  (output / 'summary.json').write_text(json.dumps(summary, indent=2))
  show(summary)


def show(summary: Mapping) -> None:
  progress = Progress()
  progress.table(
      'Greedy accuracy on held-out problems, %',
      ('seed', 'variant', 'by iteration', 'gain [95%]', 'chosen log-prob change',
       'rejected log-prob change'),
      [[row['seed'], variant,
        ' '.join(f'{100 * x:.1f}' for x in row[variant]['by_iteration']),
        f'{100 * row[variant]["gain"]:+.1f} [{100 * row[variant]["gain_low"]:+.1f}, '
        f'{100 * row[variant]["gain_high"]:+.1f}]',
        ' '.join(f'{x["chosen/change"]:+.2f}' for x in row[variant]['shifts']),
        ' '.join(f'{x["rejected/change"]:+.2f}' for x in row[variant]['shifts'])]
       for row in summary['seeds'] for variant in VARIANTS])
  progress.table('Claims', ('claim', 'verdict', 'seen'),
                 [[claim, v['verdict'], v['seen']] for claim, v in summary['verdicts'].items()])


if __name__ == '__main__':
  common_flags.run(main)
