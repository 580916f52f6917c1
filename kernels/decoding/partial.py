"""Attention over some of the keys, in a form that can be merged with that over others."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

LOWEST = float(jnp.finfo(jnp.float32).min)   # top of nothing: finite, so that no inf - inf arises


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Partial:
  """Of A rows of X queries per key head."""

  top: jax.Array              # [A, K, X] float32, largest score; LOWEST where nothing was seen
  total: jax.Array            # [A, K, X] float32, sum of exp(score - top)
  out: jax.Array              # [A, K, X, H] float32, sum of exp(score - top) * value


def nothing(shape: tuple[int, ...], like: Any) -> Partial:
  """Attention of queries of this shape [A, K, X, H] over no key at all.

  What a loop carries must, inside shard_map, vary over every mesh axis that its body's inputs
  vary over: those of `like`. The products with 0 are folded away when compiled.
  """
  first = [jnp.asarray(x)[(0,) * jnp.ndim(x)] for x in jax.tree.leaves(like)]
  zero = functools.reduce(jnp.add, [0 * x.astype(jnp.int32) for x in first])
  zeros = jnp.broadcast_to(zero.astype(jnp.float32), shape)
  return Partial(zeros[..., 0] + LOWEST, zeros[..., 0], zeros)


def merged(a: Partial, b: Partial) -> Partial:
  """Attention over the keys of both."""
  top = jnp.maximum(a.top, b.top)
  left, right = jnp.exp(a.top - top), jnp.exp(b.top - top)
  return Partial(top, a.total * left + b.total * right,
                 a.out * left[..., None] + b.out * right[..., None])


def block_scores(
    queries: jax.Array,       # [A, K, X, H]
    keys: jax.Array,          # [A, K, B, H]
    key_scale: jax.Array | None,   # [A, K, B] where keys are int8
    keep: jax.Array,          # [A, 1, 1 or X, B] bool, True where the key is seen
    *,
    scale: float,
    softcap: float | None,
) -> jax.Array:               # [A, K, X, B] float32, -inf where it is not seen
  """Scores of one block of keys."""
  dtype = queries.dtype if key_scale is not None else jnp.promote_types(queries.dtype, keys.dtype)
  scores = scale * jnp.einsum('akxh,akbh->akxb', queries.astype(dtype), keys.astype(dtype),
                              preferred_element_type=jnp.float32)
  if key_scale is not None:
    scores = scores * key_scale[:, :, None]
  if softcap is not None:
    scores = softcap * jnp.tanh(scores / softcap)
  return jnp.where(keep, scores, -jnp.inf)


def product(
    weights: jax.Array,       # [A, K, X, B] float32
    values: jax.Array,        # [A, K, B, H]
    value_scale: jax.Array | None,   # [A, K, B] where values are int8
) -> jax.Array:               # [A, K, X, H] float32
  """Sums of values; the weights are rounded to the type of the values, if that is a float."""
  if value_scale is not None:
    weights, values = weights * value_scale[:, :, None], values.astype(jnp.float32)
  return jnp.einsum('akxb,akbh->akxh', weights.astype(values.dtype), values,
                    preferred_element_type=jnp.float32)
