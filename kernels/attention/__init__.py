"""Attention with queries and keys given at once; implementations by name. See docs/attention.md."""

from __future__ import annotations

import jax

from kernels.attention import blocks, blockwise, ref
from kernels.attention.blocks import Plan
from kernels.attention.spans import Spans, causal, visible, windowed

__all__ = [
    'IMPLEMENTATIONS', 'Plan', 'Spans', 'attention', 'causal', 'plan', 'visible', 'windowed']

IMPLEMENTATIONS = ('blockwise', 'ref')
# From so many query-key pairs a row on, blockwise: measured on a CPU, docs/attention.md.
MANY_PAIRS = 256 * 256


def attention(
    q: jax.Array,             # [B, T, N, H]
    k: jax.Array,             # [B, S, K, H]
    v: jax.Array,             # [B, S, K, H]
    spans: Spans,
    *,
    scale: float,
    window: int | jax.Array | None = None,
    softcap: float | None = None,
    plan: Plan | None = None,
    impl: str | None = None,
) -> jax.Array:               # [B, T, N, H]
  """Grouped-query attention to the keys that `spans` names; see `ref.attention`, the definition.

  Arrays are local: where there is a mesh, call it inside `jax.shard_map`. `plan` is that of the
  same spans and window where the caller has it already, from the function of that name.
  """
  name = _chosen(impl, q.shape[1], k.shape[1]) if plan is None else impl or 'blockwise'
  if name == 'ref':
    if plan is not None:
      raise ValueError("the attention implementation 'ref' visits all keys and takes no plan")
    return ref.attention(q, k, v, spans, scale=scale, window=window, softcap=softcap)
  if window is not None:
    spans = windowed(spans, window)
  if plan is None:
    plan = blocks.plan(spans, k.shape[1])
  return blockwise.attention(q, k, v, spans, plan, scale=scale, softcap=softcap)


def plan(
    spans: Spans,
    keys: int,                # S
    *,
    window: int | jax.Array | None = None,
    impl: str | None = None,
) -> Plan | None:
  """What `attention` can be given so that layers of equal windows share it; None for 'ref'."""
  if _chosen(impl, spans.end.shape[1], keys) == 'ref':
    return None
  return blocks.plan(spans, keys, window=window)


def _chosen(impl: str | None, queries: int, keys: int) -> str:
  if impl is None:
    return 'blockwise' if queries * keys >= MANY_PAIRS else 'ref'
  if impl not in IMPLEMENTATIONS:
    known = sorted(IMPLEMENTATIONS)
    raise ValueError(f'unknown attention implementation {impl!r}; known: {known}')
  return impl
