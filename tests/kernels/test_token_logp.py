"""Chunked log-probs against the definition and float64, and what they keep in memory."""

import functools

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest

from kernels.token_logp import log_collision, ref, token_logp

B, D, V = 3, 8, 33


def draw(t, dtype=jnp.float32):
  rng = np.random.default_rng(t)
  return (
      jnp.asarray(rng.normal(size=(B, t, D)), dtype),
      jnp.asarray(rng.normal(size=(D, V)), dtype),
      jnp.asarray(rng.integers(0, V, (B, t)), jnp.int32),
      rng.normal(size=(B, t)))


def float64(hidden, head, targets, upstream, softcap):
  """Values, and gradients of sum(upstream * values) by hand."""
  hidden, head = np.asarray(hidden, np.float64), np.asarray(head, np.float64)
  logits = hidden @ head
  slope = 1.0
  if softcap is not None:
    slope = 1 - np.tanh(logits / softcap) ** 2
    logits = softcap * np.tanh(logits / softcap)
  top = logits.max(-1, keepdims=True)
  log_z = top + np.log(np.exp(logits - top).sum(-1, keepdims=True))
  one_hot = np.eye(V)[np.asarray(targets)]
  d_logits = upstream[..., None] * (one_hot - np.exp(logits - log_z)) * slope
  values = ((logits - log_z) * one_hot).sum(-1)
  return values, d_logits @ head.T, np.einsum('btd,btv->dv', hidden, d_logits)


@pytest.mark.parametrize('softcap', [None, 1.5])
@pytest.mark.parametrize('t, chunk', [(12, 4), (13, 5), (7, 6), (5, 5), (1, 3), (4, 1)])
def test_values_and_gradients_match_float64(t, chunk, softcap):
  hidden, head, targets, upstream = draw(t)

  def total(fn):
    def weighted(h, w):
      out = fn(h, w)
      return jnp.sum(jnp.asarray(upstream, jnp.float32) * out), out
    return jax.jit(jax.grad(weighted, argnums=(0, 1), has_aux=True))

  chunked = functools.partial(token_logp, targets=targets, chunk=chunk, softcap=softcap)
  plain = functools.partial(ref.token_logp, targets=targets, softcap=softcap)
  values, d_hidden, d_head = float64(hidden, head, targets, upstream, softcap)
  for fn in (chunked, plain):
    grads, out = total(fn)(hidden, head)
    assert out.shape == (B, t) and out.dtype == jnp.float32
    np.testing.assert_allclose(out, values, rtol=1e-5, atol=2e-6)
    np.testing.assert_allclose(grads[0], d_hidden, rtol=1e-4, atol=5e-6)
    np.testing.assert_allclose(grads[1], d_head, rtol=1e-4, atol=1e-5)


def test_the_answer_does_not_depend_on_the_chunk():
  hidden, head, targets, _ = draw(12)
  whole = token_logp(hidden, head, targets, chunk=12)
  for chunk in (1, 5, 100):
    np.testing.assert_allclose(
        token_logp(hidden, head, targets, chunk=chunk), whole, rtol=1e-6, atol=1e-6)


def test_bfloat16_inputs_are_summed_in_float32():
  hidden, head, targets, upstream = draw(9, jnp.bfloat16)
  with jax.numpy_dtype_promotion('strict'):
    out = token_logp(hidden, head, targets, chunk=4)
  assert out.dtype == jnp.float32
  np.testing.assert_allclose(out, float64(hidden, head, targets, upstream, None)[0],
                             rtol=1e-5, atol=1e-5)


def all_shapes(jaxpr):
  """Shapes of every value in a jaxpr and in all those it calls."""
  for eqn in jaxpr.eqns:
    for v in (*eqn.invars, *eqn.outvars):
      yield tuple(getattr(v.aval, 'shape', ()))
    for value in jax.tree.leaves(
        eqn.params, is_leaf=lambda x: isinstance(x, jax.extend.core.ClosedJaxpr)):
      if isinstance(value, jax.extend.core.ClosedJaxpr):
        yield from all_shapes(value.jaxpr)
      elif isinstance(value, jax.extend.core.Jaxpr):
        yield from all_shapes(value)


@pytest.mark.parametrize('t, chunk', [(64, 8), (61, 8)])
def test_gradients_never_hold_a_logit_for_every_token(t, chunk):
  """Nothing as large as [B, T, V] exists, forward or backward; [B, chunk, V] is the largest."""
  hidden, head, targets, _ = draw(t)

  def total(fn):
    return jax.make_jaxpr(jax.value_and_grad(
        lambda h, w: jnp.sum(fn(h, w)), argnums=(0, 1)))(hidden, head).jaxpr

  chunked = list(all_shapes(total(lambda h, w: token_logp(h, w, targets, chunk=chunk))))
  plain = list(all_shapes(total(lambda h, w: ref.token_logp(h, w, targets))))
  largest = max(int(np.prod(s)) for s in chunked if V in s)
  assert (B, chunk, V) in chunked and largest == B * chunk * V
  assert max(int(np.prod(s)) for s in chunked) < B * t * V
  assert (B, t, V) in plain                              # the walk sees what it looks for


def test_unknown_implementations_are_refused():
  hidden, head, targets, _ = draw(2)
  with pytest.raises(ValueError, match="unknown token_logp implementation 'fast'"):
    token_logp(hidden, head, targets, chunk=2, impl='fast')


@pytest.mark.parametrize('chunk', [0, -1])
def test_chunks_without_tokens_are_refused(chunk):
  hidden, head, targets, _ = draw(2)
  with pytest.raises(ValueError, match='chunk'):
    token_logp(hidden, head, targets, chunk=chunk)


@pytest.mark.parametrize('chunk, softcap', [(4, None), (100, 1.5)])
def test_collisions_match_float64(chunk, softcap):
  hidden, head, _, _ = draw(9)
  logits = np.asarray(hidden, np.float64) @ np.asarray(head, np.float64)
  if softcap is not None:
    logits = softcap * np.tanh(logits / softcap)
  p = np.exp(logits - logits.max(-1, keepdims=True))
  p /= p.sum(-1, keepdims=True)
  np.testing.assert_allclose(
      log_collision(hidden, head, chunk=chunk, softcap=softcap), np.log((p**2).sum(-1)),
      rtol=1e-5, atol=1e-5)
