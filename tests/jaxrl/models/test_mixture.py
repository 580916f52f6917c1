"""Experts against a loop over tokens in float64, both ways to compute them, sharded and not."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxrl.models.config import Experts
from jaxrl.models.mixture import mixture, one_by_one, route, sorted_rows
from jaxrl.parallel.mesh import make_mesh
from jaxrl.parallel.sharding import batch_sharding

B, T, D, F, E = 4, 6, 8, 12, 5


def draw(seed=0):
  rng = np.random.default_rng(seed)
  x = rng.normal(size=(B, T, D)).astype(np.float32)
  shapes = {'router': (D, E), 'expert_gate': (E, D, F), 'expert_up': (E, D, F),
            'expert_down': (E, F, D)}
  return x, {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def brute_force(x, w, experts):
  """Token by token, expert by expert, in float64."""
  x, w = x.astype(np.float64), {name: value.astype(np.float64) for name, value in w.items()}
  out = np.zeros_like(x)
  for token in np.ndindex(B, T):
    scores = x[token] @ w['router']
    p = np.exp(scores - scores.max())
    p /= p.sum()
    best = np.argsort(-p)[:experts.per_token]
    scale = p[best].sum() if experts.normalise else 1.0
    for e in best:
      gate = x[token] @ w['expert_gate'][e]
      hidden = gate / (1 + np.exp(-gate)) * (x[token] @ w['expert_up'][e])
      out[token] += p[e] / scale * (hidden @ w['expert_down'][e])
  return out


@pytest.mark.parametrize('experts', [Experts(E, 2), Experts(E, 1, False), Experts(E, 3, False),
                                     Experts(E, E)])
def test_values_match_float64(experts):
  x, w = draw()
  out = mixture(x, w, experts, jax.nn.silu)
  expected = brute_force(x, w, experts)
  np.testing.assert_allclose(out, expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize('crowded', [False, True])
def test_both_ways_agree_forward_and_backward(crowded):
  """Also where every token chooses the same experts and others have no row at all."""
  x, w = draw(1)
  if crowded:
    w['router'] = 0 * w['router'] + np.linspace(0, 1e-3, E, dtype=np.float32)
    x = np.abs(x)
  tokens = x.reshape(-1, D)

  def total(way, tokens, w):
    weights, chosen = route(tokens, w['router'], Experts(E, 2))
    out = way(tokens, weights, chosen, w['expert_gate'], w['expert_up'], w['expert_down'],
              activation=jax.nn.silu)
    return jnp.sum(jnp.sin(out))

  a, b = (jax.jit(jax.value_and_grad(functools.partial(total, way), argnums=(0, 1)))(tokens, w)
          for way in (one_by_one, sorted_rows))
  for one, other in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
    np.testing.assert_allclose(one, other, rtol=2e-5, atol=2e-5 * np.abs(other).max() + 1e-7)


@pytest.mark.parametrize('sizes', [(2, 2, 2), (1, 4, 2), (8, 1, 1)])
def test_sharded_equals_unsharded(sizes):
  data, fsdp, tensor = sizes
  x, w = draw(2)
  x = np.concatenate([x, -x])

  def total(x, w):
    return jnp.sum(jnp.sin(mixture(x, w, Experts(E, 2), jax.nn.silu)))

  expected = jax.value_and_grad(total, argnums=(0, 1))(x, w)
  mesh = make_mesh(data=data, fsdp=fsdp, tensor=tensor)
  rows = batch_sharding(mesh, 3)
  columns = {'router': (), 'expert_gate': (None, None, 'tensor'),
             'expert_up': (None, None, 'tensor'), 'expert_down': (None, 'tensor', None)}
  with jax.set_mesh(mesh):
    placed = {
        name: jax.device_put(value, NamedSharding(
            mesh, PartitionSpec(*columns[name]) if tensor > 1 else PartitionSpec()))
        for name, value in w.items()}
    found = jax.jit(jax.value_and_grad(total, argnums=(0, 1)))(jax.device_put(x, rows), placed)
  for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
    np.testing.assert_allclose(one, other, rtol=2e-5, atol=2e-5 * np.abs(other).max())


def test_a_token_does_not_depend_on_the_others():
  """No capacity: the same token gives the same bits alone and among others."""
  x, w = draw(3)
  experts = Experts(E, 2)
  whole = mixture(x, w, experts, jax.nn.silu)
  alone = mixture(x[1:2, 3:4], w, experts, jax.nn.silu)
  np.testing.assert_allclose(alone[0, 0], whole[1, 3], rtol=1e-5, atol=1e-5)
