"""Chunked log-probs against float64: values, gradients, layouts, and what they hold."""

import functools

import jax
import jax.extend
import jax.numpy as jnp
import jax.test_util
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from kernels.token_logp import log_collision, ref, token_logp
from kernels.token_logp.chunked import block_width

B, D, V = 3, 8, 300           # three blocks of 128 columns, the last overlapping; see block_width


def draw(t, dtype=jnp.float32, *, b=B, d=D, v=V, seed=0):
  rng = np.random.default_rng((t, seed))
  return (
      jnp.asarray(rng.normal(size=(b, t, d)), dtype),
      jnp.asarray(rng.normal(size=(d, v)), dtype),
      jnp.asarray(rng.integers(0, v, (b, t)), jnp.int32),
      rng.normal(size=(b, t)) * (rng.random((b, t)) < 0.8))      # some positions are left out


def float64(hidden, head, targets, upstream, softcap=None):
  """Values, and gradients of sum(upstream * values) by hand; the entropy."""
  hidden, head = np.asarray(hidden, np.float64), np.asarray(head, np.float64)
  logits = hidden @ head
  slope = 1.0
  if softcap is not None:
    slope = 1 - np.tanh(logits / softcap) ** 2
    logits = softcap * np.tanh(logits / softcap)
  top = logits.max(-1, keepdims=True)
  log_z = top + np.log(np.exp(logits - top).sum(-1, keepdims=True))
  one_hot = np.eye(head.shape[1])[np.asarray(targets)]
  p = np.exp(logits - log_z)
  d_logits = upstream[..., None] * (one_hot - p) * slope
  values = ((logits - log_z) * one_hot).sum(-1)
  return (values, d_logits @ head.T, np.einsum('btd,btv->dv', hidden, d_logits),
          -(p * (logits - log_z)).sum(-1))


def value_and_grads(fn, hidden, head, upstream):
  """(values, d hidden, d head) of sum(upstream * fn(hidden, head))."""
  def weighted(h, w, g):
    out = fn(h, w)
    return jnp.sum(g * out), out
  grads, out = jax.jit(jax.grad(weighted, argnums=(0, 1), has_aux=True))(
      hidden, head, jnp.asarray(upstream, jnp.float32))
  return out, *grads


def check(found, expected, rtol=1e-4, atol=1e-5):
  for name, x, e in zip(('values', 'd hidden', 'd head'), found, expected, strict=False):
    np.testing.assert_allclose(x, e, rtol=rtol, atol=atol * max(1, np.abs(e).max()), err_msg=name)


@pytest.mark.parametrize('softcap', [None, 1.5])
@pytest.mark.parametrize('t, chunk', [(12, 12), (13, 5), (1, 1), (4, 100)])
def test_values_and_gradients_match_float64(t, chunk, softcap):
  hidden, head, targets, upstream = draw(t)
  expected = float64(hidden, head, targets, upstream, softcap)
  for fn in (functools.partial(token_logp, chunk=chunk), ref.token_logp):
    with jax.numpy_dtype_promotion('strict'):
      found = value_and_grads(functools.partial(fn, targets=targets, softcap=softcap),
                              hidden, head, upstream)
    assert found[0].shape == (B, t) and found[0].dtype == jnp.float32
    check(found, expected)


@settings(max_examples=10, deadline=None, derandomize=True)
@given(b=st.integers(1, 3), t=st.integers(1, 9), d=st.integers(1, 9),
       v=st.sampled_from([1, 2, 127, 128, 129, 256, 300, 511]), chunk=st.integers(1, 30),
       softcap=st.sampled_from([None, 0.7, 5.0]), seed=st.integers(0, 99))
def test_any_shape_matches_float64(b, t, d, v, chunk, softcap, seed):
  hidden, head, targets, upstream = draw(t, b=b, d=d, v=v, seed=seed)
  hidden = 4 * hidden
  found = value_and_grads(
      lambda h, w: token_logp(h, w, targets, chunk=chunk, softcap=softcap), hidden, head, upstream)
  check(found, float64(hidden, head, targets, upstream, softcap))


@pytest.mark.parametrize('softcap', [None, 2.0])
def test_gradients_match_finite_differences(softcap):
  hidden, head, targets, _ = draw(5)
  jax.test_util.check_grads(
      functools.partial(token_logp, targets=targets, chunk=5, softcap=softcap), (hidden, head),
      order=1, modes=['rev'], eps=1e-2, atol=2e-3, rtol=2e-3)


