"""The loop around the step: feed, step, log one step behind, save, and resume at the exact step."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import grain
import jax
import numpy as np
from etils import epath

from jaxrl.errors import InputError
from jaxrl.losses.mean import Mean
from jaxrl.parallel.host_memory import to_device, to_host
from jaxrl.parallel.sharding import batch_sharding
from jaxrl.training import checkpoint
from jaxrl.training.step import TrainState

# (state, batch, learning rate) -> (state, metrics)
Step = Callable[
    [TrainState, Mapping[str, jax.Array], np.float32], tuple[TrainState, dict[str, Mean]]]


@dataclasses.dataclass(frozen=True)
class LoopConfig:
  steps: int
  log_every: int = 10
  save_every: int = 100
  steps_per_epoch: float | None = None   # logs `epoch` where given


class NonFiniteError(RuntimeError):
  """The loss or a gradient stopped being a number; no parameter was changed by that step."""


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
    warn: Callable[[str], None] = print,
) -> TrainState:
  """Runs to `config.steps`; batch k is `batches[k]`, so a restart goes on with the same bits.

  `step_fn(state, batch, lr)` is jitted by the caller and may donate the state. `on_log(step,
  numbers)` receives means over the steps since the last log; numbers of the clock are named
  `perf/...`. `on_resume(step)` is called once with the step that was restored (0 for a new start).
  `stop(step, state)` is asked at every checkpoint, again after a restart from it; True ends there.
  With `parks_optimizer` the optimizer's state is in the memory of the host meanwhile.

  Raises:
    NonFiniteError: naming the step and the rows of its batch.
  """
  restored = checkpoint.restore_latest(checkpoints, state, warn=warn)
  start = 0
  if restored is not None:
    start, state = restored
  on_resume(start)

  def ends(step: int, state: TrainState) -> tuple[bool, TrainState]:
    if not parks_optimizer:
      return stop(step, state), state
    parked = dataclasses.replace(state, opt_state=to_host(state.opt_state))
    ended = stop(step, parked)
    back = to_device(parked.opt_state, like=state.opt_state)
    return ended, dataclasses.replace(state, opt_state=back)

  if start:
    ended, state = ends(start, state)
    if ended:
      return state
  logger = _Logger(on_log, config, learning_rate)
  previous = None
  for step in range(start, config.steps):
    batch = put_batch(batches[step], mesh)
    state, metrics = step_fn(state, batch, np.float32(learning_rate(step)))
    if previous is not None:
      logger.add(*previous)
      on_step()
    previous = (step + 1, metrics, batch)
    if (step + 1) % config.save_every == 0 and step + 1 < config.steps:
      logger.add(*previous)     # a state is saved only after its metrics were seen to be finite
      on_step()
      previous = None
      checkpoint.save(checkpoints, step + 1, state)
      ended, state = ends(step + 1, state)
      if ended:
        return state
  if previous is not None:
    logger.add(*previous)
    on_step()
  return state


def put_batch(batch: Mapping[str, np.ndarray], mesh: jax.sharding.Mesh) -> dict[str, jax.Array]:
  """Rows over the data and fsdp axes of the mesh."""
  return {key: jax.device_put(x, batch_sharding(mesh, x.ndim)) for key, x in batch.items()}


@dataclasses.dataclass
class _Logger:
  """Gathers metrics between logs; saves fall on log boundaries, so windows survive a restart."""

  on_log: Callable[[int, dict[str, float]], None]
  config: LoopConfig
  learning_rate: Callable[[int], float]
  seen: list[dict[str, Mean]] = dataclasses.field(default_factory=list)
  since: float = dataclasses.field(default_factory=time.perf_counter)

  def add(self, step: int, metrics: dict[str, Mean], batch: Mapping[str, Any]) -> None:
    metrics = jax.device_get(metrics)
    if metrics.pop('nonfinite').total > 0:
      raise NonFiniteError(
          f'step {step}: the loss is {float(metrics["loss"].total)} and the gradient norm '
          f'{float(metrics["grad_norm"].total)}; the step was not applied. Batch {step - 1} held '
          f'{batch["mask"].shape[0]} rows; lower --learning_rate or inspect those rows.')
    self.seen.append(metrics)
    if step % self.config.log_every and step != self.config.steps:
      return
    numbers = mean_metrics(self.seen)
    now = time.perf_counter()
    tokens = sum(float(m['num_tokens'].total) for m in self.seen)
    numbers['num_tokens'] = tokens
    if self.config.steps_per_epoch is not None:
      numbers['epoch'] = step / self.config.steps_per_epoch
    numbers['learning_rate'] = float(self.learning_rate(step - 1))
    numbers['perf/seconds_per_step'] = (now - self.since) / len(self.seen)
    numbers['perf/tokens_per_second'] = tokens / max(now - self.since, 1e-9)
    self.on_log(step, numbers)
    self.seen, self.since = [], now


def mean_metrics(seen: Sequence[Mapping[str, Mean]]) -> dict[str, float]:
  """Totals over counts, both summed over the steps first."""
  names = sorted(seen[0])
  return {
      name: float(sum(float(m[name].total) for m in seen)
                  / max(sum(float(m[name].count) for m in seen), 1e-30))
      for name in names
  }


def check_loop(
    config: LoopConfig, *, batch_size: int, micro_batches: int, mesh: jax.sharding.Mesh
) -> None:
  """Refuses loops that could not run or could not resume exactly.

  Raises:
    InputError: no steps, rows that do not divide over micro-batches and devices, or saves that
      fall between logs.
  """
  if config.steps < 1:
    raise InputError('there is nothing to train', where='--steps', expected='at least 1',
                     found=config.steps)
  if config.log_every < 1 or config.save_every % config.log_every:
    raise InputError('saves must fall on logs, so that a restart logs the same windows',
                     where='--save_every', expected=f'a multiple of --log_every={config.log_every}',
                     found=config.save_every)
  ways = mesh.shape['data'] * mesh.shape['fsdp'] * micro_batches
  if batch_size % ways:
    raise InputError(
        'the batch does not divide', where='--batch_size',
        expected=f'a multiple of {ways} (data * fsdp devices * micro-batches)', found=batch_size)
