"""This project's training step as a contender of the DPO step benchmark.

SETTING is LAYOUT-DTYPE: rows are packed, each prompt once, or padded; products are in float32 or
bfloat16. Reference log-probs are computed before, by the program that scores. Batches are made and
laid out within the step's time, as in `jaxrl.training.loop`.
"""

from __future__ import annotations

import functools
import itertools
import time

import jax
import numpy as np

from benchmarks.dpo_step_worker import Pace
from benchmarks.dpo_step_workload import (
    B1,
    B2,
    BETA,
    CLIP_NORM,
    LEARNING_RATE,
    PAIRS_A_STEP,
    Workload,
)
from jaxrl.data.batches import Pair, TokenRow, buckets, pair_arrays, shuffled_batches
from jaxrl.data.packing import pack_batches, pair_unit
from jaxrl.models.hugging_face import load_params, read_config
from jaxrl.parallel.mesh import make_mesh
from jaxrl.runs.process import keep_pages
from jaxrl.runs.train_stage import make_trainer
from jaxrl.training.logps import ComputePolicy
from jaxrl.training.loop import put_batch
from jaxrl.training.objectives import preference_objective
from jaxrl.training.optimizer import OptimizerConfig, make_optimizer
from jaxrl.training.score import score_rows
from jaxrl.training.step import init_state

SEED, SHAPES, MULTIPLE, SCORED_ROWS = 0, 4, 64, 16
REMAT = 'minimal'             # on a CPU faster than keeping everything, and 0.5 GiB less


def run(folder: str, setting: str, workload: Workload, pace: Pace) -> None:
  """Trains without end."""
  layout, dtype = setting.split('-')
  keep_pages()
  config, mesh, policy = read_config(folder), make_mesh(), ComputePolicy(dtype, remat=REMAT)
  optimizer = OptimizerConfig(LEARNING_RATE, b1=B1, b2=B2, clip_norm=CLIP_NORM)
  rows = [TokenRow(p.prompt, side) for p in workload.pairs for side in (p.chosen, p.rejected)]
  lengths = buckets([len(row) for row in rows], count=SHAPES, multiple=MULTIPLE)
  with jax.set_mesh(mesh):
    params = load_params(folder, config, mesh=mesh, dtype='float32')
    score = functools.partial(score_rows, params, rows, config, policy, mesh=mesh, lengths=lengths,
                              batch_size=SCORED_ROWS, pad_id=0)
    score()                    # compiles
    start = time.perf_counter()
    logps = score()
    seconds = time.perf_counter() - start
    pairs = [Pair(*four) for four in zip(
        rows[::2], rows[1::2], logps[::2], logps[1::2], strict=True)]
    if layout == 'packed':
      packed = pack_batches(
          pairs, pair_unit, batch_size=PAIRS_A_STEP, seed=SEED, steps=workload.steps, into=1,
          shapes=SHAPES, multiple=MULTIPLE, pad_id=0)
      batches, told = packed.batches, str(packed)
    else:
      batches = shuffled_batches(
          pairs, batch_size=PAIRS_A_STEP, seed=SEED, collate=functools.partial(
              pair_arrays, lengths=lengths, pad_id=0))
      told = f'rows padded to {", ".join(map(str, lengths))}'
    objective = preference_objective('dpo', {'beta': BETA}, config, policy)
    trainer = make_trainer(objective, optimizer, 1)
    tx = make_optimizer(optimizer)
    state = jax.jit(lambda params: init_state(params, tx), donate_argnums=0)(params)
    del params, score
    pace.ready(f'jaxrl, jax {jax.__version__}: masters float32, products {dtype}, {told}',
               reference_seconds=seconds)
    for step in itertools.count():
      pace(functools.partial(jax.block_until_ready, state))
      batch = put_batch(batches[step % workload.steps], mesh)
      state, metrics = trainer.step(state, batch, np.float32(LEARNING_RATE))
      if pace.is_first():
        pace.saw(*(float(metrics[name].value()) for name in ('loss', 'grad_norm')))