def test_the_answer_does_not_depend_on_the_chunk():
  hidden, head, targets, upstream = draw(12)
  whole, *others = [
      value_and_grads(lambda h, w, n=n: token_logp(h, w, targets, chunk=n), hidden, head, upstream)
      for n in (36, 18, 1)]
  assert [block_width(36, V, n) for n in (36, 18, 1)] == [V, 256, 128]
  for other in others:
    check(other, whole, rtol=1e-6, atol=1e-6)


def test_weights_with_one_sign_add_up_over_many_tokens():
  """d head of a frequent token is summed in float32, whatever the dtype of the head."""
  hidden = jnp.ones((1, 3000, 1), jnp.bfloat16)
  head = jnp.zeros((1, V), jnp.bfloat16)
  targets = jnp.zeros((1, 3000), jnp.int32)
  grad = jax.grad(lambda w: token_logp(hidden, w, targets, chunk=1500).sum())(head)
  np.testing.assert_allclose(np.float32(grad[0, 0]), 3000 * (1 - 1 / V), rtol=4e-3)


@pytest.mark.parametrize('softcap', [None, 3.0])
def test_bfloat16_errors_are_those_of_plain_bfloat16(softcap):
  hidden, head, targets, upstream = draw(40, jnp.bfloat16, d=64)
  head = head / 4
  expected = float64(hidden, head, targets, upstream, softcap)

  def plain(h, w):                      # everything in bfloat16 but the softmax
    logits = (h @ w).astype(jnp.float32)
    logits = logits if softcap is None else softcap * jnp.tanh(logits / softcap)
    return jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], axis=-1)[..., 0]

  with jax.numpy_dtype_promotion('strict'):
    ours = value_and_grads(
        lambda h, w: token_logp(h, w, targets, chunk=60, softcap=softcap), hidden, head, upstream)
  assert [x.dtype for x in ours] == [jnp.float32, jnp.bfloat16, jnp.bfloat16]
  for x, y, e in zip(ours, value_and_grads(plain, hidden, head, upstream), expected):
    error, allowed = (np.sqrt(np.mean((np.asarray(a, np.float64) - e) ** 2)) for a in (x, y))
    assert error <= 1.5 * allowed, (error, allowed)
  np.testing.assert_allclose(ours[0], expected[0], rtol=1e-5, atol=1e-5)    # float32 sums


@pytest.mark.parametrize('garbage', [1e30, np.inf, np.nan])
def test_positions_without_a_cotangent_leak_nothing(garbage):
  hidden, head, targets, upstream = draw(6)
  upstream[:, 4:] = 0
  fn = functools.partial(token_logp, chunk=6)
  found = value_and_grads(lambda h, w: fn(h.at[:, 4:].mul(garbage), w, targets)[:, :4], hidden,
                          head, upstream[:, :4])
  expected = float64(hidden, head, targets, upstream)
  check((found[0], found[1][:, :4], found[2]),
        (expected[0][:, :4], expected[1][:, :4], expected[2]))
  assert np.isfinite(garbage) == np.isfinite(found[1][:, 4:]).all()      # 0 * garbage, the caller's
  bad = value_and_grads(lambda h, w: fn(h.at[:, 0].set(np.nan), w, targets), hidden, head, upstream)
  assert np.isnan(bad[2]).any()                             # a position that counts is not silenced


def test_targets_outside_the_vocabulary_pick_nothing():
  hidden, head, _, upstream = draw(4)
  for fill in (-1, V, 10**6):
    out, d_hidden, _ = value_and_grads(
        lambda h, w, fill=fill: token_logp(h, w, jnp.full((B, 4), fill), chunk=4), hidden, head,
        upstream)
    np.testing.assert_allclose(
        out, -jax.nn.logsumexp(hidden @ head, axis=-1), rtol=1e-5, atol=1e-5)
    assert np.isfinite(d_hidden).all()


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


