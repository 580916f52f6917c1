"""DIVE's four variants on the embedded world, over several seeds, with verdicts.

`python -m experiments.dive_claims --seeds=0,1,2` runs `experiments.dive` four times per seed, with
and without --global_pool and --selection, from the same seed model and with the same first samples,
and prints what the paper claims beside what is seen. Diversity is that of answers that each last
model samples for the held-out problems, in a yardstick that is the same for all: words and hashed
n-grams. Verdicts are computed from the run folders. Every run resumes; the same command again goes
on where it stopped. The folder is --output, by default runs/dive_claims.
"""

from __future__ import annotations

import collections
import json
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from absl import flags
from etils import epath

from experiments import claim_runs, common_flags, dive_flags, findings, output_flag
from experiments.findings import FAILS, HOLDS, OPEN, PERCENT, POINTS, finding, remark
from jaxrl.evaluation.diversity import EQUATION, by_side, solved_share
from jaxrl.evaluation.statistics import Estimate, mean_estimate, paired_difference
from jaxrl.evaluation.text_embedding import hashed_ngrams
from jaxrl.runs.manifest import read_manifest
from jaxrl.runs.progress import Progress
from jaxrl.runs.tables import EVALUATION, read_table

FLAGS = flags.FLAGS
for module in (claim_runs, output_flag):
  flags.adopt_module_key_flags(module)
DEFAULT_OUTPUT = 'runs/dive_claims'        # folder of the runs and summary.json

VANILLA, BOTH = 'vanilla', 'global + selection'
VARIANTS = {
    VANILLA: ('--noglobal_pool', '--noselection'),
    'global': ('--global_pool', '--noselection'),
    'selection': ('--noglobal_pool', '--selection'),
    BOTH: ('--global_pool', '--selection')}
MEASURES = {
    'distinct-n, right': 'positive/distinct_n', 'distinct-n, wrong': 'negative/distinct_n',
    'embedding, right': 'positive/embedding', 'embedding, wrong': 'negative/embedding'}
# Measure -> vanilla and global + selection with 10 samples, the same with 50, on GSM8K.
PUBLISHED = {
    'distinct-n, right': (0.345, 0.397, 0.309, 0.448),
    'distinct-n, wrong': (0.454, 0.507, 0.380, 0.502),
    'embedding, right': (0.111, 0.132, 0.106, 0.152),
    'embedding, wrong': (0.168, 0.196, 0.168, 0.224)}
MARGIN = 0.05                 # of accuracy; what counts as equal
# Variant -> how its accuracy differs from that of vanilla on GSM8K with 10 and 50 samples.
PUBLISHED_ACCURACY = {
    'global': '+0.3 and -0.2', 'selection': '-0.1 and -0.2', BOTH: '+0.3 and +0.4'}
PUBLISHED_FALL = {
    'embedding, right': 'falls by 20% (hard questions) to 44% (easy ones)',
    'embedding, wrong': 'falls by 25% (hard questions) to 53% (easy ones)'}
LEAST = 0.10                 # the smallest of the published gains; the largest is 0.45
RESAMPLES = 2000
FEWEST = 10                  # questions that an interval over questions takes
NO_DIVERSITY = 1e-6          # what rounding leaves of the distance of equal texts

ByQuestion = Mapping[str, float]            # prompt_id -> a measure of its responses


def folders(output: epath.Path, seed: int) -> dict[str, epath.Path]:
  """The run folders of one seed by variant."""
  return {name: output / f'seed_{seed}_{name.replace(" + ", "_")}' for name in VARIANTS}


def run_seed(output: epath.Path, seed: int) -> None:
  """The runs of one seed; the vanilla run makes the world and the seed model."""
  found = folders(output, seed)
  first = found.pop(VANILLA)
  claim_runs.start_run('dive', first, [f'--seed={seed}', *VARIANTS[VANILLA]], makes_world=True)
  for variant, folder in found.items():
    claim_runs.start_run('dive', folder, [
        *claim_runs.without_world(dive_flags.WORLD_FLAGS), f'--seed={seed}', *VARIANTS[variant],
        f'--model={first}/seed/model', f'--train={first}/world/train.jsonl',
        f'--test={first}/world/test.jsonl'])


