"""The draw of one token per slot, and the log-prob that is recorded for it.

Gumbel-max: the most probable token after independent Gumbel noise has been added to every logit is
a draw from the softmax. Noise for every token of a large vocabulary costs more than all else here,
and the softmax factorises, so a large vocabulary is cut into blocks of neighbours: a block is drawn
by its total weight, then a token of that block by its own. That takes noise for about
2 sqrt(V) numbers instead of V.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from jaxrl.sampling.filters import COLDEST, lowest_kept, softmax_weights

# Vocabularies up to this size are one block, drawn with the key of the slot itself.
ONE_BLOCK = 1024


def draw_tokens(
    keys: jax.Array,          # [R] random keys, one per slot
    logits: jax.Array,        # [R, V] float32, after penalties; -inf for banned tokens
    temperature: jax.Array,   # [R] float32, 0 for greedy
    *,
    top_k: int | None,
    top_p: float,
    min_p: float,
) -> jax.Array:               # [R] int32
  """Draws one token per row from the softmax at the temperature, filtered as `lowest_kept` says.

  A row depends on its own key, logits and temperature alone. Greedy rows, and rows with nothing
  left to draw (every token banned), take the first of the largest logits; for the latter that is
  token 0.
  """
  vocabulary = logits.shape[-1]
  border = lowest_kept(logits, temperature, top_k=top_k, top_p=top_p, min_p=min_p)
  if vocabulary <= ONE_BLOCK:
    return _draw_among(keys, logits, temperature, border)
  size = _block_size(vocabulary)
  block = _draw_block(_fold(keys, 0), logits, temperature, border, size)
  tokens = block[:, None] * size + jnp.arange(size, dtype=jnp.int32)[None]   # [R, size]
  inside = jnp.take_along_axis(logits, tokens, axis=-1, mode='fill', fill_value=-jnp.inf)
  return block * size + _draw_among(_fold(keys, 1), inside, temperature, border)


def picked_logprob(
    logits: jax.Array,        # [R, V] float32, as the model gave them
    tokens: jax.Array,        # [R] int32
) -> jax.Array:               # [R] float32
  """log p(token) under the softmax at temperature 1, without filters or penalties."""
  picked = jnp.take_along_axis(logits, tokens[:, None], axis=-1)[:, 0]
  return picked - jax.nn.logsumexp(logits, axis=-1)


def _block_size(vocabulary):
  """About sqrt(V); a divisor of V where there is one, which saves a padded copy of the logits."""
  root = math.isqrt(vocabulary - 1) + 1
  return next((n for n in range(root, 4 * root) if vocabulary % n == 0), root)


def _draw_block(keys, logits, temperature, border, size):
  """Blocks [R] int32 of `size` tokens each; the one with the largest logit for greedy rows."""
  blocks = -(-logits.shape[-1] // size)
  padded = jnp.pad(
      logits, ((0, 0), (0, blocks * size - logits.shape[-1])), constant_values=-jnp.inf)
  largest = jnp.max(padded.reshape(-1, blocks, size), axis=-1)            # [R, blocks]
  weights = softmax_weights(padded, jnp.max(largest, axis=-1), jnp.maximum(temperature, COLDEST))
  if border is not None:
    weights = jnp.where(padded >= border[:, None], weights, 0.0)
  total = jnp.sum(weights.reshape(-1, blocks, size), axis=-1)
  noisy = jnp.log(total) + _gumbel(keys, blocks)
  return _argmax(jnp.where((temperature == 0)[:, None], largest, noisy))


def _draw_among(keys, logits, temperature, border):
  """Draws [R] int32 from the softmax at the temperature; the argmax for greedy rows."""
  scaled = logits / jnp.maximum(temperature, COLDEST)[:, None]
  if border is not None:
    scaled = jnp.where(logits >= border[:, None], scaled, -jnp.inf)
  noisy = scaled + _gumbel(keys, logits.shape[-1])
  return _argmax(jnp.where((temperature == 0)[:, None], logits, noisy))


def _argmax(x):
  return jnp.argmax(x, axis=-1).astype(jnp.int32)


def _gumbel(keys, size):
  return jax.vmap(lambda key: jax.random.gumbel(key, (size,), jnp.float32))(keys)


def _fold(keys, n):
  return jax.vmap(lambda key: jax.random.fold_in(key, n))(keys)
