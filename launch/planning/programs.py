"""A run's own programs, compiled for devices that need not be there: train, score, prefill, decode.

Every function here gives a program lowered for a mesh of topology devices, with the arguments that
the run would call it with, as shapes. `figures.py` compiles it and reads what comes out.
"""

from __future__ import annotations

import dataclasses
import functools
import os
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxrl.errors import InputError
from jaxrl.models.lora import adapter_shardings, lora_specs
from jaxrl.models.params import abstract_params, decoder_specs, is_spec
from jaxrl.parallel.mesh import make_mesh, rollout_mesh
from jaxrl.parallel.sharding import batch_sharding
from jaxrl.runs.train_stage import make_trainer
from jaxrl.sampling.engine import Engine, make_engine
from jaxrl.sampling.memory import choose_slots
from jaxrl.sampling.rollout_params import rollout_specs
from jaxrl.sampling.sizes import EngineConfig
from jaxrl.training.logps import target_logps
from jaxrl.training.objectives import preference_objective
from jaxrl.training.optimizer import make_optimizer
from jaxrl.training.step import gradients, init_state
from launch.planning.chips import Topology
from launch.planning.layout import Layout
from launch.planning.setting import Setting
from launch.planning.workload import prefill_shape, score_length, training_arrays


@functools.cache
def topology_devices(topology: Topology) -> tuple[Any, ...]:
  """Descriptions of the devices, for which programs can be compiled on any host.

  Raises:
    InputError: libtpu is not installed, or knows no such topology.
  """
  jax.config.update('jax_platforms', 'cpu')
  os.environ.update(          # libtpu reads them: describe a machine, look for none
      TPU_SKIP_MDS_QUERY='1', TPU_ACCELERATOR_TYPE=topology.chip.host,
      TPU_WORKER_HOSTNAMES='localhost', ALLOW_MULTIPLE_LIBTPU_LOAD='1')
  slices = {} if topology.slices == 1 else {'num_slices': topology.slices}
  try:
    found = topologies.get_topology_desc(
        platform='tpu', topology_name=topology.name, **slices).devices
  except RuntimeError as error:       # JaxRuntimeError among them
    what = 'libtpu is not installed' if 'libtpu' in str(error).lower() else (
        'the compiler has no such topology')
    raise InputError(what, where=f'--topology={topology.name}', found=str(error)[:200],
                     fix='pip install --target=FOLDER libtpu, and put FOLDER on PYTHONPATH, or '
                         'give --nocompile for arithmetic alone') from error
  if len(found) != topology.chips:
    raise InputError('the topology has another number of devices', where='--topology',
                     expected=topology.chips, found=len(found))
  return tuple(found)


def training_mesh(topology: Topology, layout: Layout) -> Mesh:
  return make_mesh(**layout.sizes, devices=topology_devices(topology))


@dataclasses.dataclass(frozen=True)
class _StandIn:
  """A device of a mesh that nothing is compiled for."""

  id: int
  platform: str
  process_index: int = 0


def arithmetic_mesh(topology: Topology, layout: Layout) -> Mesh:
  """A mesh of the right sizes, where there is no compiler for the topology."""
  platform = 'tpu' if topology.chip.dimensions else 'gpu'
  devices: Any = np.array([_StandIn(n, platform) for n in range(topology.chips)])
  return Mesh(devices.reshape(tuple(layout.sizes.values())), tuple(layout.sizes))


def lower_train(setting: Setting, layout: Layout, mesh: Mesh) -> jax.stages.Lowered:
  """One optimizer step; with an optimizer on the host its first half, the gradients."""
  c = setting.adapted or setting.model
  objective = preference_objective(
      setting.loss, setting.loss_options, c,
      dataclasses.replace(setting.compute, remat=layout.remat))
  base = abstract_params(setting.model, mesh, jnp.dtype(setting.param_dtype))
  trained: Any = base
  frozen: tuple[Any, ...] = ()
  if setting.adapted is not None:
    trained = jax.tree.map(
        lambda s, place: jax.ShapeDtypeStruct(s.shape, jnp.float32, sharding=place),
        lora_specs(setting.adapted), adapter_shardings(setting.adapted, mesh), is_leaf=is_spec)
    frozen = (base,)
  batch = {name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=batch_sharding(mesh, x.ndim))
           for name, x in training_arrays(setting, layout).items()}
  state = lower_state(setting, mesh, trained)
  if setting.offloads:
    first = jax.jit(functools.partial(
        gradients, objective=objective, micro_batches=layout.micro_batches))
    with jax.set_mesh(mesh):
      return first.lower(state.params, state.loss_state, state.step, batch, *frozen)
  step: Any = make_trainer(
      objective, setting.optimizer, layout.micro_batches, setting.adapted).step
  with jax.set_mesh(mesh):
    return step.lower(state, batch, jax.ShapeDtypeStruct((), jnp.float32), *frozen)


