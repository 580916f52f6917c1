"""Attention on TPUs, a Pallas Mosaic kernel: the backward pass, dQ, dK and dV in one walk.

Keys are taken in chunks, one kernel for each (mostly one is all). Grid: key heads, then the items
of `tpu_work.work_by_keys`, ordered by block of queries. dK and dV of the whole chunk stay in fast
memory in float32 until the key head changes; dQ of a block of queries is read when the block
changes, added to, and written when it changes again. So every pair of blocks is visited once, five
products each, and slow memory holds nothing beyond dQ in float32.

Scores are [keys, queries]: intervals, log-sum-exp and d_out . out of the queries are rows then, and
of five products only that of dQ has a transposed operand.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels.attention import tpu_work as layout
from kernels.attention.blocks import Plan
from kernels.attention.saved import Options
from kernels.attention.spans import Spans
from kernels.attention.tpu_scores import (
  LOG2_E,
  VMEM_LIMIT,
  capped,
  dot,
  each_head,
  masked,
  precision,
  transposed_a,
  transposed_b,
)
from kernels.attention.tpu_work import FIRST, LANES, MASKED, WHOLE
from kernels.varying import out_struct

CHUNK = 8192                  # keys of 128 features: dK and dV take 8 MiB, and 8 while written


def chunk_blocks(blocks: int, block_k: int, head_size: int) -> int:
  """Key blocks of one chunk: as few chunks as fast memory allows, as equal as they can be."""
  most = max(CHUNK * LANES // max(head_size, LANES) // block_k, 1)
  return -(-blocks // -(-blocks // most))


def backward(
    q, k, v, spans: Spans, plan: Plan, out, lse, d_out, options: Options
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """dq, dk, dv as q, k and v are; `lse` is [B, N, T]."""
  n, h = q.shape[2:]
  groups, block_k = k.shape[2], plan.block_k
  blocks = plan.counts.shape[0] * plan.visited.shape[2]
  chunk = chunk_blocks(blocks, block_k, h)
  items, counts = layout.work_by_keys(plan, chunk)
  keys, values = (layout.keys_end_to_end(x, block_k, len(items) * chunk) for x in (k, v))
  queries, d_outs = (
      layout.queries_end_to_end(x, groups, plan.block_q) for x in (q, d_out))
  dots = jnp.einsum('btnh,btnh->bnt', d_out, out, preferred_element_type=jnp.float32)
  lse, dots = (
      layout.numbers_end_to_end(x, groups, plan.block_q) for x in (lse * LOG2_E, dots))
  bounds = layout.bounds(spans, plan)

  def of_chunk(dq, this):
    items, count, index = this
    first = (index * chunk)[None]
    dq, dk, dv = _of_chunk(
        first, items, count, (bounds, queries, keys, values, d_outs, lse, dots), dq,
        options=options, plan=plan, chunk=chunk)
    return dq, ((dk * options.scale).astype(k.dtype), dv.astype(v.dtype))

  dq = jnp.zeros_like(queries, jnp.float32)
  indices = jnp.arange(len(items), dtype=jnp.int32)
  if len(items) == 1:
    dq, of_keys = of_chunk(dq, (items[0], counts[0], indices[0]))
  else:
    dq, of_keys = jax.lax.scan(of_chunk, dq, (items, counts, indices))
    of_keys = (x.swapaxes(0, 1).reshape(groups, -1, h) for x in of_keys)
  dk, dv = (layout.keys_in_rows(x, k.shape, block_k) for x in of_keys)
  return layout.queries_in_rows((dq * options.scale).astype(q.dtype), q.shape), dk, dv


def _of_chunk(first, items, count, arrays, dq, *, options, plan: Plan, chunk: int):
  """dq float32 with this chunk's part added, dk and dv of its keys float32; none scaled."""
  groups, heads, length, h = dq.shape
  block_q, block_k = plan.block_q, plan.block_k
  bounds, queries, keys, values, d_outs, lse, dots = arrays

  def of_queries(kv, item, first, items):
    return kv, 0, items[item] >> layout.QUERY_SHIFT, 0

  def of_keys(kv, item, first, items):
    return kv, first[0] + (items[item] >> layout.KEY_SHIFT & layout.MOST_KEYS - 1), 0

  query_block = pl.BlockSpec((None, heads, block_q, h), of_queries)
  query_numbers = pl.BlockSpec((None, heads, block_q), lambda *at: of_queries(*at)[:3])
  key_block = pl.BlockSpec((None, block_k, h), of_keys)
  key_chunk = pl.BlockSpec((None, chunk * block_k, h), lambda kv, *_: (kv, 0, 0))
  pairs = min(length, chunk * block_k) * chunk * block_k // 2   # the most of causal rows
  scalars, inputs = (first, items), (
      bounds, queries, keys, values, d_outs, lse, dots, dq)
  of_chunk = out_struct((groups, chunk * block_k, h), jnp.float32, like=queries)
  return pl.pallas_call(
      functools.partial(_kernel, options=options, block_k=block_k, heads=heads),
      grid_spec=pltpu.PrefetchScalarGridSpec(
          num_scalar_prefetch=len(scalars),
          grid=(groups, count),
          in_specs=[
              pl.BlockSpec((4, block_q), lambda *at: (0, of_queries(*at)[2])),
              query_block, key_block, key_block, query_block, query_numbers, query_numbers,
              query_block],
          out_specs=[query_block, key_chunk, key_chunk]),
      out_shape=[out_struct(dq.shape, jnp.float32, like=queries), of_chunk, of_chunk],
      input_output_aliases={len(scalars) + len(inputs) - 1: 0},
      compiler_params=pltpu.CompilerParams(
          dimension_semantics=('parallel', 'arbitrary'), vmem_limit_bytes=VMEM_LIMIT),
      cost_estimate=pl.CostEstimate(
          flops=10 * groups * heads * pairs * h, transcendentals=groups * heads * pairs,
          bytes_accessed=sum(x.size * x.dtype.itemsize for x in (queries, d_outs, dq, dq)) + 12 * (
              groups * chunk * block_k * h)),
      name='attention_backward',
  )(*scalars, *inputs)


