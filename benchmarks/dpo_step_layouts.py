"""Forward and backward pass of packed pairs against padded rows, long prompts and short responses.

    python -m benchmarks.dpo_step --layouts

Both layouts take the same pairs and give the same loss; what is timed is the gradient alone.
"""

from __future__ import annotations

import functools
import sys
import time

import jax
import numpy as np

from benchmarks.dpo_step_workload import BETA
from benchmarks.rollout_workload import VOCABULARY
from jaxrl.data.batches import Pair, TokenRow, pair_arrays
from jaxrl.data.packing import needed, packed_arrays, pair_unit
from jaxrl.models.hugging_face import load_params, read_config
from jaxrl.parallel.mesh import make_mesh
from jaxrl.runs.process import keep_pages
from jaxrl.training.logps import ComputePolicy
from jaxrl.training.loop import put_batch
from jaxrl.training.objectives import preference_objective
from jaxrl.training.step import gradients

SEED = 0
PAIRS, PROMPT, RESPONSE = 4, 512, 256


def random_pairs() -> list[Pair]:
  rng = np.random.default_rng(SEED)

  def ids(length):
    return rng.integers(3, VOCABULARY, length).tolist()

  made = []
  for _ in range(PAIRS):
    prompt, refs = ids(PROMPT), -10 * rng.random((2, RESPONSE))
    made.append(Pair(*(TokenRow(prompt, ids(RESPONSE)) for _ in range(2)), *refs))
  return made


def main() -> None:
  folder, turns = sys.argv[1], int(sys.argv[2])
  keep_pages()
  config, mesh, pairs = read_config(folder), make_mesh(), random_pairs()
  units = [pair_unit(pair) for pair in pairs]
  padded = PROMPT + RESPONSE
  batches = {'packed': packed_arrays(units, needed(units, 1), 0),
             'padded': pair_arrays(pairs, (padded,), 0)}
  print(f'{PAIRS} pairs of a prompt of {PROMPT} and two responses of {RESPONSE}: {2 * PAIRS} rows '
        f'of {padded}, or one of {batches["packed"]["inputs"].shape[1]}')
  with jax.set_mesh(mesh):
    params = load_params(folder, config, mesh=mesh, dtype='float32')
    for dtype in ('float32', 'bfloat16'):
      objective = preference_objective(
          'dpo', {'beta': BETA}, config, ComputePolicy(dtype, remat='all'))
      step = jax.jit(functools.partial(gradients, objective=objective))
      seconds: dict[str, list[float]] = {name: [] for name in batches}
      losses = {}
      for turn in range(turns + 1):         # the first compiles
        for name, arrays in batches.items():
          batch = put_batch(arrays, mesh)
          start = time.perf_counter()
          _, _, metrics = jax.block_until_ready(
              step(params, {}, jax.numpy.int32(0), batch))
          if turn:
            seconds[name].append(time.perf_counter() - start)
          losses[name] = float(metrics['loss'].value())
      best = {name: min(values) for name, values in seconds.items()}
      print(f'{dtype}: packed {best["packed"]:.3f} s, padded {best["padded"]:.3f} s, '
            f'{best["padded"] / best["packed"]:.2f} x; losses {losses["packed"]:.6f} and '
            f'{losses["padded"]:.6f}', flush=True)


if __name__ == '__main__':
  main()
