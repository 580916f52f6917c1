"""The text of a compiled program (HLO): its instructions, and how often each computation runs."""

from __future__ import annotations

import dataclasses
import math
import re

BYTES = {'pred': 1, 's4': 0.5, 'u4': 0.5, 's8': 1, 'u8': 1, 'f8e4m3fn': 1, 'f8e5m2': 1, 's16': 2,
         'u16': 2, 'bf16': 2, 'f16': 2, 's32': 4, 'u32': 4, 'f32': 4, 's64': 8, 'u64': 8, 'f64': 8,
         'token': 0}
ARRAY = re.compile(r'(\w+)\[([\d,]*)\](?:\{[^}]*?(?:S\((\d+)\))?\})?')
INSTRUCTION = re.compile(r'\s+(?:ROOT )?%(\S+) = (\(.*?\)|\S+) ([\w\-]+)\((.*)$')


@dataclasses.dataclass(frozen=True)
class Instruction:
  kind: str                   # the shape of its result, as text
  name: str                   # of the operation
  operands: tuple[str, ...]
  rest: str                   # attributes

  def called(self, attribute: str) -> str:
    found = re.search(rf'(?:{attribute})=%([\w.\-]+)', self.rest)
    assert found is not None, (attribute, self)
    return found[1]


Computation = dict[str, Instruction]       # in the order of the text; the last is the result


def memory_bytes(kind: str) -> int:
  """Bytes of a result in main memory; arrays that lie on the chip, `S(1)` and others, are none."""
  return _sum_bytes(kind, on_chip=False)


def size_bytes(kind: str) -> int:
  """Bytes of a result wherever it is."""
  return _sum_bytes(kind, on_chip=True)


def _sum_bytes(kind: str, *, on_chip: bool) -> int:
  return math.ceil(sum(
      BYTES[dtype] * math.prod(int(n) for n in dims.split(',') if n)
      for dtype, dims, space in ARRAY.findall(re.sub(r'/\*.*?\*/', '', kind))
      if on_chip or not space))


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
      if operation in ('parameter', 'constant'):
        attributes = inside
      operands = tuple(re.findall(r'%([\w.\-]+)', inside))
      current[name] = Instruction(kind, operation, operands, attributes)
  return computations, entry


def trip_count(loop: Instruction, computations: dict[str, Computation]) -> int | None:
  """How often a `while` runs that counts from 0 by 1, as every scan does; None: known at run time.

  XLA for TPUs keeps no count in its text, but the bound that the counter is compared with is a
  constant.
  """
  if found := re.search(r'"known_trip_count":\{"n":"(\d+)"\}', loop.rest):
    return int(found[1])
  condition = computations[loop.called('condition')]
  last = list(condition.values())[-1]
  if last.name != 'compare' or 'direction=LT' not in last.rest:
    return None
  bound = condition[last.operands[1]]
  if bound.name != 'constant' or not bound.rest.strip().isdigit():
    return None
  return int(bound.rest)


def runs(
    computations: dict[str, Computation], entry: str, unknown: float
) -> dict[str, float]:
  """How often each computation runs that instructions of the program are in; fusions included.

  Args:
    unknown: trips of loops whose bound is known at run time alone. Of the branches of a
      conditional each counts as taken.
  """
  counts: dict[str, float] = {}

  def walk(name: str, times: float) -> None:
    counts[name] = counts.get(name, 0.0) + times
    for i in computations[name].values():
      if i.name == 'while':
        trips = trip_count(i, computations)
        walk(i.called('body'), times * (unknown if trips is None else trips))
      elif i.name in ('fusion', 'call', 'async-start'):
        walk(i.called('calls|to_apply' if i.name == 'call' else 'calls'), times)
      elif i.name == 'conditional':
        for branch in _branches(i):
          walk(branch, times)

  walk(entry, 1.0)
  return counts


def _branches(i: Instruction) -> list[str]:
  several = re.search(r'branch_computations=\{([^}]*)\}', i.rest)
  if several:
    return re.findall(r'%([\w.\-]+)', several[1])
  return [i.called('true_computation'), i.called('false_computation')]
