"""Stage: log-probs of both responses of every pair under the reference, computed once, stored."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from etils import epath

from jaxrl.data.batches import Pair, TokenRow
from jaxrl.errors import InputError
from jaxrl.runs import tables
from jaxrl.runs.session import Model, Session
from jaxrl.training.score import identity, score_rows


def token_rows(pairs: Sequence[Mapping]) -> list[TokenRow]:
  """Chosen and rejected of every pair row, alternating."""
  return [
      TokenRow(row['prompt_ids'], row[side])
      for row in pairs for side in ('chosen_ids', 'rejected_ids')
  ]


def reference_stage(
    session: Session, iteration: int, model: Model, lengths: Sequence[int], batch_size: int
) -> Mapping:
  """Writes `reference.parquet`, row-aligned with the pairs; returns counts.

  A response that occurs in several pairs is computed once. `sampler/logp_gap` is the mean absolute
  difference per token between what the sampler recorded and this re-scoring.
  """
  name = f'iteration_{iteration:02d}/reference'

  def score(scratch: epath.Path) -> tuple[list[TokenRow], list[tuple], dict]:
    del scratch
    rows = token_rows(read_pairs(session, iteration))
    keys = [(tuple(r.prompt_ids), tuple(r.response_ids)) for r in rows]
    unique = {key: row for key, row in zip(keys, rows, strict=True)}
    with session.progress.stage(
        f'iteration {iteration}: reference', len(unique), 'responses') as bar:
      scored = score_rows(
          model.params, list(unique.values()), session.model, session.compute, mesh=session.mesh,
          lengths=lengths, batch_size=batch_size, pad_id=session.tokenizer.pad_id,
          on_rows=bar.advance)
    return rows, keys, dict(zip(unique, scored, strict=True))

  def produce(scratch: epath.Path, found: tuple[list[TokenRow], list[tuple], dict]) -> dict:
    rows, keys, logps = found
    out = [
        {'chosen_logps': logps[chosen].tolist(), 'rejected_logps': logps[rejected].tolist()}
        for chosen, rejected in zip(keys[::2], keys[1::2], strict=True)
    ]
    tables.write_table(
        scratch / 'reference.parquet', out, tables.REFERENCE,
        metadata={'identity': identity(model.identity, rows, session.compute)})
    numbers = {'pairs': len(out), 'responses': len(logps)} | _gap(session, iteration, logps)
    session.record(iteration, 'reference', numbers)
    return numbers

  return session.run.stage(name, (f'{name}.parquet',), produce, together=score).counts


def _gap(session: Session, iteration: int, logps: Mapping) -> dict:
  if f'iteration_{iteration:02d}/samples' not in session.run.entries:
    return {}                  # pairs from a file
  path = session.run.path(
      f'iteration_{iteration:02d}/samples', f'iteration_{iteration:02d}/samples.parquet')
  samples = tables.read_table(path, tables.SAMPLES).to_pylist()
  gaps = [
      np.abs(np.asarray(row['logprobs'], np.float32) - logps[key])
      for row in samples
      if (key := (tuple(row['prompt_ids']), tuple(row['response_ids']))) in logps
  ]
  if not gaps:
    return {}
  joined = np.concatenate(gaps)
  return {'sampler/logp_gap': float(joined.mean()), 'sampler/logp_gap_max': float(joined.max())}


def read_pairs(session: Session, iteration: int) -> list[dict]:
  """Rows of the finished pairs stage, verified against the manifest."""
  name = f'iteration_{iteration:02d}/pairs'
  return tables.read_table(session.run.path(name, f'{name}.parquet'), tables.PAIRS).to_pylist()


def training_pairs(session: Session, iteration: int, model: Model) -> list[Pair]:
  """Pairs joined with their reference log-probs, whose identity is checked.

  Raises:
    InputError: the stored log-probs belong to other parameters, ids or compute dtype.
  """
  name = f'iteration_{iteration:02d}/reference'
  pairs = read_pairs(session, iteration)
  path = session.run.path(name, f'{name}.parquet')
  table = tables.read_table(path, tables.REFERENCE)
  rows = token_rows(pairs)
  expected = identity(model.identity, rows, session.compute)
  found = (table.schema.metadata or {}).get(b'identity', b'none').decode()
  if found != expected:
    raise InputError('the reference log-probs were computed for something else', where=path,
                     expected=f'identity {expected}', found=found,
                     fix='Delete the run folder, or run with the flags it was made with')
  reference = table.to_pylist()
  return [
      Pair(rows[2 * n], rows[2 * n + 1], r['chosen_logps'], r['rejected_logps'], p['weight'])
      for n, (p, r) in enumerate(zip(pairs, reference, strict=True))
  ]
