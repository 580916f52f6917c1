"""The TPU attention kernels compiled for TPUs that need not be there, forward and backward.

    pip install --target=FOLDER libtpu==0.0.42.1        # what jax 0.10.2 asks for
    PYTHONPATH=FOLDER python -m benchmarks.attention_tpu [TOPOLOGY/MODEL/TOKENS/ROWS ...]

(In a folder of its own: jax looks for a TPU wherever libtpu is installed.) bfloat16, causal rows,
all heads of a model on one chip: 8B is 32 heads of 128 on 8 key heads, 70B is 64 on 8. `fast
memory` is what each kernel uses of a core's, as the compiler says; `temporaries` is what the
program holds in slow memory beside arguments and results, copies of arguments in another layout
included; `compile` is processor time of both kernels and what is around them; `least` is the time
of the products of visited blocks at the chip's published rate, two of them forward, five backward.
"""

from __future__ import annotations

import argparse

import jax
import jax.numpy as jnp
import rich.box
import rich.console
import rich.table
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from benchmarks.token_logp_tpu import PEAK
from benchmarks.tpu_compile import Compiled, compile_for, make_tpu_mesh
from kernels.attention import attention, causal, tpu_backward, tpu_work

HEADS = {'8B': (32, 8), '70B': (64, 8)}
HEAD_SIZE = 128
CHIPS = ('v5e:2x2', 'v5p:2x2x1', 'v6e:2x2')
CASES = tuple(f'{chip}/{model}/{tokens}/1' for chip in CHIPS for model in HEADS
              for tokens in (2048, 8192, 32768))


def compile_both(topology: str, heads: int, groups: int, tokens: int, rows: int) -> Compiled:
  """A program of the output and the three gradients."""
  mesh = make_tpu_mesh(topology)

  def array(n):
    return jax.ShapeDtypeStruct(
        (rows, tokens, n, HEAD_SIZE), jnp.bfloat16, sharding=NamedSharding(mesh, P()))

  def local(q, k, v):
    return attention(q, k, v, causal(rows, tokens), scale=HEAD_SIZE ** -0.5)

  def both(q, k, v, d_out):
    out, pull = jax.vjp(jax.shard_map(local, in_specs=(P(),) * 3, out_specs=P()), q, k, v)
    return out, *pull(d_out)

  return compile_for(mesh, both, *(array(n) for n in (heads, groups, groups, heads)))


def main() -> None:
  parser = argparse.ArgumentParser(
      description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('cases', nargs='*', default=list(CASES))
  args = parser.parse_args()
  view = rich.table.Table(box=rich.box.MARKDOWN)
  for name in ('chip', 'model', 'tokens', 'blocks', 'chunks', 'fast memory, MiB',
               'temporaries, MiB', 'compile, s', 'least, ms'):
    view.add_column(name, justify='left' if name in ('chip', 'model') else 'right')
  console = rich.console.Console(width=120)
  for case in args.cases:
    topology, model, tokens, rows = case.split('/')
    chip, (heads, groups) = topology.partition(':')[0], HEADS[model]
    length, count = int(tokens), int(rows)
    compiled = compile_both(topology, heads, groups, length, count)
    block_q, block_k = tpu_work.block_sizes(length, length, heads // groups)
    n_keys = count * -(-length // block_k)
    chunks = -(-n_keys // tpu_backward.chunk_blocks(n_keys, block_k, HEAD_SIZE))
    pairs = count * sum(min(i + block_q, length) + -min(i + block_q, length) % block_k
                        for i in range(0, length, block_q)) * block_q
    view.add_row(
        chip, model, f'{count} x {length}', f'{block_q} x {block_k}', str(chunks),
        ' and '.join(f'{size / 2**20:.1f}' for size in sorted(compiled.fast_memory.values())),
        f'{compiled.temporary / 2**20:.0f}', f'{compiled.seconds:.0f}',
        f'{2e3 * 7 * pairs * heads * HEAD_SIZE / PEAK[chip]:.1f}')
    print(case, flush=True)
  console.print(view)


if __name__ == '__main__':
  main()
