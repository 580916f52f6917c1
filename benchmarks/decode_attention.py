"""Time of decoding attention per layer: it grows with live length, not with the room for it.

    python -m benchmarks.decode_attention [--blocks 32] [--dtype=float32] [--repeats=30]

32 slots, 8 heads of size 64, 8 layers walked in a scan; live lengths are ragged, the longest as
printed. `shared` adds prompts of 64 keys in 8 groups of 4 members, `copied` has the same keys at
the end of each slot's private region instead. The least of all repeats is printed, in milliseconds
per layer, programs taking turns; the reference reads all of the room whatever is live.
"""

from __future__ import annotations

import argparse
import itertools
import time

import jax
import jax.numpy as jnp
import numpy as np

from kernels.decoding import Own, Shared, blockwise, quantise, ref

LAYERS, SLOTS, HEADS, HEAD, PROMPT, GROUPS, PLACES = 8, 32, 8, 64, 64, 8, 8


def private(live: int, room: int, block: int, dtype: str) -> Own:
  """Ragged lengths up to `live`; about a third of the slots are at it."""
  rng = np.random.default_rng(live)
  lengths = np.minimum(rng.integers(1, live + live // 2 + 2, SLOTS), live)
  k, v = (_cache((LAYERS, room // block, SLOTS, HEADS, block, HEAD), dtype, n) for n in (1, 2))
  return Own(k, v, jnp.asarray(lengths, jnp.int32))


def prompts(dtype: str) -> Shared:
  """Eight groups of four slots each; half of the places are free."""
  members = np.full((GROUPS, PLACES), SLOTS, np.int32)
  slots = np.arange(SLOTS, dtype=np.int32)
  members[slots // 4, slots % 4] = slots
  k, v = (_cache((LAYERS, GROUPS, HEADS, PROMPT, HEAD), dtype, n) for n in (3, 4))
  return Shared(k, v, jnp.full(GROUPS, PROMPT, jnp.int32), jnp.zeros(GROUPS, jnp.int32),
                jnp.asarray(members), jnp.asarray(slots // 4), jnp.asarray(slots % 4))


def _cache(shape: tuple[int, ...], dtype: str, seed: int):
  x = jax.random.normal(jax.random.key(seed), shape, jnp.float32)
  return quantise(x) if dtype == 'int8' else x.astype(dtype)


def program(function):
  """All layers in a scan, each layer's result being the next one's queries."""
  def layers(q, own, shared):
    def one(q, layer):
      return function(q, own, shared, layer=layer, positions=own.live + PROMPT, scale=0.125), None
    return jax.lax.scan(one, q, jnp.arange(LAYERS, dtype=jnp.int32))[0]
  return jax.jit(layers)


def least_ms(programs: dict, repeats: int) -> dict[str, float]:
  """Milliseconds per layer of each (function, arguments)."""
  least = dict.fromkeys(programs, float('inf'))
  for turn in range(repeats + 1):
    for name, (function, args) in programs.items():
      begin = time.perf_counter()
      jax.block_until_ready(function(*args))
      if turn:                                             # the first turn compiles
        least[name] = min(least[name], time.perf_counter() - begin)
  return {name: 1e3 * seconds / LAYERS for name, seconds in least.items()}


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--blocks', type=int, nargs='+', default=[32])
  parser.add_argument('--dtype', choices=['float32', 'bfloat16', 'int8'], default='float32')
  parser.add_argument('--live', type=int, nargs='+', default=[1, 64, 128, 192])
  parser.add_argument('--rooms', type=int, nargs='+', default=[256, 1024])
  parser.add_argument('--repeats', type=int, default=30)
  options = parser.parse_args()
  queries = jax.random.normal(jax.random.key(0), (SLOTS, HEADS, HEAD), jnp.float32)
  if options.dtype == 'bfloat16':
    queries = queries.astype(jnp.bfloat16)
  functions = {'blocks': program(blockwise.decode_attention), 'ref': program(ref.decode_attention)}
  print('| room | block | live | keys | blocks | ref |\n|---|---|---|---|---|---|')
  shared = (prompts(options.dtype),)
  for room, block in itertools.product(options.rooms, options.blocks):
    for live in options.live:
      own = private(live, room, block, options.dtype)
      longer = private(live + PROMPT, room, block, options.dtype)
      for keys, args in (('shared', (queries, own, shared)), ('copied', (queries, longer, ())),
                         ('private only', (queries, own, ()))):
        found = least_ms({name: (f, args) for name, f in functions.items()}, options.repeats)
        print(f'| {room} | {block} | {live} | {keys} '
              f'| {found["blocks"]:.2f} | {found["ref"]:.2f} |', flush=True)


if __name__ == '__main__':
  main()
