"""Attention against loops in float64, gradients against the reference, and blocks visited."""

import dataclasses
import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from kernels.attention import Spans, attention, blocks, blockwise, causal, plan, ref, windowed

IMPLEMENTATIONS = ['ref', 'blockwise']
SHAPES = [  # B, T, S, N, K, H
    (2, 5, 5, 4, 2, 6),
    (1, 1, 7, 3, 3, 4),                # one query
    (3, 4, 9, 6, 1, 2),                # every head reads the same keys
    (1, 1, 1, 1, 1, 8),
    (2, 7, 3, 5, 5, 4),                # more queries than keys
]


def in_blocks(q, k, v, spans, *, block_q=4, block_k=3, window=None, **options):
  """Blocks so small that the shapes here have several, the last ones ragged."""
  spans = spans if window is None else windowed(spans, window)
  found = blocks.plan(spans, k.shape[1], block_q=block_q, block_k=block_k)
  return blockwise.attention(q, k, v, spans, found, **options)


FUNCTIONS = {'ref': ref.attention, 'blockwise': in_blocks}


def seen_keys(spans, keys, window):
  """Bool [B, T, keys], query by query."""
  fields = [np.asarray(getattr(spans, f.name)) for f in dataclasses.fields(spans)]
  keep = np.zeros((*fields[0].shape, keys), bool)
  for i, j in np.ndindex(fields[0].shape):
    prefix_start, prefix_end, start, end = (int(x[i, j]) for x in fields)
    seen = [*range(prefix_start, prefix_end), *range(start, end)]
    keep[i, j, seen[-window:] if window else seen] = True
  return keep


def brute_force(q, k, v, keep, scale, softcap=None):
  """Query by query in float64; a query with nothing to see gives zeros. keep [B, T, S]."""
  b, t, n, _ = q.shape
  out = np.zeros(q.shape, np.float64)
  for i, j, m in np.ndindex(b, t, n):
    g = m // (n // k.shape[2])
    seen = np.flatnonzero(keep[i, j])
    if len(seen):
      scores = np.array([scale * np.dot(q[i, j, m].astype(np.float64), k[i, s, g]) for s in seen])
      if softcap is not None:
        scores = softcap * np.tanh(scores / softcap)
      weights = np.exp(scores - scores.max())
      out[i, j, m] = (weights / weights.sum()) @ v[i, seen, g].astype(np.float64)
  return out


def draw(rng, b, t, s, n, kv, h):
  return (
      rng.normal(size=(b, t, n, h)).astype(np.float32),
      rng.normal(size=(b, s, kv, h)).astype(np.float32),
      rng.normal(size=(b, s, kv, h)).astype(np.float32))


def draw_spans(rng, b, t, s):
  """Any intervals in order, a third of them empty; the first query sees nothing."""
  bounds = np.sort(rng.integers(0, s + 1, (4, b, t)), axis=0).astype(np.int32)
  bounds[1] = np.where(rng.random((b, t)) < 0.3, bounds[0], bounds[1])
  bounds[3] = np.where(rng.random((b, t)) < 0.3, bounds[2], bounds[3])
  bounds[:, 0, 0] = 0
  return Spans(*map(jnp.asarray, bounds))


def packed_pairs(*units):
  """One row of (prompt, chosen, rejected) lengths: each prompt once, both responses after it."""
  rows, at = [], 0
  for prompt, *responses in units:
    first, end = at, at + prompt - 1
    rows += [(0, 0, first, i + 1) for i in range(first, end)]
    at = end
    for length in responses:
      rows += [(first, end, at, i + 1) for i in range(at, at + length)]
      at += length
  return Spans(*(jnp.asarray(x)[None] for x in np.array(rows, np.int32).T))


def of_weighted_sum(fn):
  """(q, k, v, weights, *rest) -> the sum of weighted outputs, and the gradients of q, k and v."""
  return jax.value_and_grad(
      lambda q, k, v, weights, *rest: jnp.sum(weights * fn(q, k, v, *rest)), argnums=(0, 1, 2))


@pytest.mark.parametrize('impl', IMPLEMENTATIONS)
@pytest.mark.parametrize('shape', SHAPES)
def test_values_match_float64(shape, impl):
  rng = np.random.default_rng(sum(shape))
  q, k, v = draw(rng, *shape)
  spans = draw_spans(rng, *shape[:3])
  keep = seen_keys(spans, shape[2], None)
  out = FUNCTIONS[impl](q, k, v, spans, scale=0.7)
  assert out.dtype == jnp.float32 and not keep[0, 0].any()
  np.testing.assert_allclose(out, brute_force(q, k, v, keep, 0.7), rtol=2e-6, atol=2e-6)
  assert (np.asarray(out)[0, 0] == 0).all()


