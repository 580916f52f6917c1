"""What ends a WSPO run, from its folder: how the log-ratio followed, how the models answer."""

from __future__ import annotations

from collections.abc import Mapping

from etils import epath

from jaxrl.evaluation.statistics import Estimate, paired_difference, proportion
from jaxrl.runs.session import Session
from jaxrl.runs.tables import EVALUATION, read_table

# Model -> its evaluation in the run folder.
MODELS = {
    'weak base': 'weak_base', 'weak aligned': 'weak_aligned', 'strong base': 'iteration_00',
    'result': 'iteration_01'}


def greedy(folder: epath.Path) -> dict[str, dict[str, bool]]:
  """Per model whether its greedy answer to each held-out problem is right; empty without any."""
  found = {}
  for model, place in MODELS.items():
    path = folder / place / 'evaluation.parquet'
    if path.exists():
      found[model] = {row['prompt_id']: row['verdict'] == 'correct'
                      for row in read_table(path, EVALUATION).to_pylist()}
  return found


def compare(before: Mapping[str, bool], after: Mapping[str, bool]) -> Estimate:
  """Paired difference after - before over the same problems."""
  keys = sorted(before)
  return paired_difference([before[key] for key in keys], [after[key] for key in keys])


def show(session: Session) -> None:
  """Prints what is there: held-out log-ratios, and accuracies with their differences."""
  entries = session.run.entries
  if 'iteration_01/follow' in entries:
    f = entries['iteration_01/follow'].counts
    session.progress.line(
        f'held-out responses, {f["tokens"]} ids: mean |gamma d_s - d_w| {f["error"]:.4f} (at the '
        f'start {f["error_at_start"]:.4f}), mean d_s {f["strong_gap"]:+.4f}, mean d_w '
        f'{f["weak_gap"]:+.4f}, slope of d_s on d_w {f["ratio"]:.3f} (optimum '
        f'{f["ratio_expected"]:.3g})')
    for name, key in (('d_w', 'largest_weak'), ('gamma d_s - d_w', 'largest_error')):
      session.progress.line(f'largest {name}: {f[key]["value"]:+.3f} at {f[key]["where"]}')
  right = greedy(session.run.folder)
  if not right:
    return
  rows = []
  for model, answers in right.items():
    e = proportion(sum(answers.values()), len(answers))
    gain = '-' if model == 'result' else points(compare(answers, right['result']))
    rows.append([model, f'{100 * e.value:.1f}', f'{100 * e.low:.1f}-{100 * e.high:.1f}', gain])
  session.progress.table('WSPO: greedy accuracy on held-out problems',
                         ('model', '%', '95% interval', 'result minus it, points [95%]'), rows)


def points(e: Estimate) -> str:
  return f'{100 * e.value:+.1f} [{100 * e.low:+.1f}, {100 * e.high:+.1f}]'
