"""Time of one layer's attention for preference pairs: packed, prompts once, against a row each.

    python -m benchmarks.attention_pairs [--prompt=512] [--response=256] [--dtype=float32]

The packed row holds all pairs, each as its prompt and then both responses; separate rows hold the
prompt with one response each. Least milliseconds of all turns, programs taking turns: forward
alone, and forward with the gradients of queries, keys and values. `scores` is how many the
blockwise form computes per head over how many the mask holds.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import rich.box
import rich.console
import rich.table

from kernels.attention import Spans, attention, blocks, causal

HEAD = 64


def packed(prompt: int, response: int, pairs: int) -> Spans:
  """One row of `pairs` units: the prompt but its last id, then twice that id and a response."""
  rows, at = [], 0
  for _ in range(pairs):
    first, end = at, at + prompt - 1
    rows += [(0, 0, first, i + 1) for i in range(first, end)]
    for start in (end, end + response):
      rows += [(first, end, start, i + 1) for i in range(start, start + response)]
    at = end + 2 * response
  return Spans(*(jnp.asarray(x)[None] for x in np.array(rows, np.int32).T))


def inputs(spans: Spans, heads: int, kv: int, dtype: str) -> tuple[jax.Array, ...]:
  b, t = spans.end.shape
  shapes = [(b, t, n, HEAD) for n in (heads, kv, kv, heads)]
  return tuple(jax.random.normal(jax.random.key(n), shape).astype(dtype)
               for n, shape in enumerate(shapes))


def programs(spans: Spans, arrays: tuple[jax.Array, ...], impl: str) -> list:
  """(compiled, arguments) of the forward pass and of both."""
  def forward(q, k, v, spans):
    return attention(q, k, v, spans, scale=HEAD ** -0.5, impl=impl)

  def total(q, k, v, weights, spans):
    return jnp.sum((weights * forward(q, k, v, spans)).astype(jnp.float32))

  both = jax.grad(total, argnums=(0, 1, 2))
  return [(jax.jit(fn).lower(*args, spans).compile(), (*args, spans))
          for fn, args in ((forward, arrays[:3]), (both, arrays))]


def least_ms(found: dict[Any, tuple], turns: int) -> dict[Any, float]:
  least = dict.fromkeys(found, float('inf'))
  for _ in range(turns):
    for name, (compiled, args) in found.items():
      begin = time.perf_counter()
      jax.block_until_ready(compiled(*args))
      least[name] = min(least[name], time.perf_counter() - begin)
  return {name: 1e3 * seconds for name, seconds in least.items()}


def scores(spans: Spans) -> float:
  """Scores computed blockwise over visible ones."""
  keys = spans.end.shape[1]
  plan = blocks.plan(spans, keys)
  visible = jnp.sum(spans.prefix_end - spans.prefix_start + spans.end - spans.start)
  return float(jnp.sum(plan.counts) * plan.block_q * plan.block_k / visible)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--prompt', type=int, default=512)
  parser.add_argument('--response', type=int, default=256)
  parser.add_argument('--pairs', type=int, default=3)
  parser.add_argument('--dtype', choices=['float32', 'bfloat16'], default='float32')
  parser.add_argument('--impl', nargs='+', default=['blockwise', 'ref'])
  parser.add_argument('--turns', type=int, default=7)
  args = parser.parse_args()
  layouts = {'separate': causal(2 * args.pairs, args.prompt + args.response - 1),
             'packed': packed(args.prompt, args.response, args.pairs)}
  found = {}
  for heads, kv in ((8, 8), (8, 2)):
    for layout, spans in layouts.items():
      arrays = inputs(spans, heads, kv, args.dtype)
      for impl in args.impl:
        for n, program in enumerate(programs(spans, arrays, impl)):
          found[impl, heads, kv, layout, n] = program
  least = least_ms(found, args.turns)
  view = rich.table.Table(box=rich.box.SIMPLE, title=(
      f'{args.pairs} pairs, prompts of {args.prompt}, responses of {args.response}, '
      f'heads of {HEAD}, {args.dtype}, {jax.devices()[0].device_kind}; ms'))
  for name in ('implementation', 'heads', 'layout', 'tokens', 'scores', 'forward', 'and backward'):
    view.add_column(name, justify='right')
  for (impl, heads, kv, layout, n), ms in least.items():
    if n == 0:
      spans = layouts[layout]
      view.add_row(impl, f'{heads}/{kv}', layout, str(spans.end.size),
                   f'{scores(spans):.2f}' if impl == 'blockwise' else '', f'{ms:.1f}',
                   f'{least[impl, heads, kv, layout, 1]:.1f}')
  rich.console.Console(width=110).print(view)


if __name__ == '__main__':
  main()
