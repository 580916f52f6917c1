"""Bytes of main memory that a compiled program moves, loop by loop, read from its HLO text.

XLA's `cost_analysis` counts a loop body once and on-chip memory like any other. Here every loop has
a figure of its own, to be multiplied by its trip count, and arrays that the compiler placed on the
chip (`S(1)` in a layout) are free. A fusion that cuts a slice out of an array reads the slice; an
update in place writes the update. Padding of tiles is not counted.
"""

from __future__ import annotations

import dataclasses
import math
import re

BYTES = {'pred': 1, 's8': 1, 'u8': 1, 'bf16': 2, 'f16': 2, 's32': 4, 'u32': 4, 'f32': 4}
FREE = {'parameter', 'constant', 'tuple', 'get-tuple-element', 'bitcast', 'while', 'copy-done',
        'slice-done', 'iota', 'partition-id', 'after-all'}
ARRAY = re.compile(r'(\w+)\[([\d,]*)\](?:\{[^}]*?(?:S\((\d+)\))?\})?')
INSTRUCTION = re.compile(r'\s+(?:ROOT )?%(\S+) = (\(.*?\)|\S+) ([\w\-]+)\((.*)$')


@dataclasses.dataclass(frozen=True)
class Instruction:
  kind: str                   # the shape of its result, as text
  name: str                   # of the operation
  operands: tuple[str, ...]
  rest: str                   # attributes

  def called(self, attribute: str) -> str:
    found = re.search(rf'{attribute}=%([\w.\-]+)', self.rest)
    assert found is not None, (attribute, self)
    return found[1]


Computation = dict[str, Instruction]       # in the order of the text; the last is the result


@dataclasses.dataclass(frozen=True)
class Loop:
  """What one trip moves, the loops inside it left out."""

  moved: int                  # bytes
  inner: tuple[Loop, ...]     # in the order they run


def memory_bytes(kind: str) -> int:
  """Bytes of a result in main memory."""
  return sum(BYTES[dtype] * math.prod(int(n) for n in dims.split(',') if n)
             for dtype, dims, space in ARRAY.findall(re.sub(r'/\*.*?\*/', '', kind)) if not space)


def parse(text: str) -> tuple[dict[str, Computation], str]:
  """(computations by name, name of the entry)."""
  computations: dict[str, Computation] = {}
  entry, current = '', {}
  for line in text.splitlines():
    header = re.match(r'(ENTRY )?%([\w.\-]+) \(.*\{$', line)
    if header:
      current = computations.setdefault(header[2], {})
      entry = header[2] if header[1] else entry
    elif found := INSTRUCTION.match(line):
      name, kind, operation, rest = found.groups()
      inside, _, attributes = rest.partition(')')
      if operation == 'parameter':
        attributes = inside
      operands = tuple(re.findall(r'%([\w.\-]+)', inside))
      current[name] = Instruction(kind, operation, operands, attributes)
  return computations, entry


def loops(text: str) -> Loop:
  """The whole program as a loop of one trip."""
  computations, entry = parse(text)

  def walk(name: str) -> Loop:
    body = computations[name]
    inner = [walk(i.called('body')) for i in body.values() if i.name == 'while']
    return Loop(sum(_moved(body, i, computations) for i in body.values()), tuple(inner))

  return walk(entry)


def _moved(body: Computation, i: Instruction, computations: dict[str, Computation]) -> int:
  if i.name in FREE:
    return 0
  if i.name == 'copy-start':        # the result names both ends
    return memory_bytes(i.kind)
  if i.name == 'slice-start':       # the result: (the whole), the slice, a context
    whole, part = [found[0] for found in ARRAY.finditer(i.kind)][:2]
    return memory_bytes(part) + (_size(part) if memory_bytes(whole) else 0)
  operands = [memory_bytes(body[o].kind) for o in i.operands]
  if i.name == 'dynamic-slice':
    return memory_bytes(i.kind) + (_size(i.kind) if operands[0] else 0)
  if i.name == 'dynamic-update-slice':
    update = _size(body[i.operands[1]].kind)
    return operands[1] + (update if operands[0] else 0)
  if i.name != 'fusion':
    return sum(operands) + memory_bytes(i.kind)
  inside = computations[i.called('calls')]
  read = sum(min(whole, _read(inside, n, computations)) for n, whole in enumerate(operands))
  return read + _written(inside, i)


def _size(kind: str) -> int:
  """Bytes of a result wherever it is."""
  return memory_bytes(re.sub(r'S\(\d+\)', '', kind))


def _read(inside: Computation, number: int, computations: dict[str, Computation]) -> int:
  """Bytes that a fusion reads of its operand; more than all of it where it reads it twice."""
  parameter = next(name for name, i in inside.items()
                   if i.name == 'parameter' and i.rest.strip() == str(number))
  return _read_from(inside, parameter, computations)


def _read_from(inside: Computation, name: str, computations: dict[str, Computation]) -> int:
  if name == list(inside)[-1]:
    return _size(inside[name].kind)       # handed on as it is
  total = 0
  for result, user in inside.items():
    if name not in user.operands:
      continue
    place = user.operands.index(name)
    if user.name == 'bitcast':
      total += _read_from(inside, result, computations)
    elif user.name in ('dynamic-slice', 'slice', 'gather') and place == 0:
      total += _size(user.kind)
    elif user.name == 'dynamic-update-slice' and place == 0:
      total += 0              # in place
    elif user.name == 'fusion':
      total += _read(computations[user.called('calls')], place, computations)
    else:
      total += _size(inside[name].kind)
  return total


def _written(inside: Computation, fusion: Instruction) -> int:
  root = list(inside.values())[-1]
  if root.name in ('dynamic-update-slice', 'scatter') and memory_bytes(fusion.kind):
    update = root.operands[1 if root.name == 'dynamic-update-slice' else 2]
    return _size(inside[update].kind)
  return memory_bytes(fusion.kind)
