"""Memory of token_logp on TPUs that need not be there, forward and backward, beside a plain form.

    pip install --target=FOLDER libtpu==0.0.42.1        # what jax 0.10.2 asks for
    PYTHONPATH=FOLDER python -m benchmarks.token_logp_tpu [TOPOLOGY/TOKENS/VOCABULARY/PARTS ...]

(In a folder of its own: jax looks for a TPU wherever libtpu is installed.) bfloat16; log-probs of
[1, TOKENS] from hidden states of --width features, the vocabulary split over PARTS chips. Gradients
are those of a weighted sum, for hidden states and head. Temporaries are what the compiled program
holds beside its arguments and results, per chip; least: what its products take at the chip's
published rate (forward one, backward three of 2 TOKENS WIDTH VOCABULARY / PARTS), in ms.
"""

from __future__ import annotations

import argparse
import functools
import os
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import rich.box
import rich.console
import rich.table
from jax.experimental import topologies
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from kernels.token_logp import token_logp

CASES = ('v5p:2x2x1/16384/131072/1', 'v5p:2x2x1/16384/131072/4', 'v5e:2x2/8192/128256/4',
         'v6e:2x2/16384/151936/1')
PEAK = {'v5e': 197e12, 'v5p': 459e12, 'v6e': 918e12}       # bfloat16 FLOP/s; the vendor's pages


def naive(hidden: jax.Array, head: jax.Array, targets: jax.Array) -> jax.Array:
  """log_softmax of all logits, which are kept in bfloat16: the leanest plain form."""
  logp = jax.nn.log_softmax((hidden @ head).astype(jnp.float32))
  return jnp.take_along_axis(logp, targets[..., None], axis=-1)[..., 0]


def compile_case(
    function: Callable, backward: bool, case: tuple[int, int, int], mesh: jax.sharding.Mesh
) -> tuple[float, float, float]:
  """GiB of temporaries and of results on one chip, and seconds to compile."""
  tokens, features, vocabulary = case

  def placed(shape, dtype, *axes):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, P(*axes)))

  def total(hidden, head, targets, weight):
    return jnp.sum(weight * function(hidden, head, targets))

  arrays = (placed((1, tokens, features), jnp.bfloat16), placed(
      (features, vocabulary), jnp.bfloat16, None, 'tensor' if mesh.size > 1 else None),
      placed((1, tokens), jnp.int32))
  weight = placed((1, tokens), jnp.float32)
  start = time.perf_counter()
  with jax.set_mesh(mesh):
    lowered = (jax.jit(jax.grad(total, (0, 1))).lower(*arrays, weight) if backward
               else jax.jit(function).lower(*arrays))
    memory = lowered.compile().memory_analysis()
  return (memory.temp_size_in_bytes / 2**30, memory.output_size_in_bytes / 2**30,
          time.perf_counter() - start)


def main() -> None:
  parser = argparse.ArgumentParser(
      description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('cases', nargs='*', default=list(CASES))
  parser.add_argument('--width', type=int, default=4096)
  parser.add_argument('--chunk', type=int, nargs='+', default=[512, 1024])
  args = parser.parse_args()
  jax.config.update('jax_platforms', 'cpu')
  os.environ.update(       # libtpu reads them: describe a machine, look for none
      TPU_SKIP_MDS_QUERY='1', TPU_ACCELERATOR_TYPE='v5litepod-4', TPU_WORKER_HOSTNAMES='localhost',
      ALLOW_MULTIPLE_LIBTPU_LOAD='1')
  view = rich.table.Table(box=rich.box.SIMPLE, title=(
      f'token_logp, bfloat16, {args.width} features; GiB per chip'))
  for name in ('case', 'form', 'pass', 'temporaries', 'results', 'compile', 'least ms'):
    view.add_column(name, justify='left' if name in ('case', 'form', 'pass') else 'right')
  for case in args.cases:
    topology, tokens, vocabulary, parts = case.split('/')
    devices = topologies.get_topology_desc(platform='tpu', topology_name=topology).devices
    mesh = jax.sharding.Mesh(devices[:int(parts)], ('tensor',), axis_types=(AxisType.Explicit,))
    sizes = int(tokens), args.width, int(vocabulary)
    least = 2e3 * sizes[0] * sizes[1] * sizes[2] / int(parts) / PEAK[topology.partition(':')[0]]
    forms = {f'chunk {n}': functools.partial(token_logp, chunk=n) for n in args.chunk}
    if mesh.size == 1:
      forms = {'naive': naive, **forms}
    for form, function in forms.items():
      for name, products in (('forward', 1), ('and backward', 4)):
        found = compile_case(function, products > 1, sizes, mesh)
        view.add_row(case, form, name, f'{found[0]:.2f}', f'{found[1]:.2f}', f'{found[2]:.0f} s',
                     f'{products * least:.1f}')
  rich.console.Console(width=120).print(view)


if __name__ == '__main__':
  main()
