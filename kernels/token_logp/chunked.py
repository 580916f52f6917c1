"""A scan over blocks of the vocabulary, forward and backward, in portable XLA.

All N = B * T tokens meet one block of W columns at a time, so [N, W] logits exist. Blocks of the
vocabulary, not of tokens, because of the backward pass: the gradient of a block of columns is then
whole after one product, accumulated inside it in float32 and written once, and no float32 array as
large as the head is carried through the loop, read and written by every chunk of tokens. What is
carried is the gradient of the hidden states, [N, D] in float32.

The forward pass keeps log-sum-exp, [N] in float32; the backward pass recomputes each block's logits
once. Where the vocabulary does not divide by W the last block overlaps the one before and ignores
the columns they share.

Where devices share the rows of `head`, a block is gathered when its turn comes, forward and
backward, and its gradient goes back as a sum of each device's rows: neither exists whole.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from kernels.token_logp.layout import AxisName

LANES = 128                   # columns of a TPU register: blocks are multiples of it
LOWEST = float(jnp.finfo(jnp.float32).min)      # of ignored columns; times 0 it is 0, unlike -inf


def token_logp(
    hidden: jax.Array,        # [B, T, D]
    head: jax.Array,          # [D, V]
    targets: jax.Array,       # [B, T] int32
    *,
    chunk: int,
    softcap: float | None,
    with_entropy: bool,
    axis_name: AxisName | None,
    rows_over: AxisName | None,
    statistics: Callable[..., Any] | None = None,
) -> tuple[jax.Array, jax.Array | None]:      # [B, T] float32 each
  """log p(target), and the entropy where it is asked for.

  `axis_name` splits the columns of `head` over devices, `rows_over` its rows. `statistics` is what
  gives the numbers per token that all is made of; None: `_statistics`, here.
  """
  rows, size = targets.shape, head.shape[1]
  local = targets.reshape(-1)
  if axis_name is not None:
    local = local - size * jax.lax.axis_index(axis_name)
  width = block_width(local.size, size, chunk)
  picked, part, mean = (statistics or _statistics)(
      hidden.reshape(-1, hidden.shape[-1]), head, local, width, softcap, with_entropy, rows_over)
  if axis_name is None:
    logp, log_z = picked - part, part
  else:
    # Written so that one sum over devices serves value and gradient, and that a position without a
    # cotangent gets none even where its sums are not finite: d log_z / d part = share.
    fixed = jax.lax.stop_gradient(part)
    log_z = _log_sum_exp(fixed, axis_name)
    share = jnp.nan_to_num(jnp.exp(fixed - log_z))
    logp = jax.lax.psum(picked - share * (part - fixed), axis_name) - log_z
    if mean is not None:
      mean = jax.lax.psum(share * mean, axis_name)
  if mean is None:
    return logp.reshape(rows), None
  return logp.reshape(rows), jax.lax.stop_gradient(log_z - mean).reshape(rows)


def log_collision(
    hidden: jax.Array,        # [B, T, D]
    head: jax.Array,          # [D, V]
    *,
    chunk: int,
    softcap: float | None,
    axis_name: AxisName | None,
    rows_over: AxisName | None,
) -> jax.Array:               # [B, T] float32
  rows = hidden.shape[:2]
  hidden, head = jax.lax.stop_gradient((hidden.reshape(-1, hidden.shape[-1]), head))
  width = block_width(math.prod(rows), head.shape[1], chunk)

  def add(sums, z, column, fresh):
    top, shrink, e = _next_top(sums[0], z)
    return (top, shrink * sums[1] + jnp.sum(e, axis=-1),
            shrink**2 * sums[2] + jnp.sum(e**2, axis=-1))

  zero = _per_token(hidden, 0.0)
  top, total, squares = _over_blocks(
      add, (_per_token(hidden, LOWEST), zero, zero), hidden, head, width, softcap, rows_over)
  if axis_name is not None:
    shrink = jnp.exp(top - jax.lax.pmax(top, axis_name))
    total, squares = jax.lax.psum((shrink * total, shrink**2 * squares), axis_name)
  return (jnp.log(squares) - 2 * jnp.log(total)).reshape(rows)


def block_width(tokens: int, vocabulary: int, chunk: int) -> int:
  """Columns of a block: `tokens` times as many are about `chunk` times the vocabulary."""
  blocks = math.ceil(tokens / chunk)
  return min(vocabulary, math.ceil(vocabulary / max(blocks, 1) / LANES) * LANES)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5, 6))
def _statistics(
    hidden: jax.Array,        # [N, D]
    head: jax.Array,          # [D, V]
    targets: jax.Array,       # [N] int32; elsewhere than 0..V-1: on another device
    width: int,
    softcap: float | None,
    with_mean: bool,
    rows_over: AxisName | None,
) -> tuple[jax.Array, jax.Array, jax.Array | None]:    # [N] float32 each
  """The target's logit (0 where it is not here), log-sum-exp, and sum_v p_v logit_v (constant)."""

  def add(sums, z, column, fresh):
    top, total, picked, moment = sums
    top, shrink, e = _next_top(top, z)
    total = shrink * total + jnp.sum(e, axis=-1)
    place = targets - column
    at = jnp.take_along_axis(z, jnp.clip(place, 0, width - 1)[:, None], axis=-1)[:, 0]
    picked = picked + jnp.where((place >= fresh) & (place < width), at, 0.0)
    moment = shrink * moment + jnp.sum(e * z, axis=-1) if with_mean else None
    return top, total, picked, moment

  zero = _per_token(hidden, 0.0)
  top, total, picked, moment = _over_blocks(
      add, (_per_token(hidden, LOWEST), zero, zero, zero if with_mean else None),
      hidden, head, width, softcap, rows_over)
  return picked, top + jnp.log(total), moment / total if with_mean else None


