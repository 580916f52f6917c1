"""The table that ends an IRPO run, read back from the run folder."""

from __future__ import annotations

from collections.abc import Mapping

from jaxrl.evaluation.statistics import paired_difference
from jaxrl.runs.evaluation_stage import read_evaluation
from jaxrl.runs.metrics import read_metrics
from jaxrl.runs.session import Session

COLUMNS = (
    'iteration', 'greedy % [95%]', 'majority %', 'pairs', 'all correct', 'all wrong',
    'logp chosen', 'logp rejected', 'length', 'sample s', 'score s', 'pair s', 'reference s',
    'train s', 'evaluate s', 'sample tok/s', 'train tok/s')
STAGES = ('samples', 'scores', 'pairs', 'reference', 'train', 'evaluation')


def rows(session: Session) -> list[list]:
  """One row per iteration; log-probs are those of the last training log."""
  entries = session.run.entries
  records = read_metrics(session.run.folder / 'metrics.jsonl')
  table = []
  iteration = 0
  while (name := f'iteration_{iteration:02d}') + '/evaluation' in entries:
    score: Mapping = entries[f'{name}/evaluation'].counts
    last = [r for r in records if r['iteration'] == iteration and r['stage'] == 'train']
    pairs = entries[f'{name}/pairs'].counts if f'{name}/pairs' in entries else {}
    seconds = [_seconds(entries, f'{name}/{stage}') for stage in STAGES]
    samples = entries.get(f'{name}/samples')
    train = last[-1] if last and iteration else {}
    table.append([
        iteration,
        f'{100 * score["greedy_accuracy"]:.1f} [{100 * score["greedy_low"]:.1f}, '
        f'{100 * score["greedy_high"]:.1f}]',
        _number(score.get('majority_accuracy'), 100), pairs.get('pairs/count', '-'),
        pairs.get('pairs/prompts_all_correct', '-'), pairs.get('pairs/prompts_all_wrong', '-'),
        _number(train.get('logps/chosen')), _number(train.get('logps/rejected')),
        _number(score['length']), *seconds,
        _number(samples and samples.counts['tokens'] / max(samples.seconds, 1e-9)),
        _number(train.get('perf/tokens_per_second'))])
    iteration += 1
  return table


def show(session: Session, table: list[list]) -> None:
  """Prints the table and the paired difference between the last model and the first."""
  session.progress.table('IRPO', COLUMNS, table)
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


def _seconds(entries: Mapping, name: str) -> float | str:
  return round(entries[name].seconds, 1) if name in entries else '-'


def _number(value: float | None, scale: float = 1) -> float | str:
  return '-' if value is None else round(scale * value, 1)
