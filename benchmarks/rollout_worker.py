"""One contender of the rollout benchmark in a process of its own, asked for rounds over a pipe.

    python -m benchmarks.rollout_worker NAME DTYPE BATCH MODEL_FOLDER < workload and orders

Each line of standard input is a JSON order and each line of standard output its answer. A
contender is a module `benchmarks.rollout_NAME` with `load(folder, dtype, batch, workload)`; it
returns `Contender`. Whatever the libraries print goes to standard error.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.rollout_workload import Workload, checked

WARM_UP_TOKENS = 8


@dataclasses.dataclass(frozen=True)
class Contender:
  """A loaded model behind one sampler."""

  sample: Callable[[Workload, int], list[list[int]]]   # (workload, seed) -> responses, in order
  greedy: Callable[[tuple[int, ...], int], list[int]]  # (prompt ids, tokens) -> response ids
  numerics: str                                        # versions, dtypes, settings
  compiled_programs: Callable[[], int] | None = None   # so far, where known


def peak_bytes() -> int:
  """Highest resident memory of this process since the last `forget_peak`."""
  found = re.search(r'VmHWM:\s+(\d+) kB', Path('/proc/self/status').read_text())
  assert found is not None
  return 1024 * int(found[1])


def forget_peak() -> None:
  """Restarts the high-water mark at what is resident now; man 5 proc, clear_refs."""
  Path('/proc/self/clear_refs').write_text('5')


def busy_seconds() -> float:
  """CPU seconds that this machine has spent on anything, over all cores; man 5 proc, stat."""
  ticks = [int(n) for n in Path('/proc/stat').read_text().splitlines()[0].split()[1:]]
  user, nice, system, _, _, irq, softirq, steal = ticks[:8]
  return (user + nice + system + irq + softirq + steal) / os.sysconf('SC_CLK_TCK')


def read_workload(fields: dict[str, Any]) -> Workload:
  """Undoes `dataclasses.asdict` and JSON."""
  rows = {name: tuple(map(tuple, fields[name])) for name in ('prompts', 'lengths')}
  return Workload(**(fields | rows))


def main() -> None:
  name, dtype, batch, folder = sys.argv[1:]
  answers = os.fdopen(os.dup(1), 'w')
  os.dup2(2, 1)     # libraries print to standard output

  def answer(**fields):
    print(json.dumps(fields), file=answers, flush=True)

  workload = read_workload(json.loads(sys.stdin.readline()))
  start = time.perf_counter()
  contender = importlib.import_module(f'benchmarks.rollout_{name}').load(
      folder, dtype, int(batch), workload)
  contender.sample(workload.cut(WARM_UP_TOKENS), 0)
  ready = time.perf_counter() - start
  programs = contender.compiled_programs or (lambda: 0)
  answer(ready_seconds=ready, peak_bytes=peak_bytes(), numerics=contender.numerics,
         compiled_programs=programs())
  forget_peak()
  for line in sys.stdin:
    order = json.loads(line)
    if 'greedy' in order:
      answer(ids=contender.greedy(tuple(order['greedy']), order['tokens']))
    else:
      start, own, all_busy = time.perf_counter(), time.process_time(), busy_seconds()
      responses = contender.sample(workload, order['seed'])
      seconds, own = time.perf_counter() - start, time.process_time() - own
      others = max(busy_seconds() - all_busy - own, 0.0)
      answer(seconds=seconds, own_cores=own / seconds, other_cores=others / seconds,
             tokens=checked(responses, workload), peak_bytes=peak_bytes(),
             compiled_programs=programs())


if __name__ == '__main__':
  main()
