"""Stage: train from a model to the next one, resuming inside at the exact step."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping

import grain
import jax
from etils import epath

from jaxrl.models.config import ModelConfig
from jaxrl.models.flops import peak_tflops, train_flops, units_of
from jaxrl.models.identity import identity
from jaxrl.models.lora import adapter_shardings, attach, init_adapter, merge
from jaxrl.models.peft_folder import write_adapter
from jaxrl.runs import durable
from jaxrl.runs.session import (
    ADAPTER_STREAM,
    Model,
    Session,
    clear,
    counts_of,
    write_model,
)
from jaxrl.training.loop import LoopConfig, Step, train
from jaxrl.training.objectives import Objective
from jaxrl.training.optimizer import OptimizerConfig, learning_rate_schedule, make_optimizer
from jaxrl.training.step import (
    TrainState,
    init_state,
    offload_optimizer,
    offloaded_step,
    train_step,
)
from jaxrl.training.step_log import Watch


@dataclasses.dataclass(frozen=True)
class Trainer:
  """A compiled-once step with the optimizer it was built for; serves every iteration of a run."""

  step: Callable              # `Step`, which takes the frozen model as well where `adapted`
  optimizer: OptimizerConfig
  adapted: ModelConfig | None = None   # with the adapter that is trained in place of the model
  loss_state: Callable[[dict], dict] = lambda params: {}   # what a loss with a memory starts from
  offloads: bool = False      # the optimizer's state rests in the memory of the host
  watch: Watch = Watch()

  def merged(self, base: dict, adapter: dict) -> dict:
    """The model that `base` and its adapter are together; other weights are those of `base`."""
    # Only what changes goes through jit, which would copy the rest.
    changed = {name: base['layers'][name] for name in adapter['layers']}
    layers = _merge(attach({'layers': changed}, adapter), self.adapted)['layers']
    return {**base, 'layers': {**base['layers'], **layers}}


_merge = jax.jit(merge, static_argnums=1)


def make_trainer(
    objective: Objective, optimizer: OptimizerConfig, micro_batches: int,
    adapted: ModelConfig | None = None, *, offloads: bool = False, watch: Watch | None = None,
) -> Trainer:
  """Jits the step once; the state is donated, a frozen model is not.

  With `adapted`, the configuration that `objective` was made for, a fresh adapter is trained.
  `offloads` keeps the optimizer's state in the memory of the host between steps.
  """
  options: dict = dict(
      objective=objective, tx=make_optimizer(optimizer), micro_batches=micro_batches)
  step = offloaded_step(**options) if offloads else jax.jit(
      functools.partial(train_step, **options), donate_argnums=0)
  return Trainer(step, optimizer, adapted, objective.initial_state, offloads, watch or Watch())


# What one line of the training log shows, in this order, where present.
SHOWN = ('loss', 'loss/preference', 'loss/nll', 'rewards/accuracies', 'rewards/margins',
         'logps/chosen', 'logps/rejected', 'grad_norm')


def run_training(
    session: Session, scratch: epath.Path, name: str, iteration: int, model: Model,
    trainer: Trainer, batches: grain.MapDataset, loop: LoopConfig, *,
    expected_first_loss: float | None = None,
    stop: Callable[[int, dict], bool] | None = None, parks_optimizer: bool = False,
) -> TrainState:
  """Trains from `model` inside a stage's scratch folder, going on from its newest checkpoint.

  The state holds what was trained: the model, or the adapter of a trainer that has one.
  Records carry the last part of `name` as their stage. With `expected_first_loss` the first step's
  'loss/preference' (or 'loss') must be that number to 1e-3: where policy = reference it is ln 2,
  and anything else means that ids, masks or the reference do not belong together.
  `stop(step, params)` is asked at every checkpoint, with the whole model; with `parks_optimizer`,
  for a `stop` that samples, the devices hold no state of the optimizer then.
  """
  schedule = learning_rate_schedule(trainer.optimizer, loop.steps)
  label = name.rsplit('/', 1)[-1]

  def on_log(step: int, numbers: dict[str, float]) -> None:
    session.metrics.write(iteration, label, step, numbers)
    session.metrics.sync()   # a checkpoint of this step must not outlive its record
    shown = '  '.join(f'{key} {numbers[key]:.4g}' for key in SHOWN if key in numbers)
    session.progress.line(
        f'  step {step}/{loop.steps}  {shown}  {numbers["perf/tokens_per_second"]:.0f} tokens/s')

  def asked(step: int, state: TrainState) -> bool:
    if stop is None:
      return False
    params = state.params
    return stop(step, params if trainer.adapted is None else trainer.merged(model.params, params))

  step_fn: Step
  if trainer.adapted is None:
    step_fn = trainer.step
    # The step donates its state; the reference's own arrays must survive it.
    trained = jax.tree.map(lambda x: x.copy(), model.params)
  else:
    def step_fn(state, batch, learning_rate):
      return trainer.step(state, batch, learning_rate, model.params)

    key = jax.random.key(session.stream_seed(iteration, ADAPTER_STREAM))
    trained = jax.device_put(
        init_adapter(key, trainer.adapted), adapter_shardings(trainer.adapted, session.mesh))
  tx = make_optimizer(trainer.optimizer)
  state = jax.jit(lambda params: init_state(params, tx, trainer.loss_state(params)))(trained)
  if trainer.offloads:
    state = offload_optimizer(state)
  with session.progress.stage(name, loop.steps, 'steps') as bar:

    def on_resume(step: int) -> None:
      session.metrics.rewind(iteration, label, step or None)
      bar.advance(step)

    return train(
        state, batches, _checking_first(step_fn, expected_first_loss), config=loop,
        learning_rate=lambda step: float(schedule(step)), mesh=session.mesh,
        checkpoints=durable.shared(scratch) / 'checkpoint', on_log=on_log, on_resume=on_resume,
        on_step=bar.advance, stop=asked, parks_optimizer=parks_optimizer,
        watch=_watch(session, trainer), warn=session.progress.line)


def _watch(session: Session, trainer: Trainer) -> Watch:
  """What the log is to say of this training besides its metrics."""
  config = trainer.adapted or session.model
  peak = trainer.watch.peak_tflops or peak_tflops(session.mesh.devices.flat[0].device_kind)
  return dataclasses.replace(
      trainer.watch, peak_tflops=peak, devices=session.mesh.size, programs=session.programs,
      flops_of=lambda batch: train_flops(config, units_of(batch)).total())


def train_stage(
    session: Session, name: str, iteration: int, model: Model, trainer: Trainer,
    batches: grain.MapDataset, loop: LoopConfig, *, expected_first_loss: float | None = None,
    stop: Callable[[int, dict], bool] | None = None, parks_optimizer: bool = False,
) -> Mapping:
  """`run_training`, published as the folder `model` beside `name`; returns counts.

  A trained adapter is published as `adapter`, a PEFT folder, and merged in `model`.
  """
  folder = name.rsplit('/', 1)[0]

  def train_and_save(scratch: epath.Path) -> dict:
    state = run_training(
        session, scratch, name, iteration, model, trainer, batches, loop,
        expected_first_loss=expected_first_loss, stop=stop, parks_optimizer=parks_optimizer)
    params = state.params
    if trainer.adapted is not None:
      params = trainer.merged(model.params, state.params)
    after = identity(params)
    if after == model.identity:
      raise RuntimeError(f'{name}: training did not change the parameters')
    clear(scratch / 'model', scratch / 'adapter')
    write_model(session, scratch / 'model', params, model.folder)
    if trainer.adapted is not None:
      write_adapter(scratch / 'adapter', state.params, trainer.adapted)
    return {'steps': int(state.step), 'before': model.identity, 'after': after}

  outputs = ('model',) if trainer.adapted is None else ('model', 'adapter')
  return session.run.stage(
      name, tuple(f'{folder}/{output}' for output in outputs), counts_of,
      together=train_and_save).counts


class FirstLossError(RuntimeError):
  """Training did not start from policy = reference."""


def _checking_first(step_fn: Step, expected: float | None) -> Step:
  """The step, with its loss checked where the state is at step 0."""
  if expected is None:
    return step_fn

  def step(state, batch, learning_rate):
    is_first = not checked and int(state.step) == 0
    new, metrics = step_fn(state, batch, learning_rate)
    if is_first:
      found = metrics.get('loss/preference', metrics['loss']).value()
      if abs(float(found) - expected) > 1e-3 * max(1.0, abs(expected)):
        raise FirstLossError(
            f'the first preference loss is {float(found):.6f} and not {expected:.6f}: policy and '
            'reference disagree, so ids, masks or stored log-probs do not belong together')
    checked.append(True)
    return new, metrics

  checked: list[bool] = []
  return step

