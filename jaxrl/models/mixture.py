"""A mixture of experts (Shazeer et al. 2017) without capacity: no token is ever dropped.

On accelerators tokens are sorted by expert, each expert multiplies its own run of rows
(`ragged_dot`), and the results return to their tokens: the work is that of the chosen experts
alone. On CPU XLA expands `ragged_dot` into masked copies, and one expert after another over all
tokens takes a third of the time forward and two thirds with the backward pass (2,048 tokens, 2 of
8 experts of 256 x 512; benchmarks/mixture.py).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp

from jaxrl.models.config import Experts
from jaxrl.parallel.sharding import over_devices


def mixture(
    x: jax.Array,                             # [B, T, D]
    w: Mapping[str, jax.Array],               # router, expert_gate, expert_up, expert_down
    experts: Experts,
    activation: Callable[[jax.Array], jax.Array],
) -> jax.Array:                               # [B, T, D]
  """Weighted sum over each token's experts of down(activation(gate x) * up x).

  On a mesh every device routes its own tokens; experts are split over `tensor` by columns.
  """
  local = functools.partial(_local_mixture, experts=experts, activation=activation)
  return over_devices(
      local, ('batch', 'length', 'embed'),
      x, (w['router'], (None, None)),
      (w['expert_gate'], ('experts', None, 'mlp')), (w['expert_up'], ('experts', None, 'mlp')),
      (w['expert_down'], ('experts', 'mlp', None)), summed='mlp')


def route(
    x: jax.Array,             # [T, D]
    router: jax.Array,        # [D, E]
    experts: Experts,
) -> tuple[jax.Array, jax.Array]:
  """(weights [T, k] in the type of x, experts [T, k] int32) of the k likeliest experts."""
  scores = jnp.einsum('td,de->te', x, router).astype(jnp.float32)
  weights, chosen = jax.lax.top_k(jax.nn.softmax(scores, axis=-1), experts.per_token)
  if experts.normalise:
    weights = weights / jnp.sum(weights, axis=-1, keepdims=True)
  return weights.astype(x.dtype), chosen


def _local_mixture(x, router, gate, up, down, *, experts: Experts, activation) -> jax.Array:
  b, t, d = x.shape
  tokens = x.reshape(b * t, d)
  weights, chosen = route(tokens, router, experts)
  out = jax.lax.platform_dependent(
      tokens, weights, chosen, gate, up, down,
      cpu=functools.partial(one_by_one, activation=activation),
      default=functools.partial(sorted_rows, activation=activation))
  return out.reshape(b, t, d)


def sorted_rows(tokens, weights, chosen, gate, up, down, *, activation) -> jax.Array:
  """[T, D]; each expert multiplies the rows of the tokens that chose it."""
  per_token = chosen.shape[1]
  order = jnp.argsort(chosen.reshape(-1), stable=True)                    # [T k]
  rows = tokens[order // per_token]
  sizes = jnp.bincount(chosen.reshape(-1), length=gate.shape[0]).astype(jnp.int32)
  hidden = activation(jax.lax.ragged_dot(rows, gate, sizes)) * jax.lax.ragged_dot(rows, up, sizes)
  out = jax.lax.ragged_dot(hidden, down, sizes)
  by_token = out[jnp.argsort(order)].reshape(*chosen.shape, -1)
  return jnp.sum(by_token * weights[..., None], axis=1)


def one_by_one(tokens, weights, chosen, gate, up, down, *, activation) -> jax.Array:
  """[T, D]; every expert over all tokens, with weight 0 for those that did not choose it."""

  def part(expert):
    n, w_gate, w_up, w_down = expert
    share = jnp.sum(jnp.where(chosen == n, weights, jnp.zeros((), weights.dtype)), axis=1)
    return (activation(tokens @ w_gate) * (tokens @ w_up) * share[:, None]) @ w_down

  everything = (jnp.arange(gate.shape[0], dtype=chosen.dtype), gate, up, down)
  first, rest = jax.tree.map(lambda x: x[0], everything), jax.tree.map(lambda x: x[1:], everything)
  # Starting from the first part and not from zeros, the sum is split over devices as the parts are.
  return jax.lax.scan(lambda total, expert: (total + part(expert), None), part(first), rest)[0]
