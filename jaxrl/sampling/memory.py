"""How many slots: as many as memory holds, as help, and as there is work for.

All bytes are those of one device; devices of one mesh hold the same.
"""

from __future__ import annotations

import bisect
import dataclasses
import math
import os
import pathlib
import re

import jax
import jax.numpy as jnp

from jaxrl.errors import InputError
from jaxrl.models.config import ModelConfig
from jaxrl.models.lora import lora_specs
from jaxrl.models.params import ParamSpec, decoder_specs, is_spec
from jaxrl.parallel.sharding import rollout_spec
from jaxrl.sampling.cache import empty_region
from jaxrl.sampling.requests import SamplingConfig
from jaxrl.sampling.sizes import KEY_BLOCK, EngineConfig, prompt_rows, region_length
from jaxrl.sampling.slots import empty_slots

FRACTION = 0.8                # of what is at hand; the rest is for activations and the allocator
# Rows [V] of float32 that a decode step holds per slot: logits, the same after penalties, and the
# weights of the filters. XLA's memory analysis counts 1.0, 2.0 with top_p and 3.0 with penalties.
LOGIT_ROWS = 3
# Slots per part of the mesh from which on more are hardly faster, by platform. A CPU computes more
# than it reads from there on; on accelerators the parameters are read for all slots at once.
MOST_SLOTS = {'cpu': 64}
MOST_SLOTS_ELSEWHERE = 512
# So many requests per part start at once. Of more, half do: slots that are refilled stay full,
# while all that start together wait for the longest.
AT_ONCE = {'cpu': 32}
AT_ONCE_ELSEWHERE = 128
MULTIPLE = 8                  # of slots per part, where there are more than that


@dataclasses.dataclass(frozen=True)
class SlotChoice:
  slots: int                  # over all devices
  why: str                    # a sentence: bytes per slot, memory at hand, and what was the limit


def parameter_bytes(model: ModelConfig, mesh: jax.sharding.Mesh, dtype: str) -> int:
  """Bytes of the parameters as an engine on `mesh` ('data', 'tensor') holds them."""
  specs = decoder_specs(model) | ({'lora': lora_specs(model)} if model.lora is not None else {})

  def size(s: ParamSpec) -> int:
    split = any(rollout_spec(mesh, s.axes, s.shape))
    return math.prod(s.shape) // (mesh.shape['tensor'] if split else 1)

  leaves = jax.tree.leaves(specs, is_leaf=is_spec)
  return sum(map(size, leaves)) * jnp.dtype(dtype).itemsize


def state_bytes(
    model: ModelConfig, sampling: SamplingConfig, config: EngineConfig, max_prompt: int,
    readers: int, mesh: jax.sharding.Mesh, *, slots: int,
) -> int:
  """Bytes of what lives between decode steps: caches, tables, token buffers and seen masks.

  Args:
    readers: slots that may read one row of the prompt region, at most `slots`.
    slots: per part of the mesh.
  """
  heads = model.n_kv // mesh.shape['tensor']

  def region(*shape: int):
    return empty_region(model, shape, dtype=jnp.dtype(config.dtype),
                        quantised=config.kv_cache == 'int8')

  def make():
    rows = prompt_rows(slots, readers)
    own = region(math.ceil(sampling.max_new_tokens / KEY_BLOCK), slots, heads, KEY_BLOCK)
    prompts = region(rows, heads, region_length(max_prompt - 1, config))
    return empty_slots(slots, rows, readers, model, sampling, own=own), prompts

  return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(jax.eval_shape(make)))


def slot_bytes(
    model: ModelConfig, sampling: SamplingConfig, config: EngineConfig, max_prompt: int,
    readers: int, mesh: jax.sharding.Mesh,
) -> int:
  """Bytes that one more slot costs: its keys, buffers and masks, its share of the prompts, logits.

  `readers` is a power of two; the prompt region has two rows for so many slots.
  """
  few, many = (
      state_bytes(model, sampling, config, max_prompt, readers, mesh, slots=n * readers)
      for n in (4, 8))
  return math.ceil((many - few) / (4 * readers)) + _logit_bytes(model)


def _logit_bytes(model: ModelConfig) -> int:
  return LOGIT_ROWS * 4 * model.vocab_size