def by_question(rows: Iterable[Mapping]) -> dict[str, dict[str, float]]:
  """Measure -> question -> its value, over the questions that have it."""
  groups: dict[str, list[Mapping]] = collections.defaultdict(list)
  for row in rows:
    groups[row['prompt_id']].append(row)
  found: dict[str, dict[str, float]] = {name: {} for name in MEASURES}
  for prompt_id, group in groups.items():
    metrics = by_side(group, hashed_ngrams([row['response'] for row in group]), pattern=EQUATION)
    for name, key in MEASURES.items():
      if key in metrics:
        found[name][prompt_id] = metrics[key]
  return found


def relative_gain(before: ByQuestion, after: ByQuestion) -> Estimate | None:
  """mean(after) / mean(before) - 1, with a 95% bootstrap interval over questions.

  The two may have different questions. None where one has fewer than `FEWEST`, or where there is no
  diversity to begin with.
  """
  if min(len(before), len(after)) < FEWEST or np.mean([*before.values()]) < NO_DIVERSITY:
    return None
  questions = sorted({*before, *after})
  values = np.array([[side.get(q, np.nan) for q in questions] for side in (before, after)])
  rng = np.random.default_rng(0)
  drawn = rng.integers(len(questions), size=(RESAMPLES, len(questions)))
  resampled = values[:, drawn]                                       # [2, RESAMPLES, questions]
  counts, sums = (~np.isnan(resampled)).sum(-1), np.nansum(resampled, -1)
  usable = (counts > 0).all(0) & (sums[0] > 0)
  means = sums[:, usable] / counts[:, usable]
  low, high = np.quantile(means[1] / means[0] - 1, (0.025, 0.975))
  first, last = np.nanmean(values, axis=1)
  return Estimate(float(last / first - 1), float(low), float(high))


def answers(folder: epath.Path, iteration: int) -> list[dict]:
  path = folder / f'iteration_{iteration:02d}' / 'evaluation.parquet'
  return read_table(path, EVALUATION).to_pylist()


def greedy(rows: Iterable[Mapping]) -> dict[str, bool]:
  """Whether the greedy answer of each held-out problem is right, in the order of their ids."""
  right = {row['prompt_id']: row['verdict'] == 'correct' for row in rows if row['kind'] == 'greedy'}
  return {key: right[key] for key in sorted(right)}


def summarise(runs: Mapping[int, Mapping[str, epath.Path]]) -> dict:
  """Everything the tables and verdicts are made of, from the run folders by seed and variant."""
  seeds = []
  for seed, by_variant in runs.items():
    row: dict = {'seed': seed, 'variants': {}}
    diversity: dict[str, dict[str, dict[str, float]]] = {}
    for variant, folder in by_variant.items():
      last = max(int(name[10:12]) for name in read_manifest(folder) if name.endswith('/evaluation'))
      evaluations = [answers(folder, t) for t in range(last + 1)]
      votes = [r for r in evaluations[-1] if r['kind'] == 'vote']
      diversity[variant] = by_question(votes)
      right = greedy(evaluations[-1])
      row['variants'][variant] = found = {
          'right': list(right.values()),
          'accuracy': [float(np.mean([*greedy(rows).values()])) for rows in evaluations],
          'any': solved_share(votes),
          'length': float(np.mean([r['length'] for r in votes])) if votes else None,
          'diversity': {name: _estimate(list(each.values()))
                        for name, each in diversity[variant].items()}}
      if variant == VANILLA:
        start = by_question(r for r in evaluations[0] if r['kind'] == 'vote')
        found['change'] = {name: _plain(relative_gain(start[name], diversity[variant][name]))
                           for name in MEASURES}
        row['n'] = len(right)
      else:
        found['gain'] = {
            name: _plain(relative_gain(diversity[VANILLA][name], diversity[variant][name]))
            for name in MEASURES}
    seeds.append(row)
  return {'seeds': seeds, 'verdicts': verdicts(seeds)}


def _plain(estimate: Estimate | None) -> dict[str, float] | None:
  return None if estimate is None else vars(estimate)


def _estimate(values: Sequence[float]) -> dict[str, float] | None:
  return _plain(mean_estimate(values)) if values else None


