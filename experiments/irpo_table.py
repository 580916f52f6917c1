"""The tables that end a run of an iterated method, read back from the run folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from jaxrl.evaluation.statistics import paired_difference
from jaxrl.runs.evaluation_stage import read_evaluation
from jaxrl.runs.metrics import read_metrics
from jaxrl.runs.session import Session

# Three narrow tables: one with all columns is readable neither on a terminal nor in a file.
RESULTS = ('iteration', 'greedy %', '95% interval', 'majority %', 'pairs', 'all correct',
           'all wrong')
RESPONSES = ('iteration', 'length', 'logp chosen', 'logp rejected', 'sample tokens/s',
             'train tokens/s')
STAGES = {'sample': 'samples', 'score': 'scores', 'pair': 'pairs', 'reference': 'reference',
          'select': 'select', 'train': 'train', 'evaluate': 'evaluation'}


def rows(session: Session) -> list[dict[str, str]]:
  """One row per iteration, cells by column; log-probs are those of the last training log."""
  entries = session.run.entries
  records = read_metrics(session.run.folder / 'metrics.jsonl')
  table = []
  iteration = 0
  while (name := f'iteration_{iteration:02d}') + '/evaluation' in entries:
    score: Mapping = entries[f'{name}/evaluation'].counts
    pairs = entries[f'{name}/pairs'].counts if f'{name}/pairs' in entries else {}
    # Iteration 0 has records of the seed's training, which are not preference training.
    last = {r['stage']: r for r in records if r['iteration'] == iteration} if iteration else {}
    train, sample = last.get('train', {}), last.get('sample', {})
    low, high = score['greedy_low'], score['greedy_high']
    table.append({
        'iteration': str(iteration),
        'greedy %': _tenths(score['greedy_accuracy'], 100),
        '95% interval': f'{_tenths(low, 100)}-{_tenths(high, 100)}',   # a space could be broken at
        'majority %': _tenths(score.get('majority_accuracy'), 100),
        'length': _tenths(score['length']),
        'pairs': str(pairs.get('pairs/count', '-')),
        'all correct': str(pairs.get('pairs/prompts_all_correct', '-')),
        'all wrong': str(pairs.get('pairs/prompts_all_wrong', '-')),
        'logp chosen': _tenths(train.get('logps/chosen')),
        'logp rejected': _tenths(train.get('logps/rejected')),
        'sample tokens/s': _whole(sample.get('perf/tokens_per_second')),
        'train tokens/s': _whole(train.get('perf/tokens_per_second'))} | {
        column: _seconds(entries, f'{name}/{stage}') for column, stage in STAGES.items()})
    iteration += 1
  return table


Titled = tuple[str, tuple[str, ...]]         # what a table shows, and its columns
ANSWERS: tuple[Titled, ...] = (
    ('answers of each model, and the prompts and pairs it was trained on', RESULTS),)


def show(
    session: Session, table: list[dict[str, str]], *, name: str = 'IRPO',
    results: Sequence[Titled] = ANSWERS,
) -> None:
  """Prints the tables and the paired difference between the last model and the first.

  `name` is the method's; `results` come before the tables that all methods have.
  """
  stages = [column for column in STAGES if any(row[column] != '-' for row in table)]
  for title, columns in (
      *results,
      ('length and, at the end of training, mean log-prob of responses; speed', RESPONSES),
      ('seconds per stage', ('iteration', *stages))):
    width = {column: max(len(row[column]) for row in table) for column in columns}
    session.progress.table(
        f'{name}: {title}', columns, [[row[c].rjust(width[c]) for c in columns] for row in table])
  before, after = (_greedy(session, n) for n in (0, len(table) - 1))
  difference = paired_difference([before[key] for key in sorted(before)],
                                 [after[key] for key in sorted(before)])
  session.progress.line(
      f'greedy accuracy, last minus first: {100 * difference.value:+.1f} points, 95% interval '
      f'[{100 * difference.low:+.1f}, {100 * difference.high:+.1f}] over {len(before)} problems')


def _greedy(session: Session, iteration: int) -> dict[str, bool]:
  return {
      row['prompt_id']: row['verdict'] == 'correct'
      for row in read_evaluation(session, iteration) if row['kind'] == 'greedy'
  }


def _seconds(entries: Mapping, name: str) -> str:
  return _tenths(entries[name].seconds if name in entries else None)


def _tenths(value: float | None, scale: float = 1) -> str:
  return '-' if value is None else f'{scale * value:.1f}'


def _whole(value: float | None) -> str:
  return '-' if value is None else f'{value:.0f}'
