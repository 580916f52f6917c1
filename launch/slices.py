"""Slices of Cloud TPU: what `v5p:4x4x4` or `v5p-128` is in chips, hosts, machines and names.

Sources, as of late 2025: the configuration tables of cloud.google.com/tpu/docs/v5e, /v5p and /v6e;
cloud.google.com/tpu/docs/runtimes; cloud.google.com/kubernetes-engine/docs/concepts/plan-tpus.
Which zones have what changes from month to month, so it is asked of gcloud and not written here.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping

from jaxrl.errors import InputError


@dataclasses.dataclass(frozen=True)
class Generation:
  prefix: str                  # of the accelerator type
  cores_per_chip: int          # the number in an accelerator type counts TensorCores
  runtime: str                 # --runtime-version of a TPU VM
  gke_accelerator: str         # label cloud.google.com/gke-tpu-accelerator of a node
  machines: Mapping[int, str]  # chips of a host -> GKE machine type
  shapes: tuple[str, ...]      # those that have an accelerator type, smallest first


GENERATIONS = {
    'v5e': Generation(
        'v5litepod', 1, 'v2-alpha-tpuv5-lite', 'tpu-v5-lite-podslice',
        {1: 'ct5lp-hightpu-1t', 4: 'ct5lp-hightpu-4t', 8: 'ct5lp-hightpu-8t'},
        ('1x1', '2x2', '2x4', '4x4', '4x8', '8x8', '8x16', '16x16')),
    'v5p': Generation(
        'v5p', 2, 'v2-alpha-tpuv5', 'tpu-v5p-slice', {4: 'ct5p-hightpu-4t'},
        ('2x2x1', '2x2x2', '2x2x4', '2x4x4', '4x4x4', '4x4x8', '4x8x8', '8x8x8', '8x8x16',
         '8x16x16', '16x16x16', '16x16x24')),
    'v6e': Generation(
        'v6e', 1, 'v2-alpha-tpuv6e', 'tpu-v6e-slice',
        {1: 'ct6e-standard-1t', 4: 'ct6e-standard-4t', 8: 'ct6e-standard-8t'},
        ('1x1', '2x2', '2x4', '4x4', '4x8', '8x8', '8x16', '16x16')),
}
_LARGEST_V5P = 6144      # chips of the largest job, 96 cubes of 4x4x4


@dataclasses.dataclass(frozen=True)
class Slice:
  """One slice: chips joined by the fast interconnect, spread over hosts of equal size."""

  generation: str
  topology: str                  # chips along each axis, as in 4x4x4
  chips: int
  hosts: int
  accelerator_type: str | None   # None: GKE makes this shape, a queued resource does not

  @property
  def chips_per_host(self) -> int:
    return self.chips // self.hosts

  @property
  def runtime(self) -> str:
    return GENERATIONS[self.generation].runtime

  @property
  def gke_accelerator(self) -> str:
    return GENERATIONS[self.generation].gke_accelerator

  @property
  def machine(self) -> str:
    return GENERATIONS[self.generation].machines[self.chips_per_host]


def find_slice(name: str, *, where: str = '--topology') -> Slice:
  """The slice called GENERATION:SHAPE (v5p:4x4x4), or by its accelerator type (v5p-128).

  Raises:
    InputError: there is none; the sentence lists those of the generation.
  """
  generation, colon, shape = name.partition(':')
  if colon:
    if generation not in GENERATIONS:
      raise InputError('the generation is not known', where=where,
                       expected=f'one of {", ".join(GENERATIONS)}', found=generation)
    if shape not in GENERATIONS[generation].shapes and not _is_cubes(generation, shape):
      raise InputError(f'{generation} has no such slice', where=where,
                       expected=_listed(generation), found=name)
    return _slice(generation, shape)
  prefix = name.rpartition('-')[0]
  for generation, facts in GENERATIONS.items():
    if facts.prefix == prefix:
      for shape in facts.shapes:
        if (found := _slice(generation, shape)).accelerator_type == name:
          return found
      raise InputError('there is no such accelerator type', where=where,
                       expected=_listed(generation), found=name)
  raise InputError('the slice cannot be read', where=where,
                   expected='a shape such as v5p:4x4x4, or an accelerator type such as v5p-128',
                   found=name)


def _slice(generation: str, shape: str) -> Slice:
  facts = GENERATIONS[generation]
  chips = math.prod(map(int, shape.split('x')))
  # Eight chips of v5e and v6e are one host; anything larger is made of hosts with four.
  per_host = chips if chips in facts.machines else 4
  kind = f'{facts.prefix}-{chips * facts.cores_per_chip}' if shape in facts.shapes else None
  return Slice(generation, shape, chips, chips // per_host, kind)


def _is_cubes(generation: str, shape: str) -> bool:
  """Whether it is a v5p slice of whole cubes, which GKE makes in any AxBxC with A <= B <= C."""
  if generation != 'v5p' or not re.fullmatch(r'[1-9]\d{0,2}(x[1-9]\d{0,2}){2}', shape):
    return False
  sizes = [int(size) for size in shape.split('x')]
  return (sizes == sorted(sizes) and all(size % 4 == 0 for size in sizes)
          and math.prod(sizes) <= _LARGEST_V5P)


def _listed(generation: str) -> str:
  slices = [_slice(generation, shape) for shape in GENERATIONS[generation].shapes]
  return 'one of ' + ', '.join(f'{generation}:{s.topology} ({s.accelerator_type})' for s in slices)