def _forward(hidden, head, targets, *options):
  out = _statistics(hidden, head, targets, *options)
  return out, (hidden, head, targets, out[1])


def _backward(width, softcap, with_mean, rows_over, saved, cotangents):
  hidden, head, targets, log_z = saved
  of_target, of_log_z, _ = cotangents
  live = (of_target != 0) | (of_log_z != 0)      # [N]; garbage elsewhere must not meet a product
  hidden = jnp.where(live[:, None], hidden, jnp.zeros((), hidden.dtype))

  def add(grads, z, column, fresh, slope, block):
    d_hidden, d_head = grads
    place = jnp.arange(width, dtype=jnp.int32)[None]
    hit = place == (targets - column)[:, None]
    d = of_log_z[:, None] * jnp.exp(z - log_z[:, None]) + jnp.where(hit, of_target[:, None], 0.0)
    d = jnp.where(live[:, None] & (place >= fresh), d if slope is None else d * slope, 0.0)
    d = d.astype(hidden.dtype)
    d_hidden = d_hidden + jnp.einsum('nv,dv->nd', d, block, preferred_element_type=jnp.float32)
    d_block = jnp.einsum('nd,nv->dv', hidden, d, preferred_element_type=jnp.float32)
    d_block = d_block.astype(head.dtype)
    if rows_over is not None:
      d_block = jax.lax.psum_scatter(d_block, rows_over, scatter_dimension=0, tiled=True)
    return d_hidden, jax.lax.dynamic_update_slice(d_head, d_block, (0, column))

  # The last block first: what it leaves out of the columns it shares is then written over.
  d_hidden, d_head = _over_blocks(
      add, (jnp.zeros_like(hidden, jnp.float32), jnp.zeros_like(head)), hidden, head, width,
      softcap, rows_over, backward=True)
  return d_hidden.astype(hidden.dtype), d_head, None


_statistics.defvjp(_forward, _backward)


def _over_blocks(
    add: Callable[..., Any],
    start: Any,
    hidden: jax.Array,        # [N, D]
    head: jax.Array,          # [D, V]
    width: int,
    softcap: float | None,
    rows_over: AxisName | None,
    *,
    backward: bool = False,
) -> Any:
  """start = add(start, z, column, fresh) for blocks z [N, width] of the soft-capped logits.

  `column` is where the block begins; its columns before `fresh` belong to another block as well.
  Backward, blocks come from last to first, and `add` also gets d z / d logits (None: 1) and the
  block of `head`.
  """
  size = head.shape[1]
  blocks = math.ceil(size / width)

  def one(carry, index):
    column = jnp.minimum(index * width, size - width)
    fresh = index * width - column
    block = jax.lax.dynamic_slice_in_dim(head, column, width, axis=1)
    if rows_over is not None:
      block = jax.lax.all_gather(block, rows_over, axis=0, tiled=True)
    z = jnp.einsum('nd,dv->nv', hidden, block, preferred_element_type=jnp.float32)
    slope = None
    if softcap is not None:
      squashed = jnp.tanh(z / softcap)
      z, slope = softcap * squashed, 1 - squashed**2
    if backward:
      return add(carry, z, column, fresh, slope, block), None
    if size % width:
      z = jnp.where(jnp.arange(width, dtype=jnp.int32)[None] >= fresh, z, LOWEST)
    return add(carry, z, column, fresh), None

  if blocks == 1:
    return one(start, jnp.int32(0))[0]
  return jax.lax.scan(one, start, jnp.arange(blocks, dtype=jnp.int32), reverse=backward)[0]


def _next_top(top: jax.Array, z: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
  """The greatest logit so far, what sums of exponentials shrink by, and exp(z - top)."""
  higher = jnp.maximum(top, jnp.max(z, axis=-1))
  return higher, jnp.exp(top - higher), jnp.exp(z - higher[:, None])


def _log_sum_exp(x: jax.Array, axis_name: AxisName) -> jax.Array:
  top = jax.lax.pmax(x, axis_name)
  return top + jnp.log(jax.lax.psum(jnp.exp(x - top), axis_name))


def _per_token(hidden: jax.Array, value: float) -> jax.Array:
  """[N] float32 filled with `value`, varying over the devices that `hidden` varies over."""
  return jnp.full_like(hidden[:, 0], value, jnp.float32)
