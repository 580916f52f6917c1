"""Attention against loops in float64, and one-token decoding against attention."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels.attention import attention

SHAPES = [  # B, T, S, N, K, H
    (2, 5, 5, 4, 2, 6),
    (1, 1, 7, 3, 3, 4),                # one query
    (3, 4, 9, 6, 1, 2),                # every head reads the same keys
    (1, 1, 1, 1, 1, 8),
    (2, 7, 3, 5, 5, 4),                # more queries than keys
]


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


@pytest.mark.parametrize('shape', SHAPES)
@pytest.mark.parametrize('segmented', [False, True])
def test_values_match_float64(shape, segmented):
  """Positions and segments are drawn, so some queries come before every key or stand alone."""
  rng = np.random.default_rng(sum(shape))
  b, t, s = shape[:3]
  q, k, v = draw(rng, *shape)
  q_positions = rng.integers(0, s + 1, (b, t)).astype(np.int32)
  k_positions = (1 + np.stack([rng.permutation(s) for _ in range(b)])).astype(np.int32)
  q_positions[0, 0] = 0                                    # sees nothing
  keep = k_positions[:, None] <= q_positions[:, :, None]
  segments = {}
  if segmented:
    q_segments, k_segments = (rng.integers(0, 3, (b, n)).astype(np.int32) for n in (t, s))
    keep &= q_segments[:, :, None] == k_segments[:, None]
    segments = {'q_segments': q_segments, 'k_segments': k_segments}
  out = attention(
      q, k, v, q_positions=q_positions, k_positions=k_positions, scale=0.7, **segments)
  assert out.dtype == jnp.float32 and not keep[0, 0].any()
  np.testing.assert_allclose(out, brute_force(q, k, v, keep, 0.7), rtol=2e-6, atol=2e-6)
  assert (np.asarray(out)[0, 0] == 0).all()


def test_rows_with_nothing_to_see_have_zero_gradients():
  rng = np.random.default_rng(0)
  q, k, v = draw(rng, 2, 3, 4, 2, 1, 4)
  positions = np.arange(1, 5, dtype=np.int32)[None].repeat(2, 0)
  q_positions = np.array([[0, 0, 0], [0, 2, 4]], np.int32)

  def total(q, k, v):
    out = attention(q, k, v, q_positions=q_positions, k_positions=positions, scale=0.5)
    return jnp.sum(jnp.sin(out))

  grads = jax.jit(jax.grad(total, argnums=(0, 1, 2)))(q, k, v)
  assert all(np.isfinite(g).all() for g in grads)
  assert all((np.asarray(g)[0] == 0).all() for g in grads)
  assert all((np.asarray(g)[1] != 0).any() for g in grads)


def test_large_scores_do_not_overflow():
  q = jnp.full((1, 2, 1, 4), 300.0)
  positions = jnp.arange(2, dtype=jnp.int32)[None]
  out = attention(q, q, q, q_positions=positions, k_positions=positions, scale=1.0)
  np.testing.assert_allclose(out, 300.0)


def test_bfloat16_keeps_its_type_and_its_statistics_in_float32():
  rng = np.random.default_rng(0)
  q, k, v = (jnp.asarray(x, jnp.bfloat16) for x in draw(rng, 1, 64, 64, 2, 2, 8))
  positions = jnp.arange(64, dtype=jnp.int32)[None]
  with jax.numpy_dtype_promotion('strict'):
    out = attention(q, k, v, q_positions=positions, k_positions=positions, scale=0.3)
  assert out.dtype == jnp.bfloat16
  keep = np.tril(np.ones((64, 64), bool))[None]
  expected = brute_force(*(np.asarray(x, np.float32) for x in (q, k, v)), keep, 0.3)
  np.testing.assert_allclose(np.asarray(out, np.float32), expected, atol=0.03)


def test_unknown_implementations_are_refused():
  x = jnp.zeros((1, 1, 1, 2))
  positions = jnp.zeros((1, 1), jnp.int32)
  with pytest.raises(ValueError, match="unknown attention implementation 'fast'.*'ref'"):
    attention(x, x, x, q_positions=positions, k_positions=positions, scale=1.0, impl='fast')


def test_segments_of_one_side_only_are_refused():
  x = jnp.zeros((1, 1, 1, 2))
  positions = jnp.zeros((1, 1), jnp.int32)
  with pytest.raises(ValueError, match='segments'):
    attention(
        x, x, x, q_positions=positions, k_positions=positions, q_segments=positions, scale=1.0)


@pytest.mark.parametrize('traced', [False, True])
@pytest.mark.parametrize('window, softcap', [(1, None), (3, 0.5), (100, 2.0), (None, 0.5)])
def test_windows_and_soft_caps_match_float64(window, softcap, traced):
  """Windows static or traced."""
  rng = np.random.default_rng(8)
  q, k, v = draw(rng, 2, 9, 9, 4, 2, 6)
  positions = np.arange(9, dtype=np.int32)[None].repeat(2, 0)
  distance = positions[:, :, None] - positions[:, None]
  keep = (distance >= 0) & (distance < (window or 9))
  expected = brute_force(q, k, v, keep, 0.7, softcap)
  given = jnp.int32(window) if traced and window else window
  out = attention(q, k, v, q_positions=positions, k_positions=positions, scale=0.7, window=given,
                  softcap=softcap)
  np.testing.assert_allclose(out, expected, rtol=2e-6, atol=2e-6)
