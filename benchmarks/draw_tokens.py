"""Time of drawing one token per slot from logits, beside sorting all of them and noise for all.

    python -m benchmarks.draw_tokens [--rows=32] [--vocabulary=32000] [--repeats=30]

`ours` is `jaxrl/sampling/draw.py`; `direct` sorts the whole vocabulary for top-k and top-p and adds
Gumbel noise to every logit. Logits are normal with a standard deviation of 2.5, so that a share of
0.95 is some 6,000 of 32,000 tokens. Printed per setting: the least wall-clock milliseconds of one
call on the first device, both sides taking turns. The log-prob of the drawn token is timed apart.
"""

from __future__ import annotations

import argparse
import functools
import time
from typing import Any

import jax
import jax.numpy as jnp

from jaxrl.sampling.draw import draw_tokens, picked_logprob

SETTINGS: dict[str, dict[str, Any]] = {
    'no filter': {},
    'top_p 0.95': {'top_p': 0.95},
    'top_k 50': {'top_k': 50},
    'top_k 50, top_p 0.95': {'top_k': 50, 'top_p': 0.95},
    'top_k 1000': {'top_k': 1000},
    'min_p 0.1': {'min_p': 0.1},
}
OFF: dict[str, Any] = {'top_k': None, 'top_p': 1.0, 'min_p': 0.0}


def draw_directly(keys, logits, temperature, *, top_k, top_p, min_p):
  """One token per row, with a sort where top-k or top-p ask for it."""
  scaled = logits / temperature[:, None]
  border = jnp.full_like(temperature, -jnp.inf)
  if top_k is not None or top_p < 1:
    ordered = jnp.sort(scaled, axis=-1, descending=True)[:, :top_k]
    shares = jax.nn.softmax(ordered, axis=-1)
    before = jnp.cumsum(shares, axis=-1) - shares
    border = jnp.min(jnp.where(before < top_p, ordered, jnp.inf), axis=-1)
  if min_p > 0:
    border = jnp.maximum(border, jnp.max(scaled, axis=-1) + jnp.log(min_p))
  noise = jax.vmap(lambda key: jax.random.gumbel(key, logits.shape[1:], jnp.float32))(keys)
  return jnp.argmax(jnp.where(scaled >= border[:, None], scaled + noise, -jnp.inf), axis=-1)


def least_milliseconds(functions, arguments, repeats):
  """The least time of one call of each function; they take turns."""
  for function in functions:
    jax.block_until_ready(function(*arguments))
  least = [float('inf')] * len(functions)
  for _ in range(repeats):
    for n, function in enumerate(functions):
      start = time.perf_counter()
      jax.block_until_ready(function(*arguments))
      least[n] = min(least[n], 1000 * (time.perf_counter() - start))
  return least


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--rows', type=int, default=32)
  parser.add_argument('--vocabulary', type=int, default=32000)
  parser.add_argument('--repeats', type=int, default=30)
  options = parser.parse_args()
  logits = 2.5 * jax.random.normal(jax.random.key(0), (options.rows, options.vocabulary))
  keys = jax.random.split(jax.random.key(1), options.rows)
  arguments = (keys, logits, jnp.ones((options.rows,)))
  print(f'[{options.rows}, {options.vocabulary}] float32, {jax.devices()[0].device_kind}, '
        f'jax {jax.__version__}')
  print(f'{"milliseconds":24}{"ours":>8}{"direct":>10}')
  for name, setting in SETTINGS.items():
    both = [jax.jit(functools.partial(f, **(OFF | setting))) for f in (draw_tokens, draw_directly)]
    ours, direct = least_milliseconds(both, arguments, options.repeats)
    print(f'{name:24}{ours:8.2f}{direct:10.2f}', flush=True)
  tokens = jnp.zeros((options.rows,), jnp.int32)
  [least] = least_milliseconds([jax.jit(picked_logprob)], (logits, tokens), options.repeats)
  print(f'{"log-prob":24}{least:8.2f}')


if __name__ == '__main__':
  main()
