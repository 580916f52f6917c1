"""The loop around the step: feed, step, log one step behind, save, and resume at the exact step."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping
from typing import Any

import grain
import jax
import numpy as np
from etils import epath

from jaxrl.errors import InputError
from jaxrl.losses.mean import Mean
from jaxrl.parallel.host_memory import to_device, to_host
from jaxrl.parallel.mesh import ways
from jaxrl.parallel.sharding import batch_sharding
from jaxrl.training.checkpoint import Checkpoints
from jaxrl.training.preemption import Notice, Preempted
from jaxrl.training.step import TrainState
from jaxrl.training.step_log import NonFiniteError as NonFiniteError  # callers import it here
from jaxrl.training.step_log import StepLog, Watch

# (state, batch, learning rate) -> (state, metrics)
Step = Callable[
    [TrainState, Mapping[str, jax.Array], np.float32], tuple[TrainState, dict[str, Mean]]]


@dataclasses.dataclass(frozen=True)
class LoopConfig:
  steps: int
  log_every: int = 10
  save_every: int = 100
  steps_per_epoch: float | None = None   # logs `epoch` where given
  keep: int = 2                          # checkpoints: the newest ones, and
  keep_every: int | None = None          # those of every step that is a multiple of this


def train(
    state: TrainState,
    batches: grain.MapDataset,
    step_fn: Step,
    *,
    config: LoopConfig,
    learning_rate: Callable[[int], float],
    mesh: jax.sharding.Mesh,
    checkpoints: epath.Path,
    on_log: Callable[[int, dict[str, float]], None],
    on_resume: Callable[[int], None] = lambda step: None,
    on_step: Callable[[], None] = lambda: None,
    stop: Callable[[int, TrainState], bool] = lambda step, state: False,
    parks_optimizer: bool = False,
    watch: Watch | None = None,
    warn: Callable[[str], None] = print,
) -> TrainState:
  """Runs to `config.steps`; batch k is `batches[k]`, so a restart goes on with the same bits.

  `step_fn(state, batch, lr)` is jitted by the caller and may donate the state. `on_log(step,
  numbers)` receives means over the steps since the last log; numbers of the clock are named
  `perf/...`. `on_resume(step)` is called once with the step that was restored (0 for a new start).
  `stop(step, state)` is asked at every checkpoint, again after a restart from it; True ends there.
  With `parks_optimizer` the optimizer's state is in the memory of the host meanwhile. `watch` says
  what becomes of a step that is not finite, and what is logged besides its metrics.

  States are written while the next steps run. On SIGTERM the state after the step in flight is
  saved as well, with what was gathered for the next log, and a restart goes on from it.

  Raises:
    NonFiniteError: naming the step and the rows of its batch.
    Preempted: after SIGTERM, when the state is saved.
    InputError: a checkpoint could not be written; raised at the next save or at the end.
  """

  def is_saved(step: int) -> str:
    return f'the run was asked to end; step {step} of {config.steps} is saved'

  def ends(step: int, state: TrainState) -> tuple[bool, TrainState]:
    with notice.may_leave(is_saved(step)):
      if not parks_optimizer:
        return stop(step, state), state
      parked = dataclasses.replace(state, opt_state=to_host(state.opt_state))
      ended = stop(step, parked)
      back = to_device(parked.opt_state, like=state.opt_state)
      return ended, dataclasses.replace(state, opt_state=back)

  saved = Checkpoints(checkpoints, keep=config.keep, keep_every=config.keep_every, warn=warn)
  with saved, Notice() as notice:
    restored = saved.restore(state)
    start = 0
    if restored is not None:
      start, state = restored
    on_resume(start)
    if _is_regular_save(start, config):
      ended, state = ends(start, state)
      if ended:
        return state
    if notice.due_for_any():
      raise Preempted(f'the run was asked to end before step {start + 1}')
    logger = StepLog(on_log, learning_rate, steps=config.steps, log_every=config.log_every,
                     steps_per_epoch=config.steps_per_epoch, watch=watch or Watch(), warn=warn)
    if restored is not None:
      _go_on_gathering(logger, saved.notes(start))
    previous = None
    for step in range(start, config.steps):
      with logger.timed('batch'):
        batch = batches[step]
        placed = put_batch(batch, mesh)
      with logger.timed('dispatch'):
        state, metrics = step_fn(state, placed, np.float32(learning_rate(step)))
      if previous is not None:
        logger.add(*previous)
        on_step()
      previous = (step + 1, metrics, batch)
      preempted, regular = notice.due(), _is_regular_save(step + 1, config)
      if not (preempted or regular or step + 1 == config.steps):
        continue
      logger.add(*previous)     # a state is saved only after its metrics were seen to be finite
      on_step()
      previous = None
      preempted = preempted or notice.due_for_any()
      if preempted or regular:
        saved.save(step + 1, state, _gathered(logger))
      if preempted:
        saved.wait()
        raise Preempted(is_saved(step + 1))
      if regular:
        ended, state = ends(step + 1, state)
        if ended:
          return state
    return state


def _is_regular_save(step: int, config: LoopConfig) -> bool:
  """A step whose state every run saves and looks at; others are saved where a run was cut."""
  return 0 < step < config.steps and step % config.save_every == 0


def _gathered(logger: StepLog) -> dict[str, Any]:
  """What the next log line will be made of, as JSON: its window may begin before this save."""
  steps = [{name: [float(m.total), float(m.count)] for name, m in metrics.items()}
           for metrics in logger.seen]
  return {'steps': steps, 'seconds': time.perf_counter() - logger.since}


def _go_on_gathering(logger: StepLog, notes: Mapping[str, Any]) -> None:
  logger.seen = [
      {name: Mean(np.asarray(total, np.float32), np.asarray(count, np.float32))
       for name, (total, count) in metrics.items()} for metrics in notes['steps']]
  logger.since = time.perf_counter() - notes['seconds']


def put_batch(batch: Mapping[str, np.ndarray], mesh: jax.sharding.Mesh) -> dict[str, jax.Array]:
  """Rows over the data and fsdp axes of the mesh."""

  def place(x: np.ndarray) -> jax.Array:
    # Every process has the whole batch and hands over the rows of its own devices.
    return jax.make_array_from_callback(
        x.shape, batch_sharding(mesh, x.ndim), lambda index: x[index])

  return {key: place(x) for key, x in batch.items()}


def check_loop(
    config: LoopConfig, *, batch_size: int, micro_batches: int, mesh: jax.sharding.Mesh,
    packed: bool = False,
) -> None:
  """Refuses loops that could not run or could not resume exactly.

  Raises:
    InputError: no steps, rows that do not divide over micro-batches and devices, saves that
      fall between logs, or kept steps that are never saved.
  """
  if config.steps < 1:
    raise InputError('there is nothing to train', where='--steps', expected='at least 1',
                     found=config.steps)
  if config.log_every < 1 or config.save_every % config.log_every:
    raise InputError('saves must fall on logs, so that a restart logs the same windows',
                     where='--save_every', expected=f'a multiple of --log_every={config.log_every}',
                     found=config.save_every)
  if config.keep < 1:
    raise InputError('a run could not go on without a checkpoint', where='--keep_last',
                     expected='at least 1', found=config.keep)
  if config.keep_every is not None and (
      config.keep_every < 1 or config.keep_every % config.save_every):
    raise InputError('there would be no checkpoint of these steps to keep', where='--keep_every',
                     expected=f'a multiple of --save_every={config.save_every}',
                     found=config.keep_every)
  parts = ways(mesh) * micro_batches
  if packed and batch_size < parts:
    raise InputError(
        'some devices would have nothing to do', where='--batch_size',
        expected=f'at least {parts} (data * fsdp devices * micro-batches)', found=batch_size)
  if not packed and batch_size % parts:
    raise InputError(
        'the batch does not divide', where='--batch_size',
        expected=f'a multiple of {parts} (data * fsdp devices * micro-batches), or --layout=packed',
        found=batch_size)
