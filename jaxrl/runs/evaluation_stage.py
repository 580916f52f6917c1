"""Stage: accuracy of a model on held-out problems, greedy and by majority vote."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Mapping, Sequence

from etils import epath

from jaxrl.data.readers import Problem
from jaxrl.evaluation.accuracy import majority_correct
from jaxrl.evaluation.grid_accuracy import grid_accuracy
from jaxrl.evaluation.statistics import proportion
from jaxrl.parallel import hosts
from jaxrl.rewards.checking import AnswerRule, Verdict
from jaxrl.runs import tables
from jaxrl.runs.process import peak_memory
from jaxrl.runs.sample_stage import Draws, draw_rows, share_of
from jaxrl.runs.score_stage import check_rows
from jaxrl.runs.session import Model, Session
from jaxrl.sampling.engine import Engine
from jaxrl.sampling.generate import engine_params
from jaxrl.tokens.prompts import EncodedPrompt


@dataclasses.dataclass(frozen=True)
class Evaluation:
  """Held-out problems and how they are answered; `votes` 0 leaves the vote out."""

  problems: Mapping[str, Problem]
  prompts: Sequence[EncodedPrompt]
  rule: AnswerRule
  votes: int
  vote_temperature: float
  vote_seed: int


def evaluation_stage(
    session: Session, iteration: int, engine: Engine, model: Model, test: Evaluation
) -> Mapping:
  """Writes `evaluation.parquet` and one metrics record; returns counts and accuracies.

  Problems whose gold cannot be parsed, and timed-out checks, count in neither numerator nor
  denominator of greedy accuracy; their number is among the counts.
  """
  name = f'iteration_{iteration:02d}/evaluation'

  def draw(scratch: epath.Path) -> dict[str, list[dict]]:
    """Rows by kind; of several processes process 0 has them."""
    del scratch
    params = engine_params(engine, model.params)
    kinds = {'greedy': Draws(1, 0.0, 0)}
    if test.votes:
      kinds['vote'] = Draws(test.votes, test.vote_temperature, test.vote_seed)
    total = share_of(test.prompts) * (1 + test.votes)
    with session.progress.stage(f'iteration {iteration}: evaluate', total, 'samples') as bar:
      return {kind: draw_rows(session, engine, params, test.prompts, draws, bar)
              for kind, draws in kinds.items()}

  def produce(scratch: epath.Path, by_kind: Mapping[str, list[dict]]) -> dict:
    rows: list[dict] = []
    for kind, drawn in by_kind.items():
      checks = check_rows(drawn, test.problems, test.rule)
      rows += [
          {key: row[key] for key in (
              'prompt_id', 'sample_index', 'prompt', 'response', 'finish_reason')}
          | {key: check[key] for key in ('gold', 'answer', 'verdict')}
          | {'kind': kind, 'length': len(row['response_ids'])}
          for row, check in zip(drawn, checks, strict=True)
      ]
    tables.write_table(scratch / 'evaluation.parquet', rows, tables.EVALUATION)
    summary = summarise(rows)
    if test.rule.kind == 'grid':
      summary |= grid_accuracy([row for row in rows if row['kind'] == 'greedy'],
                               {p.prompt_id: p.labels or () for p in test.problems.values()})
    session.record(iteration, 'evaluate', summary | {
        'perf/compiled_programs': session.programs(), 'perf/peak_memory_bytes': peak_memory()})
    return summary

  return session.run.stage(name, (f'{name}.parquet',), produce, together=draw).counts


def greedy_accuracy(
    session: Session, engine: Engine, params: dict, problems: Mapping[str, Problem],
    prompts: Sequence[EncodedPrompt], rule: AnswerRule,
) -> dict[str, float]:
  """`summarise` of greedy answers under parameters in training; nothing is written.

  Of several processes all call this and are told the same numbers.
  """
  whole = engine_params(engine, params)
  with session.progress.stage('dev', share_of(prompts), 'samples') as bar:
    drawn = draw_rows(session, engine, whole, prompts, Draws(1, 0.0, 0), bar)
  return hosts.broadcast(summarise([
      row | check | {'kind': 'greedy', 'length': len(row['response_ids'])}
      for row, check in zip(drawn, check_rows(drawn, problems, rule), strict=True)
  ]) if hosts.is_writer() else None)


def summarise(rows: Sequence[Mapping]) -> dict[str, float]:
  """Accuracies with 95% Wilson intervals, and what was counted how."""
  greedy = [row for row in rows if row['kind'] == 'greedy']
  judged = [row for row in greedy if row['verdict'] not in (
      Verdict.UNPARSEABLE_GOLD, Verdict.TIMEOUT)]
  right = sum(row['verdict'] == Verdict.CORRECT for row in judged)
  estimate = proportion(right, len(judged))
  found = collections.Counter(row['verdict'] for row in greedy)
  summary = {
      'n': len(judged), 'greedy_correct': right, 'greedy_accuracy': estimate.value,
      'greedy_low': estimate.low, 'greedy_high': estimate.high,
      'length': sum(row['length'] for row in greedy) / max(len(greedy), 1),
      'truncated': sum(row['finish_reason'] == 'length' for row in greedy),
  } | {f'greedy/{verdict}': found[verdict] for verdict in Verdict}
  votes = [row for row in rows if row['kind'] == 'vote']
  if votes:
    won = majority_correct(votes)
    vote = proportion(sum(won.values()), len(won))
    summary |= {'majority_accuracy': vote.value, 'majority_low': vote.low,
                'majority_high': vote.high, 'vote_length':
                    sum(row['length'] for row in votes) / len(votes)}
  return summary


def read_evaluation(session: Session, iteration: int) -> list[dict]:
  """Rows of the finished stage, verified against the manifest."""
  name = f'iteration_{iteration:02d}/evaluation'
  path = session.run.path(name, f'{name}.parquet')
  return tables.read_table(path, tables.EVALUATION).to_pylist()
