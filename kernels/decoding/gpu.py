"""Decoding attention for Hopper GPUs (Mosaic GPU): the keys of a row of queries in several parts.

A row is up to 64 queries that read the same keys: the query heads of one slot that share a key
head, for private keys; for shared ones those of all members of a group. One block of threads for
each row, key head and part of the row's live keys: a single warpgroup, two or more of which find
room on a multiprocessor, so that one multiplies while another waits. It walks tiles of 64 keys,
copied into a ring of buffers as far ahead as there are buffers; queries, scores and sums are in
registers. Tiles without a live key are neither copied nor computed.

Products take 64 rows, so most of what the tensor cores do for private keys is for rows that are not
there: at 64 operations per byte still a third of what they can while memory is read at full speed.

A row's parts are merged outside (`partial`). How keys are parted depends on shapes and on the
row's own lengths, so a slot's result does not depend on what other slots hold.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels import hopper, varying
from kernels.decoding.cache import Own, Quantised, Shared
from kernels.decoding.partial import LOWEST, Partial, merged

TILE = 64                     # keys
BLOCKS = 4 * 132              # of threads: two at a time on a multiprocessor, and as many to come
SHORTEST = 4                  # tiles of a part
HEAD_SIZES = (64, 80, 96, 128, 256)
TYPES = ('bfloat16', 'float16')


@dataclasses.dataclass(frozen=True)
class _Options:
  scale: float
  softcap: float | None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Rows:
  """A rows of queries and where their keys lie. Tile t of a row is in stretch t // `tiles` of keys,
  which is number `lead` + key head + t // tiles * `stride` of all."""

  queries: jax.Array          # [A, K, M, H], M a multiple of 8
  low: jax.Array              # [A, M] int32, the first key that each query sees
  high: jax.Array             # [A, M] int32, the end of those
  first: jax.Array            # [A] int32, the first tile that holds a key which is seen
  begin: jax.Array            # [A] int32, the tile from which on keys are parted
  end: jax.Array              # [A] int32, the end of the tiles
  lead: jax.Array             # [A] int32
  tiles: int = dataclasses.field(metadata={'static': True})
  stride: int = dataclasses.field(metadata={'static': True})
  most: int = dataclasses.field(metadata={'static': True})    # tiles of the longest row there is


