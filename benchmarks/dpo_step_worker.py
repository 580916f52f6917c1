"""One contender of the DPO step benchmark in a process of its own, asked for turns over a pipe.

    python -m benchmarks.dpo_step_worker NAME SETTING MODEL_FOLDER < workload and orders

Orders and answers are as in `rollout_worker`. A contender is a module `benchmarks.dpo_step_NAME`
with `run(folder, setting, workload, pace)`, which trains without end, takes all pairs in each turn
and calls `pace` as it says. Whatever the libraries print goes to standard error.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

from benchmarks.dpo_step_workload import read_workload
from benchmarks.rollout_worker import busy_seconds, forget_peak, peak_bytes


class Pace:
  """Holds a training up between turns, and times them.

  In the first turn every contender takes the workload's pairs shuffled, and its losses and gradient
  norms are kept to be compared. A contender with an order of its own has a second to warm up.
  """

  def __init__(self, steps: int, answer: Callable[..., None]):
    self.steps, self.answer = steps, answer
    self.done, self.warm_turns = 0, 1
    self.first: dict[str, Any] = {'loss': [], 'grad_norm': []}
    self._start()

  def ready(self, numerics: str, *, reference_seconds: float | None = None,
            own_order: bool = False) -> None:
    """Called once, before the first step.

    Args:
      numerics: versions, dtypes, settings.
      reference_seconds: what the log-probs of all pairs under the reference took, if precomputed.
    """
    self.first |= {'numerics': numerics, 'reference_seconds': reference_seconds}
    self.warm_turns = 2 if own_order else 1

  def is_first(self) -> bool:
    """True for the steps whose numbers `saw` wants."""
    return self.done <= self.steps

  def saw(self, loss: float, grad_norm: float) -> None:
    """What a step of the first turn found."""
    self.first['loss'].append(loss)
    self.first['grad_norm'].append(grad_norm)

  def __call__(self, wait: Callable[[], None] = lambda: None) -> None:
    """Called before every step; `wait` returns when all steps so far have come to an end."""
    turn, step = divmod(self.done, self.steps)
    if not step and turn >= self.warm_turns:
      wait()
      self._answer(turn == self.warm_turns)
      if not sys.stdin.readline():
        sys.exit()
      if turn == self.warm_turns:
        forget_peak()
      self._start()
    self.done += 1

  def _start(self) -> None:
    self.own, self.busy = time.process_time(), busy_seconds()
    self.since = time.perf_counter()

  def _answer(self, is_ready: bool) -> None:
    seconds, own = time.perf_counter() - self.since, time.process_time() - self.own
    others = max(busy_seconds() - self.busy - own, 0.0)
    self.answer(seconds=seconds, own_cores=own / seconds, other_cores=others / seconds,
                peak_bytes=peak_bytes(), **(self.first if is_ready else {}))


def main() -> None:
  name, setting, folder = sys.argv[1:]
  answers = os.fdopen(os.dup(1), 'w')
  os.dup2(2, 1)     # libraries print to standard output

  def answer(**fields):
    print(json.dumps(fields), file=answers, flush=True)

  workload = read_workload(json.loads(sys.stdin.readline()))
  contender = importlib.import_module(f'benchmarks.dpo_step_{name}')
  contender.run(folder, setting, workload, Pace(workload.steps, answer))


if __name__ == '__main__':
  main()
