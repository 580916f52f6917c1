"""The decode program of the rollout engine compiled for TPUs that need not be there, at 8B.

    pip install --target=FOLDER libtpu==0.0.42.1        # what jax 0.10.2 asks for
    PYTHONPATH=FOLDER python -m benchmarks.rollout_tpu [TOPOLOGY/TENSOR/SLOTS ...]

(In a folder of its own: jax looks for a TPU wherever libtpu is installed.) The shape is that of
Llama-3.1-8B in bfloat16. For every case it prints the memory of a device, the time to compile, and
the bytes that one decode step moves in a device's main memory: those of the compiled program, loop
by loop, times how often each loop runs, beside the least that any program must move. That is all
weights but the embedding table, the keys and values of all live tokens, prompts once, the new keys,
and the logits once in float32.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import rich.box
import rich.console
import rich.table
from jax.experimental import topologies
from jax.sharding import NamedSharding, PartitionSpec

from benchmarks.hlo_bytes import Loop, loops
from jaxrl.models.config import ModelConfig
from jaxrl.models.hugging_face import read_config
from jaxrl.models.params import count_params, decoder_specs, is_spec
from jaxrl.parallel.mesh import make_mesh
from jaxrl.sampling.engine import Engine, make_engine
from jaxrl.sampling.requests import SamplingConfig
from jaxrl.sampling.rollout_params import rollout_specs
from jaxrl.sampling.sizes import KEY_BLOCK as BLOCK
from jaxrl.sampling.sizes import EngineConfig
from kernels.decoding.ragged import TOGETHER
from tests.published_configs import PUBLISHED

CASES = ('v5e:2x2/4/128', 'v6e:2x2/4/384', 'v6e:2x2/1/128')
BANDWIDTH = {'v5e': 819e9, 'v6e': 1640e9}       # bytes per second; the vendor's pages
MEMORY = {'v5e': 16 * 2**30, 'v6e': 32 * 2**30}
WIDTH = 2                                       # bytes of a bfloat16


@dataclasses.dataclass(frozen=True)
class Compiled:
  """What the compiler says of one decode program, per device."""

  arguments: int              # bytes
  temporary: int              # bytes
  seconds: float
  program: Loop


def llama_8b() -> ModelConfig:
  with tempfile.TemporaryDirectory() as folder:
    (Path(folder) / 'config.json').write_text(json.dumps(PUBLISHED['Llama-3.1-8B'][0]))
    return read_config(folder)


def compile_decode(engine: Engine, readers: int) -> Compiled:
  """Compiles `engine.decode` where up to `readers` slots share a prompt."""
  mesh = engine.mesh

  def placed(shape, dtype, spec):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))

  shapes = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, jnp.bfloat16),
                        decoder_specs(engine.model), is_leaf=is_spec)
  params = jax.tree.map(lambda s, spec: placed(s.shape, s.dtype, spec), shapes,
                        rollout_specs(shapes, engine.model, mesh))
  with jax.set_mesh(mesh):
    empty = engine.empty(readers)
    slots, prompts = jax.tree.map(
        lambda s, sharding: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sharding),
        jax.eval_shape(empty), empty.lower().compile().output_shardings)
    start = time.perf_counter()
    compiled = engine.decode.lower(
        params, slots, prompts, None, placed((), jnp.uint32, PartitionSpec()),
        placed((engine.parts,), jnp.int32, PartitionSpec('data'))).compile()
    seconds = time.perf_counter() - start
  memory = compiled.memory_analysis()
  return Compiled(memory.argument_size_in_bytes, memory.temp_size_in_bytes, seconds,
                  loops(compiled.as_text()))


def moved_bytes(engine: Engine, program: Loop, prompt: int, lengths: Sequence[int]) -> float:
  """What a device moves in a step; `lengths`: response tokens of each of its slots so far."""
  (steps,) = program.inner
  (layers,) = steps.inner
  *writes, prompts, own = sorted(layers.inner, key=lambda loop: (len(loop.inner), loop.moved))
  (slots,) = own.inner             # some of those that see a block
  most = math.ceil(engine.sampling.max_new_tokens / BLOCK)
  seen = [min(math.ceil((n + 1) / BLOCK), most) for n in lengths]
  per_layer = layers.moved + math.ceil(prompt / BLOCK) * prompts.moved
  places = [min(n, BLOCK * most - 1) // BLOCK for n in lengths]      # blocks that are written to
  per_layer += (max(places) - min(places) + 1) * sum(write.moved for write in writes)
  for block in range(max(seen)):
    readers = sum(n > block for n in seen)
    per_layer += own.moved + math.ceil(readers / TOGETHER) * slots.moved
  return (program.moved / engine.config.cadence + steps.moved
          + engine.model.n_layers * per_layer)


def least_bytes(engine: Engine, prompt: int, mean: float, draws: int) -> float:
  """The least a device must move; `mean`: response tokens that a slot has on average."""
  c, tensor, slots = engine.model, engine.mesh.shape['tensor'], engine.slots_per_part
  weights = WIDTH * (count_params(c) - c.vocab_size * c.d_model)
  keys = slots * (mean + 1) + slots / draws * prompt          # read, and the newest written
  cache = keys * 2 * c.n_layers * c.n_kv * c.d_head * WIDTH
  return (weights + cache + 4 * slots * c.vocab_size) / tensor


def main() -> None:
  parser = argparse.ArgumentParser(
      description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('cases', nargs='*', default=list(CASES),
                      help='topology / devices per copy of the parameters / slots in all')
  parser.add_argument('--max_prompt', type=int, default=512)
  parser.add_argument('--max_new_tokens', type=int, default=2048)
  parser.add_argument('--draws', type=int, default=8, help='slots that share a prompt')
  args = parser.parse_args()
  jax.config.update('jax_platforms', 'cpu')
  os.environ.update(       # libtpu reads them: describe a machine, look for none
      TPU_SKIP_MDS_QUERY='1', TPU_ACCELERATOR_TYPE='v5litepod-4', TPU_WORKER_HOSTNAMES='localhost',
      ALLOW_MULTIPLE_LIBTPU_LOAD='1')
  model, prompt, new = llama_8b(), args.max_prompt - 1, args.max_new_tokens
  view = rich.table.Table(box=rich.box.SIMPLE, title=(
      f'decode step, Llama-3.1-8B, bfloat16, prompts of {prompt + 1} shared by {args.draws}, '
      f'{new} new tokens at most; GiB per device'))
  for name in ('case', 'arguments', 'temporary', 'of', 'compile', 'response tokens', 'moved',
               'least', 'ratio', 'ms at peak'):
    view.add_column(name, justify='left' if name in ('case', 'response tokens') else 'right')
  for case in args.cases:
    topology, tensor, slots = case.split('/')
    devices = topologies.get_topology_desc(platform='tpu', topology_name=topology).devices
    engine = make_engine(
        model, SamplingConfig(new), EngineConfig(int(slots), tensor=int(tensor)),
        make_mesh(devices=devices), max_prompt=args.max_prompt, eos_ids=(model.vocab_size - 1,),
        pad_id=0)
    found = compile_decode(engine, args.draws)
    chip = topology.partition(':')[0]
    first = [case, *(f'{n / 2**30:.2f}' for n in (found.arguments, found.temporary)),
             f'{MEMORY[chip] / 2**30:.0f}', f'{found.seconds:.0f} s']
    count = engine.slots_per_part
    for label, lengths in (('all full', [new] * count), (f'all {new // 4}', [new // 4] * count),
                           (f'0 to {new}', [new * n // count for n in range(count)])):
      moved = moved_bytes(engine, found.program, prompt, lengths)
      least = least_bytes(engine, prompt, statistics.mean(lengths), args.draws)
      view.add_row(*first, label, f'{moved / 2**30:.2f}', f'{least / 2**30:.2f}',
                   f'{moved / least:.2f}', f'{1e3 * moved / BANDWIDTH[chip]:.1f}')
      first = [''] * len(first)
  rich.console.Console(width=120).print(view)


if __name__ == '__main__':
  main()
