"""Log-probs on TPU (Pallas Mosaic): logits exist in fast memory alone, forward.

Forward, grid (tokens, vocabulary): a tile of hidden states stays in fast memory while tiles of the
head pass by; of each tile of logits are kept, for every token and each of 128 columns modulo 128, a
maximum, a sum of exponentials, the target's logit and, for entropies, a sum of exponentials times
logits. Columns meet once, after the last tile.

Backward, as in `chunked`: one block of the vocabulary at a time, by a kernel of the same grid that
recomputes logits and writes d loss / d logits of the block, rounded to the type of the hidden
states. The two products with it are XLA's. So of [tokens, columns of a block] exists one array of
that type, and none in float32.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels.token_logp import chunked
from kernels.token_logp.layout import AxisName
from kernels.varying import out_struct

LANES = 128
TOKEN_BYTES, HEAD_BYTES = 2**23, 2**22     # of a tile of hidden states, and of the head
TILES = 1024, 512             # most tokens and columns of a tile
FAST_MEMORY = 48 * 2**20      # bytes the compiler may use; a v5p core has 64 MiB
LOW = -1e30                   # of columns that are none; finite, also when some are added up
PICKED, LOG_Z, MEAN = 0, 1, 2      # lanes of a result


def token_logp(
    hidden: jax.Array,        # [B, T, D]
    head: jax.Array,          # [D, V]
    targets: jax.Array,       # [B, T] int32
    *,
    chunk: int,
    softcap: float | None,
    with_entropy: bool,
    axis_name: AxisName | None,
    rows_over: AxisName | None,
) -> tuple[jax.Array, jax.Array | None]:      # [B, T] float32 each
  """See `chunked.token_logp`; `chunk` is for the backward pass, forward needs none.

  Raises:
    ValueError: types other than float32 and bfloat16, or devices that share the rows of the head.
  """
  unfit = {x.dtype.name for x in (hidden, head)} - {'float32', 'bfloat16'}
  if unfit:
    raise ValueError("token_logp's implementation 'tpu' takes float32 and bfloat16; got "
                     f'{", ".join(sorted(unfit))}')
  if rows_over is not None:
    raise ValueError("token_logp's implementation 'tpu' takes whole rows of the head; got a head "
                     f'whose rows are split over {rows_over!r}')
  return chunked.token_logp(
      hidden, head, targets, chunk=chunk, softcap=softcap, with_entropy=with_entropy,
      axis_name=axis_name, rows_over=None, statistics=_statistics)


def tile_sizes(hidden: jax.Array, head: jax.Array) -> tuple[int, int]:
  """Tokens and columns of a tile, for hidden [N, D] and head [D, V]."""
  tokens, features = hidden.shape
  most = TOKEN_BYTES // (features * hidden.dtype.itemsize) // LANES * LANES
  columns = HEAD_BYTES // (features * head.dtype.itemsize) // LANES * LANES
  return (min(tokens, max(min(most, TILES[0]), LANES)),
          min(head.shape[1], max(min(columns, TILES[1]), LANES)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5, 6))
def _statistics(
    hidden: jax.Array,        # [N, D]
    head: jax.Array,          # [D, V]
    targets: jax.Array,       # [N] int32; elsewhere than 0..V-1: on another device
    width: int,
    softcap: float | None,
    with_mean: bool,
    rows_over: None,          # `token_logp` refuses others
) -> tuple[jax.Array, jax.Array, jax.Array | None]:    # [N] float32 each
  """The target's logit (0 where it is not here), log-sum-exp, and sum_v p_v logit_v (constant)."""
  (tokens, features), size = hidden.shape, head.shape[1]
  rows, columns = tile_sizes(hidden, head)
  lanes = columns if columns % LANES else LANES

  def kernel(hidden_ref, head_ref, target_ref, out_ref, *sums):
    top_ref, total_ref, picked_ref, *moment_ref = sums
    step, steps = pl.program_id(1), pl.num_programs(1)

    @pl.when(step == 0)
    def start():
      top_ref[...] = jnp.full_like(top_ref, LOW)
      for ref in (total_ref, picked_ref, *moment_ref):
        ref[...] = jnp.zeros_like(ref)

    z = _capped(_dot(hidden_ref[...], head_ref[...]), softcap)[0]
    column = step * columns + jax.lax.broadcasted_iota(jnp.int32, z.shape, 1)
    is_hit = column == target_ref[...]
    if size % columns:        # the last tile ends outside the head; a target may point there
      is_hit, z = is_hit & (column < size), jnp.where(column < size, z, LOW)
    hit = jnp.where(is_hit, z, 0.0)
    pieces = [slice(n, n + lanes) for n in range(0, columns, lanes)]
    top = functools.reduce(jnp.maximum, [z[:, piece] for piece in pieces], top_ref[...])
    shrink = jnp.exp(top_ref[...] - top)
    total = total_ref[...] * shrink
    moment = [ref[...] * shrink for ref in moment_ref]
    for piece in pieces:
      e = jnp.exp(z[:, piece] - top)
      total += e
      moment = [m + e * z[:, piece] for m in moment]
    top_ref[...], total_ref[...] = top, total
    picked_ref[...] += sum(hit[:, piece] for piece in pieces)
    for ref, value in zip(moment_ref, moment, strict=True):
      ref[...] = value

    @pl.when(step == steps - 1)
    def finish():
      def added(x):
        return jnp.sum(x, axis=1, keepdims=True)

      highest = jnp.max(top, axis=1, keepdims=True)
      shrink = jnp.exp(top - highest)
      whole = added(total * shrink)
      lane = jax.lax.broadcasted_iota(jnp.int32, out_ref.shape, 1)
      out = jnp.where(lane == PICKED, added(picked_ref[...]), highest + jnp.log(whole))
      for value in moment:
        out = jnp.where(lane == MEAN, added(value * shrink) / whole, out)
      out_ref[...] = out

  grid = pl.cdiv(tokens, rows), pl.cdiv(size, columns)
  out = pl.pallas_call(
      kernel, name='logp_forward', grid=grid,
      out_shape=out_struct((tokens, LANES), jnp.float32, like=hidden),
      in_specs=[pl.BlockSpec((rows, features), lambda i, j: (i, 0)),
                pl.BlockSpec((features, columns), lambda i, j: (0, j)),
                pl.BlockSpec((rows, 1), lambda i, j: (i, 0))],
      out_specs=pl.BlockSpec((rows, LANES), lambda i, j: (i, 0)),
      scratch_shapes=[pltpu.VMEM((rows, lanes), jnp.float32)] * (4 if with_mean else 3),
      compiler_params=_compiler_params(),
      cost_estimate=_cost(hidden, head, grid[0], 4 * tokens * LANES),
  )(hidden, head, targets[:, None])
  return out[:, PICKED], out[:, LOG_Z], out[:, MEAN] if with_mean else None


