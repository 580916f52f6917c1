"""The forward pass: one layer function, scanned, in training, scoring, prefill and decoding."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from jaxrl.models import params as params_lib
from jaxrl.models.config import ModelConfig
from jaxrl.models.lora import lora_specs
from jaxrl.models.mixture import mixture
from jaxrl.models.params import ParamSpec, decoder_specs, is_spec, layer_specs
from jaxrl.models.rope import Rotary, apply_rope, rope_angles
from jaxrl.models.storage import Int8, dequantise
from jaxrl.parallel.look_up import look_up
from jaxrl.parallel.sharding import (
    GATHERED,
    OUTPUT,
    STORED,
    Rules,
    contract,
    gather_length,
    if_it_divides,
    mean_with_other_parts,
    on_parts,
    shard,
    whole_vocabulary,
    with_other_parts,
)
from kernels.attention import Spans, attention, causal

Params = params_lib.Params
# (q [B,T,N,H], k [B,T,K,H], v [B,T,K,H], window) -> (attended [B,T,N,H], the cache)
Attend = Callable[[jax.Array, jax.Array, jax.Array, Any], tuple[jax.Array, Any]]
# (layer, q, k, v, window, cache) -> (attended, cache)
AttendCached = Callable[..., tuple[jax.Array, Any]]
ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    'silu': jax.nn.silu,
    'gelu': functools.partial(jax.nn.gelu, approximate=False),
    'gelu_tanh': functools.partial(jax.nn.gelu, approximate=True),
}
NO_WINDOW = 2**30                      # more keys than any sequence has
# Policies of recomputation: what of a layer is kept on the device, and in the memory of the host.
# 'all' keeps everything that the backward pass reads, 'nothing' only what enters the layer.
REMAT: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    'all': ((), ()),
    'nothing': ((), ()),
    'attn': (('attn',), ()),
    'qkv_attn': (('q', 'k', 'v', 'attn'), ()),
    'minimal': (('q', 'k', 'v', 'attn', 'mid', 'gate', 'up'), ()),
    'offload_attn': ((), ('attn',)),
    'offload_qkv_attn': ((), ('q', 'k', 'v', 'attn')),
}


def cast(params: Params, dtype) -> Params:
  """Parameters in the compute dtype; float32 masters stay with the caller.

  Weights stored as int8 stay so: each layer is widened when its turn comes.
  """
  return jax.tree.map(
      lambda x: x if isinstance(x, Int8) else x.astype(dtype), params,
      is_leaf=lambda x: isinstance(x, Int8))


def rms_norm(x: jax.Array, weight: jax.Array, c: ModelConfig) -> jax.Array:
  """x / rms(x) * weight over the trailing dimensions that `weight` has; the mean is float32.

  With `c.norm_offset` the factor is 1 + weight, in float32 (Gemma).
  """
  axes, weight_of_heads = tuple(range(-weight.ndim, 0)), weight.ndim == 2
  weight = weight.reshape((1,) * (x.ndim - weight.ndim) + weight.shape)
  x32 = x.astype(jnp.float32)
  mean = jnp.mean(x32 * x32, axis=axes, keepdims=True)
  if weight_of_heads:
    mean = mean_with_other_parts(mean, 'heads')
  normed = x32 * jax.lax.rsqrt(mean + c.norm_eps)
  if c.norm_offset:
    return (normed * (1.0 + weight.astype(jnp.float32))).astype(x.dtype)
  return normed.astype(x.dtype) * weight


def _project(
    name: str, pattern: str, x, w, c: ModelConfig, *names: str | None, summed: str = 'embed'
) -> jax.Array:
  """x W, and scale (x A) B where the projection has an adapter, and the bias where it has one.

  `summed` names the dimension that the product sums over.
  """
  out = contract(pattern, x, w[name], *names)
  adapter = w.get('lora', {}).get(name)
  if adapter is not None and c.lora is not None:
    operands, result = pattern.split('->')
    ours, weight = operands.split(',')
    down, up = ''.join(d for d in weight if d in ours), ''.join(d for d in weight if d not in ours)
    low = contract(f'{ours},{down}r->btr', x, adapter['a'], 'batch', 'length', None)
    out = out + c.lora.scale * contract(f'btr,r{up}->{result}', low, adapter['b'], *names)
  out = with_other_parts(out, summed)
  bias = w.get(f'{name}_bias')
  return out if bias is None else out + bias[None, None]


def _mlp(h, w, c: ModelConfig) -> jax.Array:
  activation = ACTIVATIONS[c.activation]
  if c.experts is not None:
    return mixture(h, w, c.experts, activation)
  gate, up = (
      checkpoint_name(_project(name, 'btd,df->btf', h, w, c, 'batch', 'length', 'mlp'), name)
      for name in ('gate', 'up'))
  return _project(
      'down', 'btf,fd->btd', activation(gate) * up, w, c, 'batch', 'length', 'embed',
      summed='mlp')


def _layer(x, w, kind, rotary: Rotary, attend: Attend, c: ModelConfig):
  """One block on x [B, T, D]; returns the new x and what `attend` wants kept.

  `kind` holds what differs between layers besides their weights, see `_layer_kinds`.
  """
  def norm(name: str, h: jax.Array) -> jax.Array:
    return rms_norm(h, w[name], c) if name in w else h

  h = norm('attention_norm', x)
  q = _project('q', 'btd,dnh->btnh', h, w, c, 'batch', 'length', 'heads', None)
  k = _project('k', 'btd,dkh->btkh', h, w, c, 'batch', 'length', 'kv', None)
  v = _project('v', 'btd,dkh->btkh', h, w, c, 'batch', 'length', 'kv', None)
  q, k = norm('q_norm', q), norm('k_norm', k)
  cos, sin = rotary.cos[kind.get('rope', 0)], rotary.sin[kind.get('rope', 0)]
  q, k, v = (checkpoint_name(x, name) for x, name in (
      (apply_rope(q, cos, sin), 'q'), (apply_rope(k, cos, sin), 'k'), (v, 'v')))
  attended, kept = attend(q, k, v, kind.get('window', _same_window(c)))
  out = _project('o', 'btnh,nhd->btd', attended, w, c, 'batch', 'length', 'embed',
                 summed='heads')
  x = checkpoint_name(x + norm('attention_out_norm', out), 'mid')
  return x + norm('mlp_out_norm', _mlp(norm('mlp_norm', x), w, c)), kept


def _same_window(c: ModelConfig) -> int | None:
  """The window where all layers have the same one."""
  return c.windows[0] if c.windows else None


def _layer_kinds(c: ModelConfig) -> dict[str, jax.Array]:
  """Per layer [L] int32: its `window` where they differ, and which `rope` table it reads."""
  kinds = {}
  if len(set(c.windows)) > 1:
    kinds['window'] = jnp.array([w or NO_WINDOW for w in c.windows], jnp.int32)
  if c.local_rope_theta is not None:
    kinds['rope'] = jnp.array([w is not None for w in c.windows], jnp.int32)
  return kinds


def _stacked(params: Params) -> dict:
  """What the scan over layers walks through: weights, and adapters where there are any."""
  adapters = {'lora': params['lora']['layers']} if 'lora' in params else {}
  return params['layers'] | adapters


def _ready(w: dict, c: ModelConfig, dtype) -> dict:
  """One layer's weights laid out for compute, gathered in the type they are stored in."""
  specs: dict = dict(layer_specs(c))
  if 'lora' in w:
    specs['lora'] = jax.tree.map(
        lambda s: dataclasses.replace(s, shape=s.shape[1:], axes=s.axes[1:]),
        lora_specs(c)['layers'], is_leaf=is_spec)
  return jax.tree.map(
      lambda s, x: _laid_out(x, s, s.axes, dtype), specs, w, is_leaf=is_spec)


