"""What steps say of themselves: means over the steps between two logs, and steps that failed."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import math
import resource
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jaxrl.errors import InputError
from jaxrl.losses.mean import Mean

NONFINITE = ('stop', 'skip')
_NAMED_ROWS = 8             # of a batch, in one sentence


class NonFiniteError(RuntimeError):
  """The loss or a gradient stopped being a number; no parameter was changed by that step."""


@dataclasses.dataclass(frozen=True)
class Watch:
  """What is made of steps that are not finite, and what the log can say besides their metrics.

  Attributes:
    on_nonfinite: 'stop' raises at the first such step, 'skip' goes on without it.
    max_skips: steps skipped in a row; one more raises. Only with 'skip'.
    flops_of: batch -> (causal, full) model FLOPs of a step on it; see `models/flops.py`.
    peak_tflops: of one device, at the compute dtype; without it no utilisation is logged.
    devices: how many share the step.
    programs: how many programs this process has compiled.
  """

  on_nonfinite: str = 'stop'
  max_skips: int = 3
  flops_of: Callable[[Mapping[str, np.ndarray]], tuple[float, float]] | None = None
  peak_tflops: float | None = None
  devices: int = 1
  programs: Callable[[], int] | None = None

  def __post_init__(self):
    if self.on_nonfinite not in NONFINITE:
      raise InputError('unknown policy', where='--on_nonfinite',
                       expected=f'one of {", ".join(NONFINITE)}', found=self.on_nonfinite)
    if self.max_skips < 1:
      raise InputError('no step could be skipped', where='--max_skips', expected='at least 1',
                       found=self.max_skips, fix='Use --on_nonfinite=stop')


@dataclasses.dataclass
class StepLog:
  """Gathers metrics between logs; saves fall on log boundaries, so windows survive a restart.

  `seen` holds the window's metrics and nothing else does: with it and `since` another log goes on.
  """

  on_log: Callable[[int, dict[str, float]], None]
  learning_rate: Callable[[int], float]
  steps: int
  log_every: int = 10
  steps_per_epoch: float | None = None
  watch: Watch = Watch()
  warn: Callable[[str], None] = print
  seen: list[dict[str, Mean]] = dataclasses.field(default_factory=list)
  since: float = dataclasses.field(default_factory=time.perf_counter)
  # Seconds of the window by what they were spent on, and how many steps were timed.
  _spent: dict[str, float] = dataclasses.field(
      default_factory=lambda: collections.defaultdict(float))
  _timed: int = 0
  _dispatched: collections.deque[float] = dataclasses.field(default_factory=collections.deque)
  _ready: float = 0.0

  @contextlib.contextmanager
  def timed(self, what: str) -> Iterator[None]:
    """Counts the seconds inside: 'batch', waiting for data, or 'dispatch', handing over a step."""
    start = time.perf_counter()
    yield
    now = time.perf_counter()
    self._spent[what] += now - start
    if what == 'dispatch':
      self._dispatched.append(now)

  def add(self, step: int, metrics: Mapping[str, Any], batch: Mapping[str, np.ndarray]) -> None:
    """Waits for the metrics of `step` (counted from 1), and logs where a window ends.

    `batch` is what the step was given, as the host has it; its `numbers` say which rows it holds.

    Raises:
      NonFiniteError: naming the step and the rows of its batch.
    """
    metrics = dict(jax.device_get(metrics))
    self._time_device()
    row_finite = metrics.pop('row_finite', None)
    in_a_row = int(metrics.pop('skipped_in_a_row').total)
    if metrics.pop('nonfinite').total > 0:
      sentence = _nonfinite(step, metrics, row_finite, batch)
      if self.watch.on_nonfinite == 'stop':
        raise NonFiniteError(f'{sentence} Lower --learning_rate or inspect those rows.')
      if in_a_row > self.watch.max_skips:
        raise NonFiniteError(
            f'{sentence} {in_a_row} steps in a row were not finite, and --max_skips is '
            f'{self.watch.max_skips}. Lower --learning_rate or inspect those rows.')
      self.warn(sentence)
      metrics = {name: metrics[name] for name in ('num_tokens', 'padding')}
    if self.watch.on_nonfinite == 'skip':
      metrics['skipped_steps'] = _one(float(in_a_row > 0))
    if self.watch.flops_of is not None and self.watch.peak_tflops is not None:
      causal, full = self.watch.flops_of(batch)
      metrics |= {'perf/mfu_causal': _one(causal), 'perf/mfu_full': _one(full)}
    self.seen.append(metrics)
    if step % self.log_every and step != self.steps:
      return
    now = time.perf_counter()
    self.on_log(step, self._numbers(step, max(now - self.since, 1e-9)))
    self.seen, self.since, self._timed = [], now, 0
    self._spent.clear()

  def _numbers(self, step: int, seconds: float) -> dict[str, float]:
    numbers = mean_metrics(self.seen)

    def total(name: str) -> float:
      return sum(float(m[name].total) for m in self.seen)

    numbers['num_tokens'] = total('num_tokens')
    if self.watch.on_nonfinite == 'skip':
      numbers['skipped_steps'] = total('skipped_steps')
    if self.steps_per_epoch is not None:
      numbers['epoch'] = step / self.steps_per_epoch
    numbers['learning_rate'] = float(self.learning_rate(step - 1))
    numbers['perf/seconds_per_step'] = seconds / len(self.seen)
    numbers['perf/tokens_per_second'] = numbers['num_tokens'] / seconds
    positions = sum(float(m['padding'].count) for m in self.seen)
    numbers['perf/input_tokens_per_second'] = (positions - total('padding')) / seconds
    numbers |= {f'perf/{what}_seconds': spent / max(self._timed, 1)
                for what, spent in sorted(self._spent.items())}
    if self.watch.peak_tflops is not None:
      peak = self.watch.peak_tflops * 1e12 * self.watch.devices * seconds
      for name in ('perf/mfu_causal', 'perf/mfu_full'):
        if name in numbers:   # up to here its FLOPs
          numbers[name] = total(name) / peak
    if self.watch.programs is not None:
      numbers['perf/compiled_programs'] = self.watch.programs()
    numbers['perf/peak_memory_bytes'] = peak_bytes()
    return numbers

  def _time_device(self) -> None:
    """Adds the time from when a step could start, handed over and the one before ready, to now."""
    ready = time.perf_counter()
    if self._dispatched:
      self._spent['device'] += ready - max(self._dispatched.popleft(), self._ready)
      self._timed += 1
    self._ready = ready


def _one(value: float) -> Mean:
  """A number of a single step, for means over steps."""
  return Mean(np.asarray(value, np.float32), np.ones((), np.float32))


def _nonfinite(
    step: int, metrics: Mapping[str, Mean], row_finite: np.ndarray | None,
    batch: Mapping[str, np.ndarray],
) -> str:
  """What went wrong in a step, and on which rows of the data where the objective says so."""
  numbers = batch['numbers'].reshape(-1)      # -1 where a packed row has room for more
  sentence = (
      f'step {step}: the loss is {float(metrics["loss"].total)} and the gradient norm '
      f'{float(metrics["grad_norm"].total)}; the step was not applied. '
      f'Batch {step - 1} held {int((numbers >= 0).sum())} rows')
  if row_finite is None:
    return f'{sentence}.'
  bad = numbers[~row_finite].tolist()
  if not bad:
    return f'{sentence}, each with a finite loss: it was the gradient that overflowed.'
  more = f' and {len(bad) - _NAMED_ROWS} more' if len(bad) > _NAMED_ROWS else ''
  return (f'{sentence}, of which the loss is not finite on these of the data, counted from 0: '
          f'{", ".join(map(str, bad[:_NAMED_ROWS]))}{more}.')


def mean_metrics(seen: Sequence[Mapping[str, Mean]]) -> dict[str, float]:
  """Totals over counts, both summed over the steps that have them first.

  A ratio whose count, an estimate, came out negative is infinite: more than can be told.
  """
  numbers = {}
  for name in sorted({name for m in seen for name in m}):
    means = [m[name] for m in seen if name in m]
    count = sum(float(mean.count) for mean in means)
    total = sum(float(mean.total) for mean in means)
    numbers[name] = math.inf if count < 0 else total / max(count, 1e-30)
  return numbers


def peak_bytes() -> int:
  """Most memory in use at one time so far: of the fullest local device, or of this process.

  Devices that keep no statistics (CPU) compute in the memory of the process.
  """
  known = [stats['peak_bytes_in_use'] for stats in (d.memory_stats() for d in jax.local_devices())
           if stats and 'peak_bytes_in_use' in stats]
  if known:
    return max(known)
  kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  return kilobytes if sys.platform == 'darwin' else 1024 * kilobytes
