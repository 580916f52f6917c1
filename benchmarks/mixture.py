"""A mixture of experts two ways, beside one dense MLP of an expert's size.

    python -m benchmarks.mixture

Prints seconds of the forward pass and of forward and backward on this backend: experts one after
another over all tokens (what CPUs run), rows sorted by expert (`ragged_dot`, what accelerators
run), and the dense MLP.
"""

from __future__ import annotations

import functools
import time

import jax

from jaxrl.models.config import Experts
from jaxrl.models.mixture import one_by_one, route, sorted_rows

TOKENS, D_MODEL, D_MLP, EXPERTS = 2048, 256, 512, Experts(count=8, per_token=2)
REPEATS = 3


def mixed(way, x, w):
  weights, chosen = route(x, w['router'], EXPERTS)
  return way(x, weights, chosen, w['gate'], w['up'], w['down'], activation=jax.nn.silu).sum()


def dense(x, w):
  return ((jax.nn.silu(x @ w['gate'][0]) * (x @ w['up'][0])) @ w['down'][0]).sum()


def seconds(function, *arguments) -> float:
  """The best of a few calls after the first."""
  jax.block_until_ready(function(*arguments))
  taken = []
  for _ in range(REPEATS):
    start = time.perf_counter()
    jax.block_until_ready(function(*arguments))
    taken.append(time.perf_counter() - start)
  return min(taken)


def main() -> None:
  shapes = {'router': (D_MODEL, EXPERTS.count), 'gate': (EXPERTS.count, D_MODEL, D_MLP),
            'up': (EXPERTS.count, D_MODEL, D_MLP), 'down': (EXPERTS.count, D_MLP, D_MODEL)}
  keys = jax.random.split(jax.random.key(0), len(shapes) + 1)
  w = {name: jax.random.normal(key, shape) / shape[-2] ** 0.5
       for (name, shape), key in zip(shapes.items(), keys[1:], strict=True)}
  x = jax.random.normal(keys[0], (TOKENS, D_MODEL))
  print(f'{jax.default_backend()}: {TOKENS} tokens, {EXPERTS.per_token} of {EXPERTS.count} experts '
        f'of {D_MODEL} x {D_MLP}, float32')
  print('| way | forward, s | forward and backward, s |')
  print('|---|---|---|')
  for name, function in (
      ('one by one', functools.partial(mixed, one_by_one)),
      ('sorted rows', functools.partial(mixed, sorted_rows)), ('one dense MLP', dense)):
    both = jax.jit(jax.value_and_grad(function, argnums=(0, 1)))
    print(f'| {name} | {seconds(jax.jit(function), x, w):.4f} | {seconds(both, x, w):.4f} |')


if __name__ == '__main__':
  main()
