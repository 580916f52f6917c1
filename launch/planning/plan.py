"""The plan: four programs in three phases, what each device holds, and how long they take."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from jax.sharding import Mesh

from jaxrl.parallel.mesh import rollout_mesh
from jaxrl.sampling.engine import Engine
from jaxrl.sampling.memory import LOGIT_ROWS, state_bytes
from jaxrl.sampling.memory import parameter_bytes as rollout_parameter_bytes
from kernels.attention.blocks import BLOCK
from launch.planning import programs
from launch.planning.chips import Topology
from launch.planning.decode_bytes import least_bytes, moved_bytes
from launch.planning.device_bytes import parameter_bytes
from launch.planning.figures import Figures, Traffic, compile_figures, traffic
from launch.planning.layout import Layout
from launch.planning.search import Estimate
from launch.planning.setting import Setting
from launch.planning.workload import (
    decode_flops,
    prefill_flops,
    prefill_shape,
    score_flops,
    score_length,
)


@dataclasses.dataclass(frozen=True)
class Program:
  """One compiled program in its phase; bytes and seconds of one device.

  Attributes:
    name: of the program.
    call: what one call computes, for people.
    held: kind -> bytes that lie on the device while it runs; 'working' is all that the program
      itself adds.
    flops: (useful, computed) of all devices in one call.
    tokens: useful tokens of one call over all devices.
    moved: bytes of main memory.
    compiled: False where all of this is arithmetic.
  """

  name: str
  call: str
  held: dict[str, int]
  flops: tuple[float, float]
  tokens: float
  moved: float
  traffic: list[Traffic]
  compile_seconds: float
  compiled: bool
  refused: str | None = None

  @property
  def needed(self) -> int:
    return sum(self.held.values())

  def fits(self, topology: Topology) -> bool:
    return self.refused is None and self.needed <= topology.chip.memory

  def times(self, topology: Topology) -> dict[str, float]:
    """Seconds that compute, memory and links take of one call, each at its peak."""
    chip = topology.chip
    return {'compute': self.flops[1] / (topology.chips * chip.flops),
            'memory': self.moved / chip.bandwidth,
            'links': sum(t.seconds for t in self.traffic)}

  def seconds(self, topology: Topology) -> float:
    """The roofline: nothing is faster than the slowest of the three."""
    return max(self.times(topology).values())

  def to_json(self, topology: Topology) -> dict:
    times, seconds = self.times(topology), self.seconds(topology)
    return {
        'program': self.name, 'call': self.call, 'compiled': self.compiled,
        'fits': self.fits(topology), 'refused': self.refused,
        'bytes_per_device': self.held | {'total': self.needed},
        'flops': {'useful': self.flops[0], 'computed': self.flops[1]},
        'hbm_bytes_per_device': self.moved,
        'collectives': [dataclasses.asdict(t) for t in self.traffic],
        'seconds': times | {'roofline': seconds}, 'bound': max(times, key=lambda k: times[k]),
        'tokens': self.tokens,
        'tokens_per_second_per_chip': self.tokens / seconds / topology.chips if seconds else None,
        'mfu': (self.flops[0] / (seconds * topology.chips * topology.chip.flops)
                if seconds else None),
        'compile_seconds': self.compile_seconds}


def train_program(
    setting: Setting, topology: Topology, estimate: Estimate, *, compiles: bool, store: Path | None
) -> Program:
  """The optimizer step; beside it lies the model that training started from."""
  layout, rows, bytes_ = estimate.layout, estimate.rows, estimate.bytes
  held = {'parameters': bytes_.parameters, 'optimizer': bytes_.optimizer, 'start': bytes_.start,
          'working': bytes_.gradients + bytes_.saved + bytes_.working}
  call = (f'step of {setting.batch_size} pairs in {rows.count} rows of {rows.length}')
  program = Program(
      'train', call, held, estimate.flops, float(rows.tokens), 0.0,
      [Traffic('estimate', 'all', 0, 0, estimate.links)], 0.0, compiled=False)
  if not compiles:
    return program
  mesh = programs.training_mesh(topology, layout)
  keys = _key_blocks(rows.length)
  figures = compile_figures(programs.lower_train(setting, layout, mesh), topology,
                            unknown=keys, store=store)
  held['working'] = max(figures.needed - bytes_.parameters - bytes_.optimizer, 0)
  return _compiled(program, topology, mesh, figures, held, figures.program.total(keys))


def score_program(
    setting: Setting, topology: Topology, layout: Layout, *, compiles: bool, store: Path | None
) -> Program:
  """A batch of the reference stage."""
  length = score_length(setting)
  masters = parameter_bytes(setting.model, setting.param_dtype, layout.sizes)
  tokens = layout.score_batch * (setting.lengths.prompt + setting.lengths.response - 1)
  program = Program(
      'score', f'{layout.score_batch} rows of {length}', {'parameters': masters, 'working': 0},
      score_flops(setting, layout), float(tokens), 0.0, [], 0.0, compiled=False)
  if not compiles:
    return program
  mesh, keys = programs.training_mesh(topology, layout), _key_blocks(length)
  figures = compile_figures(programs.lower_score(setting, layout, mesh), topology, unknown=keys,
                            store=store)
  held = {'parameters': masters, 'working': max(figures.needed - masters, 0)}
  return _compiled(program, topology, mesh, figures, held, figures.program.total(keys))


def rollout_programs(
    setting: Setting, topology: Topology, layout: Layout, tensor: int, *, compiles: bool,
    store: Path | None,
) -> list[Program]:
  """Prefill and decode of the engine that the run would make; the masters lie beside it.

  Raises:
    InputError: the parameters and one slot do not fit.
  """
  masters = parameter_bytes(setting.model, setting.param_dtype, layout.sizes)
  if setting.looks:           # while training: the state's parameters, and those it started from
    masters *= 2
  make_mesh = programs.training_mesh if compiles else programs.arithmetic_mesh
  mesh = make_mesh(topology, layout)
  config = programs.plan_slots(setting, mesh, tensor, topology.chip.memory, masters)
  sampling = rollout_mesh(mesh, tensor)
  parts = sampling.shape['data']
  assert config.slots is not None, 'plan_slots has chosen'
  slots = config.slots // parts
  readers = programs.readers_of(slots, setting.draws)
  held = {
      'parameters': rollout_parameter_bytes(setting.model, sampling, config.dtype),
      'cache': state_bytes(setting.model, setting.sampling, config, setting.max_prompt, readers,
                           sampling, slots=slots),
      'masters': masters}
  rows, width, continues = prefill_shape(setting)
  ids = min(width, max(setting.lengths.prompt - 1, 1))
  least = least_bytes(setting.model, config.dtype, tensor=tensor, slots=slots,
                      prompt=setting.lengths.prompt, mean=setting.lengths.response / 2,
                      draws=readers)
  flops = parts * prefill_flops(setting)
  prefill = Program(
      'prefill', f'{parts * rows} prompts, {"the last " if continues else ""}{width} ids',
      held | {'working': 0}, (flops * ids / width, flops), float(parts * rows * ids), 0.0, [], 0.0,
      compiled=False)
  flops = decode_flops(setting, config.slots)
  decode = Program(
      'decode', f'a token for {config.slots} slots', held | {'working': _logits(setting, slots)},
      (flops, flops), float(config.slots), least, [], 0.0, compiled=False)
  if not compiles:
    return [prefill, decode]
  engine = programs.plan_engine(setting, mesh, config)
  arguments = programs.engine_arguments(engine, readers)
  keys = _key_blocks(width)
  figures = compile_figures(programs.lower_prefill(setting, engine, arguments), topology,
                            unknown=keys, store=store)
  prefill = _with_figures(prefill, topology, engine, figures, figures.program.total(keys))
  figures = compile_figures(programs.lower_decode(engine, arguments), topology, unknown=1.0,
                            store=store)
  spread = [setting.lengths.response * n // slots for n in range(slots)]   # at all stages
  moved = least if figures.refused else moved_bytes(
      engine, figures.program, setting.lengths.prompt, spread, readers)
  return [prefill, _with_figures(decode, topology, engine, figures, moved)]


def _with_figures(
    program: Program, topology: Topology, engine: Engine, figures: Figures, moved: float
) -> Program:
  """The program as it was compiled; arguments that XLA pads count as working memory."""
  held = {name: size for name, size in program.held.items() if name != 'working'}
  resting = held['parameters'] + (held['cache'] if program.name == 'decode' else 0)
  if program.name == 'prefill' and not figures.refused:   # has the prompt region alone
    resting = figures.arguments
  held['working'] = max(figures.needed - resting, 0)
  return _compiled(program, topology, engine.mesh, figures, held, moved)


def _compiled(
    program: Program, topology: Topology, mesh: Mesh, figures: Figures, held: dict[str, int],
    moved: float,
) -> Program:
  return dataclasses.replace(
      program, held=held, moved=moved, traffic=traffic(figures, topology, mesh),
      compile_seconds=figures.seconds, compiled=True, refused=figures.refused)


def _logits(setting: Setting, slots: int) -> int:
  """What the engine itself reckons with for logits."""
  return LOGIT_ROWS * 4 * setting.model.vocab_size * slots


def _key_blocks(length: int) -> float:
  """Blocks of keys that a block of queries sees on average, of rows of so many causal tokens."""
  return (-(-length // BLOCK) + 1) / 2
