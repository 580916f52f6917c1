"""Rows of ids to static-shape batches; batch k is a pure function of (seed, k).

A row is a sequence of ids with a span of response ids at its end. Masks come from that span, never
from comparing ids with pad or EOS, so the loss does not change with the pad id.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import grain
import numpy as np

from jaxrl.errors import InputError


@dataclasses.dataclass(frozen=True)
class TokenRow:
  """One prompt and one response; ids are concatenated, never re-tokenised."""

  prompt_ids: Sequence[int]
  response_ids: Sequence[int]

  def __len__(self) -> int:
    return len(self.prompt_ids) + len(self.response_ids)


@dataclasses.dataclass(frozen=True)
class Pair:
  """One preference pair with the reference's per-token log-probs of both responses."""

  chosen: TokenRow
  rejected: TokenRow
  chosen_ref: Sequence[float]
  rejected_ref: Sequence[float]
  weight: float = 1.0


@dataclasses.dataclass(frozen=True)
class LabelledRow:
  """A response with a label, and the same prompt with another row's response, for KTO."""

  row: TokenRow
  label: bool                 # True: desirable
  mismatched: TokenRow
  ref: Sequence[float]        # the reference's log-probs of the response ids
  mismatched_ref: Sequence[float]


@dataclasses.dataclass(frozen=True)
class WeakRow:
  """A response with what a weak model's alignment did to it, for WSPO."""

  row: TokenRow
  ref: Sequence[float]        # log-probs under the strong reference
  weak_gap: Sequence[float]   # log-probs under the aligned weak model less those under its base


Batch = dict[str, np.ndarray]


def buckets(lengths: Sequence[int], *, count: int, multiple: int) -> tuple[int, ...]:
  """At most `count` padded lengths that cover `lengths`, at even quantiles, each a `multiple`.

  Few lengths mean few compiled programs; a row is padded to the smallest that holds it.
  """
  if not len(lengths):
    raise InputError('there are no rows to batch', where='batches', expected='at least one row')
  quantiles = np.quantile(np.asarray(lengths), np.linspace(0, 1, count + 1)[1:], method='higher')
  return tuple(sorted({int(-(-q // multiple) * multiple) for q in quantiles}))


def _pad_to(sequences: Sequence[TokenRow], lengths: Sequence[int]) -> int:
  """The smallest padded length that holds every row; inputs are one shorter than the ids."""
  longest = max(len(s) for s in sequences) - 1
  for length in sorted(lengths):
    if length >= longest:
      return length
  raise InputError(
      'a row is longer than every padded length', where='batches',
      expected=f'at most {max(lengths) + 1} ids', found=f'{longest + 1} ids')


def sequence_arrays(sequences: Sequence[TokenRow], lengths: Sequence[int], pad_id: int) -> Batch:
  """`inputs`, `targets` int32 and `mask` bool, all [B, T].

  Entry t of `targets` follows entry t of `inputs`; `mask` is True where that is a response id.

  Raises:
    InputError: a row has no prompt, so that nothing would predict its first response id, or is
      longer than every padded length.
  """
  for row, s in enumerate(sequences):
    if not s.prompt_ids:
      raise InputError('the row has no prompt', where=f'row {row} of a batch',
                       expected='at least one prompt id')
  t = _pad_to(sequences, lengths)
  inputs = np.full((len(sequences), t), pad_id, np.int32)
  targets = np.full((len(sequences), t), pad_id, np.int32)
  mask = np.zeros((len(sequences), t), bool)
  for row, s in enumerate(sequences):
    ids = np.asarray([*s.prompt_ids, *s.response_ids], np.int32)
    inputs[row, :len(ids) - 1] = ids[:-1]
    targets[row, :len(ids) - 1] = ids[1:]
    mask[row, len(s.prompt_ids) - 1:len(ids) - 1] = True
  return {'inputs': inputs, 'targets': targets, 'mask': mask}


def pair_arrays(pairs: Sequence[Pair], lengths: Sequence[int], pad_id: int) -> Batch:
  """Arrays of `sequence_arrays` as [P, 2, T] (0 chosen, 1 rejected), `ref_logps` and `weights`."""
  sequences = [s for p in pairs for s in (p.chosen, p.rejected)]
  arrays = sequence_arrays(sequences, lengths, pad_id)
  arrays['ref_logps'] = _at_responses(
      arrays['mask'], [x for p in pairs for x in (p.chosen_ref, p.rejected_ref)])
  arrays = {key: x.reshape(len(pairs), 2, -1) for key, x in arrays.items()}
  return arrays | {'weights': np.asarray([p.weight for p in pairs], np.float32)}


def labelled_arrays(rows: Sequence[LabelledRow], lengths: Sequence[int], pad_id: int) -> Batch:
  """`sequence_arrays` with `ref_logps` [B, T] and `label` [B], and `kl_...` of mismatched rows."""
  b = len(rows)
  arrays = sequence_arrays([r.row for r in rows] + [r.mismatched for r in rows], lengths, pad_id)
  arrays['ref_logps'] = _at_responses(
      arrays['mask'], [r.ref for r in rows] + [r.mismatched_ref for r in rows])
  return {key: x[:b] for key, x in arrays.items()} | {
      f'kl_{key}': x[b:] for key, x in arrays.items()} | {
          'label': np.asarray([r.label for r in rows], np.float32)}


def weak_arrays(rows: Sequence[WeakRow], lengths: Sequence[int], pad_id: int) -> Batch:
  """`sequence_arrays` with `ref_logps` and `weak_gap`, all [B, T]."""
  arrays = sequence_arrays([r.row for r in rows], lengths, pad_id)
  return arrays | {
      'ref_logps': _at_responses(arrays['mask'], [r.ref for r in rows]),
      'weak_gap': _at_responses(arrays['mask'], [r.weak_gap for r in rows])}


def _at_responses(mask: np.ndarray, values: Sequence[Sequence[float]]) -> np.ndarray:
  """Numbers of each row's response ids at their places, 0 elsewhere; float32 [B, T]."""
  out = np.zeros(mask.shape, np.float32)
  out[mask] = np.concatenate([np.asarray(x, np.float32) for x in values])
  return out


def shuffled_batches(
    rows: Sequence, *, batch_size: int, seed: int, collate: Callable[[Sequence], Batch]
) -> grain.MapDataset:
  """An endless dataset of batches: index k gives the batch of step k, whatever came before.

  Epochs follow each other without a gap and are shuffled differently. A batch has what `collate`
  gives, and `numbers`: int32, which rows they are.
  """
  def gather(numbers: Sequence[int]) -> Batch:
    return {**collate([rows[n] for n in numbers]), 'numbers': np.asarray(numbers, np.int32)}

  return shuffled_numbers(len(rows), batch_size=batch_size, seed=seed).map(gather)


def shuffled_numbers(rows: int, *, batch_size: int, seed: int) -> grain.MapDataset:
  """Which of the rows are in the batch of each step, in every layout of batches."""
  return grain.MapDataset.source(range(rows)).seed(seed).shuffle().repeat().batch(
      batch_size, batch_fn=list)
