"""Answers to logic-grid puzzles: the JSON object in a response, cell by cell and as one string.

`cells` are the names of what can be answered, 'House 1/Name', in the order of
`jaxrl.data.grid_rows.cell_names`.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Sequence
from typing import Any

from jaxrl.data.grid_rows import BLANK

# What does not parse is tried again from the next brace. Texts made for it could be read again and
# again that way, so reading ends when so many times the text has been read in vain. Each error also
# counts the lines before it, which is that much faster than reading.
MAX_READINGS = 16
COUNTING_SPEED = 64
_OBJECT = re.compile(r'\{\s*+"')
# Numbers stay text: converting thousands of digits takes quadratic time, and no cell needs it.
_DECODER = json.JSONDecoder(strict=False, parse_int=str, parse_float=str, parse_constant=str)


def last_solution(text: str) -> dict[str, Any] | None:
  """`solution` of the last JSON object in the text whose `solution` is an object.

  Line breaks inside strings are allowed, anything else that is not JSON is not. An object inside
  another is not looked at by itself. Never raises; time is linear in the text.
  """
  found, position, wasted = None, 0, 0
  while match := _OBJECT.search(text, position):
    try:
      value, position = _DECODER.raw_decode(text, match.start())
    except json.JSONDecodeError as error:
      wasted += error.pos - match.start() + error.pos // COUNTING_SPEED
      position = match.start() + 1
    except RecursionError:
      wasted += len(text) - match.start()
      position = match.start() + 1
    else:
      solution = value.get('solution')
      found = solution if isinstance(solution, dict) else found
    if wasted > MAX_READINGS * len(text):
      break
  return found


def read_cells(text: str, cells: Sequence[str]) -> list[str | None]:
  """Lower-case value of each cell in the last solution of the text; None where there is none."""
  solution = last_solution(text)
  if solution is None:
    return [None] * len(cells)
  houses = {_fold(house): {_fold(name): value for name, value in row.items()}
            for house, row in solution.items() if isinstance(row, dict)}
  return [_cell(houses.get(_fold(house), {}).get(_fold(name)))
          for house, _, name in (cell.partition('/') for cell in cells)]


def _fold(text: str) -> str:
  return text.strip().lower()


def _cell(value: Any) -> str | None:
  """A value as it is compared; of a list its first element."""
  if isinstance(value, list):
    value = value[0] if value else None
  folded = _fold(value) if isinstance(value, str) else ''
  return None if folded in ('', BLANK) else folded


def extract_grid(text: str, cells: Sequence[str]) -> str | None:
  """Canonical table of a response: JSON rows of lower-case values; None if a cell is missing."""
  values = read_cells(text, cells)
  if not values or None in values:
    return None
  by_house = itertools.groupby(
      zip(cells, values, strict=True), lambda pair: pair[0].partition('/')[0])
  return _table([[value for _, value in row] for _, row in by_house])


def canonical_grid(gold_text: str) -> str | None:
  """The same form of a gold table, given as JSON rows of values; None if it is no such table."""
  try:
    rows = _DECODER.decode(gold_text)
  except (json.JSONDecodeError, RecursionError):
    return None
  if not isinstance(rows, list) or not rows or not all(isinstance(r, list) and r for r in rows):
    return None
  values = [[_cell(value) if isinstance(value, str) else None for value in r] for r in rows]
  if len({len(r) for r in values}) != 1 or any(None in r for r in values):
    return None
  return _table(values)


def grid_values(canonical: str) -> list[str]:
  """The values of a canonical table, in the order of the cells."""
  return [value for row in json.loads(canonical) for value in row]


def _table(rows: Sequence[Sequence[str | None]]) -> str:
  return json.dumps(rows, ensure_ascii=False, separators=(',', ':'))
