"""Keys and values while sampling: prompts stored once, and new keys of every slot.

Layouts are those of `kernels.decoding`. A prompt fills a row of the prompt region in chunks and is
read by all its draws; its last id is left to the draws, whose first step feeds it.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from jaxrl.models.config import ModelConfig
from jaxrl.models.decoder import attention_options, forward_cached
from jaxrl.models.params import Params
from kernels.attention import Spans, attention
from kernels.decoding import Own, Quantised, Shared, decode_attention, quantise, write_keys


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Region:
  """Keys and values of every layer: rows of prompts, or those of slots."""

  k: jax.Array | Quantised    # prompts [L, rows, K, length, H], own [L, C, R, K, B, H]
  v: jax.Array | Quantised


def empty_region(
    c: ModelConfig, shape: tuple[int, ...], *, dtype, quantised: bool
) -> Region:
  """Zeros [L, *shape, H]."""
  whole = (c.n_layers, *shape, c.d_head)

  def zeros():
    if quantised:
      return Quantised(jnp.zeros(whole, jnp.int8), jnp.zeros(whole[:-1], jnp.float32))
    return jnp.zeros(whole, dtype)

  return Region(zeros(), zeros())


def _put(region: jax.Array | Quantised, new: jax.Array, *start) -> jax.Array | Quantised:
  """`region` with `new`, of its rank, written from `start` on; rounded where it is int8."""
  stored = quantise(new) if isinstance(region, Quantised) else new.astype(region.dtype)
  return jax.tree.map(
      lambda x, part: jax.lax.dynamic_update_slice(x, part, start[:x.ndim]), region, stored)


def _rows(region: jax.Array | Quantised, layer: jax.Array, rows: jax.Array, dtype) -> jax.Array:
  """One layer's keys [B, P, K, H] of the rows named."""
  if isinstance(region, Quantised):
    found = region.values[layer, rows].astype(jnp.float32) * region.scale[layer, rows][..., None]
  else:
    found = region[layer, rows]
  return found.astype(dtype).swapaxes(1, 2)


def own_shape(own: Region) -> tuple[int, int]:
  """(C, B): how many blocks of its own a slot has, of how many keys each."""
  keys = own.k.values if isinstance(own.k, Quantised) else own.k
  return keys.shape[1], keys.shape[4]


def prefill(
    params: Params,
    prompts: Region,
    header: Region | None,
    tokens: jax.Array,        # [B, T] int32, padded on the right
    rows: jax.Array,          # [B] int32, of the prompt region; distinct where they are used
    first: jax.Array,         # [B] int32, position of the prompt's first id: ids of the header
    count: jax.Array,         # [1] int32, how many of the B are real
    offset: jax.Array,        # int32, ids of the prompts that came in earlier chunks
    c: ModelConfig,
    *,
    continues: bool,          # whether there are earlier chunks
) -> Region:
  """The prompt region with one chunk of each prompt computed and stored."""
  b, t = tokens.shape
  positions = first[:, None] + offset + jnp.arange(t, dtype=jnp.int32)[None]

  def attend(layer, q, k, v, window, prompts):
    prompts = _store(prompts, layer, rows, count[0], offset, k, v)
    keys, values = [k], [v]
    if continues:
      keys, values = [_rows(prompts.k, layer, rows, k.dtype)], [
          _rows(prompts.v, layer, rows, v.dtype)]
    before = 0                # keys of the header, which come first
    if header is not None:
      zero = jnp.zeros((b,), jnp.int32)
      keys.insert(0, _rows(header.k, layer, zero, k.dtype))
      values.insert(0, _rows(header.v, layer, zero, v.dtype))
      before = keys[0].shape[1]
    seen = jnp.arange(1, t + 1, dtype=jnp.int32)[None] + (offset if continues else 0)
    none = jnp.zeros((b, t), jnp.int32)
    spans = Spans(none, none + first[:, None], none + before, none + before + seen)
    out = attention(q, jnp.concatenate(keys, 1), jnp.concatenate(values, 1), spans,
                    window=window, **attention_options(c))
    return out, prompts

  return forward_cached(params, tokens, positions, prompts, c, attend)[1]


