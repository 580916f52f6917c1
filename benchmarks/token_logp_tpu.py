"""Memory of token_logp on TPUs that need not be there, forward and backward, beside a plain form.

    pip install --target=FOLDER libtpu==0.0.42.1        # what jax 0.10.2 asks for
    PYTHONPATH=FOLDER python -m benchmarks.token_logp_tpu [CASE ...]

(In a folder of its own: jax looks for a TPU wherever libtpu is installed.) A CASE is
CHIPS/TOKENS/FEATURES/VOCABULARY/PARTS: bfloat16, log-probs of [1, TOKENS] from hidden states of
FEATURES, the vocabulary split over PARTS chips. Gradients are
those of a weighted sum, for hidden states and head. Temporaries are what the compiled program holds
beside its arguments and results, per chip; fast: the most VMEM that one Pallas kernel uses, in MiB;
least: what the products take at the chip's published rate (forward one, backward three of
2 TOKENS FEATURES VOCABULARY / PARTS), in ms. Nothing is timed.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import rich.box
import rich.console
import rich.table
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from benchmarks.tpu_compile import Compiled, compile_for, make_tpu_mesh
from kernels.token_logp import token_logp, tpu

CASES = ('v5p:2x2x1/16384/4096/131072/1', 'v5p:2x2x1/16384/4096/131072/4',
         'v5p:2x2x1/2048/4096/128256/1', 'v5p:2x2x1/32768/8192/128256/4',
         'v5e:2x2/8192/4096/128256/4', 'v5e:2x2/32768/8192/128256/4',
         'v6e:2x2/16384/4096/151936/1', 'v6e:2x2/32768/8192/128256/4')
PEAK = {'v5e': 197e12, 'v5p': 459e12, 'v6e': 918e12}       # bfloat16 FLOP/s; the vendor's pages


def naive(hidden: jax.Array, head: jax.Array, targets: jax.Array) -> jax.Array:
  """log_softmax of all logits, which are kept in bfloat16: the leanest plain form."""
  logp = jax.nn.log_softmax((hidden @ head).astype(jnp.float32))
  return jnp.take_along_axis(logp, targets[..., None], axis=-1)[..., 0]


def compile_case(
    function: Callable, backward: bool, case: tuple[int, int, int], mesh: jax.sharding.Mesh
) -> Compiled:
  """Compiles log-probs, or their gradients, of (tokens, features, vocabulary)."""
  tokens, features, vocabulary = case

  def placed(shape, dtype, *axes):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, P(*axes)))

  def total(hidden, head, targets, weight):
    return jnp.sum(weight * function(hidden, head, targets))

  arrays = (placed((1, tokens, features), jnp.bfloat16), placed(
      (features, vocabulary), jnp.bfloat16, None, 'tensor' if mesh.size > 1 else None),
      placed((1, tokens), jnp.int32))
  if not backward:
    return compile_for(mesh, function, *arrays)
  weight = placed((1, tokens), jnp.float32)
  return compile_for(mesh, jax.grad(total, (0, 1)), *arrays, weight)


def main() -> None:
  parser = argparse.ArgumentParser(
      description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('cases', nargs='*', default=list(CASES))
  parser.add_argument('--chunk', type=int, nargs='+', default=[512, 1024])
  parser.add_argument('--skip_naive', action='store_true', help='leave the plain form out')
  args = parser.parse_args()
  view = rich.table.Table(
      box=rich.box.SIMPLE, title='token_logp, bfloat16; GiB per chip, VMEM in MiB')
  for name in ('case', 'form', 'pass', 'temporaries', 'results', 'fast', 'compile', 'least ms'):
    view.add_column(name, justify='left' if name in ('case', 'form', 'pass') else 'right')
  for case in args.cases:
    topology, *numbers = case.split('/')
    tokens, features, vocabulary, parts = (int(n) for n in numbers)
    mesh = make_tpu_mesh(topology, parts)
    sizes = tokens, features, vocabulary
    least = 2e3 * tokens * features * vocabulary / parts / PEAK[topology.partition(':')[0]]
    forms = {f'{impl} {n}': functools.partial(token_logp, chunk=n, impl=impl)
             for impl in ('chunked', 'tpu') for n in args.chunk}
    if mesh.size == 1 and not args.skip_naive:
      forms = {'naive': naive, **forms}
    tiles = tpu.tile_sizes(
        jax.ShapeDtypeStruct((tokens, features), jnp.bfloat16),
        jax.ShapeDtypeStruct((features, vocabulary // parts), jnp.bfloat16))
    for form, function in forms.items():
      for name, products in (('forward', 1), ('and backward', 4)):
        found = compile_case(function, products > 1, sizes, mesh)
        fast = max(found.fast_memory.values(), default=0)
        view.add_row(
            case, form, name, f'{found.temporary / 2**30:.2f}', f'{found.results / 2**30:.2f}',
            f'{fast / 2**20:.1f}' if fast else '', f'{found.seconds:.0f} s',
            f'{products * least:.1f}')
    view.add_row('', f'tiles of {tiles[0]} x {tiles[1]}', end_section=True)
  rich.console.Console(width=140).print(view)


if __name__ == '__main__':
  main()
