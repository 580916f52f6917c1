"""From logits to a drawn token: temperature, top-k, top-p, and the un-truncated log-prob."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def filter_logits(
    logits: jax.Array,        # [R, V] float32, already divided by the temperature
    *,
    top_k: int | None,
    top_p: float,
) -> jax.Array:               # [R, V] float32, -inf where filtered out
  """Keeps the `top_k` largest, then the smallest set of those whose probability reaches `top_p`.

  The most probable token is always kept; ties at the border are all kept. Holtzman et al. 2020.
  """
  if top_k is not None and top_k < logits.shape[-1]:
    border = jax.lax.top_k(logits, top_k)[0][:, -1:]
    logits = jnp.where(logits < border, -jnp.inf, logits)
  if top_p < 1:
    ordered = jnp.sort(logits, axis=-1, descending=True)
    probabilities = jax.nn.softmax(ordered, axis=-1)
    before = jnp.cumsum(probabilities, axis=-1) - probabilities   # mass of strictly larger ranks
    border = jnp.min(jnp.where(before < top_p, ordered, jnp.inf), axis=-1, keepdims=True)
    logits = jnp.where(logits < border, -jnp.inf, logits)
  return logits


def draw_tokens(
    keys: jax.Array,          # [R] random keys, one per slot
    logits: jax.Array,        # [R, V] float32
    temperature: jax.Array,   # [R] float32, 0 for greedy
    *,
    top_k: int | None,
    top_p: float,
) -> tuple[jax.Array, jax.Array]:
  """Tokens [R] int32 and their log-probs [R] under the unfiltered softmax at temperature 1.

  Gumbel-max: one uniform per (slot key, token id), so the draw depends on nothing else.
  """
  greedy = temperature == 0
  scaled = logits / jnp.where(greedy, 1.0, temperature)[:, None]
  scaled = filter_logits(scaled, top_k=top_k, top_p=top_p)
  noise = jax.vmap(lambda key: jax.random.gumbel(key, logits.shape[1:], jnp.float32))(keys)
  tokens = jnp.argmax(jnp.where(greedy[:, None], logits, scaled + noise), axis=-1)
  picked = jnp.take_along_axis(logits, tokens[:, None], axis=-1)[:, 0]
  return tokens.astype(jnp.int32), picked - jax.nn.logsumexp(logits, axis=-1)
