"""Programs compiled for TPUs that need not be there, and what the compiler says of them."""

from __future__ import annotations

import dataclasses
import os
import re
import time
from collections.abc import Callable
from typing import Any

import jax
from jax.experimental import topologies
from jax.sharding import AxisType


@dataclasses.dataclass(frozen=True)
class Compiled:
  """Sizes are bytes on each chip."""

  arguments: int
  temporary: int
  results: int
  fast_memory: dict[str, int]   # of each Pallas kernel, by the name of its call
  seconds: float                # of processors: tracing, lowering and compiling


def make_tpu_mesh(topology: str, count: int = 1) -> jax.sharding.Mesh:
  """`count` chips of a topology such as v5e:2x2, in a line named 'tensor'."""
  jax.config.update('jax_platforms', 'cpu')
  os.environ.update(       # libtpu reads them: describe a machine, look for none
      TPU_SKIP_MDS_QUERY='1', TPU_ACCELERATOR_TYPE='v5litepod-4', TPU_WORKER_HOSTNAMES='localhost',
      ALLOW_MULTIPLE_LIBTPU_LOAD='1')
  devices = topologies.get_topology_desc(platform='tpu', topology_name=topology).devices
  return jax.sharding.Mesh(devices[:count], ('tensor',), axis_types=(AxisType.Explicit,))


def compile_for(mesh: jax.sharding.Mesh, function: Callable, *arguments: Any) -> Compiled:
  """Compiles function(*arguments), whose arrays are laid out on the mesh."""
  start = time.process_time()
  with jax.set_mesh(mesh):
    program = jax.jit(function).lower(*arguments).compile()
  seconds = time.process_time() - start
  memory = program.memory_analysis()
  return Compiled(memory.argument_size_in_bytes, memory.temp_size_in_bytes,
                  memory.output_size_in_bytes, _fast_memory(program.as_text()), seconds)


def _fast_memory(text: str) -> dict[str, int]:
  """What each Mosaic call uses by its record in the program: blocks, scratch, and spilled values.

  What lies below its region belongs to the program: arrays that XLA keeps in fast memory.
  """
  config = r'\[\{"memory_space":"1","offset":"(\d+)","size":"(\d+)"'
  found: dict[str, int] = {}
  for line in text.splitlines():
    if 'custom_call_target="tpu_custom_call"' in line:
      name = line.split('%', 1)[1].split(' ', 1)[0].partition('.')[0]
      region = re.search('"scoped_memory_configs":' + config, line)
      used = re.search('"used_scoped_memory_configs":' + config, line)
      size = int(used[2]) - int(region[1]) if used and region else 0
      found[name] = max(found.get(name, 0), size)
  return found
