"""Attention on TPUs, a Pallas Mosaic kernel: the forward pass, and what is chosen by shape.

Grid: key heads, then the items of `tpu_work.work`, of which the second axis is exactly as long as
there are. An item is a block of queries and a block of keys that it sees. In fast memory are the
queries of all G heads that share the key head [G, block_q, H] (fetched when the block of queries
changes), one block of keys and of values (so each is read once for G heads), and in float32 the
running maximum, sum and output of every query. The mask of a block is made once for its G heads,
and not at all where nothing is hidden. The backward pass computes scores again: `tpu_backward`.

Exponents are of 2, with log2(e) in the scale; bfloat16 scores are sums of products in float32.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels.attention import saved, tpu_backward
from kernels.attention import tpu_work as layout
from kernels.attention.blocks import Plan, check_fits
from kernels.attention.saved import Options
from kernels.attention.spans import Spans
from kernels.attention.tpu_scores import (
  VMEM_LIMIT,
  capped,
  dot,
  each_head,
  lanes,
  masked,
  precision,
  transposed_b,
)
from kernels.attention.tpu_work import FIRST, LANES, LAST, MASKED, WHOLE
from kernels.varying import out_struct

LOW = -1e30                   # a maximum of nothing; far above what a hidden score is set to
HEAD_SIZES = (64, 80, 96, 128, 256)
DTYPES = (jnp.bfloat16, jnp.float32)


def attention(
    q: jax.Array,             # [B, T, N, H]
    k: jax.Array,             # [B, S, K, H]
    v: jax.Array,             # [B, S, K, H]
    spans: Spans,             # already clipped to the window
    plan: Plan,               # of the same spans, in blocks of multiples of 128 tokens
    *,
    scale: float,
    softcap: float | None = None,
) -> jax.Array:               # [B, T, N, H]
  """See `kernels.attention.attention` and `saved.attention`.

  Raises:
    ValueError: a head size or type there is no kernel for, or too many blocks for scalar memory.
  """
  check_fits(plan, q.shape[1], k.shape[1])
  reason = why_not(q, k, v, plan)
  if reason is not None:
    raise ValueError(f"the attention implementation 'tpu' cannot take this: {reason}")
  return saved.attention(q, k, v, spans, plan, RULES, Options(scale, softcap))


def why_not(q: jax.Array, k: jax.Array, v: jax.Array, plan: Plan) -> str | None:
  """Why these arrays and this plan cannot be given to the kernel, in words; None if they can."""
  if q.shape[-1] not in HEAD_SIZES:
    return f'head sizes are {HEAD_SIZES}, not {q.shape[-1]}'
  if q.dtype not in DTYPES or not q.dtype == k.dtype == v.dtype:
    return f'arrays are all bfloat16 or all float32, not {q.dtype}, {k.dtype} and {v.dtype}'
  return layout.why_not(plan)


def forward(q, k, v, spans: Spans, plan: Plan, options: Options) -> tuple[jax.Array, jax.Array]:
  """The output as q, and its log-sum-exp float32 [B, N, T]."""
  b, t, n, h = q.shape
  groups, block_q, block_k = k.shape[2], plan.block_q, plan.block_k
  heads = n // groups
  items, count = layout.work(plan)
  queries = layout.queries_end_to_end(q, groups, block_q)
  n_keys = plan.counts.shape[0] * plan.visited.shape[2]
  keys, values = (layout.keys_end_to_end(x, block_k, n_keys) for x in (k, v))

  def of_queries(kv, item, items):
    return kv, 0, items[item] >> layout.QUERY_SHIFT, 0

  def of_keys(kv, item, items):
    return kv, items[item] >> layout.KEY_SHIFT & layout.MOST_KEYS - 1, 0

  query_block = pl.BlockSpec((None, heads, block_q, h), of_queries)
  key_block = pl.BlockSpec((None, block_k, h), of_keys)
  pairs = queries.shape[2] * k.shape[1] // 2          # the mask of a causal row; no more is known
  out, lse = pl.pallas_call(
      functools.partial(_kernel, options=options, block_k=block_k, heads=heads),
      grid_spec=pltpu.PrefetchScalarGridSpec(
          num_scalar_prefetch=1,
          grid=(groups, count[0]),
          in_specs=[
              pl.BlockSpec((4, block_q), lambda kv, item, items: (
                  0, items[item] >> layout.QUERY_SHIFT)),
              query_block, key_block, key_block],
          out_specs=[
              query_block,
              pl.BlockSpec((None, heads, block_q), lambda *at: of_queries(*at)[:3])],
          scratch_shapes=[
              pltpu.VMEM((heads, block_q, LANES), jnp.float32),
              pltpu.VMEM((heads, block_q, LANES), jnp.float32),
              pltpu.VMEM((heads, block_q, h), jnp.float32)]),
      out_shape=[
          out_struct(queries.shape, q.dtype, like=q),
          out_struct(queries.shape[:3], jnp.float32, like=q)],
      compiler_params=pltpu.CompilerParams(
          dimension_semantics=('parallel', 'arbitrary'), vmem_limit_bytes=VMEM_LIMIT),
      cost_estimate=pl.CostEstimate(
          flops=4 * n * pairs * h, transcendentals=n * pairs,
          bytes_accessed=sum(x.size * x.dtype.itemsize for x in (
              queries, queries, keys, values))),
      name='attention_forward',
  )(items[0], layout.bounds(spans, plan), queries, keys, values)
  return layout.queries_in_rows(out, q.shape), layout.numbers_in_rows(lse, (b, n, t))


def _kernel(
    items,                    # int32 [most], in scalar memory
    bounds,                   # int32 [4, block_q]
    q, k, v,                  # [G, block_q, H], [block_k, H], [block_k, H]
    out, lse,                 # [G, block_q, H], float32 [G, block_q]
    top, weight, total,       # float32 [G, block_q, 128] twice, each lane the same; [G, block_q, H]
    *, options: Options, block_k: int, heads: int,
):
  item = items[pl.program_id(1)]
  block_q, h = q.shape[1:]

  @pl.when(item & FIRST != 0)
  def _():
    top[...] = jnp.full(top.shape, LOW, jnp.float32)
    weight[...] = jnp.zeros(weight.shape, jnp.float32)
    total[...] = jnp.zeros(total.shape, jnp.float32)

  def visit(keep):
    def of_head(g):
      score = capped(dot(q[g], k[...], transposed_b, precision(q)), options)
      if keep is not None:
        score = masked(score, keep)
      old = top[g]
      new = jnp.maximum(old, jnp.max(score, axis=1, keepdims=True))
      p = jnp.exp2(score - lanes(new, block_k))
      shrink = jnp.exp2(old - new)
      top[g] = new
      weight[g] = weight[g] * shrink + jnp.sum(p, axis=1, keepdims=True)
      more = dot(p.astype(v.dtype), v[...], ((1,), (0,)), precision(q))
      total[g] = total[g] * lanes(shrink, h) + more
    each_head(heads, of_head)

  @pl.when(item & MASKED != 0)
  def _():
    first = (item >> layout.KEY_SHIFT & layout.MOST_KEYS - 1) * block_k
    key = first + jax.lax.broadcasted_iota(jnp.int32, (block_q, block_k), 1)
    bound = jnp.swapaxes(bounds[...], 0, 1)                     # [block_q, 4]
    prefix_start, prefix_end, start, end = (bound[:, n:n + 1] for n in range(4))
    visit((key >= prefix_start) & (key < prefix_end) | (key >= start) & (key < end))

  @pl.when(item & WHOLE != 0)
  def _():
    visit(None)

  @pl.when(item & LAST != 0)
  def _():
    def of_head(g):
      some = weight[g] > 0
      divisor = jnp.where(some, weight[g], 1.0)
      out[g] = (total[g] / lanes(divisor, h)).astype(out.dtype)
      found = jnp.where(some, (top[g] + jnp.log2(divisor)) * math.log(2), 0.0)
      lse[pl.ds(g, 1), :] = jnp.swapaxes(found, 0, 1)[:1]
    each_head(heads, of_head)


RULES = saved.Rules(forward, tpu_backward.backward)
