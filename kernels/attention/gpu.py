"""Attention for Hopper GPUs: Mosaic GPU kernels over the blocks that are visited.

Forward: one block of threads for each query head and 128 queries. Two warpgroups compute, of 64
queries each, while a third copies tiles of the visited keys and values into a ring of buffers in
shared memory, as far ahead as there are buffers. Scores, weights and the sum of values stay in
registers. A barrier lets the two take turns: one has the tensor cores while the other is at its
softmax. A mask is made only for blocks where some query does not see some key.

`gpu_backward` has the other direction.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels import hopper
from kernels.attention import gpu_backward, gpu_work, saved
from kernels.attention.blocks import HOPPER_BLOCK as BLOCK
from kernels.attention.blocks import Plan, check_fits
from kernels.attention.gpu_work import MEMBERS, Work, in_blocks, padded
from kernels.attention.saved import Options
from kernels.attention.spans import Spans

HEAD_SIZES = (64, 80, 96, 128, 256)
TYPES = ('bfloat16', 'float16')


def attention(
    q: jax.Array,             # [B, T, N, H]
    k: jax.Array,             # [B, S, K, H]
    v: jax.Array,             # [B, S, K, H]
    spans: Spans,             # already clipped to the window
    plan: Plan,               # of the same spans, in blocks of 128
    *,
    scale: float,
    softcap: float | None = None,
) -> jax.Array:               # [B, T, N, H]
  """See `kernels.attention.attention` and `saved.attention`.

  Raises:
    ValueError: a type, head size, scale or plan that the kernels are not written for.
  """
  _check(q, k, v, plan, scale, softcap)
  return saved.attention(q, k, v, spans, plan, RULES, Options(scale, softcap))


def _forward(q, k, v, spans: Spans, plan: Plan, options: Options):
  out, lse = _call(*padded(q, k, v, spans), gpu_work.work(plan), options)
  return out[:, :q.shape[1]], lse[..., :q.shape[1]]


def _backward(q, k, v, spans: Spans, plan: Plan, out, lse, d_out, options: Options):
  dots = jnp.einsum('btnh,btnh->bnt', d_out.astype(jnp.float32), out.astype(jnp.float32))
  # Log-sum-exp in units of log 2 for exp2, and what is to be subtracted from dP.
  numbers = in_blocks(jnp.stack([lse * hopper.LOG2_E, dots], axis=2), axis=3)      # [B, N, 2, T]
  queries, keys, values, bounds = padded(q, k, v, spans)
  arrays = queries, keys, values, in_blocks(d_out), numbers, bounds
  lists = gpu_work.work(plan)
  dq = gpu_backward.of_queries(*arrays, lists, options)
  dk, dv = gpu_backward.of_keys(*arrays, lists, options)
  return dq[:, :q.shape[1]], dk[:, :k.shape[1]], dv[:, :k.shape[1]]


RULES = saved.Rules(_forward, _backward)


def _call(q, k, v, bounds, work: Work, options: Options):
  """Output [B, T, N, H] and log-sum-exp [B, N, T] float32; both 0 where nothing is seen."""
  b, t, n, h = q.shape
  group = n // k.shape[2]
  tile_k = BLOCK if h <= 128 else BLOCK // 2
  parts = BLOCK // tile_k
  size = h * q.dtype.itemsize
  depth = hopper.stages(BLOCK * size, 2 * tile_k * size, 4)
  factor = gpu_work.factors(options)[1]

  def kernel(q, k, v, bounds, entries, counts, out, lse, *scratch):
    q_tile, k_tiles, v_tiles, bound_rows, lse_rows, *barriers = scratch
    q_ready, k_ready, v_ready, k_done, v_done, turn = barriers
    row, head, member = (jax.lax.axis_index(x) for x in ('row', 'head', 'member'))
    # Under a causal mask the last blocks have the most to do: they begin first.
    block = t // BLOCK - 1 - jax.lax.axis_index('block')
    steps = counts[row, block] * parts

    def entry_of(step):
      return entries[row, block, step // parts]

    def first_key(entry, step):
      return entry // 2 * BLOCK + step % parts * tile_k

    def take_turns():
      plgpu.barrier_arrive(turn)
      plgpu.barrier_wait(turn)

    @pl.when(member < MEMBERS)
    def compute():
      plgpu.set_max_registers(240, action='increase')
      first = block * BLOCK + member * hopper.ROWS
      here = pl.ds(first, hopper.ROWS)
      mine, ready = q_tile.at[member], q_ready.at[member]
      plgpu.copy_gmem_to_smem(q.at[row, here, head], mine, ready)
      plgpu.copy_gmem_to_smem(bounds.at[row, :, here], bound_rows.at[member], ready)
      plgpu.barrier_wait(ready)
      edges = tuple(
          hopper.row_vector(bound_rows.at[member, i]) for i in range(4))

      @pl.when(steps > 0)
      def _():
        plgpu.barrier_wait(k_ready.at[0])

      pl.when(member == 1)(take_turns)

      def step(m, carry):
        total, top, weight, entry = carry
        slot = m % depth
        following = entry_of(jnp.minimum(m + 1, steps - 1))

        score = hopper.product(
            mine, k_tiles.at[slot], transposed=True, meanwhile=take_turns)
        plgpu.barrier_arrive(k_done.at[slot])
        score = jax.lax.cond(
            entry % 2 == 1, lambda x: x,
            lambda x: gpu_work.visible_rows(x, edges, first_key(entry, m), -jnp.inf),
            gpu_work.raw_scores(score, options))
        new_top = jnp.maximum(top, jnp.max(score, axis=1) * factor)
        old = jnp.exp2(top - new_top)
        p = jnp.exp2(score * factor - hopper.down(new_top, tile_k))
        weight = weight * old + jnp.sum(p, axis=1)
        total = total * hopper.down(old, h)
        p = p.astype(v.dtype)
        total, weight, new_top, p = jax.lax.optimization_barrier((total, weight, new_top, p))
        plgpu.barrier_arrive(turn)
        plgpu.barrier_wait(v_ready.at[slot])
        plgpu.barrier_wait(turn)

        def wait_for_next():
          @pl.when(m + 1 < steps)
          def _():
            plgpu.barrier_wait(k_ready.at[(m + 1) % depth])

        total = hopper.added(
            total, p, v_tiles.at[slot], meanwhile=wait_for_next)
        plgpu.barrier_arrive(v_done.at[slot])
        return total, new_top, weight, following

      total, top, weight, _ = jax.lax.fori_loop(0, steps, step, (
          hopper.matrix(h, 0.0), hopper.row_values(hopper.LOW),
          hopper.row_values(0.0), entry_of(0)))
      pl.when(member == 0)(take_turns)
      weight = jnp.where(weight > 0, weight, 1.0)
      top = jnp.where(top > hopper.LOW, top, 0.0)
      mine[...] = (total * hopper.down(1.0 / weight, h)).astype(out.dtype)
      lse_rows.at[member][...] = top / hopper.LOG2_E + jnp.log(weight)
      plgpu.commit_smem()
      plgpu.copy_smem_to_gmem(mine, out.at[row, here, head])
      plgpu.copy_smem_to_gmem(lse_rows.at[member], lse.at[row, head, here])
      plgpu.wait_smem_to_gmem(0)

    @pl.when(member == MEMBERS)
    def copy():
      gpu_work.copy_tiles(
          ((k, k_tiles, k_ready, k_done), (v, v_tiles, v_ready, v_done)), steps, depth,
          lambda m: (row, pl.ds(first_key(entry_of(m), m), tile_k), head // group))

  return gpu_work.run(
      kernel, (q, k, v, bounds, work.keys, work.key_counts),
      (jax.ShapeDtypeStruct(q.shape, q.dtype), jax.ShapeDtypeStruct((b, n, t), jnp.float32)),
      (hopper.tile((MEMBERS, hopper.ROWS, h), q.dtype),
       hopper.tile((depth, tile_k, h), k.dtype),
       hopper.tile((depth, tile_k, h), v.dtype),
       plgpu.SMEM((MEMBERS, 4, hopper.ROWS), jnp.int32),
       plgpu.SMEM((MEMBERS, hopper.ROWS), jnp.float32),
       plgpu.Barrier(num_arrivals=2, num_barriers=MEMBERS),
       plgpu.Barrier(num_barriers=depth),
       plgpu.Barrier(num_barriers=depth),
       plgpu.Barrier(num_arrivals=MEMBERS, num_barriers=depth),
       plgpu.Barrier(num_arrivals=MEMBERS, num_barriers=depth),
       plgpu.Barrier(num_arrivals=MEMBERS)),
      {'head': n, 'block': t // BLOCK, 'row': b})


def _check(q, k, v, plan: Plan, scale: float, softcap: float | None) -> None:
  if not q.dtype == k.dtype == v.dtype or q.dtype.name not in TYPES:
    raise ValueError(
        f"the attention implementation 'gpu' takes q, k and v of one type, {' or '.join(TYPES)}; "
        f'got {q.dtype}, {k.dtype} and {v.dtype}')
  if q.shape[-1] not in HEAD_SIZES:
    raise ValueError(
        f"the attention implementation 'gpu' has head sizes {HEAD_SIZES}; got {q.shape[-1]}")
  if scale <= 0 or (softcap is not None and softcap <= 0):
    raise ValueError(
        f"the attention implementation 'gpu' takes a positive scale and softcap; got {scale} and "
        f'{softcap}')
  if (plan.block_q, plan.block_k) != (BLOCK, BLOCK):
    raise ValueError(
        f"the attention implementation 'gpu' takes a plan in blocks of {BLOCK} and {BLOCK}; got "
        f'{plan.block_q} and {plan.block_k}')
  check_fits(plan, q.shape[1], k.shape[1])
