"""What the compiler says of a program, kept on disk, so that a search goes on where it stopped."""

from __future__ import annotations

import collections
import dataclasses
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

VERSION = 1                   # of what is read from a program; older figures are not used


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


def compile_figures(
    lowered: jax.stages.Lowered, topology: Topology, *, unknown: float, store: Path | None
) -> Figures:
  """Compiles, or finds the figures of the same program for the same topology in `store`.

  Args:
    unknown: trips of loops whose length is known at run time alone, for what is counted.
  """
  text = lowered.as_text()
  versions = [f'{name} {importlib.metadata.version(name)}' for name in ('jax', 'jaxlib', 'libtpu')]
  key = hashlib.sha256(
      '\n'.join([text, str(topology), str(unknown), str(VERSION), *versions]).encode()).hexdigest()
  path = None if store is None else store / f'{key[:32]}.json'
  if path is not None and path.exists():
    return _read(json.loads(path.read_text()))
  start = time.perf_counter()
  try:
    compiled = lowered.compile()
  except jax.errors.JaxRuntimeError as error:
    if 'RESOURCE_EXHAUSTED' not in str(error):
      raise
    figures = _refused(str(error), time.perf_counter() - start)
  else:
    figures = _figures(compiled, topology, unknown, time.perf_counter() - start)
  if path is not None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f'.{os.getpid()}')
    partial.write_text(json.dumps(dataclasses.asdict(figures)))
    partial.replace(path)
  return figures


def _figures(
    compiled: jax.stages.Compiled, topology: Topology, unknown: float, seconds: float
) -> Figures:
  memory, text = compiled.memory_analysis(), compiled.as_text()
  assert memory is not None and text is not None, 'the compiler of TPUs gives both'
  gathered: dict[tuple, list[float]] = collections.defaultdict(lambda: [0.0, 0.0])
  for one in collectives(
      text, topology.chips, slices=topology.slices, unknown=unknown):
    counts = gathered[one.kind, one.group]
    counts[0] += one.runs
    counts[1] += one.runs * one.sent
  outputs = memory.output_size_in_bytes - memory.alias_size_in_bytes
  return Figures(
      memory.argument_size_in_bytes, memory.temp_size_in_bytes, outputs,
      memory.argument_size_in_bytes + memory.temp_size_in_bytes + outputs
      + memory.generated_code_size_in_bytes,
      memory.host_argument_size_in_bytes + memory.host_temp_size_in_bytes, seconds, loops(text),
      tuple(Moved(*key, *counts) for key, counts in gathered.items()))


def _refused(message: str, seconds: float) -> Figures:
  """Figures of a program that the compiler refused for want of memory."""
  said = ' '.join(message.split())
  found = re.search(r'Used ([\d.]+)([KMG]) of', said) or re.search(
      r'required for HLO temporaries \(([\d.]+)([KMG])\)', said)
  needed = math.ceil(float(found[1]) * 2 ** (10 * ('KMG'.index(found[2]) + 1))) if found else 0
  return Figures(0, 0, 0, needed, 0, seconds, Loop(0, ()), (), said[:300])


def _read(stored: dict) -> Figures:
  def loop(x: dict) -> Loop:
    return Loop(x['moved'], tuple(map(loop, x['inner'])), x['trips'])

  moved = tuple(Moved(x['kind'], tuple(x['group']), x['runs'], x['sent'])
                for x in stored['collectives'])
  return Figures(**{**stored, 'program': loop(stored['program']), 'collectives': moved})


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