def _laid_out(
    x, s: ParamSpec, names: tuple[str | None, ...], dtype, rules: Rules = GATHERED
) -> jax.Array:
  if not isinstance(x, Int8):
    return shard(x, *names, rules=rules)
  kept = [None if n - len(names) in s.summed else name for n, name in enumerate(names)]
  return dequantise(
      Int8(shard(x.values, *names, rules=rules), shard(x.scale, *kept, rules=rules)), dtype)


def _top(params: Params, name: str, names: tuple[str | None, ...], c: ModelConfig, dtype,
         rules: Rules):
  """A weight outside the layers, in the layout given by `names`."""
  return _laid_out(params[name], decoder_specs(c)[name], names, dtype, rules)


def _embed(params: Params, tokens: jax.Array, c: ModelConfig, dtype) -> jax.Array:
  """[B, T, D]; the factor is rounded to the compute dtype first, as Gemma was trained."""
  table = _top(params, 'embedding', (None, 'embed'), c, dtype, STORED)
  x = look_up(table, tokens, c.vocab_size)
  return x if c.embedding_scale == 1 else x * jnp.asarray(c.embedding_scale, x.dtype)


def attention_options(c: ModelConfig) -> dict[str, Any]:
  """Scale and soft-cap of attention scores."""
  scale = c.d_head ** -0.5 if c.attention_scale is None else c.attention_scale
  return {'scale': scale, 'softcap': c.attention_softcap}


def compute_dtype(params: Params):
  """The dtype of activations: that of the final norm, which is never quantised."""
  return params['final_norm'].dtype


@dataclasses.dataclass(frozen=True)
class Layout:
  """Where the tokens of packed rows stand in their sequences, and what they see of the row."""

  positions: jax.Array        # [B, T] int32
  spans: Spans


