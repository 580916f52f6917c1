"""What the GPU's forward and backward kernels are told, and how both compute scores and masks."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels import hopper, varying
from kernels.attention.blocks import HOPPER_BLOCK as BLOCK
from kernels.attention.blocks import Plan
from kernels.attention.saved import Options
from kernels.attention.spans import Spans

MEMBERS = 2                   # warpgroups that compute, each 64 rows of a block


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Work:
  """Lists of blocks; an entry is 2 * block + 1 where all of its pairs are visible, else 2 * block.

  Entries beyond the count are of no meaning.
  """

  keys: jax.Array             # [B, T / 128, S / 128] int32, for every block of queries
  key_counts: jax.Array       # [B, T / 128] int32
  queries: jax.Array          # [B, S / 128, T / 128] int32, for every block of keys
  query_counts: jax.Array     # [B, S / 128] int32


def work(plan: Plan) -> Work:
  """The lists of a plan, and those of its transpose."""
  b, n_queries, n_keys = plan.visited.shape
  real = jnp.arange(n_keys, dtype=jnp.int32)[None, None] < plan.counts[..., None]
  whole = plan.whole.astype(jnp.int32)
  block = jnp.arange(n_queries, dtype=jnp.int32)[None, :, None]
  at = (jnp.arange(b, dtype=jnp.int32)[:, None, None], block,
        jnp.where(real, plan.visited, n_keys))
  queries = jnp.full(plan.visited.shape, 2 * n_queries, jnp.int32)
  queries = jnp.sort(queries.at[at].set(2 * block + whole, mode='drop'), axis=1)
  counts = jnp.sum(queries < 2 * n_queries, axis=1, dtype=jnp.int32)
  return Work(2 * plan.visited + whole, plan.counts, jnp.swapaxes(queries, 1, 2), counts)


def padded(
    q: jax.Array, k: jax.Array, v: jax.Array, spans: Spans
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
  """Queries, keys and values in whole blocks, and the bounds [B, 4, T] int32 of the queries."""
  fields = (spans.prefix_start, spans.prefix_end, spans.start, spans.end)
  bounds = jnp.stack([in_blocks(x) for x in fields], axis=1)
  return in_blocks(q), in_blocks(k), in_blocks(v), bounds


def in_blocks(x: jax.Array, axis: int = 1) -> jax.Array:
  """Zeros up to a whole number of blocks."""
  widths = [(0, 0)] * x.ndim
  widths[axis] = (0, -x.shape[axis] % BLOCK)
  return jnp.pad(x, widths)


def factors(options: Options) -> tuple[float, float]:
  """Of what the product of query and key is multiplied by before, and after, capping.

  The second makes the score one of log 2, for exp2.
  """
  if options.softcap is None:
    return 1.0, options.scale * hopper.LOG2_E
  return options.scale / options.softcap, options.softcap * hopper.LOG2_E


def raw_scores(products: jax.Array, options: Options) -> jax.Array:
  """Scores but for the second factor, which exp2's argument takes in one instruction."""
  if options.softcap is None:
    return products
  return hopper.tanh(products * factors(options)[0])


def visible_rows(
    x: jax.Array,             # [64 queries, keys]
    bounds: tuple[jax.Array, ...],   # the four of each query, [64] int32
    first: jax.Array,         # [] int32, index of the first key
    hidden: float,
) -> jax.Array:
  """x where the query sees the key, else `hidden`."""
  index = hopper.index(x.shape[1], 1) + first
  return _where(index, [hopper.down(bound, x.shape[1]) for bound in bounds], x, hidden)


def visible_columns(
    x: jax.Array,             # [64 keys, queries]
    bounds: Any,              # shared memory [4, queries] int32
    first: jax.Array,         # [] int32, index of the first key
    hidden: float,
) -> jax.Array:
  """The same with queries in columns."""
  index = hopper.index(x.shape[1], 0) + first
  return _where(
      index, [hopper.across(hopper.column_vector(bounds.at[n])) for n in range(4)], x, hidden)


def _where(index: jax.Array, bounds: list[jax.Array], x: jax.Array, hidden: float) -> jax.Array:
  prefix_start, prefix_end, start, end = bounds
  keep = ((index >= prefix_start) & (index < prefix_end)) | ((index >= start) & (index < end))
  return jnp.where(keep, x, hidden)


def copy_tiles(
    rings: Sequence[tuple[Any, ...]],     # (array, tiles, barriers of full ones, of empty ones)
    steps: jax.Array,         # [] int32
    depth: int,               # tiles of a ring
    tile: Callable[[jax.Array], tuple[Any, ...]],    # which part of the arrays a step needs
) -> None:
  """What the warpgroup that copies does: each step's part into the next empty tile of each ring."""
  plgpu.set_max_registers(24, action='decrease')

  @pl.loop(0, steps)
  def _(m):
    for x, tiles, ready, done in rings:
      hopper.wait_for_buffer(done, m, depth)
      plgpu.copy_gmem_to_smem(x.at[tile(m)], tiles.at[m % depth], ready.at[m % depth])

  hopper.wait_for_last(tuple(done for *_, done in rings), steps, depth)


def run(kernel, arrays: tuple[jax.Array, ...], outputs, scratch, grid: dict[str, int]):
  """The kernel in two warpgroups that compute and one that copies, for every place of the grid."""
  over = frozenset().union(*(varying.axes(x) for x in arrays))
  found = plgpu.kernel(
      kernel, out_type=outputs, scratch_types=scratch, grid=tuple(grid.values()),
      grid_names=tuple(grid), num_threads=MEMBERS + 1, thread_name='member',
      compiler_params=plgpu.CompilerParams(approx_math=True))(*arrays)
  return [varying.varying(x, over) for x in found]
