"""Attention block by block in portable XLA: online softmax, only over blocks that are visited.

The outer loop walks the blocks of queries of all rows, the inner one the visited blocks of keys of
each, as many as the plan says: time follows what is visible. A block of scores is all there is at
one time, for all heads: [K, G * block_q, block_k], where the G query heads that share a key head
are rows of one product, so keys and values are never repeated.

The backward pass keeps the output and the log-sum-exp of each query, and walks the same blocks
once: scores again, then dQ, dK and dV. dK and dV are sums over the outer loop, in float32 arrays
the size of K and V that both loops carry and update in place.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from kernels import varying
from kernels.attention import saved
from kernels.attention.blocks import Plan, blocked, check_fits
from kernels.attention.saved import Options
from kernels.attention.spans import Spans

LOW = -1e30                   # finite: exp(-inf - LOW) is 0 for a query that has seen nothing


def attention(
    q: jax.Array,             # [B, T, N, H]
    k: jax.Array,             # [B, S, K, H]
    v: jax.Array,             # [B, S, K, H]
    spans: Spans,             # already clipped to the window
    plan: Plan,               # of the same spans
    *,
    scale: float,
    softcap: float | None = None,
) -> jax.Array:               # [B, T, N, H]
  """See `kernels.attention.attention` and `saved.attention`."""
  check_fits(plan, q.shape[1], k.shape[1])
  return saved.attention(q, k, v, spans, plan, RULES, Options(scale, softcap))


def _forward(q, k, v, spans: Spans, plan: Plan, options: Options):
  b, t, n, h = q.shape
  groups = k.shape[2]
  queries, bounds = _split_queries(q, groups, plan), _split_spans(spans, plan)
  keys, values = _split_keys(k, plan), _split_keys(v, plan)
  visited, counts = _flat(plan)
  rows = queries.shape[2]     # G * block_q

  def of_queries(i, carry):
    out, lse = carry
    query, bound = _at(queries, i), _at(bounds, i)

    def of_keys(m, state):
      total, top, weight = state
      block = visited[i, m]
      at = _row(i, plan) + block
      keep = _keep(bound, block, rows, plan).T[None]
      score = _dot('kmh,ksh->kms', query, _at(keys, at))
      score = jnp.where(keep, _capped(score, options), -jnp.inf)
      new_top = jnp.maximum(top, jnp.max(score, axis=-1))
      p, old = jnp.exp(score - new_top[..., None]), jnp.exp(top - new_top)
      more = _dot('kms,ksh->kmh', p.astype(v.dtype), _at(values, at))
      return total * old[..., None] + more, new_top, weight * old + jnp.sum(p, axis=-1)

    statistic = functools.partial(_full, (groups, rows), like=q)
    total, top, weight = jax.lax.fori_loop(
        0, counts[i], of_keys,
        (_full((groups, rows, h), 0.0, like=q), statistic(LOW), statistic(0.0)))
    weight = jnp.where(weight > 0, weight, 1.0)
    top = jnp.where(top > LOW, top, 0.0)
    return (_put(out, (total / weight[..., None]).astype(q.dtype), i),
            _put(lse, top + jnp.log(weight), i))

  blocks = queries.shape[0]
  out, lse = jax.lax.fori_loop(
      0, blocks, of_queries,
      (_full(queries.shape, 0, q.dtype, like=q), _full((blocks, groups, rows), 0.0, like=q)))
  lse = _join_queries(lse[..., None], (b, t, n, 1), plan)[..., 0].swapaxes(1, 2)
  return _join_queries(out, (b, t, n, h), plan), lse


def _backward(q, k, v, spans: Spans, plan: Plan, out, lse, d_out, options: Options):
  """Scores are [keys, queries] here: then both dK and dV are products without a transposition."""
  groups = k.shape[2]
  queries, bounds = _split_queries(q, groups, plan), _split_spans(spans, plan)
  keys, values = _split_keys(k, plan), _split_keys(v, plan)
  d_outs = _split_queries(d_out, groups, plan)
  dots = jnp.sum(d_out.astype(jnp.float32) * out.astype(jnp.float32), axis=-1, keepdims=True)
  dots = _split_queries(dots, groups, plan)[..., 0]        # [blocks, K, G * block_q]
  lse = _split_queries(lse.swapaxes(1, 2)[..., None], groups, plan)[..., 0]
  visited, counts = _flat(plan)
  rows = queries.shape[2]

  def of_queries(i, carry):
    dq, dk, dv = carry
    query, bound, d_block = _at(queries, i), _at(bounds, i), _at(d_outs, i)
    shift, dot = (_at(x, i)[:, None] for x in (lse, dots))            # [K, 1, G * block_q]

    def of_keys(m, state):
      dq, dk, dv = state
      block = visited[i, m]
      at = _row(i, plan) + block
      key = _at(keys, at)
      score = _capped(_dot('ksh,kmh->ksm', key, query), options)
      p = jnp.where(_keep(bound, block, rows, plan)[None], jnp.exp(score - shift), 0.0)
      d_score = p * (_dot('ksh,kmh->ksm', _at(values, at), d_block) - dot) * options.scale
      if options.softcap is not None:
        d_score = d_score * (1 - jnp.square(score / options.softcap))
      d_score = d_score.astype(q.dtype)
      dv = _put(dv, _at(dv, at) + _dot('ksm,kmh->ksh', p.astype(v.dtype), d_block), at)
      dk = _put(dk, _at(dk, at) + _dot('ksm,kmh->ksh', d_score, query), at)
      return dq + _dot('ksm,ksh->kmh', d_score, key), dk, dv

    of_block, dk, dv = jax.lax.fori_loop(
        0, counts[i], of_keys, (_full(query.shape, 0.0, like=q), dk, dv))
    return _put(dq, of_block.astype(q.dtype), i), dk, dv

  dq, dk, dv = jax.lax.fori_loop(
      0, queries.shape[0], of_queries,
      (_full(queries.shape, 0, q.dtype, like=q), _full(keys.shape, 0.0, like=q),
       _full(keys.shape, 0.0, like=q)))
  return (_join_queries(dq, q.shape, plan), _join_keys(dk, k.shape, plan).astype(k.dtype),
          _join_keys(dv, v.shape, plan).astype(v.dtype))


RULES = saved.Rules(_forward, _backward)


def _dot(pattern: str, x: jax.Array, y: jax.Array) -> jax.Array:
  return jnp.einsum(pattern, x, y, preferred_element_type=jnp.float32)


def _capped(score: jax.Array, options: Options) -> jax.Array:
  score = score * options.scale
  return score if options.softcap is None else options.softcap * jnp.tanh(score / options.softcap)


def _keep(bound: jax.Array, block: jax.Array, rows: int, plan: Plan) -> jax.Array:
  """Bool [block_k, G * block_q] from bounds int32 [4, block_q]: True where the key is seen."""
  bound = jnp.tile(bound, (1, rows // plan.block_q))
  key = block * plan.block_k + jnp.arange(plan.block_k, dtype=jnp.int32)[:, None]
  prefix_start, prefix_end, start, end = (bound[n][None] for n in range(4))
  return ((key >= prefix_start) & (key < prefix_end)) | ((key >= start) & (key < end))


def _split_queries(x: jax.Array, groups: int, plan: Plan) -> jax.Array:
  """[B, T, N, H] -> [B * T / block_q, K, G * block_q, H]."""
  n, h = x.shape[2:]
  x = blocked(x, plan.block_q).reshape(-1, plan.block_q, groups, n // groups, h)
  return x.transpose(0, 2, 3, 1, 4).reshape(-1, groups, n // groups * plan.block_q, h)


def _join_queries(x: jax.Array, shape: tuple[int, ...], plan: Plan) -> jax.Array:
  b, t, n, h = shape
  groups = x.shape[1]
  x = x.reshape(-1, groups, n // groups, plan.block_q, h).transpose(0, 3, 1, 2, 4)
  return x.reshape(b, -1, n, h)[:, :t]


def _split_keys(x: jax.Array, plan: Plan) -> jax.Array:
  """[B, S, K, H] -> [B * S / block_k, K, block_k, H]."""
  x = blocked(x, plan.block_k)
  return x.reshape(-1, *x.shape[2:]).swapaxes(1, 2)


def _join_keys(x: jax.Array, shape: tuple[int, ...], plan: Plan) -> jax.Array:
  b, s, groups, h = shape
  return x.swapaxes(1, 2).reshape(b, -1, groups, h)[:, :s]


def _split_spans(spans: Spans, plan: Plan) -> jax.Array:
  """Int32 [B * T / block_q, 4, block_q]; padded queries see nothing."""
  bounds = (spans.prefix_start, spans.prefix_end, spans.start, spans.end)
  return jnp.stack([blocked(x, plan.block_q).reshape(-1, plan.block_q) for x in bounds], axis=1)


def _flat(plan: Plan) -> tuple[jax.Array, jax.Array]:
  """Visited blocks [B * T / block_q, S / block_k] and their counts."""
  return plan.visited.reshape(-1, plan.visited.shape[2]), plan.counts.reshape(-1)


def _row(i: jax.Array, plan: Plan) -> jax.Array:
  """The first key block of the row that query block i belongs to."""
  return i // plan.counts.shape[1] * plan.visited.shape[2]


def _at(x: jax.Array, i: jax.Array) -> jax.Array:
  return jax.lax.dynamic_index_in_dim(x, i, keepdims=False)


def _put(x: jax.Array, part: jax.Array, i: jax.Array) -> jax.Array:
  return jax.lax.dynamic_update_index_in_dim(x, part, i, 0)


def _full(
    shape: tuple[int, ...], value: float, dtype=jnp.float32, *, like: jax.Array
) -> jax.Array:
  """`value` everywhere, as a loop may carry it: varying over the manual mesh axes of `like`."""
  return varying.varying(jnp.full(shape, value, dtype), varying.axes(like))
