"""What ScPO claims, on the embedded world, over several seeds.

`python -m experiments.scpo_claims --seeds=0,1,2` runs per seed `experiments.scpo`, the same with
--noweighted, and `experiments.irpo` with gold answers, all from one seed model, and prints each
claim with what is seen. Verdicts are computed from the run folders. Every run resumes; the same
command again goes on where it stopped. The folder is --output, by default runs/scpo_claims.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

from absl import flags
from etils import epath

from experiments import claims, common_flags, irpo_flags, output_flag, scpo_flags
from experiments.irpo_ablation import compare, greedy, last_iteration
from jaxrl.evaluation.statistics import Estimate, mean_estimate
from jaxrl.evaluation.vote_correlation import vote_correlation
from jaxrl.runs.folder import FLAGS as FLAGS_FILE
from jaxrl.runs.folder import decode_flags
from jaxrl.runs.progress import Progress
from jaxrl.runs.tables import SCORES, read_table

FLAGS = flags.FLAGS
for module in (claims, output_flag):
  flags.adopt_module_key_flags(module)
DEFAULT_OUTPUT = 'runs/scpo_claims'        # folder of the runs and summary.json
VARIANTS = ('ScPO', 'ScPO unweighted', 'IRPO with gold')
CLOSE = 0.05        # 'within a few points': of accuracy
EQUAL = 0.02        # 'worse or equal': what still counts as equal


def run_seed(output: epath.Path, seed: int) -> dict[str, epath.Path]:
  """The runs of one seed by variant; the first one makes world and seed model for all."""
  folders = {
      name: output / f'seed_{seed}_{name.lower().replace(" ", "_")}' for name in VARIANTS}
  first = folders['ScPO']
  claims.start_run('scpo', first, [f'--seed={seed}'], makes_world=True)
  given = [f'--seed={seed}', f'--model={first}/seed/model', f'--train={first}/world/train.jsonl',
           f'--test={first}/world/test.jsonl']
  claims.start_run('scpo', folders['ScPO unweighted'],
                   [*without_world(scpo_flags.WORLD_FLAGS), *given, '--noweighted'])
  claims.start_run('irpo', folders['IRPO with gold'],
                   [f'--flagfile={irpo_flags.WORLD_FLAGS}', *given])
  return folders


def without_world(path: Path) -> list[str]:
  """Flags of a file for a run that is given its model, and so has no world to make."""
  return [line for line in path.read_text().splitlines()
          if line.startswith('--') and not line.startswith(('--world_', '--seed_'))]


def votes_of(folder: epath.Path) -> list[dict]:
  """Per iteration Somers' D of the votes and the mean share of the top answer."""
  voters = int(decode_flags(folder / FLAGS_FILE)['samples_per_prompt'])
  found = []
  for t in range(1, last_iteration(folder) + 1):
    table = read_table(folder / f'iteration_{t:02d}' / 'scores.parquet', SCORES).to_pylist()
    base = [row for row in table if row['sample_index'] < voters]
    tops: dict[str, int] = {}
    for row in base:
      tops[row['prompt_id']] = max(tops.get(row['prompt_id'], 0), row['votes'])
    found.append({'correlation': vote_correlation(base),
                  'top': statistics.fmean(tops.values()) / voters})
  return found


def summarise(folders: Mapping[int, Mapping[str, epath.Path]]) -> dict:
  """Everything the tables and verdicts are made of."""
  seeds = []
  for seed, by_variant in folders.items():
    start = greedy(by_variant['ScPO'], 0)
    final = {name: greedy(f, last_iteration(f)) for name, f in by_variant.items()}
    seeds.append({
        'seed': seed,
        'by_iteration': {
            name: [statistics.fmean(greedy(f, t).values()) for t in range(last_iteration(f) + 1)]
            for name, f in by_variant.items()},
        'votes': votes_of(by_variant['ScPO']),
        'gain': vars(compare(start, final['ScPO'])),
        'to_irpo': vars(compare(final['IRPO with gold'], final['ScPO'])),
        'to_unweighted': vars(compare(final['ScPO unweighted'], final['ScPO']))})
  return {'seeds': seeds, 'verdicts': verdicts(seeds)}


def over_seeds(estimates: Sequence[Mapping]) -> Estimate:
  """Mean with its interval over seeds; of a single seed the interval over its problems."""
  if len(estimates) == 1:
    return Estimate(**estimates[0])
  return mean_estimate([e['value'] for e in estimates])


def above(estimate: Estimate, threshold: float) -> str:
  """'holds' where the whole interval is above the threshold, 'does not hold' where it is below."""
  if estimate.low > threshold:
    return 'holds'
  return 'does not hold' if estimate.high < threshold else 'undecided'


def verdicts(seeds: Sequence[Mapping]) -> dict[str, dict]:
  """Each claim with its figure over seeds and whether it holds."""
  found = {}
  for claim, key, threshold in (
      ('without any gold answer accuracy rises over the iterations', 'gain', 0.0),
      (f'it ends within {100 * CLOSE:.0f} points of IRPO with gold', 'to_irpo', -CLOSE),
      (f'without weights it ends lower, or equal to {100 * EQUAL:.0f} points', 'to_unweighted',
       -EQUAL)):
    estimate = over_seeds([row[key] for row in seeds])
    found[claim] = {
        'verdict': above(estimate, threshold),
        'seen': f'{_points(estimate)} over seeds; per seed '
                + ', '.join(_points(Estimate(**row[key])) for row in seeds)}
  correlations = [x['correlation'] for row in seeds for x in row['votes']
                  if x['correlation'] is not None]
  of_seeds = mean_estimate([row['votes'][0]['correlation'] or 0.0 for row in seeds])
  found['votes tell right answers from wrong ones'] = {
      'verdict': above(of_seeds, 0.0),
      'seen': f"Somers' D of the seed model's samples {_plain(of_seeds)}; over all iterations "
              f'{min(correlations, default=0):.2f} to {max(correlations, default=0):.2f}'}
  rise = mean_estimate([row['votes'][-1]['top'] - row['votes'][0]['top'] for row in seeds])
  found['the share of the top answer rises over the iterations'] = {
      'verdict': above(rise, 0.0), 'seen': f'{_points(rise)} over seeds'}
  return found


def _points(estimate: Estimate) -> str:
  return (f'{100 * estimate.value:+.1f} points [{100 * estimate.low:+.1f}, '
          f'{100 * estimate.high:+.1f}]')


def _plain(estimate: Estimate) -> str:
  return f'{estimate.value:.2f} [{estimate.low:.2f}, {estimate.high:.2f}]'


def show(summary: Mapping) -> None:
  progress = Progress()
  progress.table(
      'Greedy accuracy on held-out problems, %', ('seed', 'variant', 'by iteration'),
      [[row['seed'], name, ' '.join(f'{100 * x:.1f}' for x in row['by_iteration'][name])]
       for row in summary['seeds'] for name in VARIANTS])
  progress.table('Claims', ('claim', 'verdict', 'seen'),
                 [[claim, v['verdict'], v['seen']] for claim, v in summary['verdicts'].items()])


def main(argv) -> None:
  del argv
  output = epath.Path(FLAGS.output or DEFAULT_OUTPUT)
  summary = summarise({seed: run_seed(output, seed) for seed in claims.seeds()})
  (output / 'summary.json').write_text(json.dumps(summary, indent=2))
  show(summary)


if __name__ == '__main__':
  common_flags.run(main)
