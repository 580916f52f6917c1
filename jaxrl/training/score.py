"""Log-probs of stored responses under a frozen model: references, and the sampler's check."""

from __future__ import annotations

import functools
import hashlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from jaxrl.data.batches import TokenRow, sequence_arrays
from jaxrl.models.config import ModelConfig
from jaxrl.models.gather import gather_place
from jaxrl.training.logps import ComputePolicy, target_logps
from jaxrl.training.loop import put_batch


def score_rows(
    params: dict,
    rows: Sequence[TokenRow],
    c: ModelConfig,
    policy: ComputePolicy,
    *,
    mesh: jax.sharding.Mesh,
    lengths: Sequence[int],
    batch_size: int,
    pad_id: int,
    on_rows: Callable[[int], None] = lambda n: None,
) -> list[np.ndarray]:
  """Per row the log-prob of each response id, float32, in the order of `rows`.

  Where the mesh spans several processes all call this, and all are given all rows.

  Rows are sorted by length inside, so that a batch pads little. `lengths` are the padded lengths
  allowed, each one compiled program.
  """
  fn = _compiled(c, policy)
  out: list[np.ndarray] = [np.zeros(0, np.float32)] * len(rows)
  for group, filled in by_length(rows, batch_size):
    batch = sequence_arrays(filled, lengths, pad_id)
    placed = put_batch({key: batch[key] for key in ('inputs', 'targets')}, mesh)
    logps = gather_place(fn(params, placed['inputs'], placed['targets']), ())
    for row, n in enumerate(group):
      out[n] = logps[row][batch['mask'][row]]
    on_rows(len(group))
  return out


def by_length(
    rows: Sequence[TokenRow], batch_size: int
) -> Iterator[tuple[list[int], list[TokenRow]]]:
  """Batches of similar length: the numbers of their rows, and the rows filled up with repeats."""
  order = sorted(range(len(rows)), key=lambda n: len(rows[n]))
  for start in range(0, len(order), batch_size):
    group = order[start:start + batch_size]
    filled = group + [group[-1]] * (batch_size - len(group))   # repeats are computed, not kept
    yield group, [rows[n] for n in filled]


def score_stream(
    params: dict,
    rows: Iterable[TokenRow],
    c: ModelConfig,
    policy: ComputePolicy,
    *,
    window: int,
    **options: Any,
) -> Iterator[np.ndarray]:
  """What `score_rows` gives, row by row, for more rows than memory holds.

  At most `window` rows, and their results, exist at a time; rows are sorted by length inside a
  window only. `options` are those of `score_rows`, whose batch size should divide the window.
  """
  source = iter(rows)
  while group := list(itertools.islice(source, window)):
    yield from score_rows(params, group, c, policy, **options)


@functools.cache
def _compiled(c: ModelConfig, policy: ComputePolicy) -> jax.stages.Wrapped:
  """One function per model shape: jit knows compiled programs by the function's identity."""
  return jax.jit(functools.partial(target_logps, c=c, policy=policy))


def identity(params_identity: str, rows: Sequence[TokenRow], policy: ComputePolicy) -> str:
  """Hex digest of everything stored log-probs depend on: parameters, ids, spans, compute dtype."""
  digest = hashlib.sha256(f'{params_identity} {policy.dtype}\n'.encode())
  for row in rows:
    # Both lengths, so that no two lists of rows give the same bytes.
    spans = len(row.prompt_ids), len(row.response_ids)
    digest.update(np.asarray([*spans, *row.prompt_ids, *row.response_ids], '<i4').tobytes())
  return digest.hexdigest()[:32]
