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

from experiments import claim_runs, common_flags, findings, irpo_flags, output_flag
from experiments.findings import FAILS, HOLDS, NOT_PUBLISHED, POINTS, SHARE, Unit, finding
from jaxrl.evaluation.statistics import Estimate, paired_difference
from jaxrl.runs.manifest import read_manifest
from jaxrl.runs.progress import Progress
from jaxrl.runs.tables import EVALUATION, read_table

FLAGS = flags.FLAGS
for module in (claim_runs, output_flag):
  flags.adopt_module_key_flags(module)
DEFAULT_OUTPUT = 'runs/irpo_ablation'      # folder of the runs and summary.json

VARIANTS = ('with NLL', 'without NLL')
NATS = Unit(1, '+.2f', ' nats per response and iteration')


def folders(output: epath.Path, seed: int) -> dict[str, epath.Path]:
  """The run folders of one seed by variant."""
  return {name: output / f'seed_{seed}_{name.lower().replace(" ", "_")}' for name in VARIANTS}


def run_seed(output: epath.Path, seed: int) -> None:
  """The runs of one seed; the first one makes world and seed model for both."""
  first, second = folders(output, seed).values()
  claim_runs.start_run('irpo', first, [f'--seed={seed}'], makes_world=True)
  claim_runs.start_run('irpo', second, [
      f'--flagfile={irpo_flags.WORLD_FLAGS}', f'--seed={seed}', '--nll_alpha=0',
      f'--model={first}/seed/model', f'--train={first}/world/train.jsonl',
      f'--test={first}/world/test.jsonl'])


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


def summarise(runs: Mapping[int, Mapping[str, epath.Path]]) -> dict:
  """Everything the tables and verdicts are made of, from the run folders by seed and variant."""
  seeds = []
  for seed, by_variant in runs.items():
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
  """Each claim with its figure over seeds and whether it holds: what is not shown does not."""
  starts = [Estimate(*[row['seed_accuracy']] * 3) for row in seeds]
  gains = [Estimate(*(row['with NLL'][key] for key in ('gain', 'gain_low', 'gain_high')))
           for row in seeds]
  effects = [Estimate(**row['nll_effect']) for row in seeds]
  rise, fall = ([_shift(row, variant) for row in seeds] for variant in VARIANTS)
  return {
      'every seed model starts between 30% and 60%': finding(
          _verdict(all(0.3 <= e.value <= 0.6 for e in starts)), SHARE,
          findings.over_seeds(starts), starts, published=NOT_PUBLISHED),
      'IRPO gains at least 15 points on every seed, and its 95% interval excludes 0': finding(
          _verdict(all(e.value >= 0.15 and e.low > 0 for e in gains)), POINTS,
          findings.over_seeds(gains), gains,
          published='+26.0 points on GSM8K in 4 iterations (55.6 to 81.6), +8.9 on ARC-Challenge '
                    'and +8.3 on MATH in 3'),
      'with NLL the log-prob of chosen responses rises in training': finding(
          _verdict(findings.over_seeds(rise).low > 0), NATS, findings.over_seeds(rise), rise,
          published='rises (curves, no figure)', more=_rising(seeds, 'with NLL')),
      'without NLL the log-prob of chosen responses falls in training': finding(
          _verdict(findings.over_seeds(fall).high < 0), NATS, findings.over_seeds(fall), fall,
          published='falls on GSM8K, barely rises on ARC and MATH (curves, no figure)',
          more=_rising(seeds, 'without NLL')),
      'accuracy ends lower without NLL': finding(
          _verdict(all(e.low > 0 for e in effects) or findings.over_seeds(effects).low > 0),
          POINTS, findings.over_seeds(effects), effects,
          published='with minus without, one iteration: +11.3 points on GSM8K (73.1, 61.8), +2.0 '
                    'on ARC-Challenge, +5.3 on MATH', more='with minus without'),
  }


def _verdict(holds: bool) -> str:
  return HOLDS if holds else FAILS


def _shift(row: Mapping, variant: str) -> Estimate:
  """Mean change of the chosen log-prob over the iterations of one seed, without an interval."""
  mean = statistics.fmean(x['chosen/change'] for x in row[variant]['shifts'])
  return Estimate(mean, mean, mean)


def _rising(seeds: list[dict], variant: str) -> str:
  each = [x['chosen/change'] for row in seeds for x in row[variant]['shifts']]
  return f'{sum(x > 0 for x in each)} of {len(each)} iterations rise'


def main(argv) -> None:
  del argv
  output = epath.Path(FLAGS.output or DEFAULT_OUTPUT)
  seeds = claim_runs.seeds()
  for seed in seeds:
    run_seed(output, seed)
  summary = summarise({seed: folders(output, seed) for seed in seeds})
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
  progress.table('Claims', findings.COLUMNS, findings.table(summary['verdicts']))


if __name__ == '__main__':
  common_flags.run(main)
