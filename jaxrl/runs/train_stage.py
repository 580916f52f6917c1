"""Stage: train from a model to the next one, resuming inside at the exact step."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping

import grain
import jax
from etils import epath

from jaxrl.models.params import identity
from jaxrl.runs.session import Model, Session, write_model
from jaxrl.training.loop import LoopConfig, Step, train
from jaxrl.training.optimizer import OptimizerConfig, learning_rate_schedule, make_optimizer
from jaxrl.training.step import Objective, TrainState, init_state, train_step


@dataclasses.dataclass(frozen=True)
class Trainer:
  """A compiled-once step with the optimizer it was built for; serves every iteration of a run."""

  step: Step
  optimizer: OptimizerConfig


def make_trainer(objective: Objective, optimizer: OptimizerConfig, micro_batches: int) -> Trainer:
  """Jits the step once; the state is donated."""
  step = jax.jit(
      functools.partial(train_step, objective=objective, tx=make_optimizer(optimizer),
                        micro_batches=micro_batches),
      donate_argnums=0)
  return Trainer(step, optimizer)


# What one line of the training log shows, in this order, where present.
SHOWN = ('loss', 'loss/preference', 'loss/nll', 'rewards/accuracies', 'rewards/margins',
         'logps/chosen', 'logps/rejected', 'grad_norm')


def run_training(
    session: Session, scratch: epath.Path, name: str, iteration: int, model: Model,
    trainer: Trainer, batches: grain.MapDataset, loop: LoopConfig, *,
    expected_first_loss: float | None = None,
    stop: Callable[[int, dict], bool] = lambda step, params: False,
) -> TrainState:
  """Trains from `model` inside a stage's scratch folder, going on from its newest checkpoint.

  Records carry the last part of `name` as their stage. With `expected_first_loss` the first step's
  'loss/preference' (or 'loss') must be that number to 1e-3: where policy = reference it is ln 2,
  and anything else means that ids, masks or the reference do not belong together.
  `stop(step, params)` is asked at every checkpoint.
  """
  schedule = learning_rate_schedule(trainer.optimizer, loop.steps)
  label = name.rsplit('/', 1)[-1]

  def on_log(step: int, numbers: dict[str, float]) -> None:
    session.metrics.write(iteration, label, step, numbers)
    session.metrics.sync()   # a checkpoint of this step must not outlive its record
    shown = '  '.join(f'{key} {numbers[key]:.4g}' for key in SHOWN if key in numbers)
    session.progress.line(
        f'  step {step}/{loop.steps}  {shown}  {numbers["perf/tokens_per_second"]:.0f} tokens/s')

  # The step donates its state; the reference's own arrays must survive it.
  state = jax.jit(functools.partial(init_state, tx=make_optimizer(trainer.optimizer)))(
      jax.tree.map(lambda x: x.copy(), model.params))
  with session.progress.stage(name, loop.steps, 'steps') as bar:

    def on_resume(step: int) -> None:
      session.metrics.rewind(iteration, label, step or None)
      bar.advance(step)

    return train(
        state, batches, _checking_first(trainer.step, expected_first_loss), config=loop,
        learning_rate=lambda step: float(schedule(step)), mesh=session.mesh,
        checkpoints=scratch / 'checkpoint', on_log=on_log, on_resume=on_resume,
        on_step=bar.advance, stop=lambda step, state: stop(step, state.params),
        warn=session.progress.line)


def train_stage(
    session: Session, name: str, iteration: int, model: Model, trainer: Trainer,
    batches: grain.MapDataset, loop: LoopConfig, *, expected_first_loss: float | None = None,
    stop: Callable[[int, dict], bool] = lambda step, params: False,
) -> Mapping:
  """`run_training`, published as the folder `model` beside `name`; returns counts."""

  def produce(scratch: epath.Path) -> dict:
    state = run_training(
        session, scratch, name, iteration, model, trainer, batches, loop,
        expected_first_loss=expected_first_loss, stop=stop)
    after = identity(state.params)
    if after == model.identity:
      raise RuntimeError(f'{name}: training did not change the parameters')
    partial = scratch / 'model'
    if partial.exists():
      partial.rmtree()
    write_model(session, partial, state.params, model.folder)
    return {'steps': int(state.step), 'before': model.identity, 'after': after}

  return session.run.stage(name, (f'{name.rsplit("/", 1)[0]}/model',), produce).counts


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

