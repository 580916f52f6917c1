"""Writes logic-grid puzzles in the form of ZebraLogic, each with exactly one solution.

  python -m experiments.logic_puzzles --sizes=2x2,3x3 --count=40 --output=FILE.jsonl

Sizes are HOUSESxFEATURES; `--task=zebralogic` reads the file. A puzzle depends on seed, size and
index alone, so a smaller --count gives the first puzzles of a larger one. docs/logic_puzzles.md.
"""

from __future__ import annotations

import collections
import json
import sys
from collections.abc import Iterator, Sequence

from absl import app, flags
from etils import epath

from jaxrl.data.logic_grid import SIZES, draw_puzzles, puzzle_text, solution_table
from jaxrl.errors import InputError
from jaxrl.runs.durable import write_file


def parse_sizes(text: str) -> list[tuple[int, int]]:
  """[(2, 2), (3, 3)] of '2x2,3x3'.

  Raises:
    InputError: not such a list, a size that the benchmark does not have, or one given twice.
  """
  known = {f'{n}x{m}': (n, m) for n, m in SIZES}
  names = [name.strip() for name in text.split(',')]
  for name in names:
    if name not in known:
      raise InputError('unknown size', where='--sizes', found=repr(name),
                       expected='HOUSESxFEATURES with 2 to 6 of each, such as 2x2,3x3')
    if names.count(name) > 1:
      raise InputError('a size is given twice', where='--sizes', expected='each size once',
                       found=name)
  return [known[name] for name in names]


def puzzle_rows(sizes: Sequence[tuple[int, int]], count: int, seed: int) -> Iterator[dict]:
  """Rows `id`, `size`, `puzzle`, `solution`, as in the public file: `count` of each size."""
  for houses, features in sizes:
    for index, puzzle, arrangement in draw_puzzles(houses, features, seed, count):
      yield {'id': f'lgp-seed{seed}-{houses}x{features}-{index}', 'size': f'{houses}*{features}',
             'puzzle': puzzle_text(puzzle), 'solution': solution_table(puzzle, arrangement)}


def main(argv: Sequence[str]) -> None:
  if len(argv) > 1:
    raise app.UsageError(f'unexpected arguments: {" ".join(argv[1:])}')
  chosen = flags.FLAGS
  try:
    sizes = parse_sizes(chosen.sizes)
    folder = epath.Path(chosen.output).parent
    if not folder.is_dir() or epath.Path(chosen.output).is_dir():
      raise InputError('the file cannot be written', where='--output',
                       expected='a file in an existing folder', found=chosen.output)
    rows = list(puzzle_rows(sizes, chosen.count, chosen.seed))
    text = ''.join(json.dumps(row, ensure_ascii=False) + '\n' for row in rows)
    write_file(epath.Path(chosen.output), text.encode())
  except InputError as error:
    print(f'logic_puzzles: {error}', file=sys.stderr)
    sys.exit(2)
  made = collections.Counter(row['size'] for row in rows)
  print(f'{len(rows)} puzzles of {len(made)} sizes in {chosen.output}')


if __name__ == '__main__':
  flags.DEFINE_string('sizes', ','.join(f'{n}x{m}' for n, m in SIZES),
                      'Sizes HOUSESxFEATURES; default: the 25 of the benchmark.')
  flags.DEFINE_integer('count', 40, 'Puzzles of each size.', lower_bound=1)
  flags.DEFINE_integer('seed', 0, 'Seed of every random draw.', lower_bound=0)
  flags.DEFINE_string('output', None, 'JSONL file to write.', required=True)
  app.run(main)