def memory_at_hand(mesh: jax.sharding.Mesh) -> int:
  """Bytes that a device of this process can still hold, the least of them.

  Where the backend does not tell (CPU), devices share what the system has available evenly.
  """
  local = [d for d in mesh.devices.flat if d.process_index == jax.process_index()]
  told = [device.memory_stats() or {} for device in local]
  if all('bytes_limit' in stats for stats in told):
    return min(stats['bytes_limit'] - stats.get('bytes_in_use', 0) for stats in told)
  return _available_memory() // len(local)


def _available_memory(root: pathlib.Path = pathlib.Path('/')) -> int:
  """Bytes that the system can give to new processes; control groups may allow less."""
  found = re.search(r'MemAvailable:\s+(\d+) kB', _text(root / 'proc/meminfo'))
  if found:
    available = 1024 * int(found[1])
  else:                       # not Linux: what others use is not told
    available = os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') // 2
  group = root / 'sys/fs/cgroup'
  for limit, used, cache in (
      ('memory.max', 'memory.current', 'inactive_file'),
      ('memory/memory.limit_in_bytes', 'memory/memory.usage_in_bytes', 'total_inactive_file')):
    numbers = [_text(group / name).strip() for name in (limit, used)]
    if all(number.isdigit() for number in numbers):
      kept = re.search(rf'^{cache} (\d+)$', _text((group / limit).with_name('memory.stat')), re.M)
      room = int(numbers[0]) - int(numbers[1]) + (int(kept[1]) if kept else 0)
      available = min(available, max(room, 0))
  return available


def _text(path: pathlib.Path) -> str:
  try:
    return path.read_text()
  except OSError:
    return ''


def choose_slots(
    model: ModelConfig,
    sampling: SamplingConfig,
    config: EngineConfig,
    mesh: jax.sharding.Mesh,
    *,
    max_prompt: int,
    draws: int,
    requests: int | None = None,
    memory: int | None = None,
    held: int = 0,
) -> SlotChoice:
  """The number of slots for an engine on `mesh`, a multiple of its parts.

  Args:
    config: of the engine; its `slots` do not matter.
    mesh: ('data', 'tensor') from `rollout_mesh`.
    max_prompt: longest prompt, in ids.
    draws: of each prompt.
    requests: in all, where it is known.
    memory: bytes at hand on each device; None asks the system.
    held: bytes of it that will be taken by something else, such as masters not loaded yet.

  Raises:
    InputError: there is not memory for the parameters and one slot per part.
  """
  memory = memory_at_hand(mesh) if memory is None else memory
  parts, platform = mesh.shape['data'], mesh.devices.flat[0].platform
  parameters = parameter_bytes(model, mesh, config.dtype)
  readers = 1 << (max(draws, 1) - 1).bit_length()

  def needed(slots: int) -> int:
    return _logit_bytes(model) * slots + state_bytes(
        model, sampling, config, max_prompt, min(readers, slots), mesh, slots=slots)

  most = MOST_SLOTS.get(platform, MOST_SLOTS_ELSEWHERE)
  budget = int(FRACTION * (memory - held)) - parameters
  limits = {
      'more would hardly be faster': most,
      'memory holds no more': bisect.bisect_right(range(1, most + 1), budget, key=needed)}
  if requests is not None:
    at_once = parts * AT_ONCE.get(platform, AT_ONCE_ELSEWHERE)
    wanted = max(min(requests, at_once), requests // 2)
    limits[f'{requests} samples need no more'] = max(wanted // parts, 1)
  limit = min(limits, key=lambda name: limits[name])
  chosen = limits[limit]
  if chosen < 1:
    raise InputError(
        'the memory of a device does not hold the parameters and one slot', where='rollouts',
        expected=f'{_size(parameters + needed(1))} of {FRACTION:.0%} of what is at hand, '
                 f'{_size(parameters)} of it parameters',
        found=f'{_size(memory - held)} at hand',
        fix='Lower --max_new_tokens or --max_prompt_length, set --kv_cache=int8, or raise '
            '--rollout_tensor')
  if chosen > MULTIPLE:
    chosen -= chosen % MULTIPLE
  each = f' ({chosen} in each of {parts} parts of the mesh)' if parts > 1 else ''
  why = (f'{parts * chosen} slots{each} of {_size(needed(chosen) / chosen)}; a device has '
         f'{_size(memory - held)} at hand, of which parameters take {_size(parameters)}; {limit}')
  return SlotChoice(parts * chosen, why)


def _size(count: float) -> str:
  """Bytes for people."""
  for unit in ('B', 'KiB', 'MiB'):
    if count < 1024:
      return f'{count:.3g} {unit}'
    count /= 1024
  return f'{count:.3g} GiB'