@pytest.mark.parametrize('vocabulary', [512, 500])
def test_gradients_never_hold_a_logit_for_every_token(vocabulary):
  """Of [tokens, vocabulary], a block of columns is the most there is, forward and backward."""
  hidden, head, targets, _ = draw(64, v=vocabulary)
  tokens, chunk = 64 * B, 48

  def total(fn):
    return jax.make_jaxpr(jax.value_and_grad(
        lambda h, w: jnp.sum(fn(h, w)), argnums=(0, 1)))(hidden, head).jaxpr

  chunked = list(all_shapes(total(lambda h, w: token_logp(h, w, targets, chunk=chunk))))
  plain = list(all_shapes(total(lambda h, w: ref.token_logp(h, w, targets))))
  assert (tokens, 128) in chunked
  assert max(int(np.prod(s)) for s in chunked) == tokens * 128
  assert max(int(np.prod(s)) for s in plain) == tokens * vocabulary     # it sees what it looks for


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 10**6), st.integers(1, 10**6), st.integers(1, 10**6))
def test_a_block_holds_as_many_logits_as_the_chunk(tokens, vocabulary, chunk):
  width = block_width(tokens, vocabulary, chunk)
  assert 1 <= width <= vocabulary
  assert tokens * (width - 128) < chunk * vocabulary       # up to the rounding to 128 columns
  assert width == vocabulary or width % 128 == 0
  assert width == vocabulary or tokens > chunk


def test_unknown_implementations_are_refused():
  hidden, head, targets, _ = draw(2)
  with pytest.raises(ValueError, match="unknown token_logp implementation 'fast'"):
    token_logp(hidden, head, targets, chunk=2, impl='fast')


@pytest.mark.parametrize('chunk', [0, -1])
def test_chunks_without_tokens_are_refused(chunk):
  hidden, head, targets, _ = draw(2)
  with pytest.raises(ValueError, match='chunk'):
    token_logp(hidden, head, targets, chunk=chunk)
  with pytest.raises(ValueError, match='chunk'):
    log_collision(hidden, head, chunk=chunk)


def test_shapes_that_do_not_fit_are_refused():
  hidden, head, targets, _ = draw(2)
  for arrays in ((hidden, head.T, targets), (hidden, head, targets[:, :1]), (hidden[0], head,
                 targets[0])):
    with pytest.raises(ValueError, match='do not fit'):
      token_logp(*arrays, chunk=2)


@pytest.mark.parametrize('chunk, softcap', [(9, None), (100, 1.5)])
def test_collisions_and_entropies_match_float64(chunk, softcap):
  hidden, head, targets, upstream = draw(9)
  logits = np.asarray(hidden, np.float64) @ np.asarray(head, np.float64)
  if softcap is not None:
    logits = softcap * np.tanh(logits / softcap)
  p = np.exp(logits - logits.max(-1, keepdims=True))
  p /= p.sum(-1, keepdims=True)
  np.testing.assert_allclose(
      log_collision(hidden, head, chunk=chunk, softcap=softcap), np.log((p**2).sum(-1)),
      rtol=1e-5, atol=1e-5)
  (logp, entropy), pull = jax.vjp(functools.partial(
      token_logp, targets=targets, chunk=chunk, softcap=softcap, with_entropy=True), hidden, head)
  expected = float64(hidden, head, targets, upstream, softcap)
  np.testing.assert_allclose(logp, expected[0], rtol=1e-5, atol=1e-5)
  np.testing.assert_allclose(entropy, expected[3], rtol=1e-5, atol=1e-5)
  for x in pull((jnp.zeros_like(logp), jnp.ones_like(entropy))):      # a constant, as documented
    assert not x.any()


# Over devices: `rows` of them split the batch, `parts` the vocabulary.
LAYOUTS = [(1, 2), (1, 4), (1, 8), (2, 4), (8, 1)]
SHARDED = dict(b=8, v=1200)


@functools.cache
def on_one_device():
  hidden, head, targets, upstream = draw(5, **SHARDED)
  fn = functools.partial(token_logp, targets=targets, chunk=20, softcap=4.0)
  collisions = log_collision(hidden, head, chunk=20, softcap=4.0)
  return (*value_and_grads(fn, hidden, head, upstream),
          fn(hidden, head, with_entropy=True)[1], collisions)


def make_mesh(rows, parts, kind):
  return jax.make_mesh((rows, parts), ('rows', 'parts'), axis_types=(kind,) * 2,
                       devices=jax.devices()[:rows * parts])


