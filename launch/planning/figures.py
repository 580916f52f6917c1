"""What the compiler says of a program, kept on disk, so that a search goes on where it stopped."""

from __future__ import annotations

import collections
import dataclasses
import gzip
import hashlib
import importlib.metadata
import json
import math
import os
import re
import time
from pathlib import Path

import jax

from launch.planning.chips import Topology, link_bandwidth
from launch.planning.collectives import collectives, mesh_axes
from launch.planning.hlo_bytes import Loop, loops

SIZES = ('argument', 'output', 'alias', 'temp', 'generated_code', 'host_argument', 'host_temp')


@dataclasses.dataclass(frozen=True)
class Moved:
  """Collectives of one kind between the same devices."""

  kind: str
  group: tuple[int, ...]      # numbers in the order of the mesh
  runs: float                 # in one call of the program
  sent: float                 # bytes by each device in one call


@dataclasses.dataclass(frozen=True)
class Figures:
  """Of one compiled program and one device; bytes.

  Attributes:
    arguments, temporaries: of the device's main memory.
    outputs: that do not lie where an argument lay.
    refused: what the compiler said where the program does not fit, else None.
    needed: bytes in all; where refused, what the compiler says it would take.
  """

  arguments: int
  temporaries: int
  outputs: int
  needed: int
  host: int
  seconds: float
  program: Loop
  collectives: tuple[Moved, ...]
  refused: str | None = None


@dataclasses.dataclass(frozen=True)
class Compiled:
  """What the compiler said, as it is kept on disk."""

  sizes: dict[str, int]       # of `memory_analysis`
  seconds: float
  refused: str | None


def compile_figures(
    lowered: jax.stages.Lowered, topology: Topology, *, unknown: float, store: Path | None
) -> Figures:
  """Compiles, or reads again what is in `store` of the same program for the same topology.

  Args:
    unknown: trips of loops whose length is known at run time alone, for what is counted.
  """
  text = lowered.as_text()
  versions = [f'{name} {importlib.metadata.version(name)}' for name in ('jax', 'jaxlib', 'libtpu')]
  key = hashlib.sha256('\n'.join([text, str(topology), *versions]).encode()).hexdigest()[:32]
  if store is not None and (store / f'{key}.json').exists():
    said = Compiled(**json.loads((store / f'{key}.json').read_text()))
    program = gzip.decompress((store / f'{key}.hlo.gz').read_bytes()).decode()
  else:
    said, program = _compile(lowered)
    if store is not None:
      store.mkdir(parents=True, exist_ok=True)
      _write(store / f'{key}.hlo.gz', gzip.compress(program.encode()))
      _write(store / f'{key}.json', json.dumps(dataclasses.asdict(said)).encode())
  if said.refused is not None:
    return _refused(said.refused, said.seconds)
  return _figures(said, program, topology, unknown)


def _compile(lowered: jax.stages.Lowered) -> tuple[Compiled, str]:
  start = time.perf_counter()
  try:
    compiled = lowered.compile()
  except jax.errors.JaxRuntimeError as error:
    if 'RESOURCE_EXHAUSTED' not in str(error):
      raise
    return Compiled({}, time.perf_counter() - start, str(error)), ''
  seconds = time.perf_counter() - start
  memory, text = compiled.memory_analysis(), compiled.as_text()
  assert memory is not None and text is not None, 'the compiler of TPUs gives both'
  return Compiled({name: getattr(memory, f'{name}_size_in_bytes') for name in SIZES}, seconds,
                  None), text


def _write(path: Path, content: bytes) -> None:
  """Whole or not at all, however many plans share the folder."""
  partial = path.with_name(f'{path.name}.{os.getpid()}')
  partial.write_bytes(content)
  partial.replace(path)


def _figures(said: Compiled, text: str, topology: Topology, unknown: float) -> Figures:
  gathered: dict[tuple, list[float]] = collections.defaultdict(lambda: [0.0, 0.0])
  for one in collectives(text, topology.chips, slices=topology.slices, unknown=unknown):
    counts = gathered[one.kind, one.group]
    counts[0] += one.runs
    counts[1] += one.runs * one.sent
  size = said.sizes
  outputs = size['output'] - size['alias']
  return Figures(
      size['argument'], size['temp'], outputs,
      size['argument'] + size['temp'] + outputs + size['generated_code'],
      size['host_argument'] + size['host_temp'], said.seconds, loops(text),
      tuple(Moved(*key, *counts) for key, counts in gathered.items()))


def _refused(message: str, seconds: float) -> Figures:
  """Figures of a program that the compiler refused for want of memory."""
  said = ' '.join(message.split())
  found = re.search(r'Used ([\d.]+)([KMG]) of', said) or re.search(
      r'required for HLO temporaries \(([\d.]+)([KMG])\)', said)
  needed = math.ceil(float(found[1]) * 2 ** (10 * ('KMG'.index(found[2]) + 1))) if found else 0
  return Figures(0, 0, 0, needed, 0, seconds, Loop(0, ()), (), said[:300])


@dataclasses.dataclass(frozen=True)
class Traffic:
  """Collectives of one kind along one axis of the mesh, in one call."""

  kind: str
  axis: str                   # 'fsdp', 'fsdp+sequence', ...; with ' (DCN)' between slices
  count: float
  sent: float                 # bytes by each device
  seconds: float              # at the bandwidth of the links alone


def traffic(figures: Figures, topology: Topology, mesh: jax.sharding.Mesh) -> list[Traffic]:
  """The program's collectives by kind and axis, the longest first."""
  places = [(getattr(d, 'slice_index', 0) or 0, *d.coords) for d in mesh.devices.flat]
  together: dict[tuple[str, str], list[float]] = collections.defaultdict(lambda: [0.0, 0.0, 0.0])
  for one in figures.collectives:
    group = [places[n] for n in one.group]
    axis = mesh_axes(one.group, dict(mesh.shape))
    if len({place[0] for place in group}) > 1:
      axis += ' (DCN)'
    counts = together[one.kind, axis]
    for n, value in enumerate((one.runs, one.sent, one.sent / link_bandwidth(topology, group))):
      counts[n] += value
  found = [Traffic(*key, *counts) for key, counts in together.items()]
  return sorted(found, key=lambda t: -t.seconds)
