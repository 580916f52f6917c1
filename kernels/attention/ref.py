"""Plain-jnp attention: the definition every kernel is tested against."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from kernels.attention.spans import Spans, visible, windowed


def softmax(scores: jax.Array, keep: jax.Array) -> jax.Array:
  """Softmax over the last axis of float32 scores; a row with nothing to see gives zeros."""
  scores = jnp.where(keep, scores, -jnp.inf)
  top = jnp.max(scores, axis=-1, keepdims=True)
  weights = jnp.exp(scores - jnp.where(jnp.isfinite(top), top, 0.0))
  total = jnp.sum(weights, axis=-1, keepdims=True)
  return weights / jnp.where(total > 0, total, 1.0)


def _capped(scores: jax.Array, softcap: float | None) -> jax.Array:
  return scores if softcap is None else softcap * jnp.tanh(scores / softcap)


def attention(
    q: jax.Array,             # [B, T, N, H]
    k: jax.Array,             # [B, S, K, H]
    v: jax.Array,             # [B, S, K, H]
    spans: Spans,             # of the T queries, as indices of the S keys
    *,
    scale: float,
    window: int | jax.Array | None = None,
    softcap: float | None = None,
) -> jax.Array:               # [B, T, N, H]
  """softmax(scale * q k^T) v over the keys that each query sees; zeros where it sees none.

  Query head n reads key head n // (N / K). Scores and softmax are float32. With `window` a query
  sees the last so many of its keys; it may be traced. With `softcap` scores become
  softcap * tanh(score / softcap) before the mask (Gemma 2).
  """
  b, t, n, h = q.shape
  groups = k.shape[2]
  q = q.reshape(b, t, groups, n // groups, h)
  scores = jnp.einsum('btkgh,bskh->bkgts', q, k, preferred_element_type=jnp.float32) * scale
  scores = _capped(scores, softcap)
  keep = visible(spans if window is None else windowed(spans, window), k.shape[1])
  weights = softmax(scores, keep[:, None, None]).astype(v.dtype)
  out = jnp.einsum('bkgts,bskh->btkgh', weights, v)
  return out.reshape(b, t, n, h)
