"""The forward pass: one layer function, scanned, in training, scoring, prefill and decoding."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxrl.models import params as params_lib
from jaxrl.models.config import ModelConfig
from jaxrl.models.rope import apply_rope, rope_angles
from jaxrl.parallel.sharding import contract, gather, look_up, shard
from kernels.attention import attention, decode_attention

Params = params_lib.Params
# (q [B,T,N,H], k [B,T,K,H], v [B,T,K,H]) -> (attended [B,T,N,H], anything to keep)
Attend = Callable[[jax.Array, jax.Array, jax.Array], tuple[jax.Array, Any]]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
  """Keys and values of every slot; position p of a slot always lies at index p."""

  k: jax.Array                # [L, R, S, K, H]
  v: jax.Array                # [L, R, S, K, H]


def init_cache(c: ModelConfig, slots: int, length: int, dtype) -> Cache:
  shape = (c.n_layers, slots, length, c.n_kv, c.d_head)
  return Cache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))


def cast(params: Params, dtype) -> Params:
  """Parameters in the compute dtype; float32 masters stay with the caller."""
  return jax.tree.map(lambda x: x.astype(dtype), params)


def rms_norm(x: jax.Array, weight: jax.Array, eps: float) -> jax.Array:
  """x / rms(x) * weight, for x [B, T, D] and weight [D]; the mean of squares is float32."""
  x32 = x.astype(jnp.float32)
  scale = jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + eps)
  return (x32 * scale).astype(x.dtype) * weight[None, None]


def _layer(x, w, angles, attend: Attend, c: ModelConfig):
  """One block on x [B, T, D]; returns the new x and what `attend` wants kept."""
  h = rms_norm(x, w['attention_norm'], c.norm_eps)
  q = contract('btd,dnh->btnh', h, w['q'], 'batch', 'length', 'heads', None)
  k = contract('btd,dkh->btkh', h, w['k'], 'batch', 'length', 'kv', None)
  v = contract('btd,dkh->btkh', h, w['v'], 'batch', 'length', 'kv', None)
  attended, kept = attend(apply_rope(q, angles), apply_rope(k, angles), v)
  x = x + contract('btnh,nhd->btd', attended, w['o'], 'batch', 'length', 'embed')
  h = rms_norm(x, w['mlp_norm'], c.norm_eps)
  gate = contract('btd,df->btf', h, w['gate'], 'batch', 'length', 'mlp')
  up = contract('btd,df->btf', h, w['up'], 'batch', 'length', 'mlp')
  x = x + contract('btf,fd->btd', jax.nn.silu(gate) * up, w['down'], 'batch', 'length', 'embed')
  return x, kept


def _layer_axes(c: ModelConfig):
  return {name: s.axes for name, s in params_lib.layer_specs(c).items()}


def forward(
    params: Params,
    tokens: jax.Array,        # [B, T] int32
    c: ModelConfig,
    *,
    keep_kv: bool = False,
    remat: bool = False,
) -> tuple[jax.Array, tuple[jax.Array, jax.Array] | None]:
  """Hidden states before the output matrix, [B, T, D], for rows padded on the right.

  A padded position comes after every real one, so the causal mask alone keeps it out of sight.
  With `keep_kv` the keys and values [L, B, T, K, H] are returned as well (prefill). `remat`
  recomputes each layer in the backward pass instead of keeping its activations.
  """
  b, t = tokens.shape
  positions = jnp.broadcast_to(jnp.arange(t, dtype=jnp.int32)[None], (b, t))
  positions = shard(positions, 'batch', 'length')
  angles = rope_angles(positions, c)
  x = look_up(_gathered_embedding(params), tokens, 'batch', 'length', 'embed')

  def attend(q, k, v):
    out = attention(
        q, k, v, q_positions=positions, k_positions=positions, scale=c.d_head ** -0.5)
    return out, ((k, v) if keep_kv else None)

  def body(x, w):
    return _layer(x, gather(w, _layer_axes(c)), angles, attend, c)

  x, kept = jax.lax.scan(jax.checkpoint(body) if remat else body, x, params['layers'])
  return _final_norm(params, x, c), kept


def decode_step(
    params: Params,
    tokens: jax.Array,        # [R] int32, the newest token of each slot
    positions: jax.Array,     # [R] int32, its position
    cache: Cache,
    c: ModelConfig,
) -> tuple[jax.Array, Cache]:
  """Hidden states [R, D] of the newest tokens, and the cache with their keys and values."""
  rows = jnp.arange(tokens.shape[0], dtype=jnp.int32)
  angles = rope_angles(positions[:, None], c)
  x = look_up(_gathered_embedding(params), tokens[:, None], 'batch', 'length', 'embed')

  def body(carry, xs):
    x, cache = carry
    layer, w = xs

    def attend(q, k, v):
      new_k = cache.k.at[layer, rows, positions].set(k[:, 0], unique_indices=True)
      new_v = cache.v.at[layer, rows, positions].set(v[:, 0], unique_indices=True)
      out = decode_attention(
          q[:, 0], new_k[layer], new_v[layer], lengths=positions + 1, scale=c.d_head ** -0.5)
      return out[:, None], Cache(new_k, new_v)

    return _layer(x, w, angles, attend, c), None

  layers = jnp.arange(c.n_layers, dtype=jnp.int32)
  (x, cache), _ = jax.lax.scan(body, (x, cache), (layers, params['layers']))
  return _final_norm(params, x, c)[:, 0], cache


def output_matrix(params: Params, c: ModelConfig) -> jax.Array:
  """[D, V]; the embedding transposed where the two are tied."""
  if c.tie_embeddings:
    return _gathered_embedding(params).T
  return shard(params['head'], None, 'vocab')


def _gathered_embedding(params: Params) -> jax.Array:
  return shard(params['embedding'], 'vocab', None)


def _final_norm(params: Params, x: jax.Array, c: ModelConfig) -> jax.Array:
  return rms_norm(x, shard(params['final_norm'], None), c.norm_eps)
