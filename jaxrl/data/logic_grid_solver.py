"""Clues of a logic-grid puzzle, and the arrangements that satisfy them.

A puzzle has as many houses in a row as each feature has values, and each value of a feature is in
one house. The solver keeps for every value the houses it may be in, as the bits of an integer,
narrows them by every clue until nothing changes, and tries what is left. That settles whether a
second arrangement exists: nothing is sampled.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Literal, get_args

Kind = Literal[
    'found_at', 'not_at', 'same_house', 'directly_left', 'directly_right', 'next_to', 'left_of',
    'right_of', 'one_between', 'two_between']
KINDS: tuple[Kind, ...] = get_args(Kind)
PLACES: tuple[Kind, ...] = ('found_at', 'not_at')          # of one item and a house
PAIRS: tuple[Kind, ...] = tuple(k for k in KINDS if k not in PLACES)   # of two items
Item = tuple[int, int]                       # feature, value
Arrangement = tuple[tuple[int, ...], ...]    # [feature][value] -> house, from 0


@dataclasses.dataclass(frozen=True)
class Clue:
  """`item` stands in a relation to a `house` (from 0), or to an `other` item; the rest is None."""

  kind: Kind
  item: Item
  other: Item | None = None
  house: int | None = None


def holds(clue: Clue, arrangement: Arrangement) -> bool:
  """Whether the clue is true; the definition of every kind."""
  feature, value = clue.item
  at = arrangement[feature][value]
  if clue.other is None:
    return (at == clue.house) == (clue.kind == 'found_at')
  step = arrangement[clue.other[0]][clue.other[1]] - at
  return {
      'same_house': step == 0, 'directly_left': step == 1, 'directly_right': step == -1,
      'next_to': abs(step) == 1, 'left_of': step > 0, 'right_of': step < 0,
      'one_between': abs(step) == 2, 'two_between': abs(step) == 3}[clue.kind]


# Where the other item may be, given the houses `m` (not none) that an item may be in.
_REACH: dict[Kind, Callable[[int], int]] = {
    'same_house': lambda m: m,
    'directly_left': lambda m: m << 1,
    'directly_right': lambda m: m >> 1,
    'next_to': lambda m: m << 1 | m >> 1,
    'left_of': lambda m: -((m & -m) << 1),                  # all beyond the leftmost
    'right_of': lambda m: (1 << (m.bit_length() - 1)) - 1,  # all before the rightmost
    'one_between': lambda m: m << 2 | m >> 2,
    'two_between': lambda m: m << 3 | m >> 3,
}
_MIRROR: dict[Kind, Kind] = {
    'directly_left': 'directly_right', 'directly_right': 'directly_left',
    'left_of': 'right_of', 'right_of': 'left_of'}

_Domains = list[int]   # item number -> bits of the houses it may be in; 0 is a contradiction


def find_arrangements(
    houses: int, features: int, clues: Sequence[Clue], limit: int = 2
) -> list[Arrangement]:
  """Different arrangements that satisfy all clues, at most `limit` of them.

  With the default, one arrangement in the list is the proof that it is the only one.
  """
  full = (1 << houses) - 1
  domains = [full] * (houses * features)
  links = []
  for clue in clues:
    item = clue.item[0] * houses + clue.item[1]
    if clue.other is None:
      assert clue.house is not None
      bit = 1 << clue.house
      domains[item] &= bit if clue.kind == 'found_at' else full & ~bit
    else:
      other = clue.other[0] * houses + clue.other[1]
      mirror = _MIRROR.get(clue.kind, clue.kind)
      links.append((item, other, _REACH[clue.kind]))
      links.append((other, item, _REACH[mirror]))
  rows = [range(f * houses, (f + 1) * houses) for f in range(features)]
  found = itertools.islice(_search(domains, links, rows), limit)
  return [
      tuple(tuple(settled[item].bit_length() - 1 for item in row) for row in rows)
      for settled in found]


def _search(domains: _Domains, links: Sequence[tuple], rows: Sequence[range]) -> Iterator[_Domains]:
  if not _narrow(domains, links, rows):
    return
  open_items = [(bits.bit_count(), item) for item, bits in enumerate(domains) if bits & (bits - 1)]
  if not open_items:
    yield domains
    return
  _, item = min(open_items)
  bits = domains[item]
  while bits:
    tried = domains.copy()
    tried[item] = bits & -bits
    yield from _search(tried, links, rows)
    bits &= bits - 1


def _narrow(domains: _Domains, links: Sequence[tuple], rows: Sequence[range]) -> bool:
  """Removes in place what no arrangement can have; False where an item has no house left."""
  changed = True
  while changed:
    if not all(domains):
      return False
    before = domains.copy()
    for item, other, reach in links:
      domains[other] &= reach(domains[item])
      if not domains[other]:
        return False
    changed = domains != before
    for row in rows:
      changed |= _keep_apart(domains, row)
  return all(domains)


def _keep_apart(domains: _Domains, row: range) -> bool:
  """The values of one feature are in different houses, and each house has one; True if changed."""
  before = [domains[item] for item in row]
  settled = seen = shared = 0     # houses that one value must, a value may, several may be in
  for bits in before:
    settled |= 0 if bits & (bits - 1) else bits
    shared |= seen & bits
    seen |= bits
  if seen != (1 << len(row)) - 1:   # a house without a value, as where two values share one
    domains[row[0]] = 0
    return True
  for item in row:
    bits = domains[item]
    if bits & (bits - 1):
      alone = bits & ~shared
      domains[item] = alone & -alone or bits & ~settled
  return before != [domains[item] for item in row]
