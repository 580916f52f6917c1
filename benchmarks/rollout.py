"""Useful tokens per second of this rollout engine beside those of other samplers.

    pip install google-tunix==0.1.7          # into an environment of its own
    apt-get install libjemalloc2             # the allocator of all contenders, if it is there
    python -m benchmarks.rollout --tunix_python=ENVIRONMENT/bin/python

One random Llama of 56M parameters, 16 prompts x 8 samples. Each contender is a process that loads
the model and warms up; then they are asked for rounds in turn, one at a time, the others idle. A
contender is NAME:DTYPE:BATCH (slots, for ours). Useful tokens are those up to the end of each
sample; where a sample ends is fixed in advance, the same for all, and known to no scheduler.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import rich.box
import rich.console
import rich.table
import torch
import transformers

from benchmarks.rollout_workload import LLAMA_56M, Workload, make_workload

CONTENDERS = ('ours:float32:64', 'ours:bfloat16:64', 'transformers:float32:128',
              'transformers:bfloat16:128', 'tunix:float32:128')
JEMALLOC = Path('/usr/lib/x86_64-linux-gnu/libjemalloc.so.2')     # Debian's libjemalloc2
JEMALLOC_SETTINGS = 'dirty_decay_ms:-1,muzzy_decay_ms:-1,thp:always'
GREEDY_TOKENS = 16


class Worker:
  """A contender's process; `ask` waits for its answer."""

  def __init__(self, spec: str, python: str, folder: Path, workload: Workload,
               environment: dict[str, str], log: Path):
    self.spec = spec
    name, dtype, batch = spec.split(':')
    self.log = log
    with log.open('w') as errors:
      self.process = subprocess.Popen(
          [python, '-m', 'benchmarks.rollout_worker', name, dtype, batch, str(folder)],
          stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True,
          env=os.environ | environment, cwd=Path(__file__).parents[1])
    self.ready = self.ask(dataclasses.asdict(workload))
    self.rounds: list[dict[str, Any]] = []

  def ask(self, order: dict[str, Any]) -> dict[str, Any]:
    """Raises RuntimeError with the end of the contender's log if it died."""
    assert self.process.stdin is not None and self.process.stdout is not None
    self.process.stdin.write(json.dumps(order) + '\n')
    self.process.stdin.flush()
    line = self.process.stdout.readline()
    if not line:
      raise RuntimeError(f'{self.spec} died:\n{self.log.read_text()[-4000:]}')
    return json.loads(line)

  def rate(self) -> float:
    """Median useful tokens per second."""
    return statistics.median(r['tokens'] / r['seconds'] for r in self.rounds)

  def stop(self) -> None:
    self.process.terminate()
    self.process.wait()


def write_model(folder: Path) -> int:
  """Writes a random checkpoint as transformers does; returns its number of parameters."""
  torch.manual_seed(0)
  config = transformers.LlamaConfig(**LLAMA_56M)
  model = transformers.LlamaForCausalLM(config)
  model.save_pretrained(folder)
  return model.num_parameters()


def measure(specs: list[str], workload: Workload, folder: Path, args: argparse.Namespace,
            environment: dict[str, str]) -> list[Worker]:
  """Starts the contenders one after the other, then asks each for a round in turn."""
  workers: list[Worker] = []
  try:
    for spec in specs:
      python = args.tunix_python if spec.startswith('tunix') else sys.executable
      log = folder / f'{spec.replace(":", "_")}.log'
      workers.append(Worker(spec, python, folder, workload, environment, log))
    for seed in range(1, args.rounds + 1):
      for worker in workers:
        worker.rounds.append(worker.ask({'seed': seed}))
        last = worker.rounds[-1]
        print(f'round {seed}: {worker.spec} {last["tokens"] / last["seconds"]:.1f} tokens/s, '
              f'{last["own_cores"]:.2f} cores, others {last["other_cores"]:.2f}',
              file=sys.stderr, flush=True)
    greedy = {'greedy': workload.prompts[0], 'tokens': min(GREEDY_TOKENS, workload.max_new_tokens)}
    for worker in workers:     # after the rounds: another shape, so another program
      worker.ready |= worker.ask(greedy)
  finally:
    for worker in workers:
      worker.stop()
  return workers


def agreement(ids: list[int], reference: list[int]) -> int:
  """How many leading ids are the same."""
  same = [a == b for a, b in zip(ids, reference, strict=True)] + [False]
  return same.index(False)


