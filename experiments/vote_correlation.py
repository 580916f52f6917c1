"""How far votes tell right answers from wrong ones, on public sets of model responses.

  python -m experiments.vote_correlation --data_dir=DIR

Prints one row per set and number of voters k, of the problems that have so many responses: Somers'
D between the votes for a response's answer and its correctness, and of all pairs of a right and a
wrong response to one problem the share in which the right one has fewer, as many and more votes.
docs/scpo.md quotes it.
"""

from __future__ import annotations

import itertools
import statistics
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from absl import app, flags

from experiments.check_answers import SETS, check_recorded, read_recorded
from jaxrl.errors import InputError
from jaxrl.evaluation.vote_correlation import somers_d
from jaxrl.rewards.checking import Check, Verdict
from jaxrl.rewards.voting import votes

VOTED = ('math_votes', 'gsm8k model_responses', 'math model_responses_level5')
VOTERS = (2, 4, 8, 16)


@dataclass(frozen=True)
class Figures:
  """What the votes of one set are worth."""

  problems: int
  right: float                # share of responses that are right
  top: float                  # mean share of the votes that the top answer has
  correlation: float | None   # Somers' D
  order: tuple[float, float, float]   # the right response of a pair has fewer, as many, more votes


def measure(problems: Sequence[Sequence[Check]], voters: int) -> Figures:
  """Figures of the first `voters` responses to each problem that has so many.

  Raises:
    ValueError: no problem has.
  """
  groups = [checks[:voters] for checks in problems if len(checks) >= voters]
  if not groups:
    raise ValueError(f'no problem has {voters} responses')
  counts, right, order = [], [], [0, 0, 0]
  for checks in groups:
    found = votes([check.answer for check in checks])
    correct = [check.verdict is Verdict.CORRECT for check in checks]
    counts += found
    right += correct
    for a, b in itertools.product(range(voters), repeat=2):
      if correct[a] and not correct[b]:
        order[1 + (found[a] > found[b]) - (found[a] < found[b])] += 1
  tops = [max(counts[n:n + voters]) / voters for n in range(0, len(counts), voters)]
  total = max(sum(order), 1)
  return Figures(
      len(groups), statistics.fmean(right), statistics.fmean(tops), somers_d(counts, right),
      (order[0] / total, order[1] / total, order[2] / total))


def by_problem(ids: Sequence[str], checks: Sequence[Check]) -> list[list[Check]]:
  """Checks of each problem, in the order of the file; those that timed out are left out."""
  groups: dict[str, list[Check]] = {}
  for prompt_id, check in zip(ids, checks, strict=True):
    if check.verdict not in (Verdict.TIMEOUT, Verdict.UNPARSEABLE_GOLD):
      groups.setdefault(prompt_id, []).append(check)
  return list(groups.values())


def lines(data_dir: Path) -> Iterator[str]:
  """The rows of the table; raises InputError where a file is absent or damaged."""
  loaded = {name: read_recorded(data_dir, SETS[name]) for name in VOTED}
  for name, recorded in loaded.items():
    groups = by_problem([r.id for r in recorded], check_recorded(SETS[name].rule, recorded))
    for voters in VOTERS:
      if max(map(len, groups)) < voters:
        continue
      f = measure(groups, voters)
      correlation = '-' if f.correlation is None else f'{f.correlation:.2f}'
      cells = [name, voters, f.problems, f'{100 * f.right:.1f}', f'{100 * f.top:.1f}', correlation,
               *(f'{100 * share:.1f}' for share in f.order)]
      yield f'| {" | ".join(map(str, cells))} |'


def main(argv: Sequence[str]) -> None:
  if len(argv) > 1:
    raise app.UsageError(f'unexpected arguments: {" ".join(argv[1:])}')
  print("| set | k | problems | right % | top answer % | Somers' D | wrong order % | tie % | "
        'right order % |')
  print('|---' * 9 + '|')
  try:
    for line in lines(Path(flags.FLAGS.data_dir)):
      print(line, flush=True)
  except InputError as error:
    print(f'vote_correlation: {error}', file=sys.stderr)
    sys.exit(2)


if __name__ == '__main__':
  flags.DEFINE_string(
      'data_dir', None, 'Folder with gsm8k/, math/ and math_votes/ as README.md there describes.',
      required=True,
  )
  app.run(main)
