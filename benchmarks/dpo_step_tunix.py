"""Tunix's DPOTrainer as a contender of the DPO step benchmark; runs in an environment of its own.

SETTING is SHAPE-DTYPE. 'fixed': every batch has the shape of the longest prompt and response, as
its own data preparation makes them. 'grouped', its best case: pairs of about equal length together,
each batch padded no further than it needs. The reference is computed in every step: it has no other
way. Its llama3 keeps weights, gradients and moments in DTYPE.
"""

from __future__ import annotations

import importlib.metadata
import itertools
from collections.abc import Iterator, Sequence

import jax
import numpy as np
import optax
from flax import nnx
from tunix.models.llama3 import params as llama3_params
from tunix.sft.dpo import dpo_trainer

from benchmarks.dpo_step_worker import Pace
from benchmarks.dpo_step_workload import B1, B2, BETA, CLIP_NORM, LEARNING_RATE, Pair, Workload
from benchmarks.rollout_tunix import llama_config

MULTIPLE = 8


class _Trainer(dpo_trainer.DPOTrainer):
  """Hands on losses and gradient norms."""

  pace: Pace

  def _buffer_metrics(self, buffer, loss, step, additional_metrics=None, **kwargs):
    if self.pace.is_first():
      assert additional_metrics is not None
      self.pace.saw(float(loss), float(additional_metrics['grad_norm'][0]))
    return super()._buffer_metrics(
        buffer, loss=loss, step=step, additional_metrics=additional_metrics, **kwargs)


def _collated(pairs: Sequence[Pair], prompt: int, response: int) -> dpo_trainer.TrainingInput:
  """Prompts padded on the left, responses on the right."""
  def put(sequences, width, left):
    ids, mask = (np.zeros((len(sequences), width), np.int32) for _ in range(2))
    for row, sequence in enumerate(sequences):
      place = slice(width - len(sequence), None) if left else slice(len(sequence))
      ids[row, place], mask[row, place] = sequence, 1
    return ids, mask

  fields = {}
  for name, width in (('prompt', prompt), ('chosen', response), ('rejected', response)):
    fields[f'{name}_ids'], fields[f'{name}_mask'] = put(
        [getattr(p, name) for p in pairs], width, name == 'prompt')
  return dpo_trainer.TrainingInput(**fields)


def _needed(pairs: Sequence[Pair]) -> tuple[int, int]:
  """Widths of prompts and of responses."""
  widths = (max(len(p.prompt) for p in pairs),
            max(max(len(p.chosen), len(p.rejected)) for p in pairs))
  return widths[0] + -widths[0] % MULTIPLE, widths[1] + -widths[1] % MULTIPLE


def run(folder: str, setting: str, workload: Workload, pace: Pace) -> None:
  """Trains without end."""
  shape, dtype = setting.split('-')
  config = llama_config(folder)
  mesh = jax.make_mesh((1, 1), ('fsdp', 'tp'), axis_types=2 * (jax.sharding.AxisType.Auto,))
  policy, reference = (
      llama3_params.create_model_from_safe_tensors(folder, config, mesh, jax.numpy.dtype(dtype))
      for _ in range(2))
  tx = optax.chain(optax.clip_by_global_norm(CLIP_NORM), optax.adam(LEARNING_RATE, b1=B1, b2=B2))
  trainer = _Trainer(policy, reference, tx, dpo_trainer.DPOTrainingConfig(
      eval_every_n_steps=10**9, beta=BETA))
  trainer.pace = pace

  def batches() -> Iterator[dpo_trainer.TrainingInput]:
    for turn in itertools.count():
      grouped = turn > 0 and shape == 'grouped'
      for pairs in workload.batches(grouped):
        pace(lambda: jax.block_until_ready(nnx.state((policy, trainer.optimizer))))
        yield _collated(pairs, *_needed(pairs if grouped else workload.pairs))

  pace.ready(
      f'google-tunix {importlib.metadata.version("google-tunix")}, jax {jax.__version__}: weights, '
      f'gradients, moments and products {dtype}, {shape} shapes', own_order=shape == 'grouped')
  with mesh:
    trainer.train(batches())
