"""What a chip can do, by published figures, and how the chips of a topology are linked.

Rooflines divide by these; nothing on this page was measured. Sources: for TPUs
cloud.google.com/tpu/docs/v5e, /v5p and /v6e (compute, bandwidth of the main memory, bidirectional
bandwidth of all links of a chip, network of a pod or chip); the memory that programs may use is
what the compiler of libtpu 0.0.42.1 states when it refuses one. For GPUs the NVIDIA H100 and H200
data sheets, and one 400 Gbit/s network card per GPU.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

from jaxrl.errors import InputError
from jaxrl.models.flops import PEAK_TFLOPS

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
  """One chip; rates are per second.

  Attributes:
    kind: `jax.Device.device_kind`.
    memory: bytes that programs may use.
    bandwidth: bytes of main memory.
    link: bytes through one link in one direction; of a GPU, all its NVLinks together.
    network: bytes per chip between slices, or between GPU nodes.
    dimensions: of the torus; 0 for GPUs, whose nodes have a switch.
    ring: sides of this length close to a ring; of v5p every multiple of it does.
    host: a TPU_ACCELERATOR_TYPE that the compiler accepts, '' for GPUs.
  """

  kind: str
  memory: int
  bandwidth: float
  link: float
  network: float
  dimensions: int
  ring: int
  host: str

  @property
  def flops(self) -> float:
    """Dense bfloat16 operations."""
    return 1e12 * PEAK_TFLOPS[self.kind]


CHIPS = {
    # 400 GB/s both ways over 4 links; 6.4 Tbit/s per pod of 256.
    'v5e': Chip('TPU v5 lite', int(15.75 * GIB), 819e9, 50e9, 3.125e9, 2, 16, 'v5litepod-4'),
    # 1200 GB/s both ways over 6 links; 50 Gbit/s.
    'v5p': Chip('TPU v5', int(95.74 * GIB), 2765e9, 100e9, 6.25e9, 3, 4, 'v5p-8'),
    # 800 GB/s both ways over 4 links; 25.6 Tbit/s per pod of 256.
    'v6e': Chip('TPU v6 lite', int(31.25 * GIB), 1640e9, 100e9, 12.5e9, 2, 16, 'v6e-4'),
    # 900 GB/s of NVLink both ways. JAX leaves a quarter of the memory alone unless told otherwise
    # (XLA_PYTHON_CLIENT_MEM_FRACTION): these are 92% of 80 and 141 GB.
    'h100': Chip('NVIDIA H100 80GB HBM3', int(0.92 * 80e9), 3350e9, 450e9, 50e9, 0, 0, ''),
    'h200': Chip('NVIDIA H200', int(0.92 * 141e9), 4800e9, 450e9, 50e9, 0, 0, ''),
}


@dataclasses.dataclass(frozen=True)
class Topology:
  """Chips of one kind: slices of a torus of `sides`, or for GPUs (nodes, GPUs of a node)."""

  name: str                   # 'v5p:4x4x4'
  sides: tuple[int, ...]
  slices: int

  @property
  def chip(self) -> Chip:
    return CHIPS[self.name.partition(':')[0]]

  @property
  def slice_chips(self) -> int:
    return math.prod(self.sides)

  @property
  def chips(self) -> int:
    return self.slices * self.slice_chips

  @property
  def process_chips(self) -> int:
    """Chips of one process, which has those of its host or node."""
    if not self.chip.dimensions:
      return self.sides[1]
    return self.slice_chips if self.slice_chips <= 16 // self.chip.dimensions else 4

  @property
  def compiles(self) -> bool:
    """Whether programs are compiled for it; else it is planned by arithmetic alone."""
    return self.chip.dimensions > 0

  def __str__(self) -> str:
    return self.name if self.slices == 1 else f'{self.slices} slices of {self.name}'


def parse_topology(text: str, slices: int) -> Topology:
  """'v5p:4x4x4' and the like, of GPUs nodes x GPUs: 'h100:4x8'.

  Raises:
    InputError: an unknown chip, or sides that such chips are not sold in.
  """
  name, _, sides_text = text.partition(':')
  chip = CHIPS.get(name)
  parts = sides_text.split('x')
  if chip is None or not all(part.isdigit() and int(part) > 0 for part in parts):
    raise InputError('the topology cannot be read', where='--topology', found=text,
                     expected=f'a chip of {", ".join(CHIPS)} and its sides, as v5p:4x4x4, v5e:4x8 '
                              'or h100:4x8 (4 nodes of 8)')
  sides = tuple(map(int, parts))
  if len(sides) != (chip.dimensions or 2):
    raise InputError(f'the topology of a {name} has another number of sides', where='--topology',
                     expected=chip.dimensions or 'nodes and GPUs of a node', found=text)
  if slices > 1 and not chip.dimensions:
    raise InputError('GPUs have no slices', where='--num_slices', expected=1, found=slices,
                     fix='Give the number of nodes in --topology')
  return Topology(text, sides, slices)


def link_bandwidth(topology: Topology, group: Sequence[Sequence[int]]) -> float:
  """Bytes per second that one chip of a group can send in a collective, over all its links.

  `group` holds for each chip (slice, x, y, ...), of GPUs (node, number). Along every side that the
  group reaches over, a closed ring gives a link each way, an open line one.
  """
  chip = topology.chip
  first, *_ = group
  if any(place[0] != first[0] for place in group):
    return chip.network
  if not chip.dimensions:
    return chip.link
  total = 0.0
  for side, places in zip(topology.sides, list(zip(*group))[1:]):
    reached = len(set(places))
    if reached > 1:
      closed = reached == side and side % chip.ring == 0 if chip.dimensions == 3 else (
          reached == side == chip.ring)
      total += chip.link * (2 if closed else 1)
  return total or chip.link
