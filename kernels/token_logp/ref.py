"""The definition: one softmax over the whole vocabulary. For tests; it holds [B, T, V]."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def token_logp(
    hidden: jax.Array,        # [B, T, D]
    head: jax.Array,          # [D, V]
    targets: jax.Array,       # [B, T] int32
) -> jax.Array:               # [B, T] float32
  """logits[target] - logsumexp(logits), in float32."""
  logits = jnp.einsum('btd,dv->btv', hidden, head, preferred_element_type=jnp.float32)
  picked = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
  return picked - jax.nn.logsumexp(logits, axis=-1)
