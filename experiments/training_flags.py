"""Flags of training that say how rows become batches."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import grain
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
from jaxrl.parallel.mesh import ways
from jaxrl.runs.session import Session

FLAGS = flags.FLAGS

flags.DEFINE_enum('layout', 'packed', ['packed', 'padded'], 'How rows become batches: whole rows '
                  'packed into long ones, the prompt of a pair once, or one response per row, '
                  'padded to one of --length_buckets. The updates are the same.')
flags.DEFINE_integer('pack_shapes', 4, 'Most shapes of packed batches, each one compiled program; '
                     'more of them pad less.', lower_bound=1)
flags.DEFINE_integer('pack_multiple', 64, 'Lengths of packed rows are multiples of this.',
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
  if FLAGS.layout == 'packed':
    return {}
  return dict.fromkeys(('pack_shapes', 'pack_multiple'), '--layout=padded')


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
