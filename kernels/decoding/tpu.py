"""Decoding attention on TPU (Pallas Mosaic): steps and bytes follow the keys that are live.

Grid (2, units): the first axis is the two parts of a work list (`work.Work`; a chip of two cores
takes one each), the second walks its units, as many as there are at run time. A unit is one row of
queries and a stretch of keys: for private keys a slot and some of its blocks, which the kernel
copies itself, only those that are seen, the next unit's while this one's are multiplied; for shared
keys a group's members together and one stretch of the region, copied by the pipeline. In fast
memory stay two stretches of keys and values and, while its units last, a row's result.

Heads share a unit: their copies are one stretch of memory. Sums run in float32 and block by block
in the order of a row's keys, so a slot's result does not depend on what other slots hold.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels.decoding.cache import Own, Quantised, Shared
from kernels.decoding.partial import LOWEST, Partial, merged
from kernels.decoding.work import Work, work_list
from kernels.varying import alike, out_struct

LANES = 128
TILE = 32                     # rows of the tallest tile, of int8
OWN_STRETCH = 512             # most private keys of a unit
SHARED_STRETCH = 256          # most shared keys of a unit
STRETCH_BYTES = 2**20         # of private keys and values: so long a copy hides what a step costs
RESULT_BYTES = 2**21          # of a row's result: members beyond it are a row of their own
FAST_MEMORY = 48 * 2**20      # bytes the compiler may use; a v5p core has 64 MiB
TOP, TOTAL = 0, 1             # lanes of the statistics


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
    ValueError: types other than float32 and bfloat16 (and int8 in the cache).
  """
  unfit = _dtypes(q, own, shared) - {'float32', 'bfloat16', 'int8'}
  if unfit:
    raise ValueError("decode_attention's implementation 'tpu' takes float32 and bfloat16, and int8 "
                     f'in the cache; got {", ".join(sorted(unfit))}')
  q, own, shared, layer, positions, window = alike(
      (q, own, tuple(shared), layer, positions, window))
  r, n, h = q.shape
  heads = _values(own.k).shape[3]
  queries = q.reshape(r, heads, n // heads, h)
  options = _Options(scale, softcap)
  parts = [_over_own(queries, own, window, layer, options)]
  parts += [_over_shared(queries, region, positions, window, layer, options) for region in shared]
  end = functools.reduce(merged, parts)
  out = end.out / jnp.where(end.total > 0, end.total, 1.0)[..., None]
  return out.reshape(r, n, h).astype(q.dtype)


def is_default(q: jax.Array, own: Own, shared: Sequence[Shared]) -> bool:
  """Whether programs for TPUs take this implementation where none is named.

  Not for head sizes that are no multiple of 128: XLA lays such a cache out more densely than a
  kernel can read it, and would copy all of it. Nor for blocks of keys that are no whole tiles.
  """
  return q.shape[-1] % LANES == 0 and _values(own.k).shape[4] % TILE == 0 and not (
      _dtypes(q, own, shared) - {'float32', 'bfloat16', 'int8'})


@dataclasses.dataclass(frozen=True)
class _Options:
  scale: float
  softcap: float | None


def blocks_together(own: Own) -> int:
  """Private blocks of one unit: of about STRETCH_BYTES, at most OWN_STRETCH keys."""
  _, blocks, _, heads, block, h = _values(own.k).shape
  size = 2 * heads * block * h * _values(own.k).dtype.itemsize
  return max(1, min(blocks, -(-STRETCH_BYTES // size), OWN_STRETCH // block))


def shared_stretch(region: Shared) -> int:
  """Keys of a shared region in one unit: whole parts of it where there are such."""
  size = _values(region.k).shape[3]
  return next((n for n in (size, SHARED_STRETCH, LANES) if size % n == 0 and n <= SHARED_STRETCH),
              SHARED_STRETCH)


def _over_own(
    queries: jax.Array,       # [R, K, X, H]
    own: Own,
    window: int | jax.Array | None,
    layer: jax.Array,
    options: _Options,
) -> Partial:
  slots, heads, x, h = queries.shape
  blocks, block = _values(own.k).shape[1], _values(own.k).shape[4]
  together = blocks_together(own)
  low = jnp.zeros_like(own.live) if window is None else jnp.maximum(own.live - window, 0)
  work = work_list(low, own.live, keys=blocks * block, size=together * block)
  cache = [*_arrays(own.k), *_arrays(own.v)]

  def kernel(layer, border, total, row, begin, low, high, q_ref, *refs):
    sources, (out_ref, stat_ref, *buffers, arrived) = refs[:len(cache)], refs[len(cache):]
    unit, is_unit, end = _unit(border, total)

    def half(unit):           # of the buffers: units take turns
      return jax.lax.rem(unit, 2)

    def each_block(unit, act, otherwise=None):
      """`act` on the copies of every block of a unit that holds a key which is seen."""
      r = row[unit]
      for w in range(together):
        number = (unit - begin[r]) * together + w
        seen = (number * block + block > low[r]) & (number * block < high[r])

        @pl.when(seen)
        def copy(number=number, w=w):
          for n, (source, buffer) in enumerate(zip(sources, buffers, strict=True)):
            act(pltpu.make_async_copy(source.at[layer[0], number, r], buffer.at[half(unit), w],
                                      arrived.at[half(unit), n]))

        if otherwise is not None:
          pl.when(~seen)(functools.partial(otherwise, w))

    def clear(w):             # weights of 0 meet whatever lies there: it must be finite
      for buffer in buffers[len(buffers) // 2:]:
        buffer[half(unit), w] = jnp.zeros(buffer.shape[2:], buffer.dtype)

    @pl.when(is_unit & (pl.program_id(1) == 0))
    def fetch_first():
      each_block(unit, lambda copy: copy.start())

    @pl.when(unit + 1 < end)
    def fetch_next():
      each_block(unit + 1, lambda copy: copy.start())

    @pl.when(is_unit)
    def multiply():
      each_block(unit, lambda copy: copy.wait(), clear)
      r = row[unit]
      place = (unit - begin[r]) * work.size
      index = place + jax.lax.broadcasted_iota(jnp.int32, (1, work.size), 1)
      keep = (index >= low[r]) & (index < high[r])

      def of_head(refs, head):
        values = refs[0][half(unit), :, head].reshape(work.size, h)
        scales = [jnp.concatenate([ref[half(unit), w, head:head + 1] for w in range(together)], 1)
                  for ref in refs[1:]]
        return values, *scales

      middle = len(buffers) // 2
      first = place <= low[r]
      for head in range(heads):
        _add_keys(q_ref, out_ref, stat_ref, head, of_head(buffers[:middle], head),
                  of_head(buffers[middle:], head), keep, first, options)

  scratch = [pltpu.VMEM((2, together, *x.shape[3:]), x.dtype) for x in cache]
  partial = _call(
      kernel, work, queries, layer, [], [(x, pl.BlockSpec(memory_space=pl.ANY)) for x in cache],
      scratch=[*scratch, pltpu.SemaphoreType.DMA((2, len(cache)))], name='decode_own')
  return _where(low < own.live, partial)


def _over_shared(
    queries: jax.Array,       # [R, K, X, H]
    region: Shared,
    positions: jax.Array,     # [R]
    window: int | jax.Array | None,
    layer: jax.Array,
    options: _Options,
) -> Partial:
  """Each group's keys once for all its members, or for as many as `RESULT_BYTES` hold."""
  r, heads, x, h = queries.shape
  groups, places = region.members.shape
  size, stretch = _values(region.k).shape[3], shared_stretch(region)
  tiles = -(-places * x * heads * (h + LANES) * 4 // RESULT_BYTES)
  width = -(-places // tiles)                       # members of a row
  members = jnp.pad(region.members, ((0, 0), (0, tiles * width - places)), constant_values=r)
  members = members.reshape(groups * tiles, width)
  gathered = queries.at[members].get(mode='fill', fill_value=0)              # [A, m, K, X, H]
  gathered = jnp.swapaxes(gathered, 1, 2).reshape(-1, heads, width * x, h)
  taken = members < r
  high = jnp.where(jnp.any(taken, axis=1), jnp.repeat(region.length, tiles), 0)
  low, others = jnp.zeros_like(high), []
  if window is not None:
    # The first key that each member sees; negative where the window begins before the region.
    begins = positions.at[members].get(mode='fill', fill_value=0) - window + 1
    begins = begins - jnp.repeat(region.first, tiles)[:, None]               # [A, m]
    low = jnp.maximum(jnp.min(jnp.where(taken, begins, size), axis=1), 0)
    others = [jnp.repeat(begins, x, axis=1)[:, :, None]]                     # [A, m X, 1]
  work = work_list(low, high, keys=size, size=stretch)
  cache = [*_arrays(region.k), *_arrays(region.v)]

  def kernel(layer, border, total, row, begin, low, high, q_ref, *refs):
    begins, refs = (refs[0], refs[1:]) if others else (None, refs)
    sources, (out_ref, stat_ref) = refs[:len(cache)], refs[len(cache):]
    unit, is_unit, _ = _unit(border, total)

    @pl.when(is_unit)
    def multiply():
      r = row[unit]
      place = (unit - begin[r]) * stretch
      index = place + jax.lax.broadcasted_iota(jnp.int32, (1, stretch), 1)
      keep = index < high[r]
      if begins is not None:
        keep = keep & (index >= begins[...])                                 # [m X, stretch]

      def of_head(refs, head):
        return refs[0][head], *(ref[head:head + 1] for ref in refs[1:])

      middle = len(sources) // 2
      first = place <= low[r]
      for head in range(heads):
        values, *scales = of_head(sources[middle:], head)
        if size % stretch:    # the last stretch ends outside the array, in anything
          inside = place + jax.lax.broadcasted_iota(jnp.int32, (stretch, 1), 0) < size
          values = jnp.where(inside, values.astype(jnp.float32), 0.0).astype(values.dtype)
          scales = [jnp.where(index < size, s, 0.0) for s in scales]
        _add_keys(q_ref, out_ref, stat_ref, head, of_head(sources[:middle], head),
                  (values, *scales), keep, first, options)

  def place(array):
    def index(part, number, layer, border, total, row, begin, low, high):
      unit = _clamped(part, number, border, total)
      r = row[unit]
      at = jnp.where(total[0] > 0, unit - begin[r], 0)
      return layer[0], jax.lax.div(r, tiles), 0, at, *(0,) * (array.ndim - 4)

    return pl.BlockSpec((None, None, heads, stretch, *array.shape[4:]), index)

  partial = _call(kernel, work, gathered, layer, others, [(x, place(x)) for x in cache],
                  scratch=[], name='decode_shared')
  partial = _where(low < high, partial)

  def back(value, absent):    # [A, K, m X, ..] -> [R, K, X, ..]
    value = value.reshape(groups, tiles, heads, width, x, *value.shape[3:])
    value = jnp.moveaxis(value, 2, 3).reshape(groups, tiles * width, heads, x, *value.shape[5:])
    value = value[jnp.maximum(region.group, 0), region.member]
    inside = (region.group >= 0).reshape(r, *(1,) * (value.ndim - 1))
    return jnp.where(inside, value, absent)

  return Partial(back(partial.top, LOWEST), back(partial.total, 0.0), back(partial.out, 0.0))


def _add_keys(
    q_ref, out_ref, stat_ref, head: int,
    keys: tuple[jax.Array, ...],       # [S, H], and scales [1, S] where they are int8
    values: tuple[jax.Array, ...],
    keep: jax.Array,                   # [1 or X, S] bool, True where the key is seen
    is_first: jax.Array,               # whether these are the row's first
    options: _Options,
) -> None:
  """One head's result so far, and what these keys add to it."""
  query = q_ref[head]
  scores = options.scale * _dot(query, keys[0], 1)                           # [X, S]
  for key_scale in keys[1:]:
    scores = scores * key_scale
  if options.softcap is not None:
    scores = options.softcap * jnp.tanh(scores / options.softcap)
  scores = jnp.where(keep, scores, -jnp.inf)
  stats = stat_ref[head]
  top = jnp.where(is_first, LOWEST, stats[:, TOP:TOP + 1])
  total = jnp.where(is_first, 0.0, stats[:, TOTAL:TOTAL + 1])
  out = jnp.where(is_first, 0.0, out_ref[head])
  higher = jnp.maximum(top, jnp.max(scores, axis=1, keepdims=True))
  weights, shrink = jnp.exp(scores - higher), jnp.exp(top - higher)
  total = total * shrink + jnp.sum(weights, axis=1, keepdims=True)
  for value_scale in values[1:]:
    weights = weights * value_scale
  dtype = query.dtype if values[1:] else values[0].dtype
  out_ref[head] = out * shrink + _dot(weights.astype(dtype), values[0], 0)
  lane = jax.lax.broadcasted_iota(jnp.int32, stats.shape, 1)
  stat_ref[head] = jnp.where(lane == TOP, higher, total)


def _dot(x: jax.Array, y: jax.Array, axis: int) -> jax.Array:
  """x [X, n] times y, summed over y's `axis`, in float32; int8 is widened to x's type."""
  dtype = x.dtype if y.dtype == jnp.int8 else jnp.promote_types(x.dtype, y.dtype)
  precision = jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None
  return jax.lax.dot_general(
      x.astype(dtype), y.astype(dtype), (((1,), (axis,)), ((), ())), precision=precision,
      preferred_element_type=jnp.float32)


def _unit(border, total) -> tuple[jax.Array, jax.Array, jax.Array]:
  """This step's unit, whether there is one, and the end of this part."""
  part, number = pl.program_id(0), pl.program_id(1)
  end = jnp.where(part == 0, border[0], total[0])
  unit = part * border[0] + number
  return unit, unit < end, end


def _clamped(part, number, border, total) -> jax.Array:
  """The unit, or the last one of its part: whose blocks are there already."""
  end = jnp.where(part == 0, border[0], total[0])
  return jnp.maximum(jnp.minimum(part * border[0] + number, end - 1), 0)


def _call(
    kernel, work: Work, queries: jax.Array, layer: jax.Array, others: list[jax.Array],
    cache: list[tuple[jax.Array, pl.BlockSpec]], *, scratch: list, name: str,
) -> Partial:
  """The kernel over a work list; rows without units hold anything."""
  rows, heads, x, h = queries.shape

  def at_row(array, spare):
    def index(part, number, layer, border, total, row, *_):
      # A part without units would write a row that it has not computed: that is the spare one.
      r = row[_clamped(part, number, border, total)]
      is_empty = jnp.where(part == 0, border[0], total[0] - border[0]) == 0
      return jnp.where(is_empty, spare, r), *(0,) * (array.ndim - 1)

    return pl.BlockSpec((None, *array.shape[1:]), index)

  out = [out_struct((rows + 1, heads, x, n), jnp.float32, like=queries) for n in (h, LANES)]
  keys = cache[0][0][0].size                                                 # times H
  out, stats = pl.pallas_call(
      kernel, out_shape=out, name=name,
      grid_spec=pltpu.PrefetchScalarGridSpec(
          num_scalar_prefetch=7, grid=(2, jnp.maximum(work.longest, 1)),
          in_specs=[*(at_row(array, 0) for array in (queries, *others)),
                    *(spec for _, spec in cache)],
          out_specs=[at_row(array, rows) for array in out], scratch_shapes=scratch),
      compiler_params=pltpu.CompilerParams(
          dimension_semantics=('parallel', 'arbitrary'), vmem_limit_bytes=FAST_MEMORY),
      cost_estimate=pl.CostEstimate(
          flops=4 * x * keys, transcendentals=x * keys // h,
          bytes_accessed=sum(array[0].size * array.dtype.itemsize for array, _ in cache)),
  )(layer.reshape(1), work.border.reshape(1), work.total.reshape(1), work.row, work.begin,
    work.low, work.high, queries, *others, *(array for array, _ in cache))
  return Partial(stats[:rows, ..., TOP], stats[:rows, ..., TOTAL], out[:rows])


def _where(seen: jax.Array, partial: Partial) -> Partial:
  """`partial` of the rows that saw a key, and nothing for others."""
  def choose(value, absent):
    return jnp.where(seen.reshape(-1, *(1,) * (value.ndim - 1)), value, absent)

  return Partial(choose(partial.top, LOWEST), choose(partial.total, 0.0), choose(partial.out, 0.0))


def _dtypes(q: jax.Array, own: Own, shared: Sequence[Shared]) -> set[str]:
  caches = [own.k, own.v, *(x for region in shared for x in (region.k, region.v))]
  return {x.dtype.name for x in (q, *(array for cache in caches for array in _arrays(cache)))}


def _arrays(x: jax.Array | Quantised) -> tuple[jax.Array, ...]:
  return (x.values, x.scale) if isinstance(x, Quantised) else (x,)


def _values(x: jax.Array | Quantised) -> jax.Array:
  return x.values if isinstance(x, Quantised) else x
