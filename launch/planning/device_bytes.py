"""What lies on each device: bytes by arithmetic, not compiled."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxrl.models.config import ModelConfig
from jaxrl.models.decoder import REMAT
from jaxrl.models.lora import lora_specs
from jaxrl.models.params import ParamSpec, decoder_specs, is_spec
from jaxrl.parallel.sharding import STORED, spec
from jaxrl.training.optimizer import OptimizerConfig, make_optimizer
from jaxrl.training.step import init_state
from launch.planning.layout import Layout
from launch.planning.setting import Setting
from launch.planning.workload import Rows


def parameter_bytes(c: ModelConfig, dtype: str, sizes: Mapping[str, int]) -> int:
  """Bytes of the parameters on one device as they rest between steps."""
  return _model_bytes(c, jnp.dtype(dtype).itemsize, tuple(sizes.items()))


@functools.lru_cache(maxsize=4096)
def _model_bytes(c: ModelConfig, itemsize: int, sizes: tuple[tuple[str, int], ...]) -> int:
  return _tree_bytes(decoder_specs(c), itemsize, dict(sizes))


def adapter_bytes(c: ModelConfig, sizes: Mapping[str, int]) -> int:
  """Bytes of a float32 adapter on one device."""
  return _tree_bytes(lora_specs(c), 4, sizes)


def optimizer_bytes(setting: Setting, sizes: Mapping[str, int]) -> int:
  """Bytes of the optimizer's state on one device; it lies as the parameters do."""
  return _state_bytes(setting.model, setting.adapted, setting.optimizer, tuple(sizes.items()))


@functools.lru_cache(maxsize=4096)
def _state_bytes(
    model: ModelConfig, adapted: ModelConfig | None, optimizer: OptimizerConfig,
    mesh: tuple[tuple[str, int], ...],
) -> int:
  sizes = dict(mesh)
  specs = decoder_specs(model) if adapted is None else lora_specs(adapted)
  leaves = jax.tree.leaves(specs, is_leaf=is_spec)
  by_shape = {(): 1} | {s.shape: _parts(s, sizes) for s in leaves}
  trained = sum(math.prod(s.shape) for s in leaves)
  mean = trained / sum(math.prod(s.shape) / _parts(s, sizes) for s in leaves)
  return math.ceil(sum(size / by_shape.get(shape, mean)
                       for shape, size in _shapes_of(model, adapted, optimizer)))


@functools.lru_cache(maxsize=8)
def _shapes_of(
    model: ModelConfig, adapted: ModelConfig | None, optimizer: OptimizerConfig
) -> tuple[tuple[tuple[int, ...], int], ...]:
  """(shape, bytes) of every array of the optimizer's state."""
  specs: Any = decoder_specs(model) if adapted is None else lora_specs(adapted)
  params = jax.tree.map(
      lambda s: jax.ShapeDtypeStruct(s.shape, jnp.float32), specs, is_leaf=is_spec)
  state = jax.eval_shape(functools.partial(init_state, tx=make_optimizer(optimizer)), params)
  return tuple((x.shape, x.size * x.dtype.itemsize) for x in jax.tree.leaves(state.opt_state))


def _tree_bytes(specs: Any, itemsize: int, sizes: Mapping[str, int]) -> int:
  return sum(math.ceil(math.prod(s.shape) * itemsize / _parts(s, sizes))
             for s in jax.tree.leaves(specs, is_leaf=is_spec))


def _parts(s: ParamSpec, sizes: Mapping[str, int]) -> int:
  """How many parts a parameter is split into."""
  split = (axes for axes in spec(s.axes, STORED, sizes) if axes)
  return math.prod(sizes[axis] for axes in split
                   for axis in ((axes,) if isinstance(axes, str) else axes))


@dataclasses.dataclass(frozen=True)
class TrainBytes:
  """What a device holds at the peak of a step."""

  parameters: int
  optimizer: int
  start: int                  # the model that training started from, kept for the next stage
  gradients: int
  saved: int                  # of every layer for the backward pass
  working: int                # of the layer, or the chunk of log-probs, at hand

  @property
  def total(self) -> int:
    return sum(dataclasses.astuple(self))


def train_bytes(setting: Setting, layout: Layout, rows: Rows) -> TrainBytes:
  """An estimate, within a tenth of what docs/planning.md compiled; the resting parts are exact."""
  c, sizes = setting.model, layout.sizes
  base = parameter_bytes(c, setting.param_dtype, sizes)
  if setting.adapted is None:
    parameters, start, trained = base, base, parameter_bytes(c, 'float32', sizes)
  else:
    trained = adapter_bytes(setting.adapted, sizes)
    parameters, start = base + trained, 0
  width = jnp.dtype(setting.compute.dtype).itemsize
  tokens = rows.tokens_per_device(layout)
  heads, kv, mlp = (
      n / layout.tensor for n in (c.n_heads * c.d_head, c.n_kv * c.d_head, c.d_mlp))
  per_name = {'q': heads, 'k': kv, 'v': kv, 'attn': heads + 2 * c.n_heads / layout.tensor,
              'mid': c.d_model, 'gate': mlp, 'up': mlp}
  # 'all' keeps what the backward pass reads, float32 inside the norms among it.
  every = 11 * c.d_model + 3 * heads + 2 * kv + 5 * mlp
  kept = every if layout.remat == 'all' else sum(per_name[name] for name in REMAT[layout.remat][0])
  saved = c.n_layers * tokens * width * (c.d_model + kept)
  layer = width * (parameter_bytes(c, 'bfloat16', {**sizes, 'fsdp': 1, 'sequence': 1})
                   / 2 / (c.n_layers + 2))
  chunk = min(setting.compute.chunk, tokens)
  logits = 2 * 4 * chunk * c.vocab_size / layout.tensor
  head = 4 * width * c.d_model * c.vocab_size / layout.tensor     # with its gradient in float32
  shards = layout.fsdp * layout.sequence
  if shards > 1:    # which each hold their rows, and gather one block of columns at a time
    head *= min(1 / shards + chunk / tokens, 1)
  again = 0 if layout.remat == 'all' else tokens * width * every
  working = max(2 * layer + again, logits + head)
  return TrainBytes(
      parameters, 0 if setting.offloads else optimizer_bytes(setting, sizes), start,
      trained * (2 if layout.micro_batches > 1 else 1), math.ceil(saved), math.ceil(working))