@pytest.mark.parametrize('check_vma', [True, False])
@pytest.mark.parametrize('rows, parts', LAYOUTS)
def test_shares_of_the_vocabulary_equal_the_whole(rows, parts, check_vma):
  hidden, head, targets, upstream = draw(5, **SHARDED)

  @functools.partial(
      jax.shard_map, mesh=make_mesh(rows, parts, AxisType.Auto), check_vma=check_vma,
      in_specs=(P('rows'), P(None, 'parts'), P('rows')), out_specs=P('rows'))
  def part(h, w, y):
    logp, entropy = token_logp(
        h, w, y, chunk=10, softcap=4.0, axis_name='parts', with_entropy=True)
    return logp, entropy, log_collision(h, w, chunk=10, softcap=4.0, axis_name='parts')

  def total(h, w):
    out = part(h, w, targets)
    return jnp.sum(jnp.asarray(upstream, jnp.float32) * out[0]), out

  grads, (logp, *others) = jax.jit(jax.grad(total, argnums=(0, 1), has_aux=True))(hidden, head)
  for x, e in zip((logp, *grads, *others), on_one_device(), strict=True):
    np.testing.assert_allclose(x, e, rtol=1e-5, atol=1e-5)


def test_gradients_taken_inside_shard_map_are_whole():
  hidden, head, targets, upstream = draw(5, **SHARDED)

  @functools.partial(
      jax.shard_map, mesh=make_mesh(2, 4, AxisType.Auto),
      in_specs=(P('rows'), P(None, 'parts'), P('rows'), P('rows')),
      out_specs=(P('rows'), P(None, 'parts')))
  def gradients(h, w, y, g):
    return jax.grad(lambda h, w: jax.lax.psum(jnp.sum(g * token_logp(
        h, w, y, chunk=10, softcap=4.0, axis_name='parts')), 'rows'), argnums=(0, 1))(h, w)

  found = jax.jit(gradients)(hidden, head, targets, jnp.asarray(upstream, jnp.float32))
  for x, e in zip(found, on_one_device()[1:3], strict=True):
    np.testing.assert_allclose(x, e, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('check_vma', [True, False])
def test_garbage_leaks_nothing_over_devices_either(check_vma):
  hidden, head, targets, upstream = draw(5, **SHARDED)
  upstream[:, 3:] = 0
  part = jax.shard_map(
      lambda h, w, y: token_logp(h, w, y, chunk=10, axis_name='parts'), check_vma=check_vma,
      mesh=make_mesh(1, 2, AxisType.Auto), in_specs=(P(), P(None, 'parts'), P()), out_specs=P())
  found = value_and_grads(lambda h, w: part(h.at[:, 3:].set(1e38), w, targets)[:, :3], hidden, head,
                          upstream[:, :3])
  expected = float64(hidden, head, targets, upstream)
  check(found, (expected[0][:, :3], *expected[1:3]))


@pytest.mark.parametrize('rows, parts, over', [
    (2, 4, None), (8, 1, None), (2, 4, 'rows'), (4, 2, 'rows')])
def test_an_explicit_mesh_is_followed(rows, parts, over):
  """Layouts are read off the types; gradients lie as their arrays do, the rows of head too."""
  hidden, head, targets, upstream = draw(5, **SHARDED)
  mesh = make_mesh(rows, parts, AxisType.Explicit)
  with jax.set_mesh(mesh):
    hidden, upstream = (jax.device_put(x, P('rows')) for x in (hidden, jnp.float32(upstream)))
    head = jax.device_put(head, P(over, 'parts'))        # targets are not laid out

    def total(h, w):
      out = token_logp(h, w, targets, chunk=10, softcap=4.0)
      return jnp.sum(upstream * out), out
    grads, logp = jax.jit(jax.grad(total, argnums=(0, 1), has_aux=True))(hidden, head)
    assert grads[1].sharding.is_equivalent_to(head.sharding, 2)
    for x, e in zip((logp, *grads), on_one_device(), strict=False):
      np.testing.assert_allclose(x, e, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match='may be split by B and T'):
      token_logp(hidden, jax.device_put(head, P(None, 'rows')), targets, chunk=10)
    with pytest.raises(ValueError, match='axis_name'):
      token_logp(hidden, head, targets, chunk=10, axis_name='parts')
