"""Whole units, a prompt and its responses, packed into a few long rows of a fixed set of shapes.

The prompt is stored once. A row holds, unit after unit, the prompt without its last id, and then
for each response a segment: the prompt's last id and the response without its last, so that every
response id is predicted by a token of its own segment. A segment's positions go on from those of
the prompt, and its tokens see the prompt and themselves (`kernels.attention.Spans`).

Packing changes where ids lie and nothing else: batch k holds the units that it would hold as padded
rows, and gives the same loss and the same gradients.
"""

from __future__ import annotations

import dataclasses
import heapq
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TypeVar

import grain
import numpy as np

from jaxrl.data.batches import LabelledRow, Pair, TokenRow, WeakRow, shuffled_numbers
from jaxrl.errors import InputError

Batch = dict[str, np.ndarray]
Row = TypeVar('Row')
SPANS = ('prefix_start', 'prefix_end', 'start', 'end')


@dataclasses.dataclass(frozen=True)
class Unit:
  """A prompt, its responses, and what is known of each response id and of the unit.

  Attributes:
    per_token: name -> for each response one number per id.
    per_unit: name -> a number.
    number: which row of the data it is.
  """

  prompt_ids: Sequence[int]
  responses: Sequence[Sequence[int]]
  per_token: Mapping[str, Sequence[Sequence[float]]]
  per_unit: Mapping[str, float]
  number: int = -1

  @property
  def size(self) -> int:
    """Places of a row that the unit fills."""
    return len(self.prompt_ids) - 1 + self.targets

  @property
  def targets(self) -> int:
    """Response ids, which are what is predicted."""
    return sum(map(len, self.responses))


@dataclasses.dataclass(frozen=True)
class Shape:
  """Static sizes of a packed batch: what a program is compiled for."""

  rows: int                   # B
  length: int                 # T, places of a row
  targets: int                # M, response ids of a row
  units: int                  # K of a row
  response: int               # R, ids of the longest response
  responses: int              # N of a unit


def pair_unit(pair: Pair) -> Unit:
  """Both responses after one prompt, chosen first.

  Raises:
    InputError: the two have different prompts.
  """
  if list(pair.chosen.prompt_ids) != list(pair.rejected.prompt_ids):
    raise InputError('the responses of a pair have different prompts, which cannot be stored once',
                     where='--layout=packed', fix='Use --layout=padded')
  return Unit(pair.chosen.prompt_ids, (pair.chosen.response_ids, pair.rejected.response_ids),
              {'ref_logps': (pair.chosen_ref, pair.rejected_ref)}, {'weights': pair.weight})


def sequence_unit(row: TokenRow) -> Unit:
  return Unit(row.prompt_ids, (row.response_ids,), {}, {})


def weak_unit(row: WeakRow) -> Unit:
  return Unit(row.row.prompt_ids, (row.row.response_ids,),
              {'ref_logps': (row.ref,), 'weak_gap': (row.weak_gap,)}, {})


def labelled_units(row: LabelledRow) -> dict[str, Unit]:
  """The labelled response, and as 'kl_' the mismatched one that KTO's divergence is read from."""
  return {
      '': Unit(row.row.prompt_ids, (row.row.response_ids,), {'ref_logps': (row.ref,)},
               {'label': row.label}),
      'kl_': Unit(row.mismatched.prompt_ids, (row.mismatched.response_ids,),
                  {'ref_logps': (row.mismatched_ref,)}, {})}


def spread(units: Sequence[Unit], rows: int) -> list[list[Unit]]:
  """The units over `rows` rows of about equal size: the largest first, each to the emptiest row."""
  out: list[list[Unit]] = [[] for _ in range(rows)]
  heap = [(0, row) for row in range(rows)]
  for unit in sorted(units, key=lambda unit: -unit.size):
    size, row = heapq.heappop(heap)
    out[row].append(unit)
    heapq.heappush(heap, (size + unit.size, row))
  return out


def needed(units: Sequence[Unit], rows: int) -> Shape:
  """The least shape that holds these units in so many rows."""
  packed = spread(units, rows)
  return Shape(
      rows, max(sum(u.size for u in row) for row in packed),
      max(sum(u.targets for u in row) for row in packed), max(map(len, packed)),
      max((len(r) for u in units for r in u.responses), default=0), len(units[0].responses))


