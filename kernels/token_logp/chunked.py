"""A scan over chunks of time, each chunk's logits recomputed in the backward pass.

Holds [B, chunk, V] at most, forward and backward. The sum over the vocabulary is float32.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from kernels.token_logp import ref


def token_logp(
    hidden: jax.Array,        # [B, T, D]
    head: jax.Array,          # [D, V]
    targets: jax.Array,       # [B, T] int32
    *,
    chunk: int,
) -> jax.Array:               # [B, T] float32
  if chunk < 1:
    raise ValueError(f'chunk is a number of tokens, at least 1; got {chunk}')
  b, t = targets.shape
  if t <= chunk:
    return jax.checkpoint(ref.token_logp)(hidden, head, targets)
  padding = -t % chunk

  def split(x):               # [B, T, ...] -> [T / chunk, B, chunk, ...]
    x = jnp.pad(x, [(0, 0), (0, padding)] + [(0, 0)] * (x.ndim - 2))
    return jnp.moveaxis(x.reshape(b, -1, chunk, *x.shape[2:]), 1, 0)

  @jax.checkpoint
  def one_chunk(carry, xs):
    h, y = xs
    return carry, ref.token_logp(h, head, y)

  _, out = jax.lax.scan(one_chunk, None, (split(hidden), split(targets)))
  return jnp.moveaxis(out, 0, 1).reshape(b, t + padding)[:, :t]
