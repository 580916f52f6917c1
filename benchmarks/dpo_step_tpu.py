"""A DPO step of an 8B model compiled for TPUs that need not be there: memory, bytes and seconds.

    pip install --target=FOLDER libtpu==0.0.42.1        # what jax 0.10.2 asks for
    PYTHONPATH=FOLDER python -m benchmarks.dpo_step_tpu [TOPOLOGY/FSDP/SEQUENCE/PAIRS/REMAT ...]

(In a folder of its own: jax looks for a TPU wherever libtpu is installed.) The shape is that of
Llama-3.1-8B: float32 masters and Adam moments, bfloat16 products, the reference's log-probs given.
A pair is 2 x 2,048 tokens with nothing in common. With SEQUENCE 1 each response is a row; else a
pair is packed in a row that SEQUENCE devices share.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import os
import time

import jax
import jax.numpy as jnp
import rich.box
import rich.console
import rich.table
from jax.experimental import topologies

from jaxrl.data.packing import SPANS
from jaxrl.models.config import ModelConfig
from jaxrl.models.params import abstract_params
from jaxrl.parallel.mesh import make_mesh
from jaxrl.parallel.sharding import batch_sharding
from jaxrl.training.logps import ComputePolicy
from jaxrl.training.objectives import preference_objective
from jaxrl.training.optimizer import OptimizerConfig, make_optimizer
from jaxrl.training.step import init_state, train_step
from launch.planning.published import model_config

LENGTH = 2048                 # of a response with its prompt
CASES = ('v5p:4x4x4/32/2/32/attn', 'v5p:4x4x4/32/2/32/nothing', 'v5e:4x4/8/2/8/nothing')
HOST = {'v5p': 'v5p-8', 'v5e': 'v5litepod-4', 'v6e': 'v6e-4'}


@dataclasses.dataclass(frozen=True)
class Case:
  topology: str               # 'v5p:4x4x4'
  fsdp: int
  sequence: int
  pairs: int
  remat: str

  def __str__(self) -> str:
    return '/'.join(map(str, dataclasses.astuple(self)))


def parse(text: str) -> Case:
  topology, fsdp, sequence, pairs, remat = text.split('/')
  return Case(topology, int(fsdp), int(sequence), int(pairs), remat)


def batch_shapes(case: Case, mesh: jax.sharding.Mesh) -> dict[str, jax.ShapeDtypeStruct]:
  """What a batch is, without its numbers."""
  def array(dtype, *shape):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=batch_sharding(mesh, len(shape)))

  p, t = case.pairs, LENGTH
  if case.sequence == 1:
    return {
        'inputs': array(jnp.int32, p, 2, t), 'targets': array(jnp.int32, p, 2, t),
        'mask': array(jnp.bool_, p, 2, t), 'ref_logps': array(jnp.float32, p, 2, t),
        'weights': array(jnp.float32, p)}
  places = (p, 1, 2, t)
  names = ('inputs', 'positions', *SPANS, 'targets')
  return {name: array(jnp.int32, p, 2 * t) for name in names} | {
      'places': array(jnp.int32, *places), 'mask': array(jnp.bool_, *places),
      'ref_logps': array(jnp.float32, *places), 'weights': array(jnp.float32, p, 1)}


def compile_step(c: ModelConfig, case: Case) -> tuple[jax.stages.Compiled, float]:
  """The compiled step and the seconds that took."""
  devices = topologies.get_topology_desc(
      platform='tpu', topology_name=case.topology).devices
  mesh = make_mesh(fsdp=case.fsdp, sequence=case.sequence, devices=devices)
  tx = make_optimizer(OptimizerConfig(learning_rate=1e-6))
  objective = preference_objective('dpo', {'beta': 0.1}, c, ComputePolicy(remat=case.remat))
  with jax.set_mesh(mesh):
    params = abstract_params(c, mesh)
    shapes = jax.eval_shape(functools.partial(init_state, tx=tx), params)
    start = time.perf_counter()
    made = jax.jit(functools.partial(init_state, tx=tx)).lower(params).compile()
    state = jax.tree.map(
        lambda s, sharding: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sharding),
        shapes, made.output_shardings)
    start = time.perf_counter()
    step = jax.jit(functools.partial(train_step, objective=objective, tx=tx), donate_argnums=0)
    compiled = step.lower(
        state, batch_shapes(case, mesh), jax.ShapeDtypeStruct((), jnp.float32)).compile()
  return compiled, time.perf_counter() - start


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
  parser.add_argument('cases', nargs='*', default=CASES)
  jax.config.update('jax_platforms', 'cpu')
  os.environ.setdefault('TPU_SKIP_MDS_QUERY', '1')
  os.environ.setdefault('TPU_WORKER_HOSTNAMES', 'localhost')
  os.environ.setdefault('ALLOW_MULTIPLE_LIBTPU_LOAD', '1')
  table = rich.table.Table(
      'topology / fsdp / sequence / pairs / remat', 'arguments', 'temporaries', 'peak', 'bytes',
      'seconds', box=rich.box.MARKDOWN)
  for case in map(parse, parser.parse_args().cases):
    os.environ.setdefault('TPU_ACCELERATOR_TYPE', HOST[case.topology.partition(':')[0]])
    compiled, seconds = compile_step(model_config('Llama-3.1-8B'), case)
    memory = compiled.memory_analysis()
    sizes = (memory.argument_size_in_bytes, memory.temp_size_in_bytes,
             memory.peak_memory_in_bytes)
    moved = compiled.cost_analysis().get('bytes accessed', float('nan'))
    table.add_row(str(case), *(f'{size / 2**30:.2f}' for size in sizes), f'{moved / 1e9:.1f} GB',
                  f'{seconds:.0f}')
    rich.console.Console(width=120).print(table)


if __name__ == '__main__':
  main()
