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
from kernels.decoding.ragged import TOGETHER
from launch.planning.hlo_bytes import Loop


def moved_bytes(engine: Engine, program: Loop, prompt: int, lengths: Sequence[int]) -> float:
  """What a device moves in a step; `lengths`: response tokens of each of its slots so far."""
  (steps,) = program.inner
  (layers,) = steps.inner
  *writes, prompts, own = sorted(layers.inner, key=lambda loop: (len(loop.inner), loop.moved))
  (slots,) = own.inner             # some of those that see a block
  most = math.ceil(engine.sampling.max_new_tokens / BLOCK)
  seen = [min(math.ceil((n + 1) / BLOCK), most) for n in lengths]
  per_layer = layers.moved + math.ceil(prompt / BLOCK) * prompts.moved
  places = [min(n, BLOCK * most - 1) // BLOCK for n in lengths]      # blocks that are written to
  per_layer += (max(places) - min(places) + 1) * sum(write.moved for write in writes)
  for block in range(max(seen)):
    readers = sum(n > block for n in seen)
    per_layer += own.moved + math.ceil(readers / TOGETHER) * slots.moved
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
