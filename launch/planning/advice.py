"""What to change where a run does not fit, each change tried by arithmetic."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator

from jaxrl.errors import InputError
from launch.planning.chips import CHIPS, Topology
from launch.planning.search import estimates
from launch.planning.setting import Given, Setting

FREE = Given(None, None, None, None, None)


def advice(setting: Setting, given: Given, topology: Topology) -> list[str]:
  """Changes that would make training fit by arithmetic, those that change no numbers first."""
  found = []
  if given != FREE and _fits(setting, FREE, topology):
    found.append('leave --mesh, --micro_batches and --remat to the plan: another layout fits')
  for change, flags in _changes(setting):
    if _fits(change(setting), given, topology) or _fits(change(setting), FREE, topology):
      found.append(flags)
  larger = _larger(setting, topology)
  if larger is not None:
    found.append(f'take {larger}')
  return found or ['nothing that this plan knows makes it fit: train an adapter (--lora_rank), or '
                   'a smaller model']


def _changes(setting: Setting) -> Iterator[tuple[Callable[[Setting], Setting], str]]:
  def optimizer(**fields):
    return lambda s: dataclasses.replace(s, optimizer=dataclasses.replace(s.optimizer, **fields))

  if not setting.offloads:
    yield (lambda s: dataclasses.replace(s, offloads=True),
           '--offload_optimizer: its state rests in the memory of the host')
  if setting.optimizer.optimizer == 'adamw':
    if setting.optimizer.moment_dtype == 'float32':
      yield optimizer(moment_dtype='bfloat16'), '--moment_dtype=bfloat16'
    yield optimizer(optimizer='adamw8bit', moment_dtype='float32'), '--optimizer=adamw8bit'
  if setting.param_dtype == 'float32' and setting.adapted is None:
    yield (lambda s: dataclasses.replace(s, param_dtype='bfloat16'),
           '--param_dtype=bfloat16: small updates are lost to rounding')


def _fits(setting: Setting, given: Given, topology: Topology) -> bool:
  try:
    found = estimates(setting, given, topology)
  except InputError:
    return False
  return any(e.bytes.total <= topology.chip.memory for e in found)


def _larger(setting: Setting, topology: Topology) -> Topology | None:
  """The smallest slice of the same chip, of doubled sides, that fits."""
  sides = sorted(topology.sides)
  chip = topology.name.partition(':')[0]
  assert chip in CHIPS
  for _ in range(6):
    sides = sorted([2 * sides[0], *sides[1:]])
    larger = Topology(f'{chip}:{"x".join(map(str, sides))}', tuple(sides), topology.slices)
    if math.prod(sides) <= 4096 and _fits(setting, FREE, larger):
      return larger
  return None
