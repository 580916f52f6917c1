"""The tables that end an ScPO run, read back from the run folder."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from experiments import irpo_table
from jaxrl.evaluation.vote_correlation import vote_correlation
from jaxrl.preferences.new_problems import REASONS
from jaxrl.runs.reference_stage import read_pairs
from jaxrl.runs.score_stage import read_scores
from jaxrl.runs.session import Session

RESULTS = ('iteration', 'greedy %', '95% interval', 'majority %', 'pairs', 'mean weight')
VOTES = ('iteration', 'top answer %', 'votes against correctness', 'chosen right %',
         'rejected right %')


WRITTEN = ('iteration', 'written', 'kept', 'with a pair', *(r.replace('_', ' ') for r in REASONS))


def written_cells(session: Session, iteration: int) -> dict[str, str]:
  """What became of the problems that the model wrote; none where it wrote none."""
  entry = session.run.entries.get(f'iteration_{iteration:02d}/new_problems')
  if entry is None:
    return {}
  used = sum(row['prompt_id'].startswith(f'new-{iteration}-')
             for row in read_pairs(session, iteration))
  return {
      'written': str(entry.counts['written']), 'kept': str(entry.counts['kept']),
      'with a pair': str(used)} | {
      reason.replace('_', ' '): str(entry.counts[f'discarded/{reason}']) for reason in REASONS}


def vote_cells(session: Session, iteration: int, voters: int) -> dict[str, str]:
  """What the votes of an iteration were like; gold is read for these figures alone."""
  scores = read_scores(session, iteration)
  base = [row for row in scores if row['sample_index'] < voters]
  most: dict[str, int] = {}
  for row in base:
    most[row['prompt_id']] = max(most.get(row['prompt_id'], 0), row['votes'])
  verdicts = {(row['prompt_id'], row['sample_index']): row['verdict'] for row in scores}
  pairs = read_pairs(session, iteration)

  def right(side: str) -> str:
    found = [verdicts[row['prompt_id'], row[f'{side}_index']] for row in pairs]
    return _percent([v == 'correct' for v in found if v != 'unparseable_gold'])

  correlation = vote_correlation(base)
  return {
      'top answer %': _percent([votes / voters for votes in most.values()]),
      'votes against correctness': '-' if correlation is None else f'{correlation:.2f}',
      'chosen right %': right('chosen'), 'rejected right %': right('rejected'),
      'mean weight': f'{statistics.fmean(row["weight"] for row in pairs):.2f}'}


def rows(session: Session, voters: int) -> list[dict[str, str]]:
  """One row per iteration, cells by column."""
  table = irpo_table.rows(session)
  empty = dict.fromkeys((*VOTES, *WRITTEN, 'mean weight'), '-')
  return [
      empty | row | (vote_cells(session, t, voters) | written_cells(session, t) if t else {})
      for t, row in enumerate(table)]


def show(session: Session, voters: int) -> None:
  """Prints the tables; `voters` is k, the number of responses per problem that voted."""
  table = rows(session, voters)
  results: list[irpo_table.Titled] = [
      ('answers of each model, and the pairs it was trained on', RESULTS),
      ("votes: mean share of the top answer, Somers' D between votes and correctness, and how many "
       'responses of the pairs are right', VOTES)]
  if any(row['written'] != '-' for row in table):
    results.append(('problems that the model wrote, and why some were discarded', WRITTEN))
  irpo_table.show(session, table, name='ScPO', results=results)


def _percent(values: Sequence[float]) -> str:
  return f'{100 * statistics.fmean(values):.1f}' if values else '-'
