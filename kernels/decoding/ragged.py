"""Attention over private keys of ragged length: only blocks that hold a key somebody sees.

Slots differ in age, and a loop over the blocks of all slots would read as much for the youngest as
for the oldest. Here slots are put in order of how many blocks they have. Going on block by block,
fewer and fewer of them are left, and a few at a time are computed. Time is proportional to the sum
of live lengths, each rounded up to blocks, and each block's slots to `TOGETHER`.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from kernels.decoding.cache import Own, Quantised
from kernels.decoding.partial import Partial, block_scores, nothing, product

TOGETHER = 8                  # slots computed at a time; more are no faster on CPU


def over_own(
    queries: jax.Array,       # [R, K, X, H]
    own: Own,
    window: int | jax.Array | None,
    *,
    layer: jax.Array,
    scale: float,
    softcap: float | None,
) -> Partial:                 # of [R, K, X]
  """Attention of each slot over its own keys."""
  _, blocks, slots, _, block, _ = _values(own.k).shape
  count = -(-own.live // block)                        # [R] blocks that hold a key of the slot
  skipped = 0 if window is None else jnp.maximum(jnp.min(
      jnp.where(own.live > 0, own.live - window, blocks * block)), 0) // block
  together = min(TOGETHER, slots)
  order = jnp.argsort(-count).astype(jnp.int32)
  order = jnp.concatenate([order, jnp.zeros(together - 1, jnp.int32)])
  offsets = jnp.arange(block, dtype=jnp.int32)[None]
  everything = (queries, own, window, layer)

  def one(number, partial: Partial) -> Partial:
    """One block, for all slots that have keys in it."""
    left = jnp.sum(count > number)

    def some(i, partial: Partial) -> Partial:
      first = i * together
      slot = jax.lax.dynamic_slice_in_dim(order, first, together)               # [E]
      there = (first + jnp.arange(together, dtype=jnp.int32) < left)[:, None, None]
      ages = own.live[slot][:, None] - 1 - number * block - offsets             # [E, B]
      keep = (ages >= 0) if window is None else (ages >= 0) & (ages < window)
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

  return jax.lax.fori_loop(skipped, jnp.max(count), one, nothing(queries.shape, everything))


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
