"""Attention with queries and keys given at once; implementations by name."""

from __future__ import annotations

import jax

from kernels.attention import ref
from kernels.attention.spans import Spans, causal, visible, windowed

__all__ = ['IMPLEMENTATIONS', 'Spans', 'attention', 'causal', 'visible', 'windowed']

IMPLEMENTATIONS = {'ref': ref.attention}


def attention(
    q: jax.Array,             # [B, T, N, H]
    k: jax.Array,             # [B, S, K, H]
    v: jax.Array,             # [B, S, K, H]
    spans: Spans,
    *,
    scale: float,
    window: int | jax.Array | None = None,
    softcap: float | None = None,
    impl: str | None = None,
) -> jax.Array:               # [B, T, N, H]
  """Grouped-query attention to the keys that `spans` names; see `ref.attention`, the definition."""
  name = 'ref' if impl is None else impl
  if name not in IMPLEMENTATIONS:
    known = sorted(IMPLEMENTATIONS)
    raise ValueError(f'unknown attention implementation {name!r}; known: {known}')
  return IMPLEMENTATIONS[name](q, k, v, spans, scale=scale, window=window, softcap=softcap)
