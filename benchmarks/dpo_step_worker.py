"""One contender of the DPO step benchmark in a process of its own, asked for turns over a pipe.

    python -m benchmarks.dpo_step_worker NAME SETTING BATCH MODEL_FOLDER < workload and orders

Arguments and answers are those of `rollout_worker`; BATCH is not read. A contender is a module
`benchmarks.dpo_step_NAME` with `run(folder, setting, workload, pace)`, which trains without end and
calls `pace` where it says. Whatever the libraries print goes to standard error.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
from collections.abc import Callable

from benchmarks.dpo_step_workload import Workload
from benchmarks.rollout_worker import busy_seconds, forget_peak, peak_bytes


class Pace:
  """Holds a training up between turns, and times them.

  The first turn takes the workload's pairs shuffled, its losses and gradient norms are compared;
  the second is in the contender's own order; both warm up. The others are measured.
  """

  def __init__(self, steps: int, answer: Callable[..., None]):
    self.steps, self.answer = steps, answer
    self.done = 0
    self.seen: dict[str, list[float]] = {'loss': [], 'grad_norm': []}
    self.started = time.perf_counter()
    self.own = self.busy = 0.0

  def saw(self, **numbers: float | None) -> None:
    """What a step of the first turn found, where the contender tells."""
    if len(self.seen['loss']) < self.steps:
      for name, value in numbers.items():
        if value is not None:
          self.seen[name].append(value)

  def ready(self, numerics: str, reference_seconds: float | None) -> None:
    """Called once, before the first step: versions and settings; seconds per precomputed pair."""
    self.told = {'numerics': numerics, 'reference_seconds': reference_seconds}

  def __call__(self, wait: Callable[[], None] = lambda: None) -> None:
    """Called before every step; `wait` returns when all steps so far have come to an end."""
    turn, step = divmod(self.done, self.steps)
    self.done += 1
    if step or turn < 2:
      return
    wait()
    seconds = time.perf_counter() - self.started
    if turn == 2:
      self.answer(ready_seconds=seconds, peak_bytes=peak_bytes(), **self.seen, **self.told)
    else:
      own = time.process_time() - self.own
      others = max(busy_seconds() - self.busy - own, 0.0)
      self.answer(seconds=seconds, own_cores=own / seconds, other_cores=others / seconds,
                  peak_bytes=peak_bytes())
    if not sys.stdin.readline():
      sys.exit()
    if turn == 2:
      forget_peak()
    self.own, self.busy = time.process_time(), busy_seconds()
    self.started = time.perf_counter()


def main() -> None:
  name, setting, _, folder = sys.argv[1:]
  answers = os.fdopen(os.dup(1), 'w')
  os.dup2(2, 1)     # libraries print to standard output

  def answer(**fields):
    print(json.dumps(fields), file=answers, flush=True)

  workload = Workload.from_json(sys.stdin.readline())
  contender = importlib.import_module(f'benchmarks.dpo_step_{name}')
  contender.run(folder, setting, workload, Pace(workload.steps, answer))


if __name__ == '__main__':
  main()