@pytest.mark.parametrize('impl', IMPLEMENTATIONS)
@pytest.mark.parametrize('traced', [False, True])
@pytest.mark.parametrize('window, softcap', [(1, None), (3, 0.5), (100, 2.0), (None, 0.5)])
def test_windows_and_soft_caps_match_float64(window, softcap, traced, impl):
  """Windows static or traced; queries see the last keys of both intervals."""
  rng = np.random.default_rng(8)
  q, k, v = draw(rng, 2, 9, 9, 4, 2, 6)
  spans = draw_spans(rng, 2, 9, 9)
  expected = brute_force(q, k, v, seen_keys(spans, 9, window), 0.7, softcap)
  fn = functools.partial(FUNCTIONS[impl], q, k, v, spans, scale=0.7, softcap=softcap)
  out = jax.jit(lambda w: fn(window=w))(jnp.int32(window)) if traced and window else fn(
      window=window)
  np.testing.assert_allclose(out, expected, rtol=2e-6, atol=2e-6)


@functools.cache
def gradients(impl, softcap):
  """One compiled program for every drawing of the test below; the window is traced."""
  def total(q, k, v, spans, window):
    fn = functools.partial(FUNCTIONS[impl], softcap=softcap, scale=0.7, window=window)
    return fn(q, k, v, spans)
  return jax.jit(of_weighted_sum(total))


@pytest.mark.parametrize('softcap', [None, 0.8])
@hypothesis.settings(max_examples=25, deadline=None, derandomize=True)
@hypothesis.given(seed=st.integers(0, 2**32 - 1), window=st.sampled_from([1, 4, 7, 100]))
def test_gradients_match_the_reference(softcap, seed, window):
  """Rows that end within a block, and queries that see nothing."""
  rng = np.random.default_rng(seed)
  b, t, s = 2, 13, 11
  arguments = (*draw(rng, b, t, s, 4, 2, 6), rng.normal(size=(b, t, 4, 6)).astype(np.float32),
               draw_spans(rng, b, t, s), jnp.int32(window))
  value, grads = gradients('blockwise', softcap)(*arguments)
  expected, expected_grads = gradients('ref', softcap)(*arguments)
  np.testing.assert_allclose(value, expected, rtol=1e-5, atol=1e-5)
  for ours, theirs in zip(grads, expected_grads):
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=5e-6)
  assert (np.asarray(grads[0])[0, 0] == 0).all()


def test_rows_with_nothing_to_see_have_zero_gradients():
  rng = np.random.default_rng(0)
  q, k, v = draw(rng, 2, 3, 4, 2, 1, 4)
  zero = jnp.zeros((2, 3), jnp.int32)
  spans = Spans(zero, zero, zero, jnp.array([[0, 0, 0], [0, 2, 4]], jnp.int32))
  for impl in IMPLEMENTATIONS:
    total = of_weighted_sum(functools.partial(FUNCTIONS[impl], spans=spans, scale=0.5))
    grads = jax.jit(total)(q, k, v, jnp.ones_like(q))[1]
    assert all(np.isfinite(g).all() for g in grads)
    assert all((np.asarray(g)[0] == 0).all() for g in grads)
    assert all((np.asarray(g)[1] != 0).any() for g in grads)


@pytest.mark.parametrize('impl', IMPLEMENTATIONS)
def test_large_scores_do_not_overflow(impl):
  q = jnp.full((1, 2, 1, 4), 300.0)
  out = FUNCTIONS[impl](q, q, q, causal(1, 2), scale=1.0)
  np.testing.assert_allclose(out, 300.0)


@pytest.mark.parametrize('impl', IMPLEMENTATIONS)
def test_bfloat16_keeps_its_type_and_its_statistics_in_float32(impl):
  """An error of the blocks at most 1.5 times that of the plain form; both against float64."""
  rng = np.random.default_rng(0)
  q, k, v = (jnp.asarray(x, jnp.bfloat16) for x in draw(rng, 1, 64, 64, 2, 2, 8))
  spans = causal(1, 64)
  expected = brute_force(
      *(np.asarray(x, np.float32) for x in (q, k, v)), seen_keys(spans, 64, None), 0.3)

  def error(fn):
    with jax.numpy_dtype_promotion('strict'):
      (_, out), grads = jax.value_and_grad(
          lambda q, k, v: (jnp.sum(fn(q, k, v, spans, scale=0.3)), fn(q, k, v, spans, scale=0.3)),
          argnums=(0, 1, 2), has_aux=True)(q, k, v)
    assert out.dtype == jnp.bfloat16 and all(g.dtype == jnp.bfloat16 for g in grads)
    return np.abs(np.asarray(out, np.float32) - expected).mean()

  assert error(FUNCTIONS[impl]) <= 1.5 * error(ref.attention) < 0.005


