"""Log-probs for TPUs: interpreted with races looked for, and compiled where libtpu is."""

import functools
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from kernels.token_logp import token_logp, tpu

B, D = 3, 8


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch):
  """Tiles of 8 tokens and 128 columns, so that small arrays have several, ragged at both ends."""
  monkeypatch.setattr(tpu, 'tile_sizes', lambda hidden, head: (
      min(8, hidden.shape[0]), min(128, head.shape[1])))


def draw(t, v, dtype=jnp.float32, *, b=B, d=D, seed=0):
  rng = np.random.default_rng((t, seed))
  return (
      jnp.asarray(rng.normal(size=(b, t, d)), dtype), jnp.asarray(rng.normal(size=(d, v)), dtype),
      jnp.asarray(rng.integers(0, v, (b, t)), jnp.int32),
      jnp.asarray(rng.normal(size=(b, t)) * (rng.random((b, t)) < 0.8), jnp.float32))


def float64(hidden, head, targets, upstream, softcap=None):
  """Values, gradients of sum(upstream * values) by hand, and entropies."""
  hidden, head = np.asarray(hidden, np.float64), np.asarray(head, np.float64)
  logits = hidden @ head
  slope = 1.0
  if softcap is not None:
    slope = 1 - np.tanh(logits / softcap) ** 2
    logits = softcap * np.tanh(logits / softcap)
  top = logits.max(-1, keepdims=True)
  log_z = top + np.log(np.exp(logits - top).sum(-1, keepdims=True))
  one_hot = np.arange(head.shape[1]) == np.asarray(targets)[..., None]
  p = np.exp(logits - log_z)
  d_logits = np.asarray(upstream, np.float64)[..., None] * (one_hot - p) * slope
  return (np.where(one_hot.any(-1), (logits * one_hot).sum(-1) - log_z[..., 0], -log_z[..., 0]),
          d_logits @ head.T, np.einsum('btd,btv->dv', hidden, d_logits),
          -(p * (logits - log_z)).sum(-1))


def weighted_gradients(fn, hidden, head, upstream):
  """(values, d hidden, d head, entropies) of sum(upstream * values)."""
  def total(h, w):
    out = fn(h, w)
    return jnp.sum(upstream * (out[0] if isinstance(out, tuple) else out)), out

  grads, out = jax.jit(jax.grad(total, (0, 1), has_aux=True))(hidden, head)
  return (out[0], *grads, out[1]) if isinstance(out, tuple) else (out, *grads)


def run(hidden, head, targets, upstream, *, chunk, softcap=None, with_entropy=True):
  """The kernels' results, interpreted; fails where two of their copies or reads race."""
  fn = functools.partial(token_logp, targets=targets, chunk=chunk, softcap=softcap,
                         with_entropy=with_entropy, impl='tpu')
  with pltpu.force_tpu_interpret_mode(pltpu.InterpretParams(detect_races=True)):
    found = jax.block_until_ready(weighted_gradients(fn, hidden, head, upstream))
  from jax._src.pallas.mosaic.interpret import interpret_pallas_call
  assert not interpret_pallas_call.races.races_found
  return found


def check(found, expected, atol=1e-5):
  for name, x, e in zip(('values', 'd hidden', 'd head', 'entropy'), found, expected, strict=False):
    np.testing.assert_allclose(x, e, rtol=1e-4, atol=atol * max(1, np.abs(e).max()), err_msg=name)


@pytest.mark.parametrize('t, v, chunk, softcap', [
    (6, 300, 8, 1.5),         # three tiles of tokens; three blocks of the vocabulary, one ragged
    (1, 7, 1, None)])
def test_values_and_gradients_match_float64(t, v, chunk, softcap):
  arrays = draw(t, v)
  check(run(*arrays, chunk=chunk, softcap=softcap), float64(*arrays, softcap))


@pytest.mark.slow
@settings(max_examples=25, deadline=None, derandomize=True)
@given(b=st.integers(1, 3), t=st.integers(1, 9), d=st.integers(1, 9),
       v=st.sampled_from([1, 2, 127, 128, 129, 256, 300, 511]), chunk=st.integers(1, 30),
       softcap=st.sampled_from([None, 0.7, 5.0]), seed=st.integers(0, 99),
       with_entropy=st.booleans())
def test_any_shape_matches_float64(b, t, d, v, chunk, softcap, seed, with_entropy):
  hidden, *rest = draw(t, v, b=b, d=d, seed=seed)
  found = run(4 * hidden, *rest, chunk=chunk, softcap=softcap, with_entropy=with_entropy)
  check(found, float64(4 * hidden, *rest, softcap))


def test_positions_without_a_cotangent_leak_nothing_and_stray_targets_pick_nothing():
  hidden, head, targets, upstream = draw(4, 200)
  upstream = upstream.at[:, 2:].set(0.0)
  targets = targets.at[0, 0].set(-1).at[1, 0].set(200)
  found = run(hidden.at[:, 2:].set(jnp.nan), head, targets, upstream, chunk=6)
  expected = float64(hidden, head, targets, upstream)
  check((found[0][:, :2], *found[1:3], found[3][:, :2]),
        (expected[0][:, :2], *expected[1:3], expected[3][:, :2]))
  assert np.isnan(found[0][:, 2:]).all()