def _kernel(
    start, items,             # int32 [1]: first key block of the chunk; [most]; in scalar memory
    bounds,                   # int32 [4, block_q]
    q, k, v, d_out,           # [G, block_q, H], [block_k, H], [block_k, H], [G, block_q, H]
    lse, dots,                # float32 [G, block_q], the first in units of log2
    dq_before,                # float32 [G, block_q, H]
    dq, dk, dv,               # float32 [G, block_q, H], [chunk, H], [chunk, H]
    *, options: Options, block_k: int, heads: int,
):
  step = pl.program_id(1)
  item = items[step]
  block_q = q.shape[1]
  block = item >> layout.KEY_SHIFT & layout.MOST_KEYS - 1
  at = pl.ds(pl.multiple_of(block * block_k, block_k), block_k)

  @pl.when(step == 0)
  def _():
    dk[...] = jnp.zeros(dk.shape, jnp.float32)
    dv[...] = jnp.zeros(dv.shape, jnp.float32)

  @pl.when(item & FIRST != 0)
  def _():
    dq[...] = dq_before[...]

  def visit(keep):
    def of_head(g):
      row = pl.ds(g, 1)
      score = capped(dot(k[...], q[g], transposed_b, precision(q)), options)
      hidden = score if keep is None else masked(score, keep)
      p = jnp.exp2(hidden - lse[row, :])
      d_score = p * (dot(v[...], d_out[g], transposed_b, precision(q)) - dots[row, :])
      if options.softcap is not None:
        d_score *= 1.0 - jnp.square(score * (1 / (options.softcap * LOG2_E)))
      d_score = d_score.astype(q.dtype)
      dv[at, :] += dot(p.astype(v.dtype), d_out[g], ((1,), (0,)), precision(q))
      dk[at, :] += dot(d_score, q[g], ((1,), (0,)), precision(q))
      dq[g] += dot(d_score, k[...], transposed_a, precision(q))
    each_head(heads, of_head)

  @pl.when(item & MASKED != 0)
  def _():
    key = jax.lax.broadcasted_iota(jnp.int32, (block_k, block_q), 0)
    key += (start[0] + block) * block_k
    prefix_start, prefix_end, begin, end = (bounds[n:n + 1, :] for n in range(4))
    visit((key >= prefix_start) & (key < prefix_end) | (key >= begin) & (key < end))

  @pl.when(item & WHOLE != 0)
  def _():
    visit(None)