def test_visited_blocks_are_those_that_hold_a_visible_key():
  """Packed pairs: exactly the mask's minimum, in ascending order, and far from all of the row."""
  spans = packed_pairs((40, 20, 23), (9, 30, 5), (25, 14, 40))
  length = spans.end.shape[1]
  for window in (None, 12):
    keep = seen_keys(spans, length, window)[0]
    found = blocks.plan(spans, length, window=window, block_q=8, block_k=16)
    padded = np.pad(keep, [(0, -length % 8), (0, -length % 16)])
    needed = padded.reshape(len(padded) // 8, 8, -1, 16).any((1, 3))
    for i, row in enumerate(needed):
      np.testing.assert_array_equal(
          found.visited[0, i, :found.counts[0, i]], np.flatnonzero(row))
    assert found.counts.sum() < 0.4 * needed.size


def test_one_plan_serves_all_layers_and_changes_nothing():
  rng = np.random.default_rng(3)
  q, k, v = draw(rng, 1, 300, 300, 2, 1, 4)
  spans = packed_pairs((120, 80, 101))
  shared = plan(spans, 300, group=2, window=50)
  assert shared is not None
  assert (shared['blockwise'].block_q, shared['blockwise'].block_k) == (128, 128)
  options = {'scale': 0.5, 'window': 50}
  chosen = attention(q, k, v, spans, **options)
  np.testing.assert_array_equal(attention(q, k, v, spans, plan=shared, **options), chosen)
  np.testing.assert_allclose(
      chosen, attention(q, k, v, spans, impl='ref', **options), rtol=2e-6, atol=2e-6)
  short = functools.partial(plan, causal(1, 20), 20, group=1)
  assert short() is None and sorted(short(impl='blockwise')) == ['blockwise']


def test_no_array_of_queries_by_keys_and_one_forward_under_remat():
  """With the policy that saves 'attn' the backward pass has its own two loops and no others."""
  t, fn = 64, functools.partial(in_blocks, scale=0.5, block_q=16, block_k=16)
  q = jnp.ones((1, t, 2, 4))

  def program(policy):
    def of_policy(q, k, v):
      return jax.checkpoint(lambda q, k, v: fn(q, k, v, causal(1, t)), policy=policy)(
          jnp.sin(q), k, v)
    total = of_weighted_sum(of_policy)
    return jax.jit(lambda q, k, v: total(q, k, v, q)).lower(q, q, q).as_text()

  saving = program(jax.checkpoint_policies.save_only_these_names('attn'))
  assert saving.count('stablehlo.while') == 4
  assert program(jax.checkpoint_policies.nothing_saveable).count('stablehlo.while') == 6
  assert f'{t}x{t}' not in saving


def test_sharded_by_rows_heads_and_queries_equals_unsharded():
  """Keys are whole on every device that has a part of the queries; their gradients are summed."""
  rng = np.random.default_rng(4)
  q, k, v = draw(rng, 2, 32, 32, 4, 2, 4)
  weights = rng.normal(size=q.shape).astype(np.float32)
  spans = jax.tree.map(lambda x: jnp.concatenate([x, x]), packed_pairs((12, 9, 12)))
  fn = of_weighted_sum(functools.partial(in_blocks, scale=0.5))
  expected = jax.jit(fn)(q, k, v, weights, spans)
  mesh = jax.make_mesh((2, 2, 2), ('data', 'tensor', 'sequence'),
                       axis_types=(jax.sharding.AxisType.Auto,) * 3)
  rows, keys = P('data', 'sequence', 'tensor'), P('data', None, 'tensor')
  sharded = jax.shard_map(
      functools.partial(in_blocks, scale=0.5), mesh=mesh,
      in_specs=(rows, keys, keys, P('data', 'sequence')), out_specs=rows)
  found = jax.jit(of_weighted_sum(sharded))(q, k, v, weights, spans)
  for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(expected)):
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=5e-6)


def test_unknown_implementations_and_plans_that_do_not_fit_are_refused():
  x = jnp.zeros((1, 4, 1, 2))
  with pytest.raises(ValueError, match="unknown attention implementation 'fast'.*'ref'"):
    attention(x, x, x, causal(1, 4), scale=1.0, impl='fast')
  with pytest.raises(ValueError, match='takes no plan'):
    attention(x, x, x, causal(1, 4), scale=1.0, impl='ref',
              plan={'blockwise': blocks.plan(causal(1, 4), 4)})
  with pytest.raises(ValueError, match="a plan for .'blockwise'., not for .* 'tpu'"):
    attention(x, x, x, causal(1, 4), scale=1.0, impl='tpu',
              plan={'blockwise': blocks.plan(causal(1, 4), 4)})
  with pytest.raises(ValueError, match='plan of 2 x 1 blocks.*1 x 1'):
    attention(x, x, x, causal(1, 4), scale=1.0,
              plan={'blockwise': blocks.plan(causal(1, 9), 4, block_q=5)})
  with pytest.raises(ValueError, match='at least 1 token'):
    blocks.plan(causal(1, 4), 4, block_q=0)
