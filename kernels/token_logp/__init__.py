"""Log-probs of target tokens without a [batch, time, vocab] array."""

from __future__ import annotations

import jax

from kernels.token_logp import chunked

IMPLEMENTATIONS = {'chunked': chunked.token_logp}


def token_logp(
    hidden: jax.Array,        # [B, T, D]
    head: jax.Array,          # [D, V]
    targets: jax.Array,       # [B, T] int32
    *,
    chunk: int,
    softcap: float | None = None,
    impl: str | None = None,
) -> jax.Array:               # [B, T] float32
  """log p(target | prefix), temperature 1, untruncated; see `ref.token_logp`, which defines it."""
  name = 'chunked' if impl is None else impl
  if name not in IMPLEMENTATIONS:
    known = sorted(IMPLEMENTATIONS)
    raise ValueError(f'unknown token_logp implementation {name!r}; known: {known}')
  return IMPLEMENTATIONS[name](hidden, head, targets, chunk=chunk, softcap=softcap)


def log_collision(
    hidden: jax.Array,        # [B, T, D]
    head: jax.Array,          # [D, V]
    *,
    chunk: int,
    softcap: float | None = None,
) -> jax.Array:               # [B, T] float32
  """log sum_v p_v^2 of every position; see `ref.log_collision`, which defines it."""
  return chunked.log_collision(hidden, head, chunk=chunk, softcap=softcap)