def forward(
    params: Params,
    tokens: jax.Array,        # [B, T] int32
    c: ModelConfig,
    *,
    layout: Layout | None = None,
    remat: str = 'all',
) -> jax.Array:               # [B, T, D]
  """Hidden states before the output matrix; one sequence per row, padded on the right, or `layout`.

  A padded position comes after every real one, so the causal mask alone keeps it out of sight.
  `remat` names what is kept for the backward pass, of `REMAT`; the rest is computed again.
  """
  b, t = tokens.shape
  dtype = compute_dtype(params)
  if layout is None:
    positions = jnp.broadcast_to(jnp.arange(t, dtype=jnp.int32)[None], (b, t))
    layout = Layout(positions, causal(b, t))
  positions, spans = (
      jax.tree.map(lambda x: shard(x, 'batch', 'length'), x)
      for x in (layout.positions, layout.spans))
  rotary = rope_angles(positions, c)
  x = _embed(params, tokens, c, dtype)

  def attend(q, k, v, window):
    return _attention(q, k, v, spans, window, c), None

  def body(x, layer):
    w, kind = layer
    return _layer(x, _ready(w, c, dtype), kind, rotary, attend, c)

  x, _ = jax.lax.scan(_keeping(body, remat), x, (_stacked(params), _layer_kinds(c)))
  return _final_norm(params, x, c)


def _keeping(body: Callable, remat: str) -> Callable:
  """The body of the scan over layers, which keeps what a policy names."""
  if remat == 'all':
    return body
  kept, parked = REMAT[remat]
  if parked:
    policy = jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=list(kept), names_which_can_be_offloaded=list(parked),
        offload_src='device', offload_dst='pinned_host')
  else:
    policy = jax.checkpoint_policies.save_only_these_names(*kept)
  return jax.checkpoint(body, policy=policy)


def _attention(q, k, v, spans: Spans, window, c: ModelConfig) -> jax.Array:
  """Attention on each device's rows and heads; queries of a part of a row see keys of all of it."""
  heads, keys = ('batch', 'length', 'heads', None), ('batch', 'length', 'kv', None)
  options = attention_options(c)

  def local(q, k, v, *rest):
    *bounds, window = rest
    k, v = gather_length(k), gather_length(v)
    return attention(q, k, v, Spans(*bounds), window=window, **options)

  bounds = [(x, ('batch', 'length')) for x in jax.tree.leaves(spans)]
  traced = isinstance(window, jax.Array)
  if traced:
    return on_parts(local, heads, (q, heads), (k, keys), (v, keys), *bounds, (window, ()))
  return on_parts(lambda *arrays: local(*arrays, window), heads, (q, heads), (k, keys), (v, keys),
                  *bounds)


def forward_cached(
    params: Params,
    tokens: jax.Array,        # [B, T] int32
    positions: jax.Array,     # [B, T] int32
    cache: Any,
    c: ModelConfig,
    attend: AttendCached,
) -> tuple[jax.Array, Any]:
  """Hidden states [B, T, D] and the cache, for a caller that keeps keys and values itself.

  `attend` is given the number of the layer and its q, k, v, puts keys and values wherever they
  belong, and attends to whatever the tokens may see. The cache is carried from layer to layer, so
  that XLA updates it in place.
  """
  dtype = compute_dtype(params)
  rotary = rope_angles(positions, c)
  x = _embed(params, tokens, c, dtype)

  def body(carry, xs):
    x, cache = carry
    layer, w, kind = xs

    def attend_here(q, k, v, window):
      return attend(layer, q, k, v, window, cache)

    return _layer(x, _ready(w, c, dtype), kind, rotary, attend_here, c), None

  layers = jnp.arange(c.n_layers, dtype=jnp.int32)
  (x, cache), _ = jax.lax.scan(body, (x, cache), (layers, _stacked(params), _layer_kinds(c)))
  return _final_norm(params, x, c), cache


def output_matrix(params: Params, c: ModelConfig) -> jax.Array:
  """[D, V], rows as they rest, columns over the tensor axis; tied, it is the embedding."""
  dtype, columns = compute_dtype(params), if_it_divides('vocab', c.vocab_size, OUTPUT)
  if c.tie_embeddings:
    return _top(params, 'embedding', (columns, 'embed'), c, dtype, OUTPUT).T
  return _top(params, 'head', ('embed', columns), c, dtype, OUTPUT)


def logits(params: Params, hidden: jax.Array, c: ModelConfig) -> jax.Array:
  """Logits [..., V] in float32 of hidden states [..., D], soft-capped where the model is."""
  columns = if_it_divides('vocab', c.vocab_size, GATHERED)
  head = shard(output_matrix(params, c), None, columns, rules=GATHERED)
  out = jnp.einsum('...d,dv->...v', hidden, head, preferred_element_type=jnp.float32)
  out = whole_vocabulary(out, c.vocab_size)
  return out if c.final_softcap is None else c.final_softcap * jnp.tanh(out / c.final_softcap)


def _final_norm(params: Params, x: jax.Array, c: ModelConfig) -> jax.Array:
  return rms_norm(x, shard(params['final_norm'], None), c)
