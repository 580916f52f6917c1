"""Accuracy on logic-grid puzzles: whole puzzles by difficulty, and single cells."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from jaxrl.data.logic_grid import EASY_SIZES
from jaxrl.rewards.checking import Verdict
from jaxrl.rewards.grids import grid_values, read_cells


def grid_accuracy(
    rows: Sequence[Mapping], cells: Mapping[str, Sequence[str]]
) -> dict[str, float]:
  """`cell_accuracy`, and the accuracy of easy and of hard puzzles with their numbers.

  A cell of a partial answer counts; a response without a table has all of them wrong. Puzzles whose
  gold cannot be parsed count nowhere, and an accuracy of none is left out.

  Args:
    rows: `prompt_id`, `response`, `gold` (canonical) and `verdict` of each response.
    cells: the names of the cells of each puzzle.
  """
  right = total = 0
  solved: dict[str, list[bool]] = {'easy': [], 'hard': []}
  for row in rows:
    names = cells[row['prompt_id']]
    if row['verdict'] == Verdict.UNPARSEABLE_GOLD:
      continue
    houses = len({name.partition('/')[0] for name in names})
    size = (houses, len(names) // houses)
    solved['easy' if size in EASY_SIZES else 'hard'].append(row['verdict'] == Verdict.CORRECT)
    given = read_cells(row['response'], names)
    right += sum(a == b for a, b in zip(given, grid_values(row['gold']), strict=True))
    total += len(names)
  found = {'cell_accuracy': right / total} if total else {}
  for name, flags in solved.items():
    found[f'{name}_puzzles'] = len(flags)
    if flags:
      found[f'{name}_accuracy'] = sum(flags) / len(flags)
  return found
