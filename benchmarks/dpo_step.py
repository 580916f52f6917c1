"""Pairs per second and memory of this DPO step beside those of TRL's and Tunix's trainers.

    pip install trl==1.16.0
    pip install google-tunix==0.1.7          # into an environment of its own
    apt-get install libjemalloc2             # the allocator of all contenders, if it is there
    python -m benchmarks.dpo_step --tunix_python=ENVIRONMENT/bin/python
    python -m benchmarks.dpo_step --layouts  # packed against padded, in this project alone

One random Llama of 56M parameters, pairs of GSM8K's lengths, 8 a step. Each contender is a process
in which its own training loop runs; it warms up, and then all are let go on in turn, for a turn in
which each pair is taken once, the others idle. A contender is NAME:SETTING, see
`benchmarks/dpo_step_NAME.py`. The least disturbed turn counts. In the first turn all take the same
batches, so that losses and gradient norms can be compared. All processes stay in memory, up to
10 GB each: where that is too much, take fewer --contenders at a time.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import grain
import rich.box
import rich.console
import rich.table

from benchmarks import dpo_step_layouts
from benchmarks.dpo_step_workload import PAIRS_A_STEP, Workload, make_workload, padded_share
from benchmarks.rollout import Worker, allocator, write_model

CONTENDERS = ('ours:packed-float32', 'ours:packed-bfloat16', 'ours:padded-float32', 'trl:default',
              'trl:best-bfloat16', 'trl:best-float32', 'tunix:fixed-float32',
              'tunix:grouped-float32', 'tunix:grouped-bfloat16')


class Trainer(Worker):
  """A contender's process: a training that is held up between turns."""

  def __init__(self, spec: str, python: str, folder: Path, workload: Workload,
               environment: dict[str, str]):
    self.spec = spec
    self.log = folder / f'{spec.replace(":", "_")}.log'
    with self.log.open('w') as errors:
      self.process = subprocess.Popen(
          [python, '-m', 'benchmarks.dpo_step_worker', *spec.split(':'), str(folder)],
          stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True,
          env=os.environ | environment, cwd=Path(__file__).parents[1])
    self.ready = self.ask(dataclasses.asdict(workload))
    self.rounds = []
    self.pairs = len(workload.pairs)

  def ask(self, order: dict[str, Any]) -> dict[str, Any]:
    """Raises RuntimeError with the end of the contender's log if it died."""
    try:
      return super().ask(order)
    except BrokenPipeError as e:
      raise RuntimeError(f'{self.spec} died, killed if memory ran out; its log ends:\n'
                         f'{self.log.read_text()[-4000:]}') from e

  def rate(self) -> float:
    """Pairs per second in the least disturbed turn."""
    return self.pairs / min(r['seconds'] for r in self.rounds)

  def rate_with_reference(self) -> float | None:
    """With the time of precomputed log-probs added, as in a training of one epoch."""
    seconds = self.ready['reference_seconds']
    return None if seconds is None else self.pairs / (self.pairs / self.rate() + seconds)

  def peak(self) -> int:
    """Highest resident bytes in the turns measured."""
    return max(r['peak_bytes'] for r in self.rounds)


def shuffled(size: int) -> list[int]:
  """The order of this project's batches of as many rows."""
  return list(grain.MapDataset.source(range(size)).seed(dpo_step_layouts.SEED).shuffle())


def measure(specs: list[str], workload: Workload, folder: Path, args: argparse.Namespace,
            environment: dict[str, str]) -> list[Trainer]:
  """Starts the contenders one after the other, then lets each go on for a turn at a time."""
  workers: list[Trainer] = []
  try:
    for spec in specs:
      python = args.tunix_python if spec.startswith('tunix') else sys.executable
      workers.append(Trainer(spec, python, folder, workload, environment))
    for turn in range(1, args.turns + 1):
      for worker in workers:
        worker.rounds.append(worker.ask({}))
        last = worker.rounds[-1]
        print(f'turn {turn}: {worker.spec} {worker.pairs / last["seconds"]:.2f} pairs/s, '
              f'{last["own_cores"]:.2f} cores, others {last["other_cores"]:.2f}, '
              f'peak {last["peak_bytes"] / 2**20:.0f} MiB', file=sys.stderr, flush=True)
  finally:
    for worker in workers:
      worker.stop()
  return workers


