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
    impl: str | None = None,
) -> jax.Array:               # [B, T] float32
  """log p(target | prefix), temperature 1, untruncated; see `ref.token_logp`, which defines it."""
  name = 'chunked' if impl is None else impl
  if name not in IMPLEMENTATIONS:
    known = sorted(IMPLEMENTATIONS)
    raise ValueError(f'unknown token_logp implementation {name!r}; known: {known}')
  return IMPLEMENTATIONS[name](hidden, head, targets, chunk=chunk)
