"""Portable decoding attention: work by blocks of keys, as many as are live.

A slot's private keys are read as `ragged` says; shared keys block by block up to the longest group
that has members, one product for all members of a group. Blocks are cut out of the whole [L, ...]
arrays, so that no layer of the cache is copied. The last block of a shared region begins before its
place where the region's size is no multiple of the block; keys it has in common with the block
before are masked.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from kernels.decoding.cache import Own, Quantised, Shared
from kernels.decoding.partial import LOWEST, Partial, block_scores, merged, nothing, product
from kernels.decoding.ragged import over_own


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
    block: int = 64,
) -> jax.Array:               # [R, N, H] in q's dtype
  """See `ref.decode_attention`; `block` is the number of shared keys read at a time."""
  r, n, h = q.shape
  heads = _shape(own.k)[3]
  queries = q.reshape(r, heads, n // heads, h)
  options: dict[str, Any] = {'layer': layer, 'scale': scale, 'softcap': softcap}
  parts = [over_own(queries, own, window, **options)]
  parts += [_over_shared(queries, region, positions, window, block, options) for region in shared]
  end = functools.reduce(merged, parts)
  out = end.out / jnp.where(end.total > 0, end.total, 1.0)[..., None]
  return out.reshape(r, n, h).astype(q.dtype)


def _over_shared(
    queries: jax.Array,       # [R, K, X, H]
    region: Shared,
    positions: jax.Array,     # [R]
    window: int | jax.Array | None,
    block: int,
    options: dict,
) -> Partial:                 # of the queries as they came
  """Each group's keys once, for the queries of all its members."""
  r, heads, x, h = queries.shape
  groups, places = region.members.shape
  size = _shape(region.k)[3]
  block = min(block, size)

  gathered = queries.at[region.members].get(mode='fill', fill_value=0)          # [G, m, K, X, H]
  gathered = jnp.swapaxes(gathered, 1, 2).reshape(groups, heads, places * x, h)
  taken = region.members < r                                                    # [G, m]
  length = jnp.where(jnp.any(taken, axis=1), region.length, 0)                  # [G]
  skipped, count = jnp.int32(0), -(-jnp.max(length) // block)
  begins = None
  if window is not None:
    # The first key that each member sees; negative where the window begins before the region.
    begins = positions.at[region.members].get(mode='fill', fill_value=0) - window + 1
    begins = begins - region.first[:, None]                                     # [G, m]
    skipped = jnp.maximum(jnp.min(jnp.where(taken, begins, size)), 0) // block

  def one(i, partial):
    index, fresh = _indices(i, block, size)
    keep = ((index[None] < length[:, None]) & fresh[None])[:, None]             # [G, 1, B]
    if begins is not None:
      keep = jnp.repeat(keep & (index[None, None] >= begins[..., None]), x, axis=1)
    return _step(partial, gathered, region, index[0], keep[:, None], **options)

  everything = (gathered, region, positions, window, options['layer'])
  partial = jax.lax.fori_loop(skipped, count, one, nothing(gathered.shape, everything))

  def back(value, absent):   # [G, K, m X, ..] -> [R, K, X, ..]
    value = jnp.swapaxes(value.reshape(groups, heads, places, x, *value.shape[3:]), 1, 2)
    value = value[jnp.maximum(region.group, 0), region.member]
    inside = (region.group >= 0).reshape(r, *(1,) * (value.ndim - 1))
    return jnp.where(inside, value, absent)

  return Partial(back(partial.top, LOWEST), back(partial.total, 0.0), back(partial.out, 0.0))


def _step(
    partial: Partial,
    queries: jax.Array,       # [A, K, X, H]
    region: Shared,
    start: jax.Array,
    keep: jax.Array,          # [A, 1, 1 or X, B] bool, True where the key is seen
    *,
    layer: jax.Array,
    scale: float,
    softcap: float | None,
) -> Partial:
  """`partial` and one block of keys, from index `start` on."""
  keys = _read(region.k, layer, start, keep.shape[-1])
  scores = block_scores(queries, *keys, keep, scale=scale, softcap=softcap)
  top = jnp.maximum(partial.top, jnp.max(scores, axis=-1))
  weights = jnp.exp(scores - top[..., None])
  shrink = jnp.exp(partial.top - top)
  total = partial.total * shrink + jnp.sum(weights, axis=-1)
  new = product(weights, *_read(region.v, layer, start, keep.shape[-1]))
  return Partial(top, total, partial.out * shrink[..., None] + new)


def _indices(number: jax.Array, block: int, size: int) -> tuple[jax.Array, jax.Array]:
  """Indices [B] of a block's keys, and [B] bool, True where no earlier block holds them."""
  place = number * block
  index = jnp.minimum(place, size - block) + jnp.arange(block, dtype=jnp.int32)
  return index, index >= place


def _read(
    x: jax.Array | Quantised,     # [L, A, K, S, H]
    layer: jax.Array,
    start: jax.Array,
    block: int,
) -> tuple[jax.Array, jax.Array | None]:
  """Values [A, K, B, H], and scales [A, K, B] where there are any, of one block of one layer."""
  def cut(array):
    begin = (layer, 0, 0, start, *(0,) * (array.ndim - 4))
    sizes = (1, *array.shape[1:3], block, *array.shape[4:])
    return jax.lax.dynamic_slice(array, begin, sizes)[0]

  if isinstance(x, Quantised):
    return cut(x.values), cut(x.scale)
  return cut(x), None


def _shape(x: jax.Array | Quantised) -> tuple[int, ...]:
  return x.values.shape if isinstance(x, Quantised) else x.shape
