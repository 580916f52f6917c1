"""Gradients of the GPU's attention: one kernel for dQ, one for dK and dV.

Both compute scores again, from the log-sum-exp, so every sum has one place and one order, and
gradients are the same bits in every run. Two warpgroups compute, a third copies.

dQ: one block of threads for each query head and 128 queries, over the visited blocks of keys, as in
the forward pass. Shared memory has its queries and gradients, and a ring of keys and values.

dK and dV: one block of threads for each key head and 128 keys, over the blocks of queries that
visit them, and for each over the query heads that share the key head: sums over heads stay in
registers. Scores are [keys, queries] here. Where two sums of 64 x H do not fit the registers
(H = 256), dK and dV are computed by one call each.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels import hopper
from kernels.attention import gpu_work
from kernels.attention.blocks import HOPPER_BLOCK as BLOCK
from kernels.attention.gpu_work import MEMBERS, Work, factors, raw_scores
from kernels.attention.saved import Options

BOTH = 128                    # largest head size of which dK and dV are computed at once


def of_queries(
    q: jax.Array,             # [B, T, N, H], T and S multiples of 128
    k: jax.Array,             # [B, S, K, H]
    v: jax.Array,             # [B, S, K, H]
    d_out: jax.Array,         # [B, T, N, H]
    numbers: jax.Array,       # [B, N, 2, T] float32: log-sum-exp over log 2; d_out . out
    bounds: jax.Array,        # [B, 4, T] int32
    work: Work,
    options: Options,
) -> jax.Array:               # [B, T, N, H]
  """dQ."""
  b, t, n, h = q.shape
  group = n // k.shape[2]
  tile_k = BLOCK if h <= 128 else BLOCK // 2
  parts = BLOCK // tile_k
  size = h * q.dtype.itemsize
  depth = hopper.stages(2 * BLOCK * size, 2 * tile_k * size, 4)

  def kernel(q, k, v, d_out, numbers, bounds, entries, counts, dq, *scratch):
    q_tile, d_tile, k_tiles, v_tiles, number_rows, bound_rows, *barriers = scratch
    own_ready, k_ready, v_ready, k_done, v_done = barriers
    row, head, member = (jax.lax.axis_index(x) for x in ('row', 'head', 'member'))
    block = t // BLOCK - 1 - jax.lax.axis_index('block')
    steps = counts[row, block] * parts

    def entry_of(step):
      return entries[row, block, step // parts]

    def first_key(entry, step):
      return entry // 2 * BLOCK + step % parts * tile_k

    @pl.when(member < MEMBERS)
    def compute():
      plgpu.set_max_registers(240, action='increase')
      here = pl.ds(block * BLOCK + member * hopper.ROWS, hopper.ROWS)
      mine, d_mine, ready = q_tile.at[member], d_tile.at[member], own_ready.at[member]
      plgpu.copy_gmem_to_smem(q.at[row, here, head], mine, ready)
      plgpu.copy_gmem_to_smem(d_out.at[row, here, head], d_mine, ready)
      plgpu.copy_gmem_to_smem(numbers.at[row, head, :, here], number_rows.at[member], ready)
      plgpu.copy_gmem_to_smem(bounds.at[row, :, here], bound_rows.at[member], ready)
      plgpu.barrier_wait(ready)
      lse, dot = (hopper.row_vector(number_rows.at[member, i]) for i in range(2))
      edges = tuple(hopper.row_vector(bound_rows.at[member, i]) for i in range(4))

      def step(m, carry):
        total, entry = carry
        slot = m % depth
        following = entry_of(jnp.minimum(m + 1, steps - 1))
        plgpu.barrier_wait(k_ready.at[slot])
        raw = raw_scores(hopper.product(mine, k_tiles.at[slot], transposed=True), options)
        p = sloped(jnp.exp2(raw * factors(options)[1] - hopper.down(lse, tile_k)), raw, options)
        p = jax.lax.cond(
            entry % 2 == 1, lambda x: x,
            lambda x: gpu_work.visible_rows(x, edges, first_key(entry, m), 0.0), p)
        plgpu.barrier_wait(v_ready.at[slot])
        dp = hopper.product(d_mine, v_tiles.at[slot], transposed=True)
        plgpu.barrier_arrive(v_done.at[slot])
        ds = p * (dp - hopper.down(dot, tile_k))
        total = hopper.added(total, ds.astype(q.dtype), k_tiles.at[slot])
        plgpu.barrier_arrive(k_done.at[slot])
        return total, following

      total, _ = jax.lax.fori_loop(0, steps, step, (hopper.matrix(h, 0.0), entry_of(0)))
      mine[...] = (total * options.scale).astype(dq.dtype)
      plgpu.commit_smem()
      plgpu.copy_smem_to_gmem(mine, dq.at[row, here, head])
      plgpu.wait_smem_to_gmem(0)

    @pl.when(member == MEMBERS)
    def copy():
      gpu_work.copy_tiles(
          ((k, k_tiles, k_ready, k_done), (v, v_tiles, v_ready, v_done)), steps, depth,
          lambda m: (row, pl.ds(first_key(entry_of(m), m), tile_k), head // group))

  ring, done = (plgpu.Barrier(num_barriers=depth),
                plgpu.Barrier(num_arrivals=MEMBERS, num_barriers=depth))
  return gpu_work.run(
      kernel, (q, k, v, d_out, numbers, bounds, work.keys, work.key_counts),
      (jax.ShapeDtypeStruct(q.shape, q.dtype),),
      (hopper.tile((MEMBERS, hopper.ROWS, h), q.dtype),
       hopper.tile((MEMBERS, hopper.ROWS, h), q.dtype),
       hopper.tile((depth, tile_k, h), k.dtype),
       hopper.tile((depth, tile_k, h), v.dtype),
       plgpu.SMEM((MEMBERS, 2, hopper.ROWS), jnp.float32),
       plgpu.SMEM((MEMBERS, 4, hopper.ROWS), jnp.int32),
       plgpu.Barrier(num_arrivals=4, num_barriers=MEMBERS), ring, ring, done, done),
      {'head': n, 'block': t // BLOCK, 'row': b})[0]


def of_keys(
    q: jax.Array, k: jax.Array, v: jax.Array, d_out: jax.Array, numbers: jax.Array,
    bounds: jax.Array, work: Work, options: Options,
) -> tuple[jax.Array, jax.Array]:   # [B, S, K, H]
  """dK and dV; arguments as of `of_queries`."""
  found = functools.partial(_of_keys, q, k, v, d_out, numbers, bounds, work, options)
  if q.shape[-1] <= BOTH:
    return found(want_k=True, want_v=True)
  return found(want_k=True, want_v=False)[0], found(want_k=False, want_v=True)[0]


def _of_keys(q, k, v, d_out, numbers, bounds, work: Work, options: Options, *,
             want_k: bool, want_v: bool):
  b, s, heads, h = k.shape
  group = q.shape[2] // heads
  tile_q = BLOCK if h <= 64 else BLOCK // 2
  parts = BLOCK // tile_q
  size = h * q.dtype.itemsize
  depth = hopper.stages((2 if want_k else 1) * BLOCK * size, 2 * tile_q * size + 6 * 4 * tile_q, 4)

  def kernel(q, k, v, d_out, numbers, bounds, entries, counts, *references):
    outputs, scratch = references[:want_k + want_v], references[want_k + want_v:]
    k_tile, v_tile, q_tiles, d_tiles, number_rows, bound_rows, *barriers = scratch
    own_ready, ready, done = barriers
    row, head, member = (jax.lax.axis_index(x) for x in ('row', 'head', 'member'))
    block = jax.lax.axis_index('block')
    # Heads first, then halves of a block: all find their entry by a division by a constant.
    each = parts * group
    steps = counts[row, block] * each

    def entry_of(step):
      return entries[row, block, step // each]

    @pl.when(member < MEMBERS)
    def compute():
      plgpu.set_max_registers(240, action='increase')
      first = block * BLOCK + member * hopper.ROWS
      here = (row, pl.ds(first, hopper.ROWS), head)
      k_mine, v_mine = k_tile.at[member], v_tile.at[member]
      plgpu.copy_gmem_to_smem(k.at[here], k_mine, own_ready.at[member])
      if want_k:
        plgpu.copy_gmem_to_smem(v.at[here], v_mine, own_ready.at[member])
      plgpu.barrier_wait(own_ready.at[member])

      def step(m, carry):
        *totals, entry = carry
        slot = m % depth
        following = entry_of(jnp.minimum(m + 1, steps - 1))
        plgpu.barrier_wait(ready.at[slot])
        raw = raw_scores(hopper.product(k_mine, q_tiles.at[slot], transposed=True), options)
        lse = hopper.across(hopper.column_vector(number_rows.at[slot, 0]))
        p = jnp.exp2(raw * factors(options)[1] - lse)
        p = jax.lax.cond(
            entry % 2 == 1, lambda x: x,
            lambda x: gpu_work.visible_columns(x, bound_rows.at[slot], first, 0.0), p)
        weights, p = p.astype(q.dtype), sloped(p, raw, options)
        if want_v:
          totals[-1] = hopper.added(totals[-1], weights, d_tiles.at[slot])
        if want_k:
          dp = hopper.product(v_mine, d_tiles.at[slot], transposed=True)
          dot = hopper.across(hopper.column_vector(number_rows.at[slot, 1]))
          ds = (p * (dp - dot)).astype(q.dtype)
          totals[0] = hopper.added(totals[0], ds, q_tiles.at[slot])
        plgpu.barrier_arrive(done.at[slot])
        return *totals, following

      zeros = (hopper.matrix(h, 0.0),) * (want_k + want_v)
      *totals, _ = jax.lax.fori_loop(0, steps, step, (*zeros, entry_of(0)))
      if want_k:
        totals[0] = totals[0] * options.scale
      tiles = (k_mine, v_mine)[:len(totals)]
      for total, tile in zip(totals, tiles):
        tile[...] = total.astype(k.dtype)
      plgpu.commit_smem()
      for tile, output in zip(tiles, outputs):
        plgpu.copy_smem_to_gmem(tile, output.at[here])
      plgpu.wait_smem_to_gmem(0)

    @pl.when(member == MEMBERS)
    def copy():
      plgpu.set_max_registers(24, action='decrease')

      @pl.loop(0, steps)
      def _(m):
        slot = m % depth
        query_head = head * group + m % group
        first = entry_of(m) // 2 * BLOCK + m // group % parts * tile_q
        queries = pl.ds(first, tile_q)
        hopper.wait_for_buffer(done, m, depth)
        for source, target in (
            (q.at[row, queries, query_head], q_tiles),
            (d_out.at[row, queries, query_head], d_tiles),
            (numbers.at[row, query_head, :, queries], number_rows),
            (bounds.at[row, :, queries], bound_rows)):
          plgpu.copy_gmem_to_smem(source, target.at[slot], ready.at[slot])

      hopper.wait_for_last((done,), steps, depth)

  return gpu_work.run(
      kernel, (q, k, v, d_out, numbers, bounds, work.queries, work.query_counts),
      (jax.ShapeDtypeStruct(k.shape, k.dtype),) * (want_k + want_v),
      (hopper.tile((MEMBERS, hopper.ROWS, h), k.dtype),
       hopper.tile((MEMBERS, hopper.ROWS if want_k else 8, h), v.dtype),
       hopper.tile((depth, tile_q, h), q.dtype),
       hopper.tile((depth, tile_q, h), q.dtype),
       plgpu.SMEM((depth, 2, tile_q), jnp.float32),
       plgpu.SMEM((depth, 4, tile_q), jnp.int32),
       plgpu.Barrier(num_arrivals=1 + want_k, num_barriers=MEMBERS),
       plgpu.Barrier(num_arrivals=4, num_barriers=depth),
       plgpu.Barrier(num_arrivals=MEMBERS, num_barriers=depth)),
      {'head': heads, 'block': s // BLOCK, 'row': b})


def sloped(p: jax.Array, raw: jax.Array, options: Options) -> jax.Array:
  """Weights times the slope of soft-capping, 1 where there is none; raw is tanh of the score.

  Taken before dP is computed: the registers do not hold all three.
  """
  return p if options.softcap is None else p * (1.0 - raw * raw)
