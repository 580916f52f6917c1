"""Time of a train step of the embedded world's model with and without `keep_pages`.

    python -m benchmarks.keep_pages [--processes=5] [--steps=30]

Each measurement is its own process, since the setting cannot be taken back; the two kinds take
turns, so that a machine that is slowing down slows both. Printed per kind: the median over
processes of the median step in wall-clock milliseconds, the same of the kernel's CPU time per step
(where freshly touched pages are paid for), and page faults per step.
"""

from __future__ import annotations

import argparse
import functools
import json
import resource
import statistics
import subprocess
import sys
import time

import jax
import numpy as np

from experiments.world import tiny_config
from jaxrl.data.batches import Pair, TokenRow, pair_arrays
from jaxrl.models.params import init_params, param_shardings
from jaxrl.parallel.mesh import make_mesh
from jaxrl.runs.process import keep_pages
from jaxrl.training.logps import ComputePolicy
from jaxrl.training.loop import put_batch
from jaxrl.training.optimizer import OptimizerConfig, make_optimizer
from jaxrl.training.step import init_state, preference_objective, train_step

# As experiments/flags/irpo_world.flags has them.
PAIRS, LENGTH, PROMPT, VOCABULARY = 32, 72, 32, 400
KINDS = ('without', 'with')


def random_batch() -> dict[str, np.ndarray]:
  """A full batch: every row is as long as rows may be."""
  rng = np.random.default_rng(0)

  def row(prompt: list[int]) -> TokenRow:
    return TokenRow(prompt, rng.integers(0, VOCABULARY, LENGTH + 1 - PROMPT).tolist())

  pairs = []
  for _ in range(PAIRS):
    prompt = rng.integers(0, VOCABULARY, PROMPT).tolist()
    chosen, rejected = row(prompt), row(prompt)
    refs = (-rng.random(len(r.response_ids)) for r in (chosen, rejected))
    pairs.append(Pair(chosen, rejected, *refs))
  return pair_arrays(pairs, (LENGTH,), 0)


def measure(steps: int) -> dict[str, float]:
  """Medians over `steps` steps after the first three, in this process."""
  c, mesh = tiny_config(VOCABULARY), make_mesh()
  tx = make_optimizer(OptimizerConfig(3e-4))
  objective = preference_objective(
      'irpo', {'beta': 0.1, 'alpha': 1.0}, c, ComputePolicy('float32', chunk=128, remat='all'))
  with jax.set_mesh(mesh):
    params = jax.device_put(init_params(jax.random.key(0), c), param_shardings(c, mesh))
    state = jax.jit(functools.partial(init_state, tx=tx))(params)
    step = jax.jit(functools.partial(train_step, objective=objective, tx=tx), donate_argnums=0)
    batch, rate = put_batch(random_batch(), mesh), np.float32(3e-4)
    seen = []
    for _ in range(steps + 3):
      before, start = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
      state, _ = step(state, batch, rate)
      jax.block_until_ready(state)
      seconds, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_SELF)
      seen.append((1e3 * seconds, 1e3 * (after.ru_stime - before.ru_stime),
                   after.ru_minflt - before.ru_minflt))
  wall, kernel, faults = (statistics.median(values) for values in zip(*seen[3:], strict=True))
  return {'wall_ms': wall, 'kernel_ms': kernel, 'page_faults': faults}


def in_a_process(kind: str, steps: int) -> dict[str, float]:
  command = [sys.executable, '-m', 'benchmarks.keep_pages', f'--steps={steps}', f'--only={kind}']
  return json.loads(subprocess.check_output(command, text=True).splitlines()[-1])


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--processes', type=int, default=5, help='processes of each kind')
  parser.add_argument('--steps', type=int, default=30, help='steps measured in each process')
  parser.add_argument('--only', choices=KINDS, help='measure one kind in this process, as JSON')
  options = parser.parse_args()
  if options.only:
    if options.only == 'with':
      keep_pages()
    print(json.dumps(measure(options.steps)))
    return
  found: dict[str, list[dict[str, float]]] = {kind: [] for kind in KINDS}
  for _ in range(options.processes):
    for kind in KINDS:
      found[kind].append(in_a_process(kind, options.steps))
  medians = {
      kind: {name: statistics.median(run[name] for run in runs) for name in runs[0]}
      for kind, runs in found.items()}
  print(f'{jax.devices()[0].device_kind}, jax {jax.__version__}, float32, {PAIRS} pairs of 2 x '
        f'{LENGTH} ids; {options.processes} processes of each kind, {options.steps} steps each')
  print('| keep_pages | step, ms | kernel, ms | page faults |\n|---|---|---|---|')
  for kind, numbers in medians.items():
    print(f'| {kind} | {numbers["wall_ms"]:.1f} | {numbers["kernel_ms"]:.1f} | '
          f'{numbers["page_faults"]:.0f} |')
  saved = 1 - medians['with']['wall_ms'] / medians['without']['wall_ms']
  print(f'keep_pages saves {100 * saved:.0f}% of a step')


if __name__ == '__main__':
  main()