def verdicts(seeds: Sequence[Mapping]) -> dict[str, dict]:
  """Each claim with its figure over seeds: holds, does not hold or undecided."""
  found = {
      f'{BOTH} is at least {LEAST:.0%} more diverse than vanilla: {name}': _judge(
          [row['variants'][BOTH]['gain'][name] for row in seeds],
          holds=lambda e: e.low > 0 and e.value >= LEAST, fails=lambda e: e.high < LEAST,
          published=f'{after / before - 1:+.0%} with 10 samples, {after_50 / before_50 - 1:+.0%} '
                    'with 50 on GSM8K')
      for name, (before, after, before_50, after_50) in PUBLISHED.items()}
  for variant in VARIANTS:
    if variant != VANILLA:
      found[f'{variant} is at most {100 * MARGIN:.0f} points less accurate than vanilla'] = (
          _judge_accuracy(seeds, variant))
  return found | {
      f'vanilla ends less diverse than it starts: {name}': _judge(
          [row['variants'][VANILLA]['change'][name] for row in seeds],
          holds=lambda e: e.high < 0, fails=lambda e: e.low > 0,
          published=PUBLISHED_FALL.get(name, 'falls (curves, no figure)'))
      for name in MEASURES}


def _judge(each: Sequence[Mapping | None], *, holds, fails, published: str) -> dict[str, str]:
  """A verdict on the mean over seeds by its interval; of a single seed by its own interval."""
  known = [Estimate(**e) for e in each if e is not None]
  if len(known) < len(each):
    return remark(OPEN, f'{len(each) - len(known)} of {len(each)} seeds have fewer than {FEWEST} '
                  'questions with two such responses, or no diversity to begin with',
                  published=published)
  mean = findings.over_seeds(known)
  verdict = HOLDS if holds(mean) else FAILS if fails(mean) else OPEN
  return finding(verdict, PERCENT, mean, known, published=published)


def _judge_accuracy(seeds: Sequence[Mapping], variant: str) -> dict[str, str]:
  """Whether the paired difference over the problems of all seeds is surely above -MARGIN."""
  pairs = [(row['variants'][VANILLA]['right'], row['variants'][variant]['right']) for row in seeds]
  pooled = paired_difference(
      [x for before, _ in pairs for x in before], [x for _, after in pairs for x in after])
  verdict = HOLDS if pooled.low > -MARGIN else FAILS if pooled.high < 0 else OPEN
  return finding(verdict, POINTS, pooled,
                 [paired_difference(*pair) for pair in pairs],
                 published=f'{PUBLISHED_ACCURACY[variant]} points with 10 and 50 samples on GSM8K')


def show(summary: Mapping) -> None:
  progress = Progress()
  progress.table(
      'DIVE on the embedded world: accuracy on held-out problems, %, and length of samples',
      ('seed', 'variant', 'greedy by iteration', 'any of K', 'length'),
      [[row['seed'], variant, ' '.join(f'{100 * x:.1f}' for x in found['accuracy']),
        f'{100 * found["any"]:.1f}', '-' if found['length'] is None else f'{found["length"]:.1f}']
       for row in summary['seeds'] for variant, found in row['variants'].items()])
  progress.table(
      'Diversity of sampled answers of the last model, with 95% intervals over questions',
      ('seed', 'variant', *MEASURES),
      [[row['seed'], variant, *map(_interval, found['diversity'].values())]
       for row in summary['seeds'] for variant, found in row['variants'].items()])
  progress.table(
      'Relative to vanilla', ('seed', 'variant', *MEASURES),
      [[row['seed'], variant, *(
          '-' if e is None else _gain(Estimate(**e)) for e in found['gain'].values())]
       for row in summary['seeds'] for variant, found in row['variants'].items()
       if 'gain' in found])
  progress.table('Claims', findings.COLUMNS, findings.table(summary['verdicts']))


def _gain(e: Estimate) -> str:
  return f'{PERCENT.number(e.value)}% {PERCENT.interval(e)}'


def _interval(found: Mapping | None) -> str:
  return '-' if found is None else f'{found["value"]:.3f} [{found["low"]:.3f}, {found["high"]:.3f}]'


def main(argv) -> None:
  del argv
  output = epath.Path(FLAGS.output or DEFAULT_OUTPUT)
  seeds = claim_runs.seeds()
  for seed in seeds:
    run_seed(output, seed)
  summary = summarise({seed: folders(output, seed) for seed in seeds})
  (output / 'summary.json').write_text(json.dumps(summary, indent=2))
  show(summary)


if __name__ == '__main__':
  common_flags.run(main)
