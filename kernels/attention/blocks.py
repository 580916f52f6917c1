"""Which blocks of keys each block of queries has to visit: all others are skipped, not masked."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from kernels.attention.spans import Spans, clipped, windowed

BLOCK = 128                   # tokens; docs/attention.md has the times of others
HOPPER_BLOCK = 128            # of the kernels for Hopper GPUs: two warpgroups of 64 rows
ALIGNMENT = 8                 # shorter rows are one block, of a multiple of this


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Plan:
  """For every block of queries the blocks of keys that hold a key which one of them sees."""

  visited: jax.Array          # [B, T / block_q, S / block_k] int32, ascending; counts many are real
  counts: jax.Array           # [B, T / block_q] int32
  whole: jax.Array            # bool as visited: every query of the block sees every key of that one
  block_q: int = dataclasses.field(metadata={'static': True})
  block_k: int = dataclasses.field(metadata={'static': True})


def plan(
    spans: Spans,
    keys: int,                # S
    *,
    window: int | jax.Array | None = None,
    block_q: int | None = None,
    block_k: int | None = None,
) -> Plan:
  """What `attention` needs to know of the same spans, keys and window; layers can share it.

  Compares every interval with the bounds of every key block: T S / block_k steps, fused into the
  reduction over the queries of a block.
  """
  length = spans.end.shape[1]
  block_q = _block(length) if block_q is None else block_q
  block_k = _block(keys) if block_k is None else block_k
  if min(block_q, block_k) < 1:
    raise ValueError(f'blocks hold at least 1 token; got block_q={block_q}, block_k={block_k}')
  spans = clipped(spans if window is None else windowed(spans, window), keys)
  n_keys = -(-keys // block_k)
  first = jnp.arange(n_keys, dtype=jnp.int32) * block_k

  begin, past = first[None, None, None], first[None, None, None] + block_k

  def meets(start, end):      # [B, T] -> [B, T / block_q, block_q, S / block_k]
    start, end = (blocked(x, block_q)[..., None] for x in (start, end))
    return jnp.maximum(start, begin) < jnp.minimum(end, past)

  def holds(start, end):
    start, end = (blocked(x, block_q)[..., None] for x in (start, end))
    return (start <= begin) & (end >= past)

  prefix, run = (spans.prefix_start, spans.prefix_end), (spans.start, spans.end)
  seen = jnp.any(meets(*prefix) | meets(*run), axis=2)
  # Where the run begins at the prefix's end, the two are one interval.
  joined = (spans.prefix_start,
            jnp.where(spans.prefix_end >= spans.start, spans.end, spans.prefix_start))
  whole = jnp.all(holds(*prefix) | holds(*run) | holds(*joined), axis=2)
  # Sorted as one number: the blocks that are seen, in order, each with its bit.
  index = 2 * jnp.arange(n_keys, dtype=jnp.int32)[None, None] + whole.astype(jnp.int32)
  index = jnp.sort(jnp.where(seen, index, 2 * n_keys), axis=-1)
  return Plan(index // 2, jnp.sum(seen, axis=-1, dtype=jnp.int32), index % 2 == 1,
              block_q, block_k)


def check_fits(plan: Plan, queries: int, keys: int) -> None:
  """Raises ValueError for a plan of other lengths."""
  found = plan.visited.shape[1:]
  expected = (-(-queries // plan.block_q), -(-keys // plan.block_k))
  if found != expected:
    raise ValueError(
        f'a plan of {found[0]} x {found[1]} blocks; {queries} queries and {keys} keys in blocks of '
        f'{plan.block_q} and {plan.block_k} make {expected[0]} x {expected[1]}')


def blocked(x: jax.Array, block: int) -> jax.Array:
  """[B, T, ...] -> [B, T / block, block, ...], padded with zeros."""
  b, t = x.shape[:2]
  x = jnp.pad(x, [(0, 0), (0, -t % block)] + [(0, 0)] * (x.ndim - 2))
  return x.reshape(b, -1, block, *x.shape[2:])


def _block(length: int) -> int:
  return min(BLOCK, length + -length % ALIGNMENT)