def decode_attention(
    q: jax.Array,             # [R, N, H]
    own: Own,
    shared: Sequence[Shared],
    *,
    layer: jax.Array,         # [] int32
    positions: jax.Array,     # [R] int32
    scale: float,
    window: int | jax.Array | None = None,
    softcap: float | None = None,
) -> jax.Array:               # [R, N, H] in q's dtype
  """See `ref.decode_attention`.

  Raises:
    ValueError: a type, head size, block or number of heads that the kernel is not written for.
  """
  _check(q, own, shared, scale, softcap)
  r, n, h = q.shape
  heads = _array(own.k).shape[3]
  queries = q.reshape(r, heads, n // heads, h)
  options = _Options(scale, softcap)
  parts = [_over_own(queries, own, window, layer, options)]
  parts += [_over_shared(queries, region, positions, window, layer, options) for region in shared]
  end = functools.reduce(merged, parts)
  out = end.out / jnp.where(end.total > 0, end.total, 1.0)[..., None]
  return out.reshape(r, n, h).astype(q.dtype)


def _over_own(
    queries: jax.Array,       # [R, K, X, H]
    own: Own,
    window: int | jax.Array | None,
    layer: jax.Array,
    options: _Options,
) -> Partial:                 # of [R, K, X]
  slots, heads, x, _ = queries.shape
  keys, values = _array(own.k), _array(own.v)
  _, blocks, _, _, block, _ = keys.shape
  low = jnp.zeros_like(own.live) if window is None else jnp.maximum(own.live - window, 0)
  first = low // TILE
  places = jnp.arange(slots, dtype=jnp.int32) * heads
  queries = _whole_eights(queries)
  over = (slots, queries.shape[2])
  rows = _Rows(
      queries, jnp.broadcast_to(low[:, None], over), jnp.broadcast_to(own.live[:, None], over),
      first, first, -(-own.live // TILE), layer * (blocks * slots * heads) + places,
      block // TILE, slots * heads, blocks * block // TILE)
  found = _attend(rows, _stretches(keys), _stretches(values), options)
  return jax.tree.map(lambda part: part[:, :, :x], found)


def _over_shared(
    queries: jax.Array,       # [R, K, X, H]
    region: Shared,
    positions: jax.Array,     # [R]
    window: int | jax.Array | None,
    layer: jax.Array,
    options: _Options,
) -> Partial:                 # of the queries as they came
  """Each group's keys once for as many of its members as make 64 queries."""
  r, heads, x, h = queries.shape
  groups, places = region.members.shape
  together = min(places, hopper.ROWS // x)
  rows = -(-places // together)
  members = jnp.pad(region.members, ((0, 0), (0, rows * together - places)), constant_values=r)
  members = members.reshape(groups * rows, together)
  taken = members < r                                                           # [A, m]

  gathered = queries.at[members].get(mode='fill', fill_value=0)                 # [A, m, K, X, H]
  gathered = jnp.swapaxes(gathered, 1, 2).reshape(groups * rows, heads, together * x, h)
  length = jnp.repeat(region.length, rows)[:, None]                             # [A, 1]
  low = jnp.zeros_like(members)
  if window is not None:
    begins = positions.at[members].get(mode='fill', fill_value=0) - window + 1
    low = jnp.maximum(begins - jnp.repeat(region.first, rows)[:, None], 0)
  high = jnp.where(taken, length, 0)
  first = jnp.min(jnp.where(low < high, low, length), axis=1) // TILE
  end = jnp.where(jnp.any(low < high, axis=1), -(-length[:, 0] // TILE), 0)

  keys, values = _array(region.k), _array(region.v)
  size = keys.shape[3]
  if size < TILE:             # shorter than a tile: this layer's are copied
    keys, values = (jnp.pad(jax.lax.dynamic_slice_in_dim(cache, layer, 1), (
        (0, 0), (0, 0), (0, 0), (0, TILE - size), (0, 0))) for cache in (keys, values))
    layer, size = jnp.zeros_like(layer), TILE
  gathered = _whole_eights(gathered)

  def of_rows(bound):         # [A, m] -> [A, M]
    bound = jnp.repeat(bound, x, axis=1)
    return jnp.pad(bound, ((0, 0), (0, gathered.shape[2] - bound.shape[1])))

  group = jnp.repeat(jnp.arange(groups, dtype=jnp.int32), rows)
  tiles = -(-size // TILE)
  found = _attend(
      _Rows(gathered, of_rows(low), of_rows(high), first, jnp.zeros_like(first), end,
            (layer * groups + group) * heads, tiles, 0, tiles),
      _stretches(keys), _stretches(values), options)

  def back(part, absent):     # [A, K, M, ..] -> [R, K, X, ..]
    part = part[:, :, :together * x].reshape(
        groups, rows, heads, together, x, *part.shape[3:])
    part = jnp.moveaxis(part, 2, 3).reshape(groups, rows * together, heads, x, *part.shape[5:])
    part = part[jnp.maximum(region.group, 0), jnp.where(region.group >= 0, region.member, 0)]
    inside = (region.group >= 0).reshape(r, *(1,) * (part.ndim - 1))
    return jnp.where(inside, part, absent)

  return Partial(back(found.top, LOWEST), back(found.total, 0.0), back(found.out, 0.0))


def _attend(rows: _Rows, k: jax.Array, v: jax.Array, options: _Options) -> Partial:
  """Each row's attention over its keys; k and v are stretches [*, size, H]."""
  a, heads, m, h = rows.queries.shape
  size = k.shape[1]
  parts = max(1, min(rows.most // SHORTEST, -(-BLOCKS // (a * heads))))
  depth = _depth(h * k.dtype.itemsize)
  factor = options.scale * hopper.LOG2_E
  bounds = jnp.stack([rows.low, rows.high], axis=1)                             # [A, 2, M]
  bounds = jnp.pad(bounds, ((0, 0), (0, 0), (0, hopper.ROWS - m)))
  places = jnp.stack([rows.first, rows.begin, rows.end, rows.lead], axis=1)     # [A, 4]

  def kernel(q, k, v, bounds, places, out, numbers, *scratch):
    k_tiles, v_tiles, out_tile, bound_rows, number_rows, ready, k_ready, v_ready = scratch
    row, head, part = (jax.lax.axis_index(x) for x in ('row', 'head', 'part'))
    first, begin, end, lead = (places[row, i] for i in range(4))
    each = (end - begin + parts - 1) // parts
    start = jnp.maximum(begin + part * each, first)
    steps = jnp.maximum(jnp.minimum(begin + (part + 1) * each, end) - start, 0)

    def first_key(step):
      """Of the tile, in its stretch: the last one begins before its place where it is no whole."""
      return jnp.minimum((start + step) % rows.tiles * TILE, size - TILE)

    def fetch(x, tiles, ready, step):
      @pl.when(step < steps)
      def _():
        stretch = lead + head + (start + step) // rows.tiles * rows.stride
        plgpu.copy_gmem_to_smem(
            x.at[stretch, pl.ds(first_key(step), TILE)], tiles.at[step % depth],
            ready.at[step % depth])

    # Until they are in registers the queries lie where the ring's last values will.
    staged = v_tiles.at[depth - 1]
    plgpu.copy_gmem_to_smem(q.at[row, head], staged.at[pl.ds(0, m)], ready)
    plgpu.copy_gmem_to_smem(bounds.at[row], bound_rows, ready)
    for early in range(depth):
      fetch(k, k_tiles, k_ready, jnp.int32(early))
    for early in range(depth - 1):
      fetch(v, v_tiles, v_ready, jnp.int32(early))
    plgpu.barrier_wait(ready)
    query = hopper.matrix_of(staged)
    plgpu.commit_smem()       # values may overwrite what was read
    low, high = (hopper.row_vector(bound_rows.at[i]) for i in range(2))
    fetch(v, v_tiles, v_ready, jnp.int32(depth - 1))

    def step(number, carry):
      total, top, weight = carry
      slot = number % depth
      plgpu.barrier_wait(k_ready.at[slot])
      score = hopper.product(query, k_tiles.at[slot], transposed=True)
      fetch(k, k_tiles, k_ready, number + depth)
      score = score * factor if options.softcap is None else (
          options.softcap * hopper.LOG2_E) * hopper.tanh(score * (options.scale / options.softcap))
      place = (start + number) * TILE
      index = hopper.index(TILE, 1) + (place // (rows.tiles * TILE) * (rows.tiles * TILE)
                                       + first_key(number))
      lowest = jnp.maximum(low, place)           # keys of the tile before are not counted twice
      keep = (index >= hopper.down(lowest, TILE)) & (index < hopper.down(high, TILE))
      score = jnp.where(keep, score, -jnp.inf)
      new_top = jnp.maximum(top, jnp.max(score, axis=1))
      old = jnp.exp2(top - new_top)
      p = jnp.exp2(score - hopper.down(new_top, TILE))
      weight = weight * old + jnp.sum(p, axis=1)
      plgpu.barrier_wait(v_ready.at[slot])
      total = hopper.added(total * hopper.down(old, h), p.astype(v.dtype), v_tiles.at[slot])
      fetch(v, v_tiles, v_ready, number + depth)
      return total, new_top, weight

    total, top, weight = jax.lax.fori_loop(0, steps, step, (
        hopper.matrix(h, 0.0), hopper.row_values(hopper.LOW), hopper.row_values(0.0)))
    out_tile[...] = total
    number_rows.at[0][...] = jnp.where(weight > 0, top / hopper.LOG2_E, LOWEST)
    number_rows.at[1][...] = weight
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(out_tile.at[pl.ds(0, m)], out.at[row, head, part])
    plgpu.copy_smem_to_gmem(number_rows, numbers.at[row, head, part])
    plgpu.wait_smem_to_gmem(0)

  arrays = rows.queries, k, v, bounds, places
  over = frozenset().union(*(varying.axes(x) for x in arrays))
  out, numbers = (varying.varying(x, over) for x in plgpu.kernel(
      kernel,
      out_type=(jax.ShapeDtypeStruct((a, heads, parts, m, h), jnp.float32),
                jax.ShapeDtypeStruct((a, heads, parts, 2, hopper.ROWS), jnp.float32)),
      scratch_types=(
          hopper.tile((depth, TILE, h), k.dtype),
          hopper.tile((depth, TILE, h), v.dtype),
          hopper.tile((hopper.ROWS, h), jnp.float32),
          plgpu.SMEM((2, hopper.ROWS), jnp.int32),
          plgpu.SMEM((2, hopper.ROWS), jnp.float32),
          plgpu.Barrier(num_arrivals=2),
          plgpu.Barrier(num_barriers=depth),
          plgpu.Barrier(num_barriers=depth)),
      grid=(parts, heads, a), grid_names=('part', 'head', 'row'),
      compiler_params=plgpu.CompilerParams(approx_math=True))(*arrays))
  tops, totals = numbers[..., 0, :m], numbers[..., 1, :m]                       # [A, K, parts, M]
  top = jnp.max(tops, axis=2)
  shrink = jnp.exp(tops - top[:, :, None])
  return Partial(top, jnp.sum(totals * shrink, axis=2), jnp.sum(out * shrink[..., None], axis=2))


def _depth(lanes: int) -> int:
  """Buffers of the ring, of keys of so many bytes: such that two blocks of threads find room."""
  out, each = hopper.ROWS * lanes * 2, 2 * TILE * lanes
  half = (hopper.SHARED_MEMORY // 2 - hopper.SMALL // 2 - out) // each
  return min(half, 4) if half >= 2 else hopper.stages(out, each, 4)


def _array(cache: jax.Array | Quantised) -> jax.Array:
  if isinstance(cache, Quantised):
    raise ValueError("decode_attention's implementation 'gpu' takes no int8 cache")
  return cache


def _stretches(x: jax.Array) -> jax.Array:
  """[..., keys, H] -> [*, keys, H]."""
  return x.reshape(-1, *x.shape[-2:])


def _whole_eights(x: jax.Array) -> jax.Array:
  """[A, K, X, H] with rows of zeros up to a multiple of 8: what a copy into a tile takes."""
  return jnp.pad(x, ((0, 0), (0, 0), (0, -x.shape[2] % 8), (0, 0)))


def _check(q: jax.Array, own: Own, shared: Sequence[Shared], scale: float,
           softcap: float | None) -> None:
  regions: tuple[Own | Shared, ...] = (own, *shared)
  caches = [_array(cache) for region in regions for cache in (region.k, region.v)]
  types = sorted({x.dtype.name for x in (q, *caches)})
  if len(types) > 1 or types[0] not in TYPES:
    raise ValueError("decode_attention's implementation 'gpu' takes queries and cache of one type, "
                     f'{" or ".join(TYPES)}; got {", ".join(types)}')
  if q.shape[2] not in HEAD_SIZES:
    raise ValueError(
        f"decode_attention's implementation 'gpu' has head sizes {HEAD_SIZES}; got {q.shape[2]}")
  sizes = [_array(region.k).shape[3] for region in shared]
  if any(size % 8 for size in sizes if size > TILE):
    raise ValueError("decode_attention's implementation 'gpu' takes shared regions of at most "
                     f'{TILE} keys or a multiple of 8; got {sizes}')
  _, _, _, heads, block, _ = _array(own.k).shape
  if block % TILE or q.shape[1] // heads > hopper.ROWS:
    raise ValueError(
        f"decode_attention's implementation 'gpu' takes private blocks of a multiple of {TILE} "
        f'keys and at most {hopper.ROWS} query heads of one key head; got {block} keys and '
        f'{q.shape[1] // heads} heads')
  if scale <= 0 or (softcap is not None and softcap <= 0):
    raise ValueError("decode_attention's implementation 'gpu' takes a positive scale and softcap; "
                     f'got {scale} and {softcap}')
