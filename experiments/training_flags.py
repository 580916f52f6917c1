"""Flags of training: how rows become batches, what is kept, what is done when a step fails."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import grain
import jax
import numpy as np
from absl import flags

from jaxrl.data.batches import (
    labelled_arrays,
    pair_arrays,
    sequence_arrays,
    shuffled_batches,
    weak_arrays,
)
from jaxrl.data.packing import (
    labelled_units,
    pack_batches,
    pair_unit,
    sequence_unit,
    weak_unit,
)
from jaxrl.models.config import ModelConfig
from jaxrl.parallel.mesh import ways
from jaxrl.runs.session import Session
from jaxrl.runs.train_stage import Trainer, make_trainer
from jaxrl.training.loop import LoopConfig, check_loop
from jaxrl.training.objectives import Objective
from jaxrl.training.optimizer import OptimizerConfig
from jaxrl.training.step_log import NONFINITE, Watch

FLAGS = flags.FLAGS

flags.DEFINE_enum('layout', 'packed', ['packed', 'padded'], 'How rows become batches: whole rows '
                  'packed into long ones, the prompt of a pair once, or one response per row, '
                  'padded to one of --length_buckets. The updates are the same.')
flags.DEFINE_integer('pack_shapes', 4, 'Most shapes of packed batches, each one compiled program; '
                     'more of them pad less.', lower_bound=1)
flags.DEFINE_integer('pack_multiple', 64, 'Lengths of packed rows are multiples of this.',
                     lower_bound=1)

flags.DEFINE_bool('offload_optimizer', False, "Keep the optimizer's state in the memory of the "
                  'host between steps.')
flags.DEFINE_enum('on_nonfinite', 'stop', NONFINITE, 'What is done about a step whose loss or '
                  'gradient is no number; it is never applied.')
flags.DEFINE_integer('max_skips', 3, 'Most such steps in a row.', lower_bound=1)
flags.DEFINE_float('peak_tflops', None, 'Of one device, for the utilisation in the log; default: '
                   'known for some devices.', lower_bound=0.0)
flags.DEFINE_integer('keep_last', 2, 'Newest checkpoints of a training that are kept while it '
                     'goes on.', lower_bound=1)
flags.DEFINE_integer('keep_every', None, 'Keep the checkpoint of every so many steps as well.',
                     lower_bound=1)

# What the rows of an objective are -> how they are padded, and what is packed.
KINDS: dict[str, tuple[Callable, Callable]] = {
    'sequences': (sequence_arrays, sequence_unit),
    'pairs': (pair_arrays, pair_unit),
    'labelled': (labelled_arrays, labelled_units),
    'weak': (weak_arrays, weak_unit),
}


def without_effect() -> dict[str, str]:
  """Flags that the values of the others leave without effect, and why."""
  idle: dict[str, str] = {}
  if FLAGS.layout == 'padded':
    idle |= dict.fromkeys(('pack_shapes', 'pack_multiple'), '--layout=padded')
  if FLAGS.on_nonfinite == 'stop':
    idle['max_skips'] = '--on_nonfinite=stop'
  others = f'--optimizer={FLAGS.optimizer}'
  if FLAGS.optimizer != 'adamw8bit':
    idle['moment_block'] = others
  if FLAGS.optimizer != 'adamw':
    idle['moment_dtype'] = others
  if FLAGS.optimizer == 'adafactor':
    idle |= dict.fromkeys(('adam_b1', 'adam_b2'), others)
  return idle


def loop_config(rows: int, epochs: float, max_steps: int | None) -> LoopConfig:
  """The loop over so many rows."""
  epoch = rows / FLAGS.batch_size
  steps = math.ceil(epochs * epoch)
  return LoopConfig(
      min(steps, max_steps or steps), FLAGS.log_every, FLAGS.save_every, steps_per_epoch=epoch,
      keep=FLAGS.keep_last, keep_every=FLAGS.keep_every)


def check_devices(mesh: jax.sharding.Mesh) -> None:
  """Raises InputError where batches do not divide over the devices, or saves fall between logs."""
  check_loop(
      LoopConfig(1, FLAGS.log_every, FLAGS.save_every, keep=FLAGS.keep_last,
                 keep_every=FLAGS.keep_every),
      batch_size=FLAGS.batch_size, micro_batches=FLAGS.micro_batches, mesh=mesh,
      packed=FLAGS.layout == 'packed')


def trainer(
    objective: Objective, optimizer: OptimizerConfig, adapted: ModelConfig | None
) -> Trainer:
  """The compiled-once step of these flags."""
  return make_trainer(
      objective, optimizer, FLAGS.micro_batches, adapted, offloads=FLAGS.offload_optimizer,
      watch=Watch(FLAGS.on_nonfinite, FLAGS.max_skips, peak_tflops=FLAGS.peak_tflops))


def batches(
    session: Session, kind: str, rows: Sequence[Any], *, iteration: int, steps: int,
    lengths: Sequence[int], stream: int, batch_size: int,
) -> grain.MapDataset:
  """Shuffled batches of a training of so many steps, of rows of a kind; `lengths` where padded.

  The same rows come in the same batches whatever the layout, devices and micro-batches are.
  """
  collate, units = KINDS[kind]
  sequence = session.mesh.shape['sequence']
  seed, pad_id = session.stream_seed(iteration, stream), session.tokenizer.pad_id
  if FLAGS.layout == 'padded':
    return shuffled_batches(rows, batch_size=batch_size, seed=seed, collate=functools.partial(
        collate, lengths=lengths, pad_id=pad_id))
  packed = pack_batches(
      rows, units, batch_size=batch_size, seed=seed, steps=steps,
      into=ways(session.mesh) * FLAGS.micro_batches, shapes=FLAGS.pack_shapes,
      multiple=math.lcm(FLAGS.pack_multiple, sequence), pad_id=pad_id, picks=sequence == 1)
  session.progress.line(f'  {packed}')
  return packed.batches


def mean_weight(batch: dict[str, np.ndarray]) -> float:
  """Mean weight of the pairs of a batch in either layout."""
  is_pair = batch['mask'].any(axis=(-2, -1))
  return float(batch['weights'][is_pair].mean())
