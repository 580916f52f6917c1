"""Attention operations; an implementation raises on what it cannot honour."""

from __future__ import annotations

import jax

from kernels.attention import ref

IMPLEMENTATIONS = {'ref': ref.attention}


def attention(
    q: jax.Array,             # [B, T, N, H]
    k: jax.Array,             # [B, S, K, H]
    v: jax.Array,             # [B, S, K, H]
    *,
    q_positions: jax.Array,   # [B, T] int32
    k_positions: jax.Array,   # [B, S] int32
    q_segments: jax.Array | None = None,   # [B, T] int32
    k_segments: jax.Array | None = None,   # [B, S] int32
    scale: float,
    window: int | jax.Array | None = None,
    softcap: float | None = None,
    impl: str | None = None,
) -> jax.Array:               # [B, T, N, H]
  """Causal grouped-query attention; see `ref.attention`, which defines it."""
  name = 'ref' if impl is None else impl
  if name not in IMPLEMENTATIONS:
    known = sorted(IMPLEMENTATIONS)
    raise ValueError(f'unknown attention implementation {name!r}; known: {known}')
  return IMPLEMENTATIONS[name](
      q, k, v, q_positions=q_positions, k_positions=k_positions,
      q_segments=q_segments, k_segments=k_segments, scale=scale, window=window, softcap=softcap)