def packed_arrays(
    units: Sequence[Unit], shape: Shape, pad_id: int, *, picks: bool = True
) -> Batch:
  """A batch of `shape`; names and dimensions:

  inputs, positions, prefix_start, prefix_end, start, end: int32 [B, T], the last four as indices
    into the row; a place that holds nothing has an `end` of 0.
  picked, targets: int32 [B, M], the places that predict a response id, and those ids. Without
    `picks`, for rows that are split over devices, no `picked`, and targets of all T places.
  places: int32 [B, K, N, R], where each response id lies among the M (or T); mask: bool, where
    there is one; what `per_token` names: float32, as long. Without N where units have one response.
  What `per_unit` names: float32 [B, K]. numbers: int32 [B, K], of the rows; -1 where there is none.

  Raises:
    InputError: a unit has no prompt or another number of responses, or the shape is too small.
  """
  b, t, k, n = shape.rows, shape.length, shape.units, shape.responses
  tokens: Batch = {name: np.zeros((b, t), np.int32) for name in ('positions', *SPANS)}
  tokens['inputs'] = np.full((b, t), pad_id, np.int32)
  out: Batch = {name: np.zeros((b, shape.targets), np.int32) for name in ('picked', 'targets')}
  each = (b, k, n, shape.response)
  out |= {'places': np.zeros(each, np.int32), 'mask': np.zeros(each, bool)}
  out |= {name: np.zeros(each, np.float32) for name in units[0].per_token}
  out |= {name: np.zeros((b, k), np.float32) for name in units[0].per_unit}
  out['numbers'] = np.full((b, k), -1, np.int32)
  for row, members in enumerate(spread(units, b)):
    place, target = 0, 0
    for number, unit in enumerate(members):
      _check(unit, n)
      if place + unit.size > t or target + unit.targets > shape.targets or number >= k:
        raise InputError('a batch does not fit its packed shape', where='batches',
                         expected=f'at most {shape}', found=needed(units, b))
      prompt, p = unit.prompt_ids, len(unit.prompt_ids)
      prefix = slice(place, place + p - 1)
      _put(tokens, row, prefix, prompt[:-1], 0, (0, 0, place))
      start = prefix.stop
      for response, ids in enumerate(unit.responses):
        r = len(ids)
        if not r:
          continue
        segment = slice(start, start + r)
        _put(tokens, row, segment, [prompt[-1], *ids[:-1]], p - 1, (place, prefix.stop, start))
        out['picked'][row, target:target + r] = np.arange(start, start + r)
        out['targets'][row, target:target + r] = ids
        out['places'][row, number, response, :r] = np.arange(target, target + r)
        out['mask'][row, number, response, :r] = True
        for name, values in unit.per_token.items():
          out[name][row, number, response, :r] = values[response]
        start, target = segment.stop, target + r
      for name, value in unit.per_unit.items():
        out[name][row, number] = value
      out['numbers'][row, number] = unit.number
      place = start
  if not picks:
    picked, targets = out.pop('picked'), out.pop('targets')
    out['targets'] = np.zeros((b, t), np.int32)
    # Unused entries of `picked` name place 0, which an id may follow: they come first.
    for row in range(b):
      out['targets'][row, picked[row, ::-1]] = targets[row, ::-1]
    out['places'] = np.where(
        out['mask'], np.take_along_axis(picked, out['places'].reshape(b, -1), 1).reshape(each), 0)
  if n == 1:
    out = {name: x[:, :, 0] if x.ndim == 4 else x for name, x in out.items()}
  return tokens | out


def _check(unit: Unit, responses: int) -> None:
  if not len(unit.prompt_ids):
    raise InputError('the row has no prompt', where='a packed batch',
                     expected='at least one prompt id')
  if len(unit.responses) != responses:
    raise InputError('units differ in their number of responses', where='a packed batch',
                     expected=responses, found=len(unit.responses))


def _put(tokens: Batch, row: int, where: slice, ids: Sequence[int], position: int,
         spans: tuple[int, int, int]) -> None:
  """A run of ids whose tokens see the prefix spans[0] to spans[1], and what came since spans[2]."""
  index = np.arange(where.start, where.stop)
  tokens['inputs'][row, where] = ids
  tokens['positions'][row, where] = index - where.start + position
  for name, value in zip(SPANS, (*spans, index + 1), strict=True):
    tokens[name][row, where] = value


