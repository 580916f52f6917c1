"""Rows of logic-grid puzzles as questions: the prompt of ZebraLogic and its gold tables.

A row has the puzzle's text and its solution {'header': ['House', ...], 'rows': [['1', ...], ...]}.
What can be answered is a list of cells, named 'House 1/Name'; they are the labels of the problem.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from jaxrl.data.rows import Row, check_text, describe, get_field
from jaxrl.errors import InputError

BLANK = '___'    # a cell that is to be filled in
EXPECTED = "an object {'header': ['House', ...], 'rows': [['1', ...], ...]}"

EXAMPLE_PUZZLE = """\
There are 3 houses, numbered 1 to 3 from left to right, as seen from across the street. \
Each house is occupied by a different person. Each house has a unique attribute for each of the \
following characteristics:
 - Each person has a unique name: `Bob`, `Carol`, `Eric`
 - Each person has a unique type of pet: `dog`, `rabbit`, `cat`

## Clues:
1. Carol is somewhere to the left of the person who owns a dog.
2. The person who owns a cat is in the second house.
3. Bob is the person who owns a rabbit."""
EXAMPLE_ANSWER = json.dumps({
    'reasoning':
        'By Clue 2 the cat is in House 2, so the dog is in House 1 or House 3. By Clue 1 somebody '
        'lives to the left of the dog, so the dog is in House 3, and the rabbit is in House 1. By '
        'Clue 3 Bob is in House 1. Carol lives to the left of House 3, so she is in House 2, and '
        'Eric is in House 3.',
    'solution': {
        'House 1': {'Name': 'Bob', 'Pet': 'rabbit'},
        'House 2': {'Name': 'Carol', 'Pet': 'cat'},
        'House 3': {'Name': 'Eric', 'Pet': 'dog'}}}, indent=4)


def grid_template(question: str) -> str:
  """The prompt with one worked example, as Prasad et al. 2024 (ScPO) ask."""
  return (f'# Example Puzzle\n\n{EXAMPLE_PUZZLE}\n\n# Answer to the Example Puzzle\n\n'
          f'{EXAMPLE_ANSWER}\n\n# Puzzle to Solve\n\n{question}')


def cell_names(houses: int, headers: Sequence[str]) -> tuple[str, ...]:
  """'House 1/Name', 'House 1/Pet', ..., 'House 2/Name', ... in the order of an answer."""
  return tuple(f'House {house + 1}/{name}' for house in range(houses) for name in headers)


def answer_form(houses: int, headers: Sequence[str]) -> str:
  """What follows a puzzle: how the answer is to be written, with blanks for the values."""
  blank = {'reasoning': BLANK, 'solution': {
      f'House {house + 1}': dict.fromkeys(headers, BLANK) for house in range(houses)}}
  return ('\n\n# Instruction\n\nNow solve this puzzle. Give your reasoning and your solution in '
          f'the following JSON format:\n\n{json.dumps(blank, indent=4, ensure_ascii=False)}')


def read_grid(
    row: Row, field: str, *, keep_blank: bool = False
) -> tuple[str, tuple[str, ...], str]:
  """(gold table as JSON rows without the house column, names of its cells, form of the answer).

  With `keep_blank` a table with a cell that is null, empty or '___' has the gold '', which no
  checker can parse. Header and number of rows are always needed: the prompt states them.

  Raises:
    InputError: no such table, or an empty cell.
  """
  value = get_field(row, field, EXPECTED)
  where = f'{row.where}, field {field!r}'

  def bad(what: str, found: Any, expected: str = EXPECTED) -> InputError:
    return InputError(what, where=where, expected=expected, found=describe(found),
                      fix='Correct the row or name another answer field')

  header = value.get('header') if isinstance(value, dict) else None
  rows = value.get('rows') if isinstance(value, dict) else None
  if not isinstance(header, list) or not isinstance(rows, list):
    raise bad('the solution is not a table', value)
  names = [check_text(name, where, 'a name of the header').strip() for name in header]
  folded = [name.casefold() for name in names]
  if folded[:1] != ['house'] or len(names) < 2 or len(set(folded)) != len(folded):
    raise bad('the header cannot be used', header, "'House', then different names of columns")
  if not rows or any(not isinstance(r, list) or len(r) != len(names) for r in rows):
    raise bad('the rows do not fit the header', rows, f'lists of {len(names)} cells')
  if [str(r[0]).strip() for r in rows] != [str(n + 1) for n in range(len(rows))]:
    raise bad('the houses are not in order', [r[0] for r in rows], "'1', '2', ...")
  layout = cell_names(len(rows), names[1:]), answer_form(len(rows), names[1:])
  cells = [r[1:] for r in rows]
  for cell in (cell for r in cells for cell in r):
    if cell is None or (isinstance(cell, str) and cell.strip() in ('', BLANK)):
      if not keep_blank:
        raise bad('the solution has an empty cell', cell, 'a value in every cell')
      return '', *layout
    check_text(cell, where, 'a cell of the solution')
  return json.dumps(cells, ensure_ascii=False), *layout
