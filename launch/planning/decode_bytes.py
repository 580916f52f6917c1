"""Bytes that one decode step of a device moves in its main memory: compiled, and the least.

The least is what any program must move: all weights but the embedding table, the keys and values of
all live tokens, prompts once, the new keys, and the logits once in float32.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax.numpy as jnp

from jaxrl.models.config import ModelConfig
from jaxrl.models.params import count_params
from jaxrl.sampling.engine import Engine
from jaxrl.sampling.sizes import KEY_BLOCK as BLOCK
from jaxrl.sampling.sizes import region_length
from kernels.decoding.ragged import TOGETHER
from kernels.decoding.tpu import SHARED_STRETCH
from launch.planning.hlo_bytes import Loop


def moved_bytes(
    engine: Engine, program: Loop, prompt: int, lengths: Sequence[int], draws: int
) -> float:
  """What a device moves in a step.

  Args:
    lengths: response tokens of each of the device's slots so far.
    draws: slots that share a prompt.
  """
  (steps,) = program.inner
  (layers,) = steps.inner
  most = math.ceil(engine.sampling.max_new_tokens / BLOCK)
  seen = [min(math.ceil((n + 1) / BLOCK), most) for n in lengths]
  if layers.kernels:          # kernels/decoding/tpu.py; what reads estimates a whole region
    moved = {'decode_own': 0, 'decode_shared': 0, 'write_keys': 0}
    for name, size in layers.kernels:
      moved[name] += size
    room = region_length(engine.max_prompt - 1, engine.config)
    groups = math.ceil(len(lengths) / draws) / engine.prompt_rows(draws)
    stretches = math.ceil(prompt / SHARED_STRETCH) * SHARED_STRETCH
    reads = moved['decode_own'] * sum(seen) / (most * len(lengths))
    reads += moved['decode_shared'] * groups * min(stretches / room, 1)
    per_layer = layers.moved + reads + moved['write_keys']
  else:                       # kernels/decoding/blockwise.py
    *writes, per_block, per_own = sorted(
        layers.inner, key=lambda loop: (len(loop.inner), loop.moved))
    (slots,) = per_own.inner       # some of those that see a block
    reads = math.ceil(prompt / BLOCK) * per_block.moved
    for block in range(max(seen)):
      readers = sum(n > block for n in seen)
      reads += per_own.moved + math.ceil(readers / TOGETHER) * slots.moved
    places = [min(n, BLOCK * most - 1) // BLOCK for n in lengths]      # blocks that are written to
    written = max(places) - min(places) + 1
    per_layer = layers.moved + reads + written * sum(write.moved for write in writes)
  return (program.moved / engine.config.cadence + steps.moved
          + engine.model.n_layers * per_layer)


def least_bytes(
    c: ModelConfig, dtype: str, *, tensor: int, slots: int, prompt: int, mean: float, draws: int
) -> float:
  """The least a device must move.

  Args:
    tensor: devices that share one copy of the parameters, and `slots` slots.
    mean: response tokens that a slot has on average.
    draws: slots that share a prompt.
  """
  width = jnp.dtype(dtype).itemsize
  weights = width * (count_params(c) - c.vocab_size * c.d_model)
  keys = slots * (mean + 1) + slots / draws * prompt          # read, and the newest written
  cache = keys * 2 * c.n_layers * c.n_kv * c.d_head * width
  return (weights + cache + 4 * slots * c.vocab_size) / tensor
