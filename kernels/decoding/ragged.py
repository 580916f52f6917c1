"""Attention over private keys of ragged length: only blocks that hold a key somebody sees.

Slots differ in age, and a loop over the blocks of all slots would read as much for the youngest as
for the oldest. Here slots are put in order of how many blocks they see. Going back in time block by
block, fewer and fewer of them are left, and a few at a time are computed. Time is proportional to
the sum of live lengths, each rounded up to blocks, and each block's slots to `TOGETHER`.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from kernels.decoding.cache import Own, Quantised
from kernels.decoding.partial import Partial, block_scores, nothing, product

TOGETHER = 8                  # slots computed at a time; more are no faster on CPU


def blocks_seen(newest: jax.Array, seen: jax.Array, blocks: int, block: int) -> jax.Array:
  """[R] int32: how many blocks of its ring hold the `seen` [R] newest keys of each slot.

  In the newest key's block there is room for newest % block + 1 keys. Where the oldest key shares
  a block with the newest, having gone all around the ring, that block counts once.
  """
  earlier = jnp.maximum(seen - newest % block - 1, 0)
  return jnp.where(seen > 0, jnp.minimum(1 + -(-earlier // block), blocks), 0)


def over_own(
    queries: jax.Array,       # [R, K, X, H]
    own: Own,
    window: int | jax.Array | None,
    *,
    layer: jax.Array,
    scale: float,
    softcap: float | None,
) -> Partial:                 # of [R, K, X]
  """Attention of each slot over the keys of its own ring that it sees."""
  _, blocks, slots, _, block, _ = _values(own.k).shape
  size = blocks * block
  seen = own.live if window is None else jnp.minimum(own.live, window)          # [R]
  count = blocks_seen(own.newest, seen, blocks, block)
  together = min(TOGETHER, slots)
  order = jnp.argsort(-count).astype(jnp.int32)
  order = jnp.concatenate([order, jnp.zeros(together - 1, jnp.int32)])
  offsets = jnp.arange(block, dtype=jnp.int32)[None]

  everything = (queries, own, window, layer)

  def back(j, partial: Partial) -> Partial:
    """One more block back in time, for all slots that see it."""
    number = (own.newest // block - j) % blocks
    ages = (own.newest - number * block - offsets) % size                       # [1, B]
    left = jnp.sum(count > j)

    def some(i, partial: Partial) -> Partial:
      first = i * together
      slot = jax.lax.dynamic_slice_in_dim(order, first, together)               # [E]
      there = (first + jnp.arange(together, dtype=jnp.int32) < left)[:, None, None]
      keep = ages < seen[slot][:, None]                                         # [E, B]
      scores = block_scores(
          queries[slot], *_read(own.k, layer, number, slot), keep[:, None, None],
          scale=scale, softcap=softcap)
      top = jnp.maximum(partial.top[slot], jnp.max(scores, axis=-1))
      weights = jnp.exp(scores - top[..., None])
      new = product(weights, *_read(own.v, layer, number, slot))
      shrink = jnp.exp(partial.top[slot] - top)
      total = partial.total[slot] * shrink + jnp.sum(weights, axis=-1)
      out = partial.out[slot] * shrink[..., None] + new
      # Those past the last have seen all they see; others may stand twice, so nothing is written.
      at = jnp.where(there[:, 0, 0], slot, slots)

      def put(all, part):
        return all.at[at].set(part, mode='drop')

      return Partial(put(partial.top, top), put(partial.total, total), put(partial.out, out))

    return jax.lax.fori_loop(0, -(-left // together), some, partial)

  return jax.lax.fori_loop(0, jnp.max(count), back, nothing(queries.shape, everything))


def _read(
    x: jax.Array | Quantised, layer: jax.Array, number: jax.Array, slot: jax.Array
) -> tuple[jax.Array, jax.Array | None]:
  """One block of some slots, [E, K, B, H], and scales [E, K, B] where there are any."""
  def cut(array):               # [L, C, R, K, B, ...]
    def one(slot):
      begin = (layer, number, slot, *(0,) * (array.ndim - 3))
      return jax.lax.dynamic_slice(array, begin, (1, 1, 1, *array.shape[3:]))[0, 0, 0]

    return jax.vmap(one)(slot)

  return (cut(x.values), cut(x.scale)) if isinstance(x, Quantised) else (cut(x), None)


def _values(x: jax.Array | Quantised) -> jax.Array:
  return x.values if isinstance(x, Quantised) else x
