"""A scan over chunks of time, each chunk's logits recomputed in the backward pass.

Holds [B, chunk, V] at most, forward and backward. The sum over the vocabulary is float32.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from kernels.token_logp import ref


def token_logp(
    hidden: jax.Array,        # [B, T, D]
    head: jax.Array,          # [D, V]
    targets: jax.Array,       # [B, T] int32
    *,
    chunk: int,
    softcap: float | None = None,
) -> jax.Array:               # [B, T] float32
  one = functools.partial(ref.token_logp, softcap=softcap)
  return _in_chunks(lambda h, y: one(h, head, y), (hidden, targets), chunk)


def log_collision(
    hidden: jax.Array,        # [B, T, D]
    head: jax.Array,          # [D, V]
    *,
    chunk: int,
    softcap: float | None = None,
) -> jax.Array:               # [B, T] float32
  return _in_chunks(
      lambda h: ref.log_collision(h, head, softcap=softcap), (hidden,), chunk)


def _in_chunks(
    function: Callable[..., jax.Array], arrays: tuple[jax.Array, ...], chunk: int) -> jax.Array:
  """function over chunks of the second dimension, recomputed in the backward pass."""
  if chunk < 1:
    raise ValueError(f'chunk is a number of tokens, at least 1; got {chunk}')
  b, t = arrays[0].shape[:2]
  if t <= chunk:
    return jax.checkpoint(function)(*arrays)
  padding = -t % chunk

  def split(x):               # [B, T, ...] -> [T / chunk, B, chunk, ...]
    x = jnp.pad(x, [(0, 0), (0, padding)] + [(0, 0)] * (x.ndim - 2))
    return jnp.moveaxis(x.reshape(b, -1, chunk, *x.shape[2:]), 1, 0)

  @jax.checkpoint
  def one_chunk(carry, xs):
    return carry, function(*xs)

  _, out = jax.lax.scan(one_chunk, None, tuple(split(x) for x in arrays))
  return jnp.moveaxis(out, 0, 1).reshape(b, t + padding)[:, :t]
