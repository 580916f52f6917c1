"""Plain-jnp decoding attention: the definition every implementation is tested against."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from kernels.attention.ref import softmax
from kernels.decoding.cache import Own, Shared, widen


def decode_attention(
    q: jax.Array,             # [R, N, H]
    own: Own,
    shared: Sequence[Shared],
    *,
    layer: jax.Array,         # [] int32
    positions: jax.Array,     # [R] int32
    scale: float,
    window: int | jax.Array | None = None,
    softcap: float | None = None,
) -> jax.Array:               # [R, N, H] in q's dtype
  """softmax(scale * q k^T) v over all keys that a slot sees, of all regions together.

  Query head n reads key head n // (N / K). Everything is float32. With `window` a key is seen iff
  its position > positions[r] - window. With `softcap` scores become softcap * tanh(score / softcap)
  before the mask. A slot that sees nothing gives zeros.
  """
  r, n, h = q.shape
  keys, values = [_joined(widen(jax.tree.map(lambda x: x[layer], x))) for x in (own.k, own.v)]
  size = keys.shape[2]
  ages = own.live[:, None] - 1 - jnp.arange(size, dtype=jnp.int32)[None]      # [R, S]
  parts = [(keys, values, ages >= 0, positions[:, None] - ages)]
  for region in shared:
    keys, values = [widen(jax.tree.map(lambda x: x[layer], x)) for x in (region.k, region.v)]
    group = jnp.maximum(region.group, 0)
    index = jnp.arange(keys.shape[2], dtype=jnp.int32)[None]                   # [1, P]
    keep = (index < region.length[group][:, None]) & (region.group >= 0)[:, None]
    parts.append((keys[group], values[group], keep, region.first[group][:, None] + index))
  keys = jnp.concatenate([part[0] for part in parts], axis=2)                  # [R, K, S + P.., H]
  values = jnp.concatenate([part[1] for part in parts], axis=2)
  keep = jnp.concatenate([part[2] for part in parts], axis=1)                  # [R, S + P..]
  if window is not None:
    key_positions = jnp.concatenate([part[3] for part in parts], axis=1)
    keep &= key_positions > positions[:, None] - window
  heads = keys.shape[1]
  queries = q.astype(jnp.float32).reshape(r, heads, n // heads, h)
  scores = jnp.einsum('rkgh,rksh->rkgs', queries, keys) * scale
  scores = scores if softcap is None else softcap * jnp.tanh(scores / softcap)
  weights = softmax(scores, keep[:, None, None])
  return jnp.einsum('rkgs,rksh->rkgh', weights, values).reshape(r, n, h).astype(q.dtype)


def _joined(blocks: jax.Array) -> jax.Array:
  """[C, R, K, B, H] -> [R, K, C B, H]."""
  c, r, k, b, h = blocks.shape
  return jnp.moveaxis(blocks, 0, 2).reshape(r, k, c * b, h)
