"""Attention with queries and keys given at once; implementations by name. See docs/attention.md."""

from __future__ import annotations

from typing import Any

import jax

from kernels.attention import blocks, blockwise, ref, saved, tpu, tpu_work
from kernels.attention.blocks import Plan
from kernels.attention.spans import Spans, causal, visible, windowed

__all__ = [
    'IMPLEMENTATIONS', 'Plan', 'Spans', 'attention', 'causal', 'plan', 'visible', 'windowed']

IMPLEMENTATIONS = ('blockwise', 'gpu', 'ref', 'tpu')
# From so many query-key pairs a row on, in blocks: measured on a CPU, docs/attention.md.
MANY_PAIRS = 256 * 256
# Blockwise, but on TPUs the kernel for them. Which one is known when the program is lowered.
BY_PLATFORM = saved.by_platform(
    ('blockwise', blockwise.RULES), tpu=('tpu', tpu.RULES))


def attention(
    q: jax.Array,             # [B, T, N, H]
    k: jax.Array,             # [B, S, K, H]
    v: jax.Array,             # [B, S, K, H]
    spans: Spans,
    *,
    scale: float,
    window: int | jax.Array | None = None,
    softcap: float | None = None,
    plan: dict[str, Plan] | None = None,
    impl: str | None = None,
) -> jax.Array:               # [B, T, N, H]
  """Grouped-query attention to the keys that `spans` names; see `ref.attention`, the definition.

  Arrays are local: where there is a mesh, call it inside `jax.shard_map`. `plan` is that of the
  same spans and window where the caller has it already, from the function of that name.

  Raises:
    ValueError: an implementation that is unknown, that cannot take these arrays, or that the plan
      is not for.
  """
  if impl == 'ref' and plan is not None:
    raise ValueError("the attention implementation 'ref' visits all keys and takes no plan")
  if plan is None:
    plan = _plans(spans, k.shape[1], q.shape[2] // k.shape[2], window, impl)
  if plan is None:
    return ref.attention(q, k, v, spans, scale=scale, window=window, softcap=softcap)
  if impl is not None and _known(impl) not in plan:
    raise ValueError(f'a plan for {sorted(plan)}, not for the attention implementation {impl!r}')
  if window is not None:
    spans = windowed(spans, window)
  options: dict[str, Any] = {'scale': scale, 'softcap': softcap}
  if impl == 'gpu' or 'gpu' in plan:
    from kernels.attention import gpu  # by name only: importing Mosaic GPU takes 1.5 s
    return gpu.attention(q, k, v, spans, plan['gpu'], **options)
  if impl == 'tpu' or 'blockwise' not in plan:
    return tpu.attention(q, k, v, spans, plan['tpu'], **options)
  blocks.check_fits(plan['blockwise'], q.shape[1], k.shape[1])
  if impl == 'blockwise' or 'tpu' not in plan or tpu.why_not(q, k, v, plan['tpu']):
    return blockwise.attention(q, k, v, spans, plan['blockwise'], **options)
  return saved.attention(q, k, v, spans, plan, BY_PLATFORM, saved.Options(**options))


def plan(
    spans: Spans,
    keys: int,                # S
    *,
    group: int,               # query heads that share a key head, N / K
    window: int | jax.Array | None = None,
    impl: str | None = None,
) -> dict[str, Plan] | None:
  """What `attention` can be given so that layers of equal windows share it; None for 'ref'.

  By name of implementation: blocks differ, and what is not used is never computed.
  """
  return _plans(spans, keys, group, window, impl)


def _plans(spans, keys, group, window, impl) -> dict[str, Plan] | None:
  queries = spans.end.shape[1]
  if impl is None and queries * keys < MANY_PAIRS or _known(impl) == 'ref':
    return None
  plans = {}
  if impl in (None, 'blockwise'):
    plans['blockwise'] = blocks.plan(spans, keys, window=window)
  if impl == 'gpu':
    plans['gpu'] = blocks.plan(
        spans, keys, window=window, block_q=blocks.HOPPER_BLOCK, block_k=blocks.HOPPER_BLOCK)
  if impl in (None, 'tpu'):
    block_q, block_k = tpu_work.block_sizes(queries, keys, group)
    plans['tpu'] = blocks.plan(spans, keys, window=window, block_q=block_q, block_k=block_k)
  return plans


def _known(impl: str | None) -> str | None:
  if impl is not None and impl not in IMPLEMENTATIONS:
    raise ValueError(
        f'unknown attention implementation {impl!r}; known: {sorted(IMPLEMENTATIONS)}')
  return impl