def table(workers: list[Worker], kind: str, workload: Workload) -> rich.table.Table:
  ours = max((w.rate() for w in workers if w.spec.startswith('ours')), default=None)
  reference = workers[0].ready['ids']
  draws = [n for row in workload.lengths for n in row]
  title = (f'{kind} lengths: {len(workload.prompts)} prompts x {len(workload.lengths[0])} samples, '
           f'mean {statistics.mean(draws):.1f}, longest {max(draws)}, top-p {workload.top_p}')
  view = rich.table.Table(title=title, box=rich.box.SIMPLE)
  for name in ('contender', 'useful tokens/s', 'rounds', 'ours is', 'others',
               'peak RSS', 'loading', 'ready', 'greedy'):
    view.add_column(name, justify='left' if name == 'contender' else 'right')
  for w in workers:
    rates = [r['tokens'] / r['seconds'] for r in w.rounds]
    view.add_row(
        w.spec, f'{w.rate():.1f}', f'{min(rates):.0f}..{max(rates):.0f}',
        f'{ours / w.rate():.2f} x' if ours else '-',
        f'{statistics.mean(r["other_cores"] for r in w.rounds):.1f}',
        f'{w.rounds[-1]["peak_bytes"] / 2**20:.0f} MiB', f'{w.ready["peak_bytes"] / 2**20:.0f} MiB',
        f'{w.ready["ready_seconds"]:.0f} s',
        f'{agreement(w.ready["ids"], reference)}/{len(reference)}')
  return view


def allocator(choice: str) -> tuple[str, dict[str, str]]:
  """(what all contenders allocate with, the environment that makes them)."""
  if choice == 'jemalloc' or (choice == 'auto' and JEMALLOC.exists()):
    return (f'jemalloc ({JEMALLOC_SETTINGS})',
            {'LD_PRELOAD': str(JEMALLOC), 'MALLOC_CONF': JEMALLOC_SETTINGS})
  return 'that of the C library', {}


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--contenders', nargs='+', default=list(CONTENDERS))
  parser.add_argument('--lengths', nargs='+', default=['varied', 'equal'],
                      choices=['varied', 'equal'])
  parser.add_argument('--tunix_python', help='python of an environment with google-tunix')
  parser.add_argument('--rounds', type=int, default=3)
  parser.add_argument('--prompts', type=int, default=16)
  parser.add_argument('--draws', type=int, default=8)
  parser.add_argument('--mean', type=int, default=96)
  parser.add_argument('--max_new_tokens', type=int, default=256)
  parser.add_argument('--top_p', type=float, default=1.0)
  parser.add_argument('--seed', type=int, default=0)
  parser.add_argument('--allocator', choices=['auto', 'jemalloc', 'libc'], default='auto')
  args = parser.parse_args()
  specs = args.contenders
  if args.tunix_python is None:
    specs = [s for s in specs if not s.startswith('tunix')]
  memory, environment = allocator(args.allocator)
  console = rich.console.Console(width=120)
  with tempfile.TemporaryDirectory() as name:
    folder = Path(name)
    parameters = write_model(folder)
    console.print(f'random Llama, {parameters / 1e6:.1f}M parameters; '
                  f'{len(os.sched_getaffinity(0))} cores, {platform.machine()}; '
                  f'allocator of all: {memory}')
    for kind in args.lengths:
      workload = make_workload(kind, prompts=args.prompts, draws=args.draws, mean=args.mean,
                               max_new_tokens=args.max_new_tokens, top_p=args.top_p,
                               seed=args.seed)
      workers = measure(specs, workload, folder, args, environment)
      console.print(table(workers, kind, workload))
      late = [w.spec for w in workers
              if w.rounds[-1]['compiled_programs'] > w.ready['compiled_programs']]
      if late:
        console.print(f'These compiled in a round, which counts against them: {", ".join(late)}')
      if max(r['other_cores'] for w in workers for r in w.rounds) > 0.1:
        console.print('Other processes were busy (column "others", in cores), which slows '
                      'contenders unevenly, PyTorch most. Measure on an idle machine.')
    for w in workers:
      console.print(f'{w.spec}: {w.ready["numerics"]}')
  if len(specs) < len(args.contenders):
    console.print('Tunix was left out: give --tunix_python.')


if __name__ == '__main__':
  main()
