"""Stage: how training moved the log-probs of the responses it was trained on, measured exactly.

Training logs average over different batches; here every distinct chosen and rejected response of
the iteration is scored again under the new model and compared with its reference log-prob.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

import numpy as np
from etils import epath

from jaxrl.evaluation.statistics import mean_estimate
from jaxrl.runs.reference_stage import read_pairs, token_rows, training_pairs
from jaxrl.runs.session import Model, Session
from jaxrl.training.score import score_rows


def shift_stage(
    session: Session, iteration: int, reference: Model, trained: Model, lengths: Sequence[int],
    batch_size: int,
) -> Mapping:
  """Writes `shift.json` and one metrics record; returns the same numbers.

  For each side the mean sequence log-prob before and after, in nats per response, over distinct
  responses, and the 95% interval of the mean change.
  """
  name = f'iteration_{iteration:02d}/shift'

  def measure(scratch: epath.Path) -> dict:
    del scratch
    pairs = training_pairs(session, iteration, reference)
    rows = token_rows(read_pairs(session, iteration))
    before: dict[tuple, float] = {}
    unique = {}
    sides: dict[str, dict[tuple, None]] = {'chosen': {}, 'rejected': {}}
    for n, pair in enumerate(pairs):
      for side, row, logps in (('chosen', rows[2 * n], pair.chosen_ref),
                               ('rejected', rows[2 * n + 1], pair.rejected_ref)):
        key = (tuple(row.prompt_ids), tuple(row.response_ids))
        before[key] = float(np.sum(np.asarray(logps, np.float32)))
        unique[key] = row
        sides[side][key] = None
    with session.progress.stage(f'iteration {iteration}: shift', len(unique), 'responses') as bar:
      scored = score_rows(
          trained.params, list(unique.values()), session.model, session.compute,
          mesh=session.mesh, lengths=lengths, batch_size=batch_size,
          pad_id=session.tokenizer.pad_id, on_rows=bar.advance)
    after = {key: float(x.sum()) for key, x in zip(unique, scored, strict=True)}
    numbers: dict[str, float] = {}
    for side, keys in sides.items():
      change = mean_estimate([after[key] - before[key] for key in keys])
      numbers |= {
          f'{side}/before': float(np.mean([before[key] for key in keys])),
          f'{side}/after': float(np.mean([after[key] for key in keys])),
          f'{side}/change': change.value, f'{side}/change_low': change.low,
          f'{side}/change_high': change.high, f'{side}/responses': len(keys)}
    return numbers

  def produce(scratch: epath.Path, numbers: dict) -> dict:
    (scratch / 'shift.json').write_text(json.dumps(numbers, indent=1))
    session.record(iteration, 'shift', numbers)
    return numbers

  return session.run.stage(name, (f'{name}.json',), produce, together=measure).counts
