"""The formulas against the products that a traced forward and backward pass really holds."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.ad_checkpoint import checkpoint_name
from jax.extend import core
from jax.interpreters import partial_eval

from jaxrl.models import decoder, flops, lora
from jaxrl.models.config import Experts, Lora
from jaxrl.models.params import decoder_specs, is_spec
from tests.tiny_model import CONFIG

B, T = 3, 12
MODELS = {
    'grouped heads': CONFIG,
    'tied': dataclasses.replace(CONFIG, tie_embeddings=True),
    'norms after': dataclasses.replace(CONFIG, norm_placement='after', qk_norm='width'),
    'experts': dataclasses.replace(CONFIG, experts=Experts(5, 2)),
    'adapter': dataclasses.replace(CONFIG, lora=Lora(3, 6.0, lora.TARGETS)),
    'adapter on q and v': dataclasses.replace(CONFIG, lora=Lora(4, 6.0, ('q', 'v'))),
}


def count(jaxpr):
  """FLOPs of matrix products in a jaxpr, bodies of scans as often as they run."""
  total = 0
  for eqn in jaxpr.eqns:
    name, (out, *_) = eqn.primitive.name, [v.aval for v in eqn.outvars] or [None]
    if name == 'dot_general':
      (summed, _), _ = eqn.params['dimension_numbers']
      lhs = eqn.invars[0].aval.shape
      total += 2 * math.prod(out.shape) * math.prod(lhs[d] for d in summed)
    elif name == 'ragged_dot_general':      # every row meets one expert
      total += 2 * math.prod(eqn.invars[0].aval.shape) * out.shape[-1]
    elif name == 'cond':                    # by platform: the branch that an accelerator takes
      total += min(count(branch.jaxpr) for branch in eqn.params['branches'])
    else:
      assert name != 'while'
      times = eqn.params['length'] if name == 'scan' else 1
      inner = [x for x in eqn.params.values()
               if isinstance(x, core.ClosedJaxpr | core.Jaxpr)]
      total += times * sum(count(getattr(x, 'jaxpr', x)) for x in inner)
  return total


def dense(layer, q, k, v, window, cache):
  """Attention over the whole square."""
  b, t, n, h = q.shape
  q = q.reshape(b, t, k.shape[2], -1, h)
  weights = jax.nn.softmax(jnp.einsum('btkgh,bskh->bkgts', q, k))
  out = jnp.einsum('bkgts,bskh->btkgh', weights, v).reshape(b, t, n, h)
  return checkpoint_name(out, 'attn'), cache


def hidden(params, c):
  tokens = jnp.zeros((B, T), jnp.int32)
  positions = jnp.broadcast_to(jnp.arange(T)[None], (B, T))
  return decoder.forward_cached(params, tokens, positions, (), c, dense)[0]


def loss(trained, frozen, c):
  params = lora.attach(frozen, trained) if c.lora is not None else trained
  return jnp.sum(jax.nn.logsumexp(decoder.logits(params, hidden(params, c), c), axis=-1))


def abstract(specs):
  return jax.tree.map(
      lambda s: jax.ShapeDtypeStruct(s.shape, jnp.float32), specs, is_leaf=is_spec)


def arguments(c):
  base = abstract(decoder_specs(c))
  return (base, None) if c.lora is None else (abstract(lora.lora_specs(c)), base)


@pytest.mark.parametrize('c', MODELS.values(), ids=MODELS)
def test_every_product_is_counted(c):
  units = [flops.plain_row(T, T)] * B
  forward = jax.make_jaxpr(loss, static_argnums=2)(*arguments(c), c)
  assert count(forward.jaxpr) == flops.forward_flops(c, units).total()[1]
  both = jax.make_jaxpr(jax.grad(loss), static_argnums=2)(*arguments(c), c)
  # Gradients of frozen matrices are written down, but nothing uses them: no compiler keeps them.
  used, _ = partial_eval.dce_jaxpr(both.jaxpr, [True] * len(both.jaxpr.outvars))
  assert count(used) == flops.train_flops(c, units).total()[1]


@pytest.mark.parametrize('remat', ['nothing', 'attn', 'qkv_attn', 'minimal'])
@pytest.mark.parametrize('c', MODELS.values(), ids=MODELS)
def test_recomputed_layers(c, remat, monkeypatch):
  """Hardware FLOPs less those of the head's and attention's own backward passes."""
  plain, units = decoder._layer, [flops.plain_row(T, T)] * B
  before = jax.make_jaxpr(jax.grad(loss), static_argnums=2)(*arguments(c), c)
  kept = {name for names in decoder.REMAT[remat] for name in names}
  policy = jax.checkpoint_policies.save_only_these_names(*kept)

  def layer(x, w, kind, rotary, attend, c):
    return jax.checkpoint(lambda x, w: plain(x, w, kind, rotary, attend, c), policy=policy)(x, w)

  monkeypatch.setattr(decoder, '_layer', layer)
  after = jax.make_jaxpr(jax.grad(loss), static_argnums=2)(*arguments(c), c)
  expected = [flops.recompute_flops(c, units, name).total()[1] for name in (remat, 'all')]
  # The backward pass of this dense attention keeps the scores, unless its layer is recomputed.
  scores = flops.forward_flops(c, units).full / 2 if 'attn' in kept else 0
  assert count(after.jaxpr) - count(before.jaxpr) == expected[0] - expected[1] + scores > 0


def test_by_hand():
  """Two layers of D = 32, 4 heads and 2 kv heads of 8, mlp 48, vocabulary 50."""
  weights = 32 * 32 + 2 * 32 * 16 + 32 * 32 + 3 * 32 * 48
  unit = flops.Segments(3, (2, 4), scored=5)
  f = flops.forward_flops(CONFIG, [unit])
  assert f.matrices == 2 * 9 * 2 * weights
  assert f.head == 2 * 5 * 32 * 50
  assert f.causal == 2 * 4 * 32 * ((1 + 2 + 3) + (4 + 5) + (4 + 5 + 6 + 7))
  assert f.full == 2 * 4 * 32 * (3 * 3 + 2 * 5 + 4 * 7)
  kept = flops.recompute_flops(CONFIG, [unit], 'attn')
  assert kept.causal == f.causal / 2 and kept.matrices == f.matrices * (1 - 32 * 48 / weights)


def test_a_prompt_that_is_stored_once_is_computed_once():
  twice = [flops.plain_row(10 + n, n) for n in (4, 6)]
  once = flops.Segments(10, (4, 6), 10)
  pair, packed = (flops.train_flops(CONFIG, units) for units in (twice, [once]))
  assert pair.head == packed.head
  assert pair.matrices - packed.matrices == pair.matrices * 10 / 30
  assert pair.causal - packed.causal == 3 * 2 * 4 * 32 * 55


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 9), st.lists(st.integers(1, 9), max_size=3),
       st.none() | st.integers(1, 12))
def test_visible_keys_are_those_of_a_mask(prefix, segments, window):
  unit = flops.Segments(prefix, tuple(segments), 0)
  seen = sum(min(i, window or i) for i in range(1, prefix + 1))
  for s in segments:       # a query's keys in order: the prefix, then its own segment up to itself
    for q in range(1, s + 1):
      keys = ['prefix'] * prefix + ['own'] * q
      seen += len(keys[-window:] if window else keys)
  assert flops.visible_keys(unit, window, causal=True) == seen
  assert flops.visible_keys(unit, window, causal=False) >= seen


def test_windows_bound_both_conventions():
  c = dataclasses.replace(CONFIG, windows=(4, None))
  f = flops.forward_flops(c, [flops.plain_row(10, 0)])
  assert f.causal == 4 * 32 * ((1 + 2 + 3 + 4 * 7) + 55) and f.full == 4 * 32 * (10 * 4 + 100)


def test_units_are_read_from_padded_rows():
  mask = np.zeros((1, 3, 8), bool)
  mask[0, 0, 2:5], mask[0, 1, 7] = True, True
  assert flops.units_of({'mask': mask}) == [
      flops.plain_row(5, 3), flops.plain_row(8, 1), flops.plain_row(0, 0)]


def test_units_are_read_from_packed_rows():
  """A prompt of 4 with two responses, a prompt of 1 with one, and places left over."""
  prefix = [(0, 0, 0)] * 3
  bounds = prefix + [(0, 3, 3)] * 2 + [(0, 3, 5)] * 4 + [(9, 9, 9)] * 3
  spans = np.zeros((4, 1, 14), np.int32)
  spans[:3, 0, :12], spans[3, 0, :12] = np.array(bounds).T, np.arange(1, 13)
  batch = dict(zip(('prefix_start', 'prefix_end', 'start', 'end'), spans, strict=True))
  units = flops.units_of(batch | {'mask': np.ones((1, 2, 2, 2), bool)})
  assert units == [flops.Segments(3, (2, 4), 8), flops.Segments(0, (3,), 0)]
  seen = spans[1] - spans[0] + spans[3] - spans[2]
  assert sum(flops.visible_keys(u, None, causal=True) for u in units) == seen.sum()


def test_peaks():
  assert flops.peak_tflops('NVIDIA H200') == 989 and flops.peak_tflops('TPU v5 lite') == 197
  assert flops.peak_tflops(jax.devices('cpu')[0].device_kind) is None
