"""Decoding attention compiled for TPUs that need not be there: fast memory, copies, seconds.

    pip install --target=FOLDER libtpu==0.0.42.1        # what jax 0.10.2 asks for
    PYTHONPATH=FOLDER python -m benchmarks.decode_attention_tpu [CHIP ...]

(In a folder of its own: jax looks for a TPU wherever libtpu is installed.) One step of two layers
on one chip, the shapes being one chip's share of Llama-3.1 8B (32 query heads on 8 of 128) and 70B
(64 on 8): slots with prompts of 512 shared by 8 and room for NEW tokens each. `unit` is the keys of
a step over private and over shared keys, `fast` the larger kernel's use of VMEM, `cache` the bytes
of the keys and values given, `beside` what the program holds besides: no copy of them.
"""

from __future__ import annotations

import argparse
import dataclasses

import jax
import jax.numpy as jnp
import rich.box
import rich.console
import rich.table
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from benchmarks.tpu_compile import Compiled, compile_for, make_tpu_mesh
from kernels.decoding import Own, Quantised, Shared, decode_attention, tpu

CHIPS = ('v5e:2x2', 'v5p:2x2x1', 'v6e:2x2')
LAYERS, BLOCK = 2, 64


@dataclasses.dataclass(frozen=True)
class Setting:
  """What one chip holds."""

  slots: int
  heads: int                  # of keys
  repeats: int                # query heads of one key head
  new: int                    # room for private keys
  head: int = 128
  prompt: int = 512
  draws: int = 8
  quantised: bool = False
  window: int | None = None


CASES = {
    '8B, all heads': Setting(64, 8, 4, 2048),
    '8B, all heads, 8k': Setting(16, 8, 4, 8192),
    '8B, all heads, 32k': Setting(4, 8, 4, 32768),
    '8B over 4 chips': Setting(128, 2, 4, 2048),
    '8B over 4 chips, int8': Setting(128, 2, 4, 2048, quantised=True),
    '8B over 4 chips, window 1024': Setting(128, 2, 4, 8192, window=1024),
    '70B over 8 chips': Setting(128, 1, 8, 2048),
    '70B over 8 chips, 32k': Setting(16, 1, 8, 32768),
    '70B over 4 chips, 8k': Setting(64, 2, 8, 8192),
}


def caches(s: Setting, mesh: jax.sharding.Mesh) -> tuple[Own, Shared]:
  """The regions of a setting, as shapes."""
  def array(dtype, *shape):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, P()))

  def cache(*shape):
    if s.quantised:
      return Quantised(array(jnp.int8, *shape), array(jnp.float32, *shape[:-1]))
    return array(jnp.bfloat16, *shape)

  own = (LAYERS, -(-s.new // BLOCK), s.slots, s.heads, BLOCK, s.head)
  groups = 2 * -(-s.slots // s.draws) + 1
  rows = (LAYERS, groups, s.heads, s.prompt, s.head)
  per_slot, per_group = array(jnp.int32, s.slots), array(jnp.int32, groups)
  return (Own(cache(*own), cache(*own), per_slot),
          Shared(cache(*rows), cache(*rows), per_group, per_group,
                 array(jnp.int32, groups, s.draws), per_slot, per_slot))


def compile_case(topology: str, s: Setting) -> Compiled:
  """Compiles a scan over the layers for one chip."""
  mesh = make_tpu_mesh(topology)
  own, shared = caches(s, mesh)

  def step(q, own, shared, positions):
    def one(q, layer):
      return decode_attention(q, own, (shared,), layer=layer, positions=positions,
                              scale=s.head ** -0.5, window=s.window), None
    return jax.lax.scan(one, q, jnp.arange(LAYERS, dtype=jnp.int32))[0]

  q = jax.ShapeDtypeStruct((s.slots, s.heads * s.repeats, s.head), jnp.bfloat16,
                           sharding=NamedSharding(mesh, P()))
  return compile_for(mesh, jax.shard_map(step, mesh=mesh, out_specs=P()), q, own, shared, own.live)


def main() -> None:
  parser = argparse.ArgumentParser(
      description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('chips', nargs='*', default=list(CHIPS), help='such as v5e:2x2')
  args = parser.parse_args()
  view = rich.table.Table(box=rich.box.SIMPLE, title='decode_attention, bfloat16; MiB')
  for name in ('chip', 'shape', 'slots', 'room', 'heads', 'unit', 'fast', 'cache', 'beside',
               'compile'):
    view.add_column(name, justify='left' if name in ('chip', 'shape') else 'right')
  for chip in args.chips:
    for name, s in CASES.items():
      own, shared = caches(s, make_tpu_mesh(chip))
      unit = f'{BLOCK * tpu.blocks_together(own)} {tpu.shared_stretch(shared)}'
      found = compile_case(chip, s)
      sizes = (max(found.fast_memory.values()), found.arguments, found.temporary)
      view.add_row(
          chip.partition(':')[0], name, str(s.slots), f'{s.new} + {s.prompt}',
          f'{s.heads * s.repeats}/{s.heads}', unit, *(f'{n / 2**20:,.1f}' for n in sizes),
          f'{found.seconds:.1f} s')
  rich.console.Console(width=120).print(view)


if __name__ == '__main__':
  main()