def lower_state(setting: Setting, mesh: Mesh, trained: Any) -> Any:
  """Shapes and places of a training state, as the run starts it."""
  start = functools.partial(init_state, tx=make_optimizer(setting.optimizer))
  with jax.set_mesh(mesh):
    shapes = jax.eval_shape(start, trained)
  return jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(
          mesh, PartitionSpec() if x.sharding is None else x.sharding.spec)), shapes)


def lower_score(setting: Setting, layout: Layout, mesh: Mesh) -> jax.stages.Lowered:
  """Log-probs of a batch of the reference stage (`training.score`)."""
  policy = dataclasses.replace(setting.compute, remat=layout.remat)
  program = jax.jit(functools.partial(target_logps, c=setting.model, policy=policy))
  ids = jax.ShapeDtypeStruct((layout.score_batch, score_length(setting)), jnp.int32,
                             sharding=batch_sharding(mesh, 2))
  with jax.set_mesh(mesh):
    return program.lower(
        abstract_params(setting.model, mesh, jnp.dtype(setting.param_dtype)), ids, ids)


def plan_slots(setting: Setting, mesh: Mesh, tensor: int, memory: int, held: int) -> EngineConfig:
  """The sizes of the run's engine, with as many slots as it would choose itself.

  Args:
    mesh: of training.
    tensor: devices that share one copy of the parameters.
    memory: bytes of a device, of which `held` are taken by masters.

  Raises:
    InputError: the parameters and one slot do not fit.
  """
  config = dataclasses.replace(setting.engine, tensor=tensor)
  if config.slots is not None:
    return config
  choice = choose_slots(
      setting.model, setting.sampling, config, rollout_mesh(mesh, tensor),
      max_prompt=setting.max_prompt, draws=setting.draws, memory=memory, held=held)
  return dataclasses.replace(config, slots=choice.slots)


def plan_engine(setting: Setting, mesh: Mesh, config: EngineConfig) -> Engine:
  """The run's engine; a tokenizer would know which ids end a response, which changes no size."""
  return make_engine(setting.model, setting.sampling, config, mesh, max_prompt=setting.max_prompt,
                     eos_ids=(setting.model.vocab_size - 1,), pad_id=0, draws=setting.draws)


@dataclasses.dataclass(frozen=True)
class EngineArguments:
  """What the programs of an engine are called with, as shapes."""

  params: Any
  slots: Any
  prompts: Any


def engine_arguments(engine: Engine, readers: int) -> EngineArguments:
  """Parameters in the compute dtype, and the state where up to `readers` slots share a prompt."""
  mesh, dtype = engine.mesh, jnp.dtype(engine.config.dtype)
  shapes = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, dtype),
                        decoder_specs(engine.model), is_leaf=is_spec)
  params = jax.tree.map(
      lambda s, spec: jax.ShapeDtypeStruct(
          s.shape, s.dtype, sharding=NamedSharding(mesh, spec)),
      shapes, rollout_specs(shapes, engine.model, mesh))
  with jax.set_mesh(mesh):
    slots, prompts = jax.eval_shape(engine.empty(readers))
  return EngineArguments(params, slots, prompts)


def readers_of(slots: int, draws: int) -> int:
  """Of the slots of a part, those that may read one prompt, as `generate` has it."""
  return min(1 << (max(draws, 1) - 1).bit_length(), slots)


def lower_decode(engine: Engine, arguments: EngineArguments) -> jax.stages.Lowered:
  """Up to `cadence` steps of all slots."""
  with jax.set_mesh(engine.mesh):
    return engine.decode.lower(
        arguments.params, arguments.slots, arguments.prompts, None,
        _placed(engine, (), jnp.uint32, PartitionSpec()),
        _placed(engine, (engine.parts,), jnp.int32))


def lower_prefill(
    setting: Setting, engine: Engine, arguments: EngineArguments
) -> jax.stages.Lowered:
  """A chunk of some prompts of every part; the last one where prompts have several."""
  rows, width, continues = prefill_shape(setting)
  program = engine.next_chunk if continues else engine.first_chunk
  count = engine.parts * rows
  with jax.set_mesh(engine.mesh):
    return program.lower(
        arguments.params, arguments.prompts, None, _placed(engine, (count, width), jnp.int32),
        _placed(engine, (count,), jnp.int32), _placed(engine, (count,), jnp.int32),
        _placed(engine, (engine.parts,), jnp.int32),
        _placed(engine, (), jnp.int32, PartitionSpec()))


def _placed(
    engine: Engine, shape: tuple[int, ...], dtype: Any, spec: PartitionSpec | None = None
) -> jax.ShapeDtypeStruct:
  spec = PartitionSpec('data') if spec is None else spec
  return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(engine.mesh, spec))
