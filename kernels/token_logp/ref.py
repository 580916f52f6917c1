"""The definition: one softmax over the whole vocabulary. For tests; it holds [B, T, V]."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def token_logp(
    hidden: jax.Array,        # [B, T, D]
    head: jax.Array,          # [D, V]
    targets: jax.Array,       # [B, T] int32
    *,
    softcap: float | None = None,
) -> jax.Array:               # [B, T] float32
  """logits[target] - logsumexp(logits), in float32; soft-capped logits: cap * tanh(logit / cap)."""
  logits = _logits(hidden, head, softcap)
  picked = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
  return picked - jax.nn.logsumexp(logits, axis=-1)


def log_collision(
    hidden: jax.Array,        # [B, T, D]
    head: jax.Array,          # [D, V]
    *,
    softcap: float | None = None,
) -> jax.Array:               # [B, T] float32
  """log sum_v p_v^2: how likely two draws at this position would be the same token."""
  logits = _logits(hidden, head, softcap)
  return jax.nn.logsumexp(2 * logits, axis=-1) - 2 * jax.nn.logsumexp(logits, axis=-1)


def _logits(hidden: jax.Array, head: jax.Array, softcap: float | None) -> jax.Array:
  logits = jnp.einsum('btd,dv->btv', hidden, head, preferred_element_type=jnp.float32)
  return logits if softcap is None else softcap * jnp.tanh(logits / softcap)
