"""What the TPU kernels walk: rows laid end to end, and a list of the pairs of blocks to be visited.

All rows of queries are one run of blocks, all rows of keys another, each row padded to whole ones;
intervals count keys from the first of all. So the kernels know neither rows nor batches: one item
of work is a block of queries and a block of keys, and a grid step does one item. The list lies in
scalar memory, and the grid is as long as the list (its length is an array), so blocks that nobody
sees cost nothing, not even an empty step.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from kernels.attention.blocks import Plan, blocked
from kernels.attention.spans import Spans

LANES = 128
ROWS = 4096                   # queries of one step, all heads that share a key head together
BLOCK_Q, BLOCK_K = 512, 512   # at most; docs/attention.md says why
# An item is one int32: block of queries, block of keys, then four bits.
FIRST, LAST = 1, 2            # of those of its block of queries
MASKED, WHOLE = 4, 8          # a key is hidden from a query; none is. Neither: nothing to compute
KEY_SHIFT, QUERY_SHIFT = 4, 18
MOST_KEYS, MOST_QUERIES = 1 << QUERY_SHIFT - KEY_SHIFT, 1 << 31 - QUERY_SHIFT      # blocks
MOST_ITEMS = 1 << 17          # 512 KiB of the 1 MiB of scalar memory
NONE = jnp.iinfo(jnp.int32).max


def block_sizes(queries: int, keys: int, heads: int) -> tuple[int, int]:
  """Tokens of a block of queries and of keys, where `heads` query heads share a key head.

  Blocks are of multiples of 128 and as equal as they can be, so that little is padded.
  """
  most = max(ROWS // heads // LANES * LANES, LANES)
  return _even(queries, min(most, BLOCK_Q)), _even(keys, BLOCK_K)


def _even(length: int, most: int) -> int:
  parts = -(-length // most)
  return -(-length // (parts * LANES)) * LANES


def why_not(plan: Plan) -> str | None:
  """Why the pairs of blocks of a plan cannot be listed, in words; None where they can be."""
  if plan.block_q % LANES or plan.block_k % LANES:
    return f'blocks are of multiples of {LANES} tokens, not {plan.block_q} x {plan.block_k}'
  rows, queries, keys = plan.visited.shape
  if rows * queries >= MOST_QUERIES or rows * keys > MOST_KEYS or plan.visited.size > MOST_ITEMS:
    return (f'{rows} rows of {queries} x {keys} pairs of blocks; scalar memory holds {MOST_ITEMS}')
  return None


def queries_end_to_end(x: jax.Array, groups: int, block: int) -> jax.Array:
  """[B, T, N, H] -> [K, G, B * T', H], T' a multiple of the block."""
  n, h = x.shape[2:]
  x = blocked(x, block).reshape(-1, groups, n // groups, h)
  return x.transpose(1, 2, 0, 3)


def queries_in_rows(x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
  """The inverse; `shape` is [B, T, N, H]."""
  b, t, n, h = shape
  return x.transpose(2, 0, 1, 3).reshape(b, -1, n, h)[:, :t]


def numbers_end_to_end(x: jax.Array, groups: int, block: int) -> jax.Array:
  """[B, N, T] -> [K, G, B * T']."""
  b, n, t = x.shape
  x = jnp.pad(x, ((0, 0), (0, 0), (0, -t % block)))
  return x.swapaxes(0, 1).reshape(groups, n // groups, -1)


def numbers_in_rows(x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
  """The inverse; `shape` is [B, N, T]."""
  b, n, t = shape
  return x.reshape(n, b, -1).swapaxes(0, 1)[..., :t]


def keys_end_to_end(x: jax.Array, block: int, blocks: int) -> jax.Array:
  """[B, S, K, H] -> [K, blocks * block, H], zeros after the last row."""
  x = blocked(x, block).reshape(-1, *x.shape[2:]).swapaxes(0, 1)
  return jnp.pad(x, ((0, 0), (0, blocks * block - x.shape[1]), (0, 0)))


def keys_in_rows(x: jax.Array, shape: tuple[int, ...], block: int) -> jax.Array:
  """The inverse; `shape` is [B, S, K, H]."""
  b, s, k, h = shape
  padded = s + -s % block
  return x[:, :b * padded].swapaxes(0, 1).reshape(b, padded, k, h)[:, :s]


def bounds(spans: Spans, plan: Plan) -> jax.Array:
  """Int32 [4, B * T']: the intervals of each query, of keys laid end to end."""
  rows = jnp.arange(spans.end.shape[0], dtype=jnp.int32)[:, None]
  first = rows * (plan.visited.shape[2] * plan.block_k)
  fields = (spans.prefix_start, spans.prefix_end, spans.start, spans.end)
  # Queries that are added see nothing: zeros are added after the first key has been counted in.
  return jnp.stack([blocked(x + first, plan.block_q).reshape(-1) for x in fields])


def work(plan: Plan) -> tuple[jax.Array, jax.Array]:
  """Items int32 [1, most] ordered by query block, and how many are real, int32 [1].

  A block of queries that see nothing has one item, which says that its output is zero.
  """
  code, real = _codes(plan)
  first = jnp.arange(code.shape[2], dtype=jnp.int32)[None, None] == 0
  empty = first & (plan.counts == 0)[..., None]
  return _listed(jnp.where(real | empty, code, NONE).reshape(1, -1))


def work_by_keys(plan: Plan, chunk: int) -> tuple[jax.Array, jax.Array]:
  """Items int32 [chunks, most], each row's of so many key blocks, counted from the chunk's first.

  Within a row they are ordered by query block. The second array, int32 [chunks], is how many are
  real; a chunk that nobody sees has one item, that computes nothing.
  """
  code, real = _codes(plan)
  code, real = code.reshape(1, -1), real.reshape(1, -1)
  blocks = plan.visited.shape[0] * plan.visited.shape[2]
  start = jnp.arange(-(-blocks // chunk), dtype=jnp.int32)[:, None] * chunk
  key = code >> KEY_SHIFT & MOST_KEYS - 1
  inside = real & (key >= start) & (key < start + chunk)
  items = jnp.where(inside, code - (start << KEY_SHIFT), NONE)
  nothing = jnp.where(jnp.any(inside, axis=1, keepdims=True), NONE, 0)
  found, count = _listed(jnp.concatenate([nothing, items], axis=1))
  return found[:, :1 + plan.counts.size * chunk], count


def _codes(plan: Plan) -> tuple[jax.Array, jax.Array]:
  """Items without FIRST and LAST [B, T / block_q, S / block_k], and which of them are visited."""
  b, n_queries, n_keys = plan.visited.shape
  real = jnp.arange(n_keys, dtype=jnp.int32)[None, None] < plan.counts[..., None]
  query = jnp.arange(b * n_queries, dtype=jnp.int32).reshape(b, n_queries, 1)
  row = jnp.arange(b, dtype=jnp.int32)[:, None, None]
  key = row * n_keys + jnp.where(real, plan.visited, 0)
  kind = jnp.where(real, jnp.where(plan.whole, WHOLE, MASKED), 0)
  return query << QUERY_SHIFT | key << KEY_SHIFT | kind, real


def _listed(code: jax.Array) -> tuple[jax.Array, jax.Array]:
  """The items of each row in order, their first and last ones marked, and how many there are."""
  code = jnp.sort(code, axis=1)
  count = jnp.sum(code < NONE, axis=1, dtype=jnp.int32)
  query = code >> QUERY_SHIFT
  # The number after the last block's is what shifting NONE gives: MOST_QUERIES - 1.
  before = jnp.pad(query[:, :-1], ((0, 0), (1, 0)), constant_values=-1)
  after = jnp.pad(query[:, 1:], ((0, 0), (0, 1)), constant_values=-1)
  code += jnp.where(query != before, FIRST, 0) + jnp.where(query != after, LAST, 0)
  return code, count