def fitting_lengths(totals: Iterable[int], *, count: int, multiple: int) -> tuple[int, ...]:
  """At most `count` lengths, each a `multiple`, that hold all totals with the least padding."""
  counts: dict[int, int] = {}
  for total in totals:
    length = max(-(-total // multiple), 1) * multiple
    counts[length] = counts.get(length, 0) + 1
  lengths = np.array(sorted(counts))
  below = np.concatenate([[0], np.cumsum([counts[x] for x in lengths])])    # totals of those before
  # cost[m, n]: places of the lengths m to n - 1 where all are padded to the last of them.
  numbers = np.arange(len(lengths) + 1)
  cost = np.where(numbers[:, None] < numbers[None],
                  np.concatenate([[0], lengths])[None] * (below[None] - below[:, None]), np.inf)
  least, cuts = np.where(numbers == 0, 0.0, np.inf), []
  for _ in range(min(count, len(lengths))):
    cuts.append(np.argmin(least[:, None] + cost, axis=0))      # of the n shortest, where to cut
    least = np.min(least[:, None] + cost, axis=0)
  found, end = [], len(lengths)
  for cut in reversed(cuts):
    found.append(int(lengths[end - 1]))
    end = int(cut[end])
  return tuple(reversed(found))


@dataclasses.dataclass(frozen=True)
class Packed:
  """Batches of packed rows.

  Attributes:
    batches: element k, for k below the number of steps, is a pure function of (rows, seed, k).
    shapes: by name of unit; a program is compiled for each.
    filled: the share of all places that hold a token, over all batches.
  """

  batches: grain.MapDataset
  shapes: tuple[dict[str, Shape], ...]
  filled: float

  def __str__(self) -> str:
    sizes = ', '.join(f'{s.rows} x {s.length}' for each in self.shapes for s in each.values())
    return f'packed batches of {sizes} tokens, {self.filled:.1%} of them filled'


def pack_batches(
    rows: Sequence[Row], units: Callable[[Row], Unit | dict[str, Unit]], *, batch_size: int,
    seed: int, steps: int, into: int, shapes: int, multiple: int, pad_id: int, picks: bool = True,
) -> Packed:
  """The batches of `shuffled_batches` packed into `into` rows each, of at most `shapes` shapes.

  Where `units` gives several units of a row by name, each is packed for itself and its arrays
  begin with the name; the first says how long rows are.
  """
  made: list[dict[str, Unit]] = []
  for number, row in enumerate(rows):
    found_units = units(row)
    named = found_units if isinstance(found_units, dict) else {'': found_units}
    made.append({name: dataclasses.replace(u, number=number) for name, u in named.items()})
  names = tuple(made[0])
  order = shuffled_numbers(len(rows), batch_size=batch_size, seed=seed)

  def least(numbers: Sequence[int]) -> dict[str, Shape]:
    return {name: needed([made[n][name] for n in numbers], into) for name in names}

  all_least = [least(order[k]) for k in range(steps)]
  lengths = fitting_lengths(
      (s[names[0]].length for s in all_least), count=shapes, multiple=multiple)
  fitting: dict[int, list[dict[str, Shape]]] = {length: [] for length in lengths}
  for shape in all_least:
    fitting[_smallest(shape[names[0]].length, lengths)].append(shape)
  found = {
      length: {name: _covering([s[name] for s in group], multiple) for name in names}
      for length, group in fitting.items()}

  def pack(numbers: Sequence[int]) -> Batch:
    shape = found[_smallest(least(numbers)[names[0]].length, lengths)]
    out: Batch = {}
    for name in names:
      arrays = packed_arrays(
          [made[n][name] for n in numbers], shape[name], pad_id, picks=picks)
      out |= {f'{name}{key}': x for key, x in arrays.items()}
    return out

  size = [sum(unit.size for unit in each.values()) for each in made]
  held = sum(size[n] for k in range(steps) for n in order[k])
  places = sum(len(group) * into * s.length for length, group in fitting.items()
               for s in found[length].values())
  return Packed(order.map(pack), tuple(found.values()), held / places)


def _covering(shapes: Sequence[Shape], multiple: int) -> Shape:
  """The least shape that all of these fit into, its sizes of tokens multiples of `multiple`."""
  most = {name: max(getattr(s, name) for s in shapes) for name in Shape.__annotations__}
  for name in ('length', 'targets'):
    most[name] = max(-(-most[name] // multiple), 1) * multiple
  return Shape(**most)


def _smallest(total: int, lengths: Sequence[int]) -> int:
  return next(length for length in lengths if length >= total)