def _forward(hidden, head, targets, *options):
  out = _statistics(hidden, head, targets, *options)
  return out, (hidden, head, targets, out[1])


def _backward(width, softcap, with_mean, rows_over, saved, cotangents):
  hidden, head, targets, log_z = saved
  of_target, of_log_z, _ = cotangents
  live = (of_target != 0) | (of_log_z != 0)      # [N]; garbage elsewhere must not meet a product
  numbers = jnp.stack([of_target, of_log_z, log_z], axis=1)                  # [N, 3]
  size, columns = head.shape[1], tile_sizes(hidden, head)[1]
  width = min(size, -(-width // columns) * columns)
  counted = jnp.where(live[:, None], hidden, jnp.zeros((), hidden.dtype))

  def add(grads, number, width):
    """With the block of `width` columns that begins at number * (the width of whole blocks)."""
    d_hidden, d_head = grads
    column = number * whole
    d = _d_logits(hidden, head, targets, numbers, number * (whole // columns), width, softcap)
    block = jax.lax.dynamic_slice_in_dim(head, column, width, axis=1)
    d_hidden = d_hidden + jnp.einsum('nv,dv->nd', d, block, preferred_element_type=jnp.float32)
    d_block = jnp.einsum('nd,nv->dv', counted, d, preferred_element_type=jnp.float32)
    return d_hidden, jax.lax.dynamic_update_slice(d_head, d_block.astype(head.dtype), (0, column))

  whole, blocks = width, size // width
  grads = jnp.zeros_like(hidden, jnp.float32), jnp.zeros_like(head)
  if blocks == 1:
    grads = add(grads, jnp.int32(0), whole)
  else:
    grads, _ = jax.lax.scan(lambda grads, number: (add(grads, number, whole), None), grads,
                            jnp.arange(blocks, dtype=jnp.int32))
  if size % whole:
    grads = add(grads, jnp.int32(blocks), size % whole)
  return grads[0].astype(hidden.dtype), grads[1], None


_statistics.defvjp(_forward, _backward)


def _d_logits(
    hidden: jax.Array,        # [N, D]
    head: jax.Array,          # [D, V]
    targets: jax.Array,       # [N] int32
    numbers: jax.Array,       # [N, 3] float32: cotangents of picked and log_z, and log_z
    first: jax.Array,         # [] int32, the tile of columns where the block begins
    width: int,               # of the block
    softcap: float | None,
) -> jax.Array:               # [N, width] in hidden's dtype
  """d loss / d logits of one block of columns; 0 where both cotangents are."""
  tokens, features = hidden.shape
  rows, columns = tile_sizes(hidden, head)

  def kernel(first, hidden_ref, head_ref, target_ref, number_ref, out_ref):
    z, slope = _capped(_dot(hidden_ref[...], head_ref[...]), softcap)
    of_target, of_log_z, log_z = (number_ref[:, n:n + 1] for n in range(3))
    place = (first[0] + pl.program_id(1)) * columns
    hit = place + jax.lax.broadcasted_iota(jnp.int32, z.shape, 1) == target_ref[...]
    d = of_log_z * jnp.exp(z - log_z) + jnp.where(hit, of_target, 0.0)
    d = d if slope is None else d * slope
    is_live = (of_target != 0) | (of_log_z != 0)
    out_ref[...] = jnp.where(is_live, d, 0.0).astype(out_ref.dtype)

  grid = pl.cdiv(tokens, rows), pl.cdiv(width, columns)
  return pl.pallas_call(
      kernel, name='logp_backward',
      out_shape=out_struct((tokens, width), hidden.dtype, like=hidden),
      grid_spec=pltpu.PrefetchScalarGridSpec(
          num_scalar_prefetch=1, grid=grid,
          in_specs=[pl.BlockSpec((rows, features), lambda i, j, first: (i, 0)),
                    pl.BlockSpec((features, columns), lambda i, j, first: (0, first[0] + j)),
                    pl.BlockSpec((rows, 1), lambda i, j, first: (i, 0)),
                    pl.BlockSpec((rows, 3), lambda i, j, first: (i, 0))],
          out_specs=pl.BlockSpec((rows, columns), lambda i, j, first: (i, j))),
      compiler_params=_compiler_params(),
      cost_estimate=_cost(hidden, head[:, :width], grid[0],
                          tokens * width * hidden.dtype.itemsize),
  )(first.reshape(1), hidden, head, targets[:, None], numbers)


def _dot(x: jax.Array, y: jax.Array) -> jax.Array:
  """x [n, D] times y [D, m] in float32."""
  dtype = jnp.promote_types(x.dtype, y.dtype)
  return jnp.dot(
      x.astype(dtype), y.astype(dtype), preferred_element_type=jnp.float32,
      precision=jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None)


def _capped(z: jax.Array, softcap: float | None) -> tuple[jax.Array, jax.Array | None]:
  """Soft-capped logits, and their slope where it is not 1."""
  if softcap is None:
    return z, None
  squashed = jnp.tanh(z / softcap)
  return softcap * squashed, 1 - squashed**2


def _compiler_params() -> pltpu.CompilerParams:
  return pltpu.CompilerParams(
      dimension_semantics=('parallel', 'arbitrary'), vmem_limit_bytes=FAST_MEMORY)


def _cost(hidden: jax.Array, head: jax.Array, passes: int, written: int) -> pl.CostEstimate:
  """Hidden states are read once, the head (or part of it) once for every tile of tokens."""
  logits = hidden.shape[0] * head.shape[1]
  return pl.CostEstimate(
      flops=2 * logits * hidden.shape[1], transcendentals=logits,
      bytes_accessed=(hidden.size * hidden.dtype.itemsize + written
                      + passes * head.size * head.dtype.itemsize))
