"""Log-probs of target tokens without a [tokens, vocab] array; docs/log_probs.md says how."""

from __future__ import annotations

import functools
from typing import Literal, overload

import jax

from kernels.token_logp import chunked, layout, tpu

IMPLEMENTATIONS = {'chunked': chunked, 'tpu': tpu}


@overload
def token_logp(
    hidden: jax.Array, head: jax.Array, targets: jax.Array, *, chunk: int,
    softcap: float | None = None, axis_name: layout.AxisName | None = None,
    with_entropy: Literal[False] = False, impl: str | None = None) -> jax.Array: ...


@overload
def token_logp(
    hidden: jax.Array, head: jax.Array, targets: jax.Array, *, chunk: int,
    softcap: float | None = None, axis_name: layout.AxisName | None = None,
    with_entropy: Literal[True], impl: str | None = None) -> tuple[jax.Array, jax.Array]: ...


def token_logp(
    hidden: jax.Array,        # [B, T, D]
    head: jax.Array,          # [D, V]; with axis_name this device's columns
    targets: jax.Array,       # [B, T] int32, ids in the whole vocabulary
    *,
    chunk: int,
    softcap: float | None = None,
    axis_name: layout.AxisName | None = None,
    with_entropy: bool = False,
    impl: str | None = None,
) -> jax.Array | tuple[jax.Array, jax.Array]:     # [B, T] float32 each
  """log p(target | prefix), temperature 1, untruncated; see `ref.token_logp`, which defines it.

  Logits exist for one block of the vocabulary at a time, forward and backward. Where the cotangent
  of a position is zero, nothing of that position reaches a gradient, whatever it holds.

  Under `jax.set_mesh` with Explicit axes the layout is read off the arguments: rows and tokens may
  be split, the rows of `head` over any axes, and its columns over axes that split none of these.
  Inside shard_map it is a function of local arrays.

  Args:
    chunk: as many logits exist at one time as `chunk` tokens have (this device's tokens and
      columns); rounded up to blocks of 128 columns.
    softcap: logits are cap * tanh(logit / cap).
    axis_name: inside shard_map, the mesh axis (or axes) that splits the vocabulary in equal parts.
    with_entropy: also gives the entropy of every position, in nats, without gradient.
    impl: 'chunked', the default, or 'tpu', a Pallas kernel that is for TPUs alone.

  Raises:
    ValueError: chunk below 1, shapes or layouts that do not fit, an unknown implementation.
  """
  name = 'chunked' if impl is None else impl
  if name not in IMPLEMENTATIONS:
    known = sorted(IMPLEMENTATIONS)
    raise ValueError(f'unknown token_logp implementation {name!r}; known: {known}')
  _check(hidden, head, targets, chunk)
  one = functools.partial(IMPLEMENTATIONS[name].token_logp, chunk=chunk, softcap=softcap)
  logp, entropy = layout.on_each_device(
      functools.partial(one, with_entropy=with_entropy), hidden, head, targets, axis_name=axis_name)
  return (logp, entropy) if with_entropy else logp


def log_collision(
    hidden: jax.Array,        # [B, T, D]
    head: jax.Array,          # [D, V]; with axis_name this device's columns
    *,
    chunk: int,
    softcap: float | None = None,
    axis_name: layout.AxisName | None = None,
) -> jax.Array:               # [B, T] float32
  """log sum_v p_v^2 of every position, without gradient; `ref.log_collision` defines it.

  Arguments, layouts and errors are those of `token_logp`.
  """
  _check(hidden, head, None, chunk)
  one = functools.partial(chunked.log_collision, chunk=chunk, softcap=softcap)
  return layout.on_each_device(one, hidden, head, axis_name=axis_name)


def _check(
    hidden: jax.Array, head: jax.Array, targets: jax.Array | None, chunk: int) -> None:
  if chunk < 1:
    raise ValueError(f'chunk is a number of tokens, at least 1; got {chunk}')
  rows = hidden.shape[:2] if targets is None else targets.shape
  if hidden.ndim != 3 or head.ndim != 2 or hidden.shape != (*rows, head.shape[0]):
    raise ValueError(
        'hidden [B, T, D], head [D, V] and targets [B, T] do not fit; got '
        f'{hidden.shape}, {head.shape}' + ('' if targets is None else f', {targets.shape}'))
