"""Bytes of main memory that a compiled program moves, loop by loop, read from its HLO text.

XLA's `cost_analysis` counts a loop body once and on-chip memory like any other. Here every loop has
a figure of its own, to be multiplied by its trip count, and arrays that the compiler placed on the
chip (`S(1)` in a layout) are free. A fusion that cuts a slice out of an array reads the slice; an
update in place writes the update. Padding of tiles is not counted. A Pallas kernel moves what it
estimates itself.
"""

from __future__ import annotations

import dataclasses
import re

from launch.planning.hlo import (
    ARRAY,
    Computation,
    Instruction,
    memory_bytes,
    parse,
    size_bytes,
    trip_count,
)

FREE = {'parameter', 'constant', 'tuple', 'get-tuple-element', 'bitcast', 'while', 'copy-done',
        'slice-done', 'iota', 'partition-id', 'replica-id', 'after-all', 'conditional', 'call',
        'all-gather-done', 'all-reduce-done', 'collective-permute-done', 'async-done',
        'async-update', 'opt-barrier'}


@dataclasses.dataclass(frozen=True)
class Loop:
  """What one trip moves, the loops inside it left out."""

  moved: int                  # bytes
  inner: tuple[Loop, ...]     # in the order they run
  trips: int | None = None    # None: known at run time alone
  kernels: tuple[tuple[str, int], ...] = ()     # by name, with their bytes; not in `moved`

  def total(self, unknown: float) -> float:
    """Bytes of all trips, of loops of unknown length so many."""
    return self.moved + sum(size for _, size in self.kernels) + sum(
        (unknown if loop.trips is None else loop.trips) * loop.total(unknown)
        for loop in self.inner)


def loops(text: str) -> Loop:
  """The whole program as a loop of one trip."""
  computations, entry = parse(text)

  def walk(name: str, trips: int | None) -> Loop:
    body = computations[name]
    inner = [walk(i.called('body'), trip_count(i, computations))
             for i in body.values() if i.name == 'while']
    called = [walk(i.called('calls|to_apply'), 1) for i in body.values() if i.name == 'call']
    kernels = {name: size for name, i in body.items() if (size := _kernel_bytes(i)) is not None}
    moved = sum(_moved(body, i, computations) for name, i in body.items() if name not in kernels)
    return Loop(moved, (*inner, *called), trips,
                tuple((name.partition('.')[0], size) for name, size in kernels.items()))

  return walk(entry, 1)


def _kernel_bytes(i: Instruction) -> int | None:
  """What a Pallas kernel says that it moves; None: it says nothing, or this is none."""
  if i.name != 'custom-call' or 'custom_call_target="tpu_custom_call"' not in i.rest:
    return None
  found = re.search(r'"bytes_accessed":"(\d+)"', i.rest)
  return int(found[1]) if found else None


def _moved(body: Computation, i: Instruction, computations: dict[str, Computation]) -> int:
  if i.name in FREE:
    return 0
  if i.name == 'copy-start':        # the result names both ends
    return memory_bytes(i.kind)
  if i.name == 'slice-start':       # the result: (the whole), the slice, a context
    whole, part = [found[0] for found in ARRAY.finditer(i.kind)][:2]
    return memory_bytes(part) + (size_bytes(part) if memory_bytes(whole) else 0)
  operands = [memory_bytes(body[o].kind) for o in i.operands]
  if i.name == 'dynamic-slice':
    return memory_bytes(i.kind) + (size_bytes(i.kind) if operands[0] else 0)
  if i.name == 'dynamic-update-slice':
    update = size_bytes(body[i.operands[1]].kind)
    return operands[1] + (update if operands[0] else 0)
  if i.name != 'fusion':
    return sum(operands) + memory_bytes(i.kind)
  inside = computations[i.called('calls')]
  read = sum(min(whole, _read(inside, n, computations)) for n, whole in enumerate(operands))
  return read + _written(inside, i)


def _read(inside: Computation, number: int, computations: dict[str, Computation]) -> int:
  """Bytes that a fusion reads of its operand; more than all of it where it reads it twice."""
  parameter = next(name for name, i in inside.items()
                   if i.name == 'parameter' and i.rest.strip() == str(number))
  return _read_from(inside, parameter, computations)


def _read_from(inside: Computation, name: str, computations: dict[str, Computation]) -> int:
  if name == list(inside)[-1]:
    return size_bytes(inside[name].kind)       # handed on as it is
  total = 0
  for result, user in inside.items():
    if name not in user.operands:
      continue
    place = user.operands.index(name)
    if user.name == 'bitcast':
      total += _read_from(inside, result, computations)
    elif user.name in ('dynamic-slice', 'slice', 'gather') and place == 0:
      total += size_bytes(user.kind)
    elif user.name == 'dynamic-update-slice' and place == 0:
      total += 0              # in place
    elif user.name == 'fusion':
      total += _read(computations[user.called('calls')], place, computations)
    else:
      total += size_bytes(inside[name].kind)
  return total


def _written(inside: Computation, fusion: Instruction) -> int:
  root = list(inside.values())[-1]
  if root.name != 'tuple':
    return _result_written(inside, root, fusion.kind)
  return sum(_result_written(inside, inside[o], kind) for o, kind in zip(
      root.operands, _arrays(fusion.kind), strict=True))


def _arrays(kind: str) -> list[str]:
  """The arrays of a tuple, one by one."""
  return [found[0] for found in ARRAY.finditer(re.sub(r'/\*.*?\*/', '', kind))]


def _result_written(inside: Computation, result: Instruction, kind: str) -> int:
  """Bytes of one result, of an array that is updated in place the update alone.

  `kind` says where it lies; shapes inside of a fusion do not.
  """
  while result.name == 'bitcast':
    result = inside[result.operands[0]]
  if result.name in ('dynamic-update-slice', 'scatter') and memory_bytes(kind):
    update = result.operands[1 if result.name == 'dynamic-update-slice' else 2]
    return size_bytes(inside[update].kind)
  return memory_bytes(kind)
