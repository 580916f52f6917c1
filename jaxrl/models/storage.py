"""int8 storage of frozen weights: a reference or a judge in a quarter of the float32 memory.

Symmetric rounding with one scale per output channel (Dettmers et al. 2022, section 2, without the
outlier decomposition): |error| <= scale / 2 for every weight. Weights only; products stay in the
compute dtype.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from jaxrl.models.config import ModelConfig
from jaxrl.models.params import Params, ParamSpec, decoder_specs, is_spec

KEPT = ('router',)   # small, and a changed choice of experts is not a small error


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Int8:
  """A matrix as values * scale."""

  values: jax.Array           # int8, the shape of the matrix
  scale: jax.Array            # float32, size 1 along the dimensions a product sums over


def is_quantised(name: str, s: ParamSpec) -> bool:
  """Whether the weight of this name becomes `Int8`; norms, biases and routers stay as they are."""
  return bool(s.summed) and name not in KEPT


def quantise(params: Params, c: ModelConfig) -> Params:
  """The same tree with every matrix as `Int8`; traceable."""
  def one(path, s: ParamSpec, x):
    return quantise_weight(x, s.summed) if is_quantised(path[-1].key, s) else x

  return jax.tree.map_with_path(one, decoder_specs(c), params, is_leaf=is_spec)


def quantise_weight(x: jax.Array, summed: tuple[int, ...]) -> Int8:
  """One matrix, rounded to the nearest of 255 steps of each output channel."""
  x = x.astype(jnp.float32)
  largest = jnp.max(jnp.abs(x), axis=summed, keepdims=True)
  scale = jnp.where(largest > 0, largest / 127, 1.0)   # an all-zero channel stays zero
  return Int8(jnp.round(x / scale).astype(jnp.int8), scale)


def dequantise(x: Int8, dtype) -> jax.Array:
  """The matrix in `dtype`; the product is rounded once."""
  return (x.values.astype(jnp.float32) * x.scale).astype(dtype)
