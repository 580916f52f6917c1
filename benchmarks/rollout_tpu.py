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
import os
import statistics
import time

import jax
import rich.box
import rich.console
import rich.table
from jax.experimental import topologies

from jaxrl.parallel.mesh import make_mesh
from jaxrl.sampling.engine import Engine, make_engine
from jaxrl.sampling.requests import SamplingConfig
from jaxrl.sampling.sizes import EngineConfig
from launch.planning.chips import CHIPS
from launch.planning.decode_bytes import least_bytes, moved_bytes
from launch.planning.hlo_bytes import Loop, loops
from launch.planning.programs import engine_arguments, lower_decode
from launch.planning.published import model_config

CASES = ('v5e:2x2/4/128', 'v6e:2x2/4/384', 'v6e:2x2/1/128')


@dataclasses.dataclass(frozen=True)
class Compiled:
  """What the compiler says of one decode program, per device."""

  arguments: int              # bytes
  temporary: int              # bytes
  seconds: float
  program: Loop


def compile_decode(engine: Engine, readers: int) -> Compiled:
  """Compiles `engine.decode` where up to `readers` slots share a prompt."""
  start = time.perf_counter()
  compiled = lower_decode(engine, engine_arguments(engine, readers)).compile()
  seconds = time.perf_counter() - start
  memory = compiled.memory_analysis()
  return Compiled(memory.argument_size_in_bytes, memory.temp_size_in_bytes, seconds,
                  loops(compiled.as_text()))


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
  model, prompt, new = model_config('Llama-3.1-8B'), args.max_prompt - 1, args.max_new_tokens
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
    chip = CHIPS[topology.partition(':')[0]]
    first = [case, *(f'{n / 2**30:.2f}' for n in (found.arguments, found.temporary)),
             f'{chip.memory / 2**30:.0f}', f'{found.seconds:.0f} s']
    count = engine.slots_per_part
    for label, lengths in (('all full', [new] * count), (f'all {new // 4}', [new // 4] * count),
                           (f'0 to {new}', [new * n // count for n in range(count)])):
      moved = moved_bytes(engine, found.program, prompt, lengths, args.draws)
      least = least_bytes(
          model, 'bfloat16', tensor=int(tensor), slots=count, prompt=prompt,
          mean=statistics.mean(lengths), draws=args.draws)
      view.add_row(*first, label, f'{moved / 2**30:.2f}', f'{least / 2**30:.2f}',
                   f'{moved / least:.2f}', f'{1e3 * moved / chip.bandwidth:.1f}')
      first = [''] * len(first)
  rich.console.Console(width=120).print(view)


if __name__ == '__main__':
  main()
