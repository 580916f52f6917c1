"""Time of token_logp, forward and backward, beside its bare products and a checkpointed scan.

    python -m benchmarks.token_logp [--tokens 2048] [--width 512] [--vocabulary 32000]

Products: the four matrix products that any form needs which does not keep logits (logits, logits
again, gradients of hidden states and of head; 8 TOKENS WIDTH VOCABULARY FLOPs), with nothing
between them, a block of the vocabulary at a time. Checkpointed scan: chunks of tokens under
jax.checkpoint, gradients left to jax. Exponentials: one of every logit and its sum, twice, with no
product. All are interleaved. Seconds are wall time, the median and the least of the rounds; CPU
seconds are those of all threads of this process, the median, which other processes disturb less;
the last column is their ratio to the products' in the same round.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import rich.box
import rich.console
import rich.table

from kernels.token_logp import ref, token_logp
from kernels.token_logp.chunked import block_width


def gradients(function: Callable) -> Callable:
  """Value and gradients of a weighted sum of function(hidden, head, targets)."""
  def total(hidden, head, targets, weight):
    return jnp.sum(weight * function(hidden, head, targets))
  return jax.jit(jax.value_and_grad(total, (0, 1)))


def checkpointed_scan(hidden, head, targets, *, chunk):
  """What it replaces: chunks of tokens, each recomputed in the backward pass."""
  def split(x):                 # [1, T, ...] -> [T / chunk, 1, chunk, ...]
    return jnp.moveaxis(x.reshape(1, -1, chunk, *x.shape[2:]), 1, 0)

  @jax.checkpoint
  def one(carry, xs):
    return carry, ref.token_logp(xs[0], head, xs[1])

  _, out = jax.lax.scan(one, None, (split(hidden), split(targets)))
  return out.reshape(targets.shape)


def products(hidden, head, targets, weight, *, width):
  """The four products over blocks of columns."""
  del targets, weight
  hidden = hidden[0]

  def block(index):
    return jax.lax.dynamic_slice_in_dim(head, index * width, width, axis=1)

  def forward(top, index):
    return jnp.maximum(top, hidden @ block(index)), None

  def backward(carry, index):
    d_hidden, d_head = carry
    columns = block(index)
    z = hidden @ columns
    d_head = jax.lax.dynamic_update_slice(d_head, hidden.T @ z, (0, index * width))
    return (d_hidden + z @ columns.T, d_head), None

  blocks = jnp.arange(head.shape[1] // width, dtype=jnp.int32)
  top, _ = jax.lax.scan(forward, jnp.zeros((hidden.shape[0], width)), blocks)
  grads, _ = jax.lax.scan(backward, (jnp.zeros_like(hidden), jnp.zeros_like(head)), blocks)
  return top, grads


def between(hidden, head, targets, weight, *, width):
  """An exponential of every logit and its sum, twice, without products."""
  del targets, weight
  start = jnp.tile(hidden[0], (1, -(-width // hidden.shape[-1])))[:, :width]

  def one(total, index):
    z = start + index.astype(jnp.float32)
    return total + jnp.sum(jnp.exp(z), axis=-1), None

  return jax.lax.scan(one, jnp.zeros(start.shape[0]),
                      jnp.arange(2 * (head.shape[1] // width), dtype=jnp.int32))[0]


def main() -> None:
  parser = argparse.ArgumentParser(
      description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--tokens', type=int, default=2048)
  parser.add_argument('--width', type=int, default=512)
  parser.add_argument('--vocabulary', type=int, default=32000)
  parser.add_argument('--chunk', type=int, nargs='+', default=[64, 128, 256, 512])
  parser.add_argument('--rounds', type=int, default=5)
  args = parser.parse_args()
  tokens, width, vocabulary = args.tokens, args.width, args.vocabulary
  rng = np.random.default_rng(0)
  arrays = (
      jnp.asarray(rng.normal(size=(1, tokens, width)), jnp.float32),
      jnp.asarray(0.05 * rng.normal(size=(width, vocabulary)), jnp.float32),
      jnp.asarray(rng.integers(0, vocabulary, (1, tokens)), jnp.int32),
      jnp.asarray(rng.normal(size=(1, tokens)), jnp.float32))
  columns = 3200 if vocabulary % 3200 == 0 else vocabulary
  forms = {f'products, {columns} columns': jax.jit(functools.partial(products, width=columns)),
           'exponentials alone': jax.jit(functools.partial(between, width=columns))}
  for chunk in args.chunk:
    forms[f'chunk {chunk} ({block_width(tokens, vocabulary, chunk)} columns)'] = gradients(
        functools.partial(token_logp, chunk=chunk))
  forms['checkpointed scan, chunk 512'] = gradients(functools.partial(checkpointed_scan, chunk=512))
  seconds: dict[str, list[float]] = {name: [] for name in forms}
  busy: dict[str, list[float]] = {name: [] for name in forms}
  for n in range(args.rounds + 1):      # the first compiles
    for name, function in forms.items():
      start, cpu = time.perf_counter(), time.process_time()
      jax.block_until_ready(function(*arrays))
      if n:
        seconds[name].append(time.perf_counter() - start)
        busy[name].append(time.process_time() - cpu)
  view = rich.table.Table(box=rich.box.SIMPLE, title=(
      f'[{tokens}, {width}] x [{width}, {vocabulary}] float32, forward and backward'))
  for name in ('form', 'seconds', 'least', 'GFLOP/s at least', 'CPU seconds', 'to products'):
    view.add_column(name, justify='left' if name == 'form' else 'right')
  base = next(iter(busy.values()))
  for name, times in seconds.items():
    rate = 8e-9 * tokens * width * vocabulary / min(times)
    ratio = statistics.median(t / b for t, b in zip(busy[name], base, strict=True))
    view.add_row(name, f'{statistics.median(times):.2f}', f'{min(times):.2f}',
                 '' if 'alone' in name else f'{rate:.0f}', f'{statistics.median(busy[name]):.2f}',
                 f'{ratio:.2f}')
  rich.console.Console(width=100).print(view)


if __name__ == '__main__':
  main()
