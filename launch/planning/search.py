"""Which layouts a plan considers, and how it estimates them before anything is compiled."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator

import jax.numpy as jnp

from jaxrl.errors import InputError
from jaxrl.models.config import ModelConfig
from jaxrl.models.decoder import REMAT
from jaxrl.models.params import count_params
from launch.planning.chips import Topology
from launch.planning.device_bytes import TrainBytes, train_bytes
from launch.planning.layout import Layout
from launch.planning.setting import Given, Setting
from launch.planning.workload import Rows, step_flops, training_rows

MICRO_BATCHES = (1, 2, 4, 8, 16)
SEQUENCES = (1, 2, 4, 8)


@dataclasses.dataclass(frozen=True)
class Estimate:
  """A layout by arithmetic."""

  layout: Layout
  rows: Rows
  bytes: TrainBytes
  flops: tuple[float, float]  # of a step: the model's, the hardware's
  compute: float              # seconds of a step at the peak of the chips
  links: float                # seconds of a step at the bandwidth of the links

  @property
  def seconds(self) -> float:
    """The longer of the two, and a tenth of the other: of equals, the one that moves less."""
    return max(self.compute, self.links) + 0.1 * min(self.compute, self.links)


def refused(setting: Setting, topology: Topology, layout: Layout) -> str | None:
  """Why the run could not be laid out so; None where it could."""
  c = setting.model
  rows = layout.ways * layout.micro_batches
  if math.prod(layout.sizes.values()) != topology.chips:
    return f'--mesh: {math.prod(layout.sizes.values())} devices of {topology.chips}'
  if layout.data % topology.slices:
    return f'--mesh: data={layout.data} is no multiple of {topology.slices} slices'
  if c.n_kv % layout.tensor or c.d_mlp % layout.tensor:
    return f'--mesh: {c.n_kv} key heads and {c.d_mlp} columns over tensor={layout.tensor}'
  if c.d_model % (layout.fsdp * layout.sequence):
    return f'--mesh: width {c.d_model} over fsdp * sequence = {layout.fsdp * layout.sequence}'
  if any(length % layout.sequence for length in setting.buckets):
    return f'--length_buckets: {setting.buckets} over sequence={layout.sequence}'
  if setting.layout == 'packed' and setting.batch_size < rows:
    return f'--batch_size={setting.batch_size} is fewer than the {rows} rows of the devices'
  if setting.layout == 'padded' and setting.batch_size % rows:
    return f'--batch_size={setting.batch_size} is no multiple of {rows}'
  if layout.score_batch % layout.ways:
    return f'--score_batch={layout.score_batch} is no multiple of {layout.ways}'
  return None


def layouts(setting: Setting, given: Given, topology: Topology) -> Iterator[Layout]:
  """All that the flags leave open and the run would accept."""
  meshes = [given.mesh] if given.mesh else list(_meshes(topology))
  micro = [given.micro_batches] if given.micro_batches else MICRO_BATCHES
  remats = [name for name in given.remats if topology.compiles or not REMAT[name][1]]
  for (data, fsdp, sequence, tensor), parts, remat in itertools.product(meshes, micro, remats):
    ways = data * fsdp
    score = given.score_batch or math.lcm(ways, setting.score_batch) if (
        ways <= setting.score_batch or given.score_batch) else ways
    found = Layout(data, fsdp, sequence, tensor, parts, remat, score)
    if refused(setting, topology, found) is None:
      yield found


def _meshes(topology: Topology) -> Iterator[tuple[int, int, int, int]]:
  """Sizes (data, fsdp, sequence, tensor) whose product is the number of chips."""
  chips = topology.slice_chips
  for tensor, sequence in itertools.product(_divisors(chips), SEQUENCES):
    if chips % (tensor * sequence) == 0:
      for copies in _divisors(chips // (tensor * sequence)):
        yield topology.slices * copies, chips // (tensor * sequence * copies), sequence, tensor


def _divisors(n: int) -> list[int]:
  return [d for d in range(1, n + 1) if n % d == 0]


def estimates(setting: Setting, given: Given, topology: Topology) -> list[Estimate]:
  """Every layout, the fastest by arithmetic first.

  Raises:
    InputError: there is none that the run would accept.
  """
  found = [_estimate(setting, topology, layout) for layout in layouts(setting, given, topology)]
  if not found:
    raise InputError(
        'the devices cannot be used by this run', where='--topology, --mesh',
        expected='a mesh (data, fsdp, sequence, tensor) that uses every device once, with at most '
                 f'--batch_size={setting.batch_size} rows and tensor a divisor of '
                 f'{setting.model.n_kv}', found=given_reason(setting, given, topology),
        fix='Raise --batch_size, or rent fewer chips')
  return sorted(found, key=lambda e: (e.seconds, e.bytes.total))


def given_reason(setting: Setting, given: Given, topology: Topology) -> str:
  if given.mesh is None:
    return f'no such mesh of {topology.chips} devices'
  layout = Layout(*given.mesh, given.micro_batches or 1, given.remats[0],
                  given.score_batch or setting.score_batch)
  return refused(setting, topology, layout) or 'none that divides'


def _estimate(setting: Setting, topology: Topology, layout: Layout) -> Estimate:
  rows = training_rows(setting, layout)
  flops = step_flops(setting, layout, rows)
  return Estimate(
      layout, rows, train_bytes(setting, layout, rows), flops,
      flops[1] / (topology.chips * topology.chip.flops), _link_seconds(
          setting, topology, layout, rows))


def _link_seconds(setting: Setting, topology: Topology, layout: Layout, rows: Rows) -> float:
  """Seconds that collectives take at the bandwidth of one side of the torus, both ways.

  Weights are gathered in the forward and again in the backward pass, gradients are reduced once
  per micro-batch; with `tensor` two activations per layer are reduced in each pass, and with
  `sequence` keys and values are gathered.
  """
  c, width = setting.model, jnp.dtype(setting.compute.dtype).itemsize
  tokens = rows.tokens_per_device(layout)
  passes = layout.micro_batches * (2 + (layout.remat != 'all'))
  shards = layout.fsdp * layout.sequence
  trained = 0 if setting.adapted is not None else 1
  sent = {
      'shards': layout.micro_batches * (2 + trained) * width * count_params(c) / layout.tensor,
      'tensor': passes * 2 * c.n_layers * 2 * width * tokens * c.d_model,
      'sequence': passes * c.n_layers * width * tokens * layout.sequence * (
          2 * c.n_kv * c.d_head / layout.tensor),
      'copies': 2 * trained * 4 * count_params(c) / (layout.tensor * shards)}
  inner = layout.data // topology.slices
  # How many devices share each, and how far they reach in the order of the mesh.
  groups = {'shards': (shards, shards * layout.tensor), 'tensor': (layout.tensor, layout.tensor),
            'sequence': (layout.sequence, layout.sequence * layout.tensor),
            'copies': (inner, inner * shards * layout.tensor)}
  seconds = sum(sent[name] * (n - 1) / n / _bandwidth(topology, reach)
                for name, (n, reach) in groups.items())
  between = sent['copies'] * (topology.slices - 1) / topology.slices
  return seconds + between / topology.chip.network


def _bandwidth(topology: Topology, reach: int) -> float:
  """Bytes per second of a chip to others of its slice, or to so many GPUs in order."""
  chip = topology.chip
  if chip.dimensions:
    return 2 * chip.link
  return chip.link if reach <= topology.sides[1] else chip.network


def rollout_tensors(c: ModelConfig, given: Given, topology: Topology) -> list[int]:
  """Devices that may share a copy of the parameters while sampling, the fewest first.

  Every process samples on its own devices.

  Raises:
    InputError: a given number that does not divide the devices of a process.
  """
  if not given.rollout_tensor:
    return [n for n in _divisors(topology.process_chips) if not c.n_kv % n and not c.d_mlp % n]
  if topology.process_chips % given.rollout_tensor:
    raise InputError('every process samples on its own devices', where='--rollout_tensor',
                     expected=f'a divisor of {topology.process_chips}, the chips of a process of '
                              f'{topology.name}', found=given.rollout_tensor)
  return [given.rollout_tensor]
