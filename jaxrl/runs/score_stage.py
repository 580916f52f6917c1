"""Stage: extract and check the answer of every sample, and count votes."""

from __future__ import annotations

import collections
from collections.abc import Mapping

from etils import epath

from jaxrl.data.readers import Problem
from jaxrl.errors import InputError
from jaxrl.rewards.checking import AnswerRule, Verdict, canonical_gold, check_answers
from jaxrl.rewards.voting import votes_among
from jaxrl.runs import tables
from jaxrl.runs.sample_stage import read_samples
from jaxrl.runs.session import Session


def check_rows(
    rows: list[dict], problems: Mapping[str, Problem], rule: AnswerRule
) -> list[dict]:
  """`gold`, `answer`, `verdict` of each row; rows name their problem by `prompt_id`."""
  of_row = [problems[row['prompt_id']] for row in rows]
  checks = check_answers(
      rule, [row['response'] for row in rows], [p.gold for p in of_row],
      [p.labels or () for p in of_row] if rule.kind in ('choice', 'grid') else None)
  gold = {p.prompt_id: canonical_gold(rule, p.gold) for p in problems.values()}
  return [
      {'prompt_id': row['prompt_id'], 'sample_index': row['sample_index'],
       'gold': gold[row['prompt_id']], 'answer': check.answer, 'verdict': str(check.verdict)}
      for row, check in zip(rows, checks, strict=True)
  ]


def check_gold(problems: list[Problem], rule: AnswerRule, where: str) -> set[str]:
  """Ids of problems whose gold answer cannot be parsed.

  Raises:
    InputError: more than 1 percent of them, naming the first rows.
  """
  bad = [p for p in problems if canonical_gold(rule, p.gold) is None]
  if len(bad) > 0.01 * len(problems):
    raise InputError(
        'too many gold answers cannot be parsed', where=where,
        expected=f'at most 1 percent of {len(problems)} rows',
        found=f'{len(bad)}, first {bad[0].where or bad[0].prompt_id}: {bad[0].gold[-60:]!r}',
        fix='Check --task and --answer_field')
  return {p.prompt_id for p in bad}


def score_stage(
    session: Session, iteration: int, problems: Mapping[str, Problem], rule: AnswerRule,
    voters: int,
) -> Mapping:
  """Writes `scores.parquet`, row-aligned with the samples; returns counts of verdicts.

  The first `voters` draws of a prompt vote; a draw's `votes` are those for its answer.
  """
  name = f'iteration_{iteration:02d}/scores'

  def produce(scratch: epath.Path) -> dict:
    samples = read_samples(session, iteration)
    unknown = next((s['prompt_id'] for s in samples if s['prompt_id'] not in problems), None)
    if unknown is not None:
      raise InputError('the problems have changed since the samples were drawn', where=name,
                       expected=f'a problem {unknown!r}', found='none',
                       fix='Restore the file of problems, or start with another --run_dir')
    with session.progress.stage(f'iteration {iteration}: score', len(samples), 'samples') as bar:
      rows = check_rows(samples, problems, rule)
      bar.advance(len(rows))
    by_prompt = collections.defaultdict(list)
    for row in rows:
      by_prompt[row['prompt_id']].append(row)
    for group in by_prompt.values():
      answers = [row['answer'] for row in group]
      for row, count in zip(group, votes_among(answers[:voters], answers), strict=True):
        row['votes'] = count
    tables.write_table(scratch / 'scores.parquet', rows, tables.SCORES)
    found = collections.Counter(row['verdict'] for row in rows)
    return {str(verdict): found[verdict] for verdict in Verdict}

  return session.run.stage(name, (f'{name}.parquet',), produce).counts


def read_scores(session: Session, iteration: int) -> list[dict]:
  """Rows of the finished stage, verified against the manifest."""
  name = f'iteration_{iteration:02d}/scores'
  return tables.read_table(session.run.path(name, f'{name}.parquet'), tables.SCORES).to_pylist()