def test_bfloat16_errors_are_those_of_plain_bfloat16():
  hidden, head, targets, upstream = draw(8, 300, jnp.bfloat16, d=64)
  head = head / 4
  expected = float64(hidden, head, targets, upstream, 3.0)

  def plain(h, w):                      # everything in bfloat16 but the softmax
    logits = 3.0 * jnp.tanh((h @ w).astype(jnp.float32) / 3.0)
    return jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], axis=-1)[..., 0]

  ours = run(hidden, head, targets, upstream, chunk=12, softcap=3.0)
  assert [x.dtype for x in ours] == [jnp.float32, jnp.bfloat16, jnp.bfloat16, jnp.float32]
  for x, y, e in zip(ours, weighted_gradients(plain, hidden, head, upstream), expected):
    error, allowed = (np.sqrt(np.mean((np.asarray(a, np.float64) - e) ** 2)) for a in (x, y))
    assert error <= 1.5 * allowed, (error, allowed)
  np.testing.assert_allclose(ours[0], expected[0], rtol=1e-5, atol=1e-5)    # float32 sums


def lowered(function, *arrays):
  return jax.jit(function).trace(*arrays).lower(lowering_platforms=('tpu',)).as_text()


def test_it_runs_where_it_is_named_and_nowhere_else():
  hidden, head, targets, _ = draw(2, 300)
  for impl, calls in ((None, 0), ('chunked', 0), ('tpu', 1)):
    text = lowered(functools.partial(token_logp, chunk=2, impl=impl), hidden, head, targets)
    assert text.count('tpu_custom_call') == calls


def test_no_logits_of_all_tokens_are_held():
  """Forward none at all; backward a block of columns, in the type of the hidden states."""
  hidden, head, targets, _ = draw(16, 600, jnp.bfloat16)
  tokens = 16 * B

  def grads(h, w):
    return jax.grad(lambda h, w: token_logp(h, w, targets, chunk=11, impl='tpu').sum(), (0, 1))(
        h, w)

  text = lowered(grads, hidden, head)
  assert f'tensor<{tokens}x128xbf16>' in text                # the block: 5 of them, one ragged
  for width in (600, 640, 512):
    assert f'tensor<{tokens}x{width}x' not in text
  # In float32 all there is of [tokens, 128] are statistics, of the forward pass.
  assert 'logp_forward' in text and 'logp_backward' in text


@pytest.mark.parametrize('check_vma', [True, False])
def test_a_split_vocabulary_lowers_with_gradients(check_vma):
  hidden, head, targets, _ = draw(4, 512)
  mesh = jax.make_mesh((2,), ('parts',), axis_types=(AxisType.Auto,))
  part = jax.shard_map(
      lambda h, w, y: token_logp(h, w, y, chunk=6, axis_name='parts', impl='tpu'), mesh=mesh,
      in_specs=(P(), P(None, 'parts'), P()), out_specs=P(), check_vma=check_vma)
  text = lowered(jax.grad(lambda h, w: part(h, w, targets).sum(), (0, 1)), hidden, head)
  assert text.count('tpu_custom_call') == 2


def test_what_it_cannot_do_is_refused():
  hidden, head, targets, _ = draw(2, 300)
  with pytest.raises(ValueError, match="'tpu' takes float32 and bfloat16; got float16"):
    token_logp(hidden, head.astype(jnp.float16), targets, chunk=2, impl='tpu')
  mesh = jax.make_mesh((2,), ('rows',), axis_types=(AxisType.Explicit,))
  with jax.set_mesh(mesh), pytest.raises(ValueError, match="rows are split over 'rows'"):
    token_logp(hidden, jax.device_put(head, P('rows', None)), targets, chunk=2, impl='tpu')


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec('libtpu') is None,
                    reason='libtpu, which compiles for TPUs, is not installed')
@pytest.mark.parametrize('chip', ['v5e:2x2', 'v5p:2x2x1', 'v6e:2x2'])
def test_it_compiles_within_fast_memory(chip, monkeypatch):
  """Temporaries are a block of d loss / d logits, and d hidden in float32."""
  monkeypatch.undo()          # the tiles that chips get
  from benchmarks.token_logp_tpu import compile_case
  from benchmarks.tpu_compile import make_tpu_mesh
  found = compile_case(functools.partial(token_logp, chunk=512, impl='tpu'), True,
                       (4096, 2048, 16384), make_tpu_mesh(chip))
  assert set(found.fast_memory) == {'logp_forward', 'logp_backward'}
  assert 2**22 < max(found.fast_memory.values()) < tpu.FAST_MEMORY
  assert found.temporary < 2 * (4096 * 2048 * (2 + 4) + 4096 * 2048 * 4)
