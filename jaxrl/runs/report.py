"""The page of a run: gathers what is on disk in a run folder and writes `report.html`.

`write_report` is called after every iteration; `python -m jaxrl.runs.report RUN_DIR` renders the
page of any run folder again. Any part of the folder may be missing while a run is in progress.
The page holds no clock and no random choice: the same folder gives the same bytes.
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import re
import statistics
import sys
from collections.abc import Callable
from typing import Any

from etils import epath

from jaxrl.errors import InputError
from jaxrl.evaluation.statistics import paired_difference, proportion
from jaxrl.rewards.voting import majority_vote
from jaxrl.runs import durable, manifest, report_page, report_tables
from jaxrl.runs.folder import FLAGS, VERSIONS, decode_flags, read_run
from jaxrl.runs.metrics import read_metrics
from jaxrl.runs.report_tables import finite

MAX_PROMPTS = 200
MAX_BYTES = 24_000_000  # of prompts and responses in the whole page; a phone opens this in seconds
MAX_POINTS = 600  # of a training curve: about one a pixel on a desktop

_PARTS = ('samples', 'scores', 'pairs', 'reference', 'evaluation')
_SERIES = (
    'loss', 'rewards/margins', 'rewards/chosen', 'rewards/rejected', 'rewards/accuracies',
    'logps/chosen', 'logps/rejected', 'grad_norm',
)  # fmt: skip


def write_report(
    run_dir: epath.PathLike, *, max_prompts: int = MAX_PROMPTS, max_bytes: int = MAX_BYTES
) -> epath.Path:
  """Writes `RUN_DIR/report.html` from what is in the folder and returns its path.

  Args:
    run_dir: a run folder, finished or in progress.
    max_prompts: prompts with all their samples that the page carries per table; they are chosen
      evenly in file order, and the page says how many of how many it shows.
    max_bytes: bound on the text of prompts and responses of the whole page. Where `max_prompts`
      prompts per table would exceed it, fewer are carried, and the page says so.

  Raises:
    InputError: `run_dir` is not a folder, or a bound is not positive.
  """
  run_dir = epath.Path(run_dir)
  if not run_dir.is_dir():
    raise InputError('is not a run folder', where=run_dir, fix='Give the folder of a run')
  for name, value in (('max_prompts', max_prompts), ('max_bytes', max_bytes)):
    if value < 1:
      raise InputError('is too small', where=name, expected='1 or more', found=value)
  page = report_page.render(gather(run_dir, max_prompts=max_prompts, max_bytes=max_bytes))
  path = run_dir / 'report.html'
  durable.write_file(path, page.encode())
  return path


def gather(run_dir: epath.Path, *, max_prompts: int, max_bytes: int) -> dict[str, Any]:
  """Everything the page shows, as plain values; `choices` holds the prompts of the browser."""
  notes: list[str] = []
  flags = _read(decode_flags, run_dir / FLAGS, notes, {})
  records = _read(read_metrics, run_dir / 'metrics.jsonl', notes, [])
  folders = _iterations(run_dir)
  bounds = {
      'max_prompts': max_prompts,
      'max_bytes': max(1, max_bytes // max(1, 2 * len(folders))),
  }
  choices, lengths, outcomes, evaluations, method = [], [], [], {}, None
  totals: collections.Counter[str] = collections.Counter()
  for number, folder in folders.items():
    found = report_tables.read_samples(folder, number, notes, **bounds)
    method = found.get('method') or method
    if 'choice' in found:
      choices.append(found['choice'])
    if found.get('outcomes'):
      outcomes.append({'iteration': number} | found['outcomes'])
    lengths += [
        {'iteration': number, 'group': group} | found_lengths
        for group, found_lengths in found['lengths'].items()
    ]
    totals['samples'] += found.get('n_samples', 0)
    totals['pairs'] += found.get('n_pairs', 0)
    evaluation = report_tables.read_evaluation(folder, number, notes, **bounds)
    if evaluation:
      choices.append(evaluation.pop('choice'))
      evaluations[number] = evaluation
    notes += _missing(number, folder)
  accuracy = _accuracy(records, evaluations)
  return {
      'run': run_dir.name or str(run_dir),
      'method': flags.get('method') or method,
      'model': next((flags[k] for k in ('model', 'model_dir', 'checkpoint') if flags.get(k)), None),
      'iterations': max(folders, default=None),
      'totals': dict(totals),
      'flags': flags,
      'versions': _read(_read_json, run_dir / VERSIONS, notes, {}),
      'accuracy': accuracy,
      'paired': _paired(evaluations),
      'training': _training(records),
      'lengths': lengths,
      'outcomes': outcomes,
      'stages': _stages(run_dir, notes),
      'notes': notes,
      'choices': choices,
  }


def _iterations(run_dir: epath.Path) -> dict[int, epath.Path]:
  """Iteration number -> folder, in order."""
  found = {}
  for path in run_dir.iterdir():
    match = re.fullmatch(r'iteration_(\d+)', path.name)
    if match and path.is_dir():
      found[int(match[1])] = path
  return dict(sorted(found.items()))


def _missing(number: int, folder: epath.Path) -> list[str]:
  parts = _PARTS if number else ('evaluation',)
  gone = [part for part in parts if not (folder / f'{part}.parquet').exists()]
  return [f'Iteration {number} has no {", ".join(gone)} yet.'] if gone else []


def _read_json(path: epath.Path) -> dict[str, Any]:
  try:
    found = json.loads(path.read_bytes(), parse_constant=lambda _: None)
  except ValueError:
    found = None
  if not isinstance(found, dict):
    raise InputError('this is not a JSON object', where=path)
  return found


def _read(
    reader: Callable[[epath.Path], Any], path: epath.Path, notes: list[str], empty: Any
) -> Any:
  """`reader(path)`, or `empty` where there is no such file or it is damaged, which is noted."""
  if not path.exists():
    return empty
  try:
    return reader(path)
  except InputError as error:
    notes.append(f'Left out: {error}')
    return empty


def _stages(run_dir: epath.Path, notes: list[str]) -> list[dict[str, Any]]:
  """Finished stages, by iteration (None outside of one) and within it as they finished."""
  rows = []
  path = run_dir / manifest.NAME
  for key, entry in _read(lambda p: manifest.read_manifest(p.parent), path, notes, {}).items():
    folder, _, stage = key.rpartition('/')
    match = re.fullmatch(r'iteration_(\d+)', folder)
    rows.append({
        'iteration': int(match[1]) if match else None,
        'stage': stage if match else key,
        'seconds': finite(entry.seconds),
        'counts': entry.counts,
        'rows': sum(o.rows for o in entry.outputs if o.rows is not None) or None,
    })
  return sorted(rows, key=lambda row: -1 if row['iteration'] is None else row['iteration'])


def _accuracy(records, evaluations) -> list[dict[str, Any]]:
  """Greedy and majority accuracy of each evaluated iteration, each with a 95% interval.

  The recorded metrics are what the run measured, so they win; what has no record is counted from
  the table. Prompts whose gold answer cannot be read are in neither.
  """
  rows = {}
  for number, evaluation in evaluations.items():
    row = {'iteration': number}
    voted = {p: _majority_verdict(found) for p, found in evaluation['votes'].items()}
    greedy = {p: verdict for p, (verdict, _) in evaluation['greedy'].items()}
    for kind, verdicts in (('majority', voted), ('greedy', greedy)):
      counted = [v for v in verdicts.values() if v not in (None, 'unparseable_gold')]
      if counted:
        row['n'] = len(counted)
        row[kind] = finite(sum(v == 'correct' for v in counted) / len(counted))
    if 'n' in row:
      rows[number] = row
  for record in records:
    if record['stage'] not in ('evaluate', 'evaluation'):
      continue
    row = rows.setdefault(record['iteration'], {'iteration': record['iteration']})
    row['n'] = finite(record.get('n')) or row.get('n')
    for kind in ('greedy', 'majority'):
      rate = finite(record.get(f'{kind}_accuracy'))
      if rate is not None:
        row[kind] = rate
        for side in ('low', 'high'):
          row[f'{kind}_{side}'] = finite(record.get(f'{kind}_{side}'))
  for row in rows.values():
    for kind in ('greedy', 'majority'):
      if row.get(kind) is not None and row.get(f'{kind}_low') is None and row.get('n'):
        estimate = proportion(round(row[kind] * row['n']), int(row['n']))
        row[f'{kind}_low'], row[f'{kind}_high'] = finite(estimate.low), finite(estimate.high)
  return [rows[number] for number in sorted(rows)]


def _majority_verdict(rows: list[tuple[str | None, str | None]]) -> str | None:
  """Verdict of the answer with most votes among (verdict, answer) rows of one prompt."""
  winner, _ = majority_vote([answer for _, answer in rows])
  return next((verdict for verdict, answer in rows if answer == winner), None)


def _paired(evaluations) -> dict[str, Any] | None:
  """Greedy accuracy of the last evaluation minus that of the first, on the prompts of both."""
  if len(evaluations) < 2:
    return None
  first, last = min(evaluations), max(evaluations)
  greedy = evaluations[last]['greedy']
  before, after = [], []
  for prompt_id, (verdict, _) in evaluations[first]['greedy'].items():
    both = (verdict, greedy.get(prompt_id, (None, None))[0])
    if None not in both and 'unparseable_gold' not in both:
      before.append(both[0] == 'correct')
      after.append(both[1] == 'correct')
  if len(before) < 2:
    return None
  estimate = paired_difference(before, after)
  changes = list(zip(before, after, strict=True))
  return {
      'first': first,
      'last': last,
      'n': len(changes),
      'difference': finite(estimate.value),
      'low': finite(estimate.low),
      'high': finite(estimate.high),
      'gained': changes.count((False, True)),
      'lost': changes.count((True, False)),
  }


def _training(records) -> dict[str, Any]:
  """Training curves over global steps, averaged over bins where there are very many steps.

  Steps may count on through the run or start again in each iteration; either way `steps` grows.
  """
  records = sorted(
      (r for r in records if r['stage'] == 'train'), key=lambda r: (r['iteration'], r['step'])
  )
  per_point = -(-len(records) // MAX_POINTS) or 1
  names = [n for n in _SERIES if any(n in r for r in records)]
  names += sorted({n for r in records for n in r if n.startswith('loss/')})
  steps: list[int] = []
  iterations: list[int] = []
  starts: list[dict[str, int]] = []
  series: dict[str, list[float | None]] = {name: [] for name in names}
  broken: collections.Counter[str] = collections.Counter()
  offset, last = 0, 0
  by_iteration: dict[int, list[dict[str, Any]]] = collections.defaultdict(list)
  for record in records:
    by_iteration[record['iteration']].append(record)
  for number, mine in by_iteration.items():
    first = mine[0]['step']
    # Starts again: go on from the last step. The same rule places steps in the event files.
    offset = last + (first == 0) if steps and first <= last else 0
    starts.append({'iteration': number, 'step': first + offset})
    for i in range(0, len(mine), per_point):
      part = mine[i : i + per_point]
      last = part[-1]['step'] + offset
      steps.append(last)
      iterations.append(number)
      for name in names:
        values = [finite(r[name]) for r in part if name in r]
        known = [v for v in values if v is not None]
        broken[name] += len(values) - len(known)
        series[name].append(finite(statistics.fmean(known)) if known else None)
  return {
      'steps': steps,
      'iterations': iterations,
      'starts': starts,
      'series': series,
      'per_point': per_point,
      'nonfinite': {name: count for name, count in broken.items() if count},
  }


def main(argv: list[str] | None = None) -> int:
  """Renders the page of a run folder again and prints where it is."""
  parser = argparse.ArgumentParser(prog='python -m jaxrl.runs.report', description=main.__doc__)
  parser.add_argument('run_dir', help='folder of a run')
  parser.add_argument('--max_prompts', type=int, default=MAX_PROMPTS, help='prompts per table')
  parser.add_argument('--max_bytes', type=int, default=MAX_BYTES, help='bytes of text in the page')
  options = parser.parse_args(argv)
  try:
    with read_run(options.run_dir) as folder:
      path = durable.shared(write_report(
          folder, max_prompts=options.max_prompts, max_bytes=options.max_bytes))
  except InputError as error:
    print(error, file=sys.stderr)
    return 2
  print(os.fspath(path))
  return 0


if __name__ == '__main__':
  sys.exit(main())
