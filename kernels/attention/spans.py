"""Which keys each query sees, as two intervals of indices: a shared prefix, and a run of its own.

Causal rows, packed rows, a prompt stored once before several responses and sliding windows all are
intervals, so no mask [T, S] has to exist, and whole blocks outside of them can be skipped.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Spans:
  """A query sees the keys j with prefix_start <= j < prefix_end or start <= j < end.

  All int32 [B, T]. The prefix ends at or before `start`, and positions run on from its last key to
  the first of the run; an interval with its end at or before its start holds nothing.
  """

  prefix_start: jax.Array
  prefix_end: jax.Array
  start: jax.Array
  end: jax.Array


def causal(rows: int, length: int) -> Spans:
  """Rows of one sequence each: query i sees the keys 0 to i."""
  zero = jnp.zeros((rows, length), jnp.int32)
  return Spans(zero, zero, zero, zero + jnp.arange(1, length + 1, dtype=jnp.int32)[None])


def windowed(spans: Spans, window: int | jax.Array) -> Spans:
  """The last `window` keys that each query sees, its own included."""
  left = jnp.maximum(window - (spans.end - spans.start), 0)
  return Spans(
      jnp.maximum(spans.prefix_start, spans.prefix_end - left), spans.prefix_end,
      jnp.maximum(spans.start, spans.end - window), spans.end)


def clipped(spans: Spans, keys: int) -> Spans:
  """The same keys, of which there are `keys`, by bounds that lie between 0 and `keys`."""
  return jax.tree.map(lambda x: jnp.clip(x, 0, keys), spans)


def visible(spans: Spans, keys: int) -> jax.Array:
  """The mask [B, T, keys] that the intervals stand for."""
  j = jnp.arange(keys, dtype=jnp.int32)[None, None]

  def inside(start, end):
    return (j >= start[..., None]) & (j < end[..., None])

  return inside(spans.prefix_start, spans.prefix_end) | inside(spans.start, spans.end)
