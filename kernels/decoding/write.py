"""New keys of all slots into a decoding cache on TPU (Pallas Mosaic), in place.

A grid step is of some slots: the tile of rows that a slot's key lies in is copied into fast memory,
the row is put in, and the tile is copied back, all tiles of a step at once. XLA has nothing of the
kind: for a scatter, or for rows narrower than a tile, it lays out the whole cache anew.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels.varying import alike, out_struct

TOGETHER = 32                 # slots of a step


def write_keys(
    x: jax.Array,             # [L, C, R, K, B, H], or scales [L, C, R, K, B]
    new: jax.Array,           # [R, K, H], or [R, K]
    layer: jax.Array,         # [] int32
    place: jax.Array,         # [R] int32, among a slot's own keys; C B: not written
) -> jax.Array:
  """`x` with one new key of every slot in one layer; the rest of it is neither read nor copied."""
  x, new, layer, place = alike((x, new, layer, place))
  blocks, slots, heads, block = x.shape[1:5]
  is_scale = x.ndim == 5
  rows = 32 // x.dtype.itemsize        # of a tile: 8 of 4 bytes, 16 of 2, 32 of 1
  rows = block if is_scale or block % rows else rows
  together = min(TOGETHER, slots)
  new = new[..., None] if is_scale else new                                    # [R, K, H or 1]
  padded = jnp.pad(place, (0, -slots % together), constant_values=blocks * block)
  wide = jnp.float32 if jnp.issubdtype(x.dtype, jnp.floating) else jnp.int32

  def kernel(layer, place, new_ref, _, x_ref, tiles, arrived):
    first = pl.program_id(0) * together

    def each(act):
      """`act` on the copies in and out of every slot that has a new key."""
      def one(n, carry):
        slot, at = first + n, place[first + n]
        number = jax.lax.div(at, block)
        start = jax.lax.div(at - number * block, rows) * rows

        @pl.when(at < blocks * block)
        def copy():
          there = x_ref.at[layer[0], number, slot]
          if rows < block:
            there = there.at[:, pl.ds(pl.multiple_of(start, rows), rows)]
          act(n, at - number * block - start, there)

        return carry

      jax.lax.fori_loop(0, together, one, 0)

    def fetch(n, offset, there):
      pltpu.make_async_copy(there, tiles.at[n], arrived.at[0]).start()

    def await_tile(n, offset, there):     # they come in any order: all are there when all are
      pltpu.make_async_copy(there, tiles.at[n], arrived.at[0]).wait()

    def change(n, offset, there):
      for head in range(heads):
        if is_scale:
          old = tiles[n, head:head + 1]                                        # [1, B]
          hit = jax.lax.broadcasted_iota(jnp.int32, old.shape, 1) == offset
          tiles[n, head:head + 1] = jnp.where(hit, new_ref[n, head:head + 1], old)
        else:
          old = tiles[n, head].astype(wide)                                    # [rows, H]
          hit = jax.lax.broadcasted_iota(jnp.int32, old.shape, 0) == offset
          row = new_ref[n, head:head + 1].astype(wide)
          tiles[n, head] = jnp.where(hit, row, old).astype(x.dtype)
      pltpu.make_async_copy(tiles.at[n], there, arrived.at[1]).start()

    def await_back(n, offset, there):
      pltpu.make_async_copy(tiles.at[n], there, arrived.at[1]).wait()

    for act in (fetch, await_tile, change, await_back):
      each(act)

  tile = (heads, rows, *x.shape[5:])
  tile_bytes = x[0, 0, 0].size // block * rows * x.dtype.itemsize
  return pl.pallas_call(
      kernel, name='write_keys', out_shape=out_struct(x.shape, x.dtype, like=x),
      input_output_aliases={3: 0},
      grid_spec=pltpu.PrefetchScalarGridSpec(
          num_scalar_prefetch=2, grid=(pl.cdiv(slots, together),),
          in_specs=[pl.BlockSpec((together, *new.shape[1:]), lambda i, layer, place: (i, 0, 0)),
                    pl.BlockSpec(memory_space=pl.ANY)],
          out_specs=pl.BlockSpec(memory_space=pl.ANY),
          scratch_shapes=[pltpu.VMEM((together, *tile), x.dtype), pltpu.SemaphoreType.DMA((2,))]),
      compiler_params=pltpu.CompilerParams(dimension_semantics=('arbitrary',)),
      cost_estimate=pl.CostEstimate(
          flops=0, transcendentals=0, bytes_accessed=2 * slots * tile_bytes),
  )(layer.reshape(1), padded, new, x)
