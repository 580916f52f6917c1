"""The Hopper attention kernels on an H200: parity with the definition, then time against cuDNN.

    python -m benchmarks.attention_gpu [--tokens 4096 32768] [--turns=5]

bfloat16, the heads of an 8B model (32 of 128 on 8 key heads), 32,768 tokens in rows of so many, one
layer, the least of all turns in milliseconds. `forward`, and `both`: with the gradients of queries,
keys and values. cuDNN is jax.nn.dot_product_attention(implementation='cudnn'), causal, and for
packed pairs with the same mask as a boolean array; it holds [T, T] per row. Shares are of the
device's own rate of a bf16 product of 8192 x 8192 x 8192, where operations are those of visible
pairs, and for decoding of the bytes per second of a copy.

Parity comes first: the root mean square error of the output and of each gradient over that of the
definition in bfloat16, both against the definition in float32.
"""

from __future__ import annotations

import argparse
import functools
import sys
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import rich.box
import rich.console
import rich.table

from kernels.attention import Spans, attention, causal, ref, visible
from kernels.decoding import Own, Shared, decode_attention

HEADS, GROUPS, HEAD = 32, 8, 128
TOTAL = 32768                 # tokens of all rows together
SIDE = 8192                   # of the product that stands for the device
SCALE = HEAD ** -0.5


def packed(length: int, prompt: int = 512, response: int = 256) -> Spans:
  """A row of prompts with two responses each, and a rest that is a shorter prompt."""
  fields = np.zeros((4, length), np.int32)
  for at in range(0, length, prompt + 2 * response):
    runs = ((at, prompt, 0), (at + prompt, response, prompt),
            (at + prompt + response, response, prompt))
    for start, count, before in runs:
      inside = np.arange(start, min(start + count, length))
      fields[:, inside] = np.stack(np.broadcast_arrays(
          at * (before > 0), (at + before) * (before > 0), start, inside + 1))
  return Spans(*(jnp.asarray(x)[None] for x in fields))


def normal(seed: int, *shape: int) -> jax.Array:
  return jax.random.normal(jax.random.key(seed), shape, jnp.bfloat16)


def with_gradients(fn: Callable) -> Callable:
  """(q, k, v, d_out, ...) -> the output and three gradients."""
  def both(q, k, v, d_out, *rest):
    out, pull = jax.vjp(lambda q, k, v: fn(q, k, v, *rest), q, k, v)
    return out, *pull(d_out)
  return both


def least_seconds(fn: Callable, arrays: tuple, turns: int) -> float:
  """Of one call, from so many in a row that they take about 0.1 s."""
  run = jax.jit(fn)

  def turn(calls: int) -> float:
    begin = time.perf_counter()
    for _ in range(calls):
      out = run(*arrays)
    jax.block_until_ready(out)
    return (time.perf_counter() - begin) / calls

  turn(1)                     # compiles
  calls = max(1, round(0.1 / turn(2)))
  return min(turn(calls) for _ in range(turns))


def parity(head: int, softcap: float | None, window: int | None) -> list[float]:
  """Errors over those of the plain form, of the output, dQ, dK and dV; rows of packed pairs."""
  length = 1000
  spans = packed(length, 150, 90)
  arrays = [normal(n, 1, length, heads, head) for n, heads in enumerate((4, 2, 2, 4))]
  options = {'spans': spans, 'scale': head ** -0.5, 'softcap': softcap, 'window': window}

  def outputs(fn, dtype):
    found = jax.jit(with_gradients(functools.partial(fn, **options)))(
        *(x.astype(dtype) for x in arrays))
    return [np.asarray(x, np.float64) for x in found]

  with jax.default_matmul_precision('highest'):
    exact, plain = (outputs(ref.attention, dtype) for dtype in (jnp.float32, jnp.bfloat16))
  ours = outputs(functools.partial(attention, impl='gpu'), jnp.bfloat16)
  return [float(np.sqrt(np.mean((a - b) ** 2) / np.mean((c - b) ** 2)))
          for a, b, c in zip(ours, exact, plain)]