def speed_table(workers: list[Trainer]) -> rich.table.Table:
  ours = max((w for w in workers if w.spec.startswith('ours')), key=Trainer.rate, default=None)
  view = rich.table.Table(title='Speed and memory', box=rich.box.SIMPLE)
  for name in ('contender', 'pairs/s', 'turns', 'ours is', 'with reference', 'peak RSS',
               'of its', 'others'):
    view.add_column(name, justify='left' if name == 'contender' else 'right')
  for w in workers:
    rates = [w.pairs / r['seconds'] for r in w.rounds]
    amortised = w.rate_with_reference()
    view.add_row(
        w.spec, f'{w.rate():.2f}', f'{min(rates):.2f}..{max(rates):.2f}',
        f'{ours.rate() / w.rate():.2f} x' if ours else '-',
        '-' if amortised is None else f'{amortised:.2f}', f'{w.peak() / 2**20:.0f} MiB',
        f'{ours.peak() / w.peak():.0%}' if ours else '-',
        f'{max(r["other_cores"] for r in w.rounds):.1f}')
  return view


def agreement_table(workers: list[Trainer]) -> rich.table.Table:
  view = rich.table.Table(title='Loss and gradient norm of the first steps', box=rich.box.SIMPLE)
  view.add_column('contender')
  for step in range(1, len(workers[0].ready['loss']) + 1):
    view.add_column(f'step {step}', justify='right')
  for w in workers:
    view.add_row(w.spec, *(
        f'{loss:.6f} {norm:.5f}'
        for loss, norm in zip(w.ready['loss'], w.ready['grad_norm'], strict=True)))
  return view


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--contenders', nargs='+', default=list(CONTENDERS))
  parser.add_argument('--tunix_python', help='python of an environment with google-tunix')
  parser.add_argument('--turns', type=int, default=3)
  parser.add_argument('--steps', type=int, default=4, help='steps of a turn')
  parser.add_argument('--seed', type=int, default=0)
  parser.add_argument('--allocator', choices=['auto', 'jemalloc', 'libc'], default='auto')
  parser.add_argument('--layouts', action='store_true',
                      help='packed against padded rows, in place of contenders')
  args = parser.parse_args()
  memory, environment = allocator(args.allocator)
  console = rich.console.Console(width=120)
  console.print(f'{len(os.sched_getaffinity(0))} cores, {platform.machine()}; '
                f'allocator of all: {memory}')
  with tempfile.TemporaryDirectory() as name:
    folder = Path(name)
    console.print(f'random Llama, {write_model(folder) / 1e6:.1f}M parameters')
    if args.layouts:
      command = [sys.executable, '-m', 'benchmarks.dpo_step_layouts', name, str(args.turns)]
      subprocess.run(command, check=True, env=os.environ | environment)
      return
    specs = args.contenders
    if args.tunix_python is None:
      specs = [s for s in specs if not s.startswith('tunix')]
    workload = make_workload(args.steps, shuffled, args.seed)
    tokens = sum(p.tokens for p in workload.pairs) / len(workload.pairs)
    console.print(
        f'{len(workload.pairs)} pairs, {PAIRS_A_STEP} a step, mean {tokens:.0f} ids in both '
        f'sequences; of padded rows {padded_share(workload.batches(False)):.0%} would be empty, '
        f'{padded_share(workload.batches(True)):.0%} where grouped by length')
    workers = measure(specs, workload, folder, args, environment)
    console.print(speed_table(workers))
    console.print('"with reference": with the time of precomputed log-probs, over one epoch.')
    console.print(agreement_table(workers))
    for w in workers:
      console.print(f'{w.spec}: {w.ready["numerics"]}', highlight=False)
    if max(r['other_cores'] for w in workers for r in w.rounds) > 0.1:
      console.print('Other processes were busy (column "others", in cores), which slows contenders '
                    'unevenly. Measure on an idle machine.')
    if len(specs) < len(args.contenders):
      console.print('Tunix was left out: give --tunix_python.')


if __name__ == '__main__':
  main()
