"""Collectives of a compiled program: how often each runs, over which mesh axes, and its bytes.

A TPU program spells one collective in several ways: as itself, as a pair of start and done, as the
first of several fusions that carry it through other work (`AsyncCollectiveStart`), a reduce-scatter
as an all-reduce inside a fusion named all-reduce-scatter, and what goes between slices as a send to
the host. Each is counted once. Within a slice, devices are numbered as those of the first one.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterable, Sequence

import numpy as np

from launch.planning.hlo import Computation, Instruction, parse, runs, size_bytes

KINDS = ('all-gather', 'reduce-scatter', 'all-reduce', 'all-to-all', 'ragged-all-to-all',
         'collective-permute', 'collective-broadcast')


@dataclasses.dataclass(frozen=True)
class Collective:
  """One instruction of the program.

  Attributes:
    kind: of `KINDS`.
    group: numbers of the devices of one group, as the mesh lists them.
    size: bytes per device and run of the larger of operand and result.
    runs: in one call of the program.
  """

  kind: str
  group: tuple[int, ...]
  size: int
  runs: float

  @property
  def sent(self) -> float:
    """Bytes that each device sends in one run by a ring, or straight to its partner."""
    n = len(self.group)
    if self.kind in ('collective-permute', 'collective-broadcast'):
      return float(self.size)
    return (2.0 if self.kind == 'all-reduce' else 1.0) * self.size * (n - 1) / n


def collectives(
    text: str, devices: int, *, slices: int = 1, unknown: float = 1.0
) -> list[Collective]:
  """All collectives between two devices or more.

  Args:
    devices: that the program is for, over all slices.
    unknown: how often loops run whose length is known at run time alone.
  """
  computations, entry = parse(text)
  found = []
  for name, times in runs(computations, entry, unknown).items():
    body = computations[name]
    for i in body.values():
      between = re.search(r'_xla_megascale_transfer_type="(\w+)"', i.rest)
      if i.name == 'send' and between:      # the devices of other slices at the same place
        kind = between[1].lower().replace('_', '-')
        group = tuple(range(0, devices, devices // slices))
        found.append(Collective(kind, group, size_bytes(body[i.operands[0]].kind), times))
      kind = i.name.removesuffix('-start')
      if kind not in KINDS or not _begins(i, body):
        continue
      if kind == 'all-reduce' and name.startswith('all-reduce-scatter'):
        kind = 'reduce-scatter'
      group = _group(i.rest, devices)
      if len(group) > 1:
        found.append(Collective(kind, group, _size(i, body), times))
  return found


def _begins(i: Instruction, body: Computation) -> bool:
  """Whether this is where a collective starts: the later fusions of a chain repeat it."""
  return 'chain_id=' not in i.rest or any('"AsyncCollectiveStart"' in j.rest for j in body.values())


def _size(i: Instruction, body: Computation) -> int:
  operands = sum(size_bytes(body[o].kind) for o in i.operands)
  if i.name.endswith('-start'):     # the result names operands and results
    return max(operands, size_bytes(i.kind) - operands)
  return max(operands, size_bytes(i.kind))


def _group(attributes: str, devices: int) -> tuple[int, ...]:
  """The first group of `replica_groups`, or the first pair that differs of a permutation.

  Three spellings: {{0,1},{2,3}}; [2,2]<=[2,2]T(1,0), an iota reshaped and transposed; and
  mesh['a'=2,'b'=2] {'b'}, with ('a':(1)2) for a part of an axis.
  """
  if found := re.search(r'source_target_pairs=\{(.*?)\}\}', attributes):
    pairs = re.findall(r'(\d+),(\d+)', found[1])
    return next(((int(a), int(b)) for a, b in pairs if a != b), ())
  if found := re.search(r'replica_groups=\{\{([\d,]*)\}', attributes):
    return tuple(int(n) for n in found[1].split(','))
  if found := re.search(r'replica_groups=\[([\d,]+)\]<=(\S+?)(?:, |$)', attributes):
    shape = [int(n) for n in found[1].split(',')]
    return tuple(_iota(found[2]).reshape(shape)[0].tolist())
  if found := re.search(r'replica_groups=mesh\[(.*?)\](?:, device_ids=\((.*?)\))? \{(.*?)\}',
                        attributes):
    axes = [(name, int(size)) for name, size in re.findall(r"'(\w+)'=(\d+)", found[1])]
    ids = _iota(found[2]) if found[2] else np.arange(math.prod(s for _, s in axes))
    return _along(axes, ids, re.findall(r"'(\w+)'(?::\((\d+)\)(\d+))?", found[3]))
  if 'replica_groups={}' in attributes:
    return tuple(range(devices))
  raise ValueError(f'replica groups cannot be read: {attributes[:200]}')


def _iota(text: str) -> np.ndarray:
  """'[4,2]T(1,0)' and '[8]<=[4,2]T(1,0)' as the numbers in their order."""
  text = text.rpartition('<=')[2] or text
  dims, _, order = text.partition('T')
  numbers = np.arange(math.prod(sizes := [int(n) for n in re.findall(r'\d+', dims)]))
  return numbers.reshape(sizes).transpose(
      [int(n) for n in re.findall(r'\d+', order)] or None).reshape(-1)


def _along(
    axes: Sequence[tuple[str, int]], ids: np.ndarray, over: Iterable[tuple[str, str, str]]
) -> tuple[int, ...]:
  """Devices of the group of the first device: those along `over`, axes or parts of them."""
  places = np.unravel_index(np.arange(ids.size), [size for _, size in axes])
  coordinates = dict(zip((name for name, _ in axes), places, strict=True))
  sizes = dict(axes)
  free = np.ones(ids.size, bool)
  chosen = {name: (int(before or 1), int(part or sizes[name])) for name, before, part in over}
  for name, place in coordinates.items():
    before, part = chosen.get(name, (1, 1))
    after = sizes[name] // (before * part)
    free &= (place // (part * after) == 0) & (place % after == 0)
  return tuple(ids[free].tolist())


def mesh_axes(group: Iterable[int], shape: dict[str, int]) -> str:
  """Names of the mesh axes that the devices of a group differ in, joined by '+'."""
  places = np.unravel_index(np.array(list(group)), list(shape.values()))
  return '+'.join(name for name, place in zip(shape, places, strict=True)
                  if len(set(place.tolist())) > 1)