def decode_case(slots: int, live: int, prompt: int, members: int) -> tuple[tuple, int]:
  """Arguments for private keys and a prompt of each group, and the bytes of live keys."""
  own = Own(*(normal(n, 1, live // 64, slots, GROUPS, 64, HEAD) for n in (1, 2)),
            jnp.full(slots, live, jnp.int32))
  groups = slots // members
  slot = jnp.arange(slots, dtype=jnp.int32)
  region = Shared(
      *(normal(n, 1, groups, GROUPS, prompt, HEAD) for n in (3, 4)),
      jnp.full(groups, prompt, jnp.int32), jnp.zeros(groups, jnp.int32),
      slot.reshape(groups, members), slot // members, slot % members)
  size = (slots * live + groups * prompt) * GROUPS * HEAD * 2 * 2
  return (normal(0, slots, HEADS, HEAD), own, (region,), slot * 0 + prompt + live - 1), size


def decode(q, own, shared, positions):
  return decode_attention(q, own, shared, layer=jnp.int32(0), positions=positions, scale=SCALE,
                          impl='gpu')


def attention_rows(tokens: int, turns: int, rate: float) -> list[tuple[str, ...]]:
  """Of the table: causal rows, then packed pairs, ours and cuDNN's."""
  rows = TOTAL // tokens
  arrays = tuple(normal(n, rows, tokens, heads, HEAD)
                 for n, heads in enumerate((HEADS, GROUPS, GROUPS, HEADS)))
  table = []
  for name in ('causal', 'packed'):
    if name == 'causal':
      spans = causal(rows, tokens)
      cudnn = functools.partial(jax.nn.dot_product_attention, is_causal=True)
      extra: tuple[jax.Array, ...] = ()
    else:
      spans = jax.tree.map(lambda x: jnp.repeat(x, rows, axis=0), packed(tokens))
      extra = (jax.jit(visible, static_argnums=1)(spans, tokens)[:, None],)

      def cudnn(q, k, v, mask, **options):
        return jax.nn.dot_product_attention(q, k, v, mask=mask, **options)

    pairs = float(jnp.sum(spans.end - spans.start + spans.prefix_end - spans.prefix_start))
    operations = 4 * pairs * HEAD * HEADS
    ours = functools.partial(attention, scale=SCALE, impl='gpu')
    theirs = functools.partial(cudnn, scale=SCALE, implementation='cudnn')
    for who, fn, rest in (('ours', ours, (spans,)), ('cuDNN', theirs, extra)):
      forward = least_seconds(fn, (*arrays[:3], *rest), turns)
      both = least_seconds(with_gradients(fn), (*arrays, *rest), turns)
      table.append((name, f'{rows} x {tokens}', who, f'{1e3 * forward:.2f}',
                    f'{operations / forward / rate:.2f}', f'{1e3 * both:.2f}',
                    f'{3.5 * operations / both / rate:.2f}'))
  return table


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--tokens', type=int, nargs='+', default=[4096, 8192, 16384, 32768])
  parser.add_argument('--turns', type=int, default=5)
  args = parser.parse_args()
  kind = jax.devices()[0].device_kind
  if 'H200' not in kind:
    sys.exit(f'benchmarks.attention_gpu needs an NVIDIA H200; the first device here is {kind!r}')
  console = rich.console.Console(width=110)

  view = rich.table.Table('head size', 'softcap', 'window', 'output', 'dQ', 'dK', 'dV',
                          box=rich.box.SIMPLE, title='error over that of plain bfloat16')
  for head, softcap, window in (
      (64, None, None), (80, None, None), (96, None, 100), (128, None, None), (128, 50.0, 300),
      (256, 50.0, None)):
    found = parity(head, softcap, window)
    view.add_row(*map(str, (head, softcap, window)), *(f'{x:.2f}' for x in found))
  console.print(view)

  square = normal(0, SIDE, SIDE)
  rate = 2 * SIDE ** 3 / least_seconds(jnp.matmul, (square, square), args.turns)
  large = jnp.zeros(2**30, jnp.int32)
  bandwidth = 2 * large.nbytes / least_seconds(lambda x: x + 1, (large,), args.turns)
  console.print(f'{kind}, jax {jax.__version__}: {rate / 1e12:.0f} TFLOP/s of a bf16 product, '
                f'{bandwidth / 1e12:.2f} TB/s of a copy')

  view = rich.table.Table('layout', 'rows', 'of', 'forward', 'share', 'both', 'share',
                          box=rich.box.SIMPLE, title='training attention, ms')
  for tokens in args.tokens:
    for row in attention_rows(tokens, args.turns, rate):
      view.add_row(*row)
  console.print(view)

  view = rich.table.Table('slots', 'private keys', 'prompt', 'members', 'ms', 'share of a copy',
                          box=rich.box.SIMPLE, title='decoding attention')
  for slots, live, prompt, members in (
      (256, 1024, 512, 8), (256, 4096, 512, 8), (64, 8192, 1024, 8), (8, 16384, 1024, 8)):
    arrays, size = decode_case(slots, live, prompt, members)
    seconds = least_seconds(decode, arrays, args.turns)
    expected = jax.jit(functools.partial(
        decode_attention, layer=jnp.int32(0), scale=SCALE, impl='blockwise'))(
            *arrays[:3], positions=arrays[3])
    np.testing.assert_allclose(
        np.asarray(jax.jit(decode)(*arrays), np.float32), np.asarray(expected, np.float32),
        atol=0.01)
    view.add_row(*map(str, (slots, live, prompt, members)), f'{1e3 * seconds:.3f}',
                 f'{size / seconds / bandwidth:.2f}')
  console.print(view)


if __name__ == '__main__':
  main()