def compute_header(
    params: Params, region: Region, tokens: jax.Array, c: ModelConfig
) -> Region:
  """A region of one row with the keys of tokens int32 [chunks, 1, T], which are padded at the end.

  Padding is computed and stored like the rest; whoever reads the row knows its length.
  """
  chunks, _, t = tokens.shape
  one, none = jnp.ones(1, jnp.int32), jnp.zeros(1, jnp.int32)

  def step(region, chunk):
    tokens, offset = chunk
    return prefill(params, region, None, tokens, none, none, one, offset, c,
                   continues=chunks > 1), None

  offsets = t * jnp.arange(chunks, dtype=jnp.int32)
  return jax.lax.scan(step, region, (tokens, offsets))[0]


def _store(prompts: Region, layer, rows, count, offset, k, v) -> Region:
  """Writes k, v [B, T, K, H] of the first `count` prompts into their rows."""
  k, v = k.swapaxes(1, 2), v.swapaxes(1, 2)

  def one(b, prompts: Region) -> Region:
    def put(region, new):
      part = jax.lax.dynamic_index_in_dim(new, b, keepdims=True)[None]   # [1, 1, K, T, H]
      return _put(region, part, layer, rows[b], 0, offset, 0)

    return Region(put(prompts.k, k), put(prompts.v, v))

  return jax.lax.fori_loop(0, count, one, prompts)


def scatter_keys(
    x: jax.Array,             # [L, C, R, K, B, ...]
    new: jax.Array,           # [R, K, ...]
    layer: jax.Array,         # [] int32
    place: jax.Array,         # [R] int32, among a slot's own keys; C B: not written
) -> jax.Array:
  """`x` with one new key of every slot in one layer."""
  block, slots = x.shape[4], jnp.arange(new.shape[0], dtype=jnp.int32)
  return x.at[layer, place // block, slots, :, place % block].set(
      new, mode='drop', unique_indices=True)


def write_blocks(x: jax.Array, new: jax.Array, layer: jax.Array, place: jax.Array) -> jax.Array:
  """The same for TPUs, which for a scatter or for single rows would lay out the whole cache anew.

  For head sizes that the kernel is not for (`kernels.decoding.tpu.is_default`). Every block between
  the first and the last that is written to is read and written whole.
  """
  size, block = x.shape[1] * x.shape[4], x.shape[4]
  first = jnp.min(jnp.where(place < size, place, size)) // block
  last = jnp.max(jnp.where(place < size, place, -1)) // block
  offsets = jnp.arange(block, dtype=jnp.int32)[None]

  def one(n, x):
    hit = (n * block + offsets == place[:, None])[:, None]                      # [R, 1, B]
    hit = hit.reshape(*hit.shape, *(1,) * (x.ndim - 5))
    at = (layer, n, *(0,) * (x.ndim - 2))
    kept = jax.lax.dynamic_slice(x, at, (1, 1, *x.shape[2:]))
    changed = jnp.where(hit, new[:, :, None], kept[0, 0])
    return jax.lax.dynamic_update_slice(x, changed[None, None], at)

  return jax.lax.fori_loop(first, last + 1, one, x)


def decode(
    params: Params,
    tokens: jax.Array,        # [R] int32, newest token of each slot
    positions: jax.Array,     # [R] int32
    own: Region,
    live: jax.Array,          # [R] int32, keys of its own that a slot sees, this step's included
    shared: tuple[Shared, ...],
    c: ModelConfig,
) -> tuple[jax.Array, Region]:
  """Hidden states [R, D] of the newest tokens, and the slots' own keys and values with theirs."""

  blocks, block = own_shape(own)
  place = jnp.where(live > 0, live - 1, blocks * block)        # out of range: not written
  write = write_keys if c.d_head % 128 == 0 else write_blocks

  def attend(layer, q, k, v, window, own):
    def put(region, new):     # [R, 1, K, H]
      stored = quantise(new[:, 0]) if isinstance(region, Quantised) else (
          new[:, 0].astype(region.dtype))
      return jax.tree.map(
          lambda x, part: jax.lax.platform_dependent(
              x, part, layer, place, tpu=write, default=scatter_keys), region, stored)

    own = Region(put(own.k, k), put(own.v, v))
    out = decode_attention(
        q[:, 0], Own(own.k, own.v, live), shared, layer=layer, positions=positions,
        window=window, **attention_options(c))
    return out[:, None], own

  hidden, own = forward_cached(
      params, tokens[:, None], positions[:, None], own, c, attend)
  return hidden[:, 0], own
