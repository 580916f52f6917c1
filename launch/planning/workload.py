"""What goes through the programs: batches of the lengths that are planned for, and their FLOPs."""

from __future__ import annotations

import dataclasses
import functools
import math

import numpy as np

from jaxrl.data.batches import Pair, TokenRow, pair_arrays, shuffled_batches
from jaxrl.data.packing import pack_batches, pair_unit
from jaxrl.models.flops import (
    Segments,
    forward_flops,
    layer_weights,
    plain_row,
    recompute_flops,
    train_flops,
)
from jaxrl.sampling.sizes import prompt_widths
from launch.planning.layout import Layout
from launch.planning.setting import Setting


@dataclasses.dataclass(frozen=True)
class Rows:
  """Sizes of a batch of training.

  Attributes:
    count, length: rows, and places of each.
    units: what they hold, pair by pair.
  """

  count: int
  length: int
  units: tuple[Segments, ...]

  @property
  def tokens(self) -> int:
    """Of all units, a shared prompt once where it is stored once."""
    return sum(unit.tokens for unit in self.units)

  @property
  def places(self) -> int:
    return self.count * self.length

  def tokens_per_device(self, layout: Layout) -> int:
    """Places of a micro-batch that one device has, of `sequence` its part."""
    return math.ceil(self.places / (layout.ways * layout.micro_batches * layout.sequence))


def training_rows(setting: Setting, layout: Layout) -> Rows:
  """What `training_arrays` will be, without making them."""
  prompt, response, pairs = setting.lengths.prompt, setting.lengths.response, setting.batch_size
  if setting.layout == 'padded':
    return Rows(2 * pairs, score_length(setting),
                (plain_row(prompt + response - 1, response),) * (2 * pairs))
  rows = layout.ways * layout.micro_batches
  multiple = math.lcm(setting.pack_multiple, layout.sequence)
  length = -(-pairs // rows) * (prompt - 1 + 2 * response)
  return Rows(rows, -(-length // multiple) * multiple,
              (Segments(prompt - 1, (response, response), 2 * response),) * pairs)


def training_arrays(setting: Setting, layout: Layout) -> dict[str, np.ndarray]:
  """Pairs of the planned lengths, laid out as the run does it."""
  prompt, response = [0] * setting.lengths.prompt, [0] * setting.lengths.response
  row, ref = TokenRow(prompt, response), [0.0] * setting.lengths.response
  pairs = [Pair(row, row, ref, ref)] * setting.batch_size
  if setting.layout == 'padded':
    return shuffled_batches(pairs, batch_size=len(pairs), seed=0, collate=functools.partial(
        pair_arrays, lengths=setting.buckets, pad_id=0))[0]
  return pack_batches(
      pairs, pair_unit, batch_size=len(pairs), seed=0, steps=1,
      into=layout.ways * layout.micro_batches, shapes=1,
      multiple=math.lcm(setting.pack_multiple, layout.sequence), pad_id=0,
      picks=layout.sequence == 1).batches[0]


def step_flops(setting: Setting, layout: Layout, rows: Rows) -> tuple[float, float]:
  """(model FLOPs of a step, those that the hardware computes, padding and recomputation included).

  Attention counts the keys that a query sees.
  """
  c = setting.adapted or setting.model
  model, _ = train_flops(c, rows.units).total()
  again, _ = recompute_flops(c, rows.units, layout.remat).total()
  return model, (model + again) * rows.places / rows.tokens


def score_length(setting: Setting) -> int:
  """The padded length of the rows that are scored."""
  needed = setting.lengths.prompt + setting.lengths.response - 1
  return next(length for length in setting.buckets if length >= needed)


def score_flops(setting: Setting, layout: Layout) -> tuple[float, float]:
  """(FLOPs of the tokens, of all places) of one batch of the reference stage."""
  prompt, response = setting.lengths.prompt, setting.lengths.response
  length, b = score_length(setting), layout.score_batch
  useful, _ = forward_flops(setting.model, [plain_row(prompt + response - 1, response)] * b).total()
  whole, _ = forward_flops(setting.model, [plain_row(length, length)] * b).total()
  return useful, whole


def prefill_shape(setting: Setting) -> tuple[int, int, bool]:
  """(prompts per part, padded length of a chunk, whether earlier chunks come before it)."""
  longest = max(setting.lengths.prompt - 1, 1)
  width = next(w for w in prompt_widths(setting.max_prompt - 1, setting.engine)
               if w >= min(longest, setting.engine.chunk))
  return max(setting.engine.prefill_tokens // width, 1), width, longest > setting.engine.chunk


def prefill_flops(setting: Setting) -> float:
  """Of one part's program: a chunk of its prompts, as it is padded."""
  rows, width, continues = prefill_shape(setting)
  c = setting.model
  total, _ = forward_flops(c, [plain_row(width, 0)] * rows).total()
  if continues:               # earlier chunks as a prefix that is not computed again
    before = setting.lengths.prompt - 1 - width
    total += 4.0 * c.n_heads * c.d_head * c.n_layers * rows * width * before
  return total


def decode_flops(setting: Setting, slots: int) -> float:
  """Of one step of so many slots with responses half done."""
  c = setting.model
  keys = setting.lengths.prompt + setting.lengths.response / 2
  matrices = 2.0 * (c.n_layers * layer_weights(c) + c.d_model * c.vocab_size)
  return slots * (matrices + 4.0 * c.n_heads * c.d_head * c.n_layers * keys)
