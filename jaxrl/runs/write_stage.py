"""Stages: the current model writes problems from examples, and what of them is kept."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence

from etils import epath

from jaxrl.data.readers import Problem
from jaxrl.data.tasks import Task, ask
from jaxrl.errors import InputError
from jaxrl.preferences import new_problems
from jaxrl.preferences.new_problems import WriterTemplate
from jaxrl.runs.problem_set import ProblemSet
from jaxrl.runs.sample_stage import Draws, read_samples, sample_stage
from jaxrl.runs.session import Model, Session
from jaxrl.sampling.engine import Engine
from jaxrl.tokens.prompts import encode_prompts, prompt_ids


@dataclasses.dataclass(frozen=True)
class Writing:
  """How problems are written; the paper's settings are in experiments/flags."""

  count: int                  # prompts, each of which gives one problem at most
  few_shot: int               # questions in a prompt
  temperature: float
  template: WriterTemplate
  max_prompt: int             # ids; a longer prompt is left out
  seed: int


def write_stage(
    session: Session, iteration: int, engine: Engine, model: Model, task: Task, writing: Writing,
    train: ProblemSet, test: ProblemSet, *, max_prompt_length: int,
) -> ProblemSet:
  """Stages 'written' (samples of the writer) and 'new_problems' (what was kept of them).

  Returns the problems that are new, unlike any other and short enough to be asked; none of them has
  a gold answer.
  """
  folder = f'iteration_{iteration:02d}'

  def questions(problems: ProblemSet) -> list[str]:
    return [new_problems.question_of(p.prompt, task.template) for p in problems.problems.values()]

  asked = {p.prompt_id for p in train.prompts}
  examples = [new_problems.question_of(p.prompt, task.template)
              for p in train.problems.values() if p.prompt_id in asked]
  chosen = new_problems.choose_examples(
      writing.count, len(examples), writing.few_shot, writing.seed)
  prompts = encode_prompts(session.tokenizer, [
      _problem(f'written-{iteration}-{n}', new_problems.writer_prompt(
          [examples[i] for i in indices], writing.template)) for n, indices in enumerate(chosen)
  ], max_prompt_length=writing.max_prompt, over_length='drop').prompts
  sample_stage(
      session, iteration, engine, model, prompts,
      Draws(1, writing.temperature, writing.seed), name='written')

  def fits(question: str) -> bool:
    try:
      ids = prompt_ids(session.tokenizer, ask(task, question))
    except InputError:         # what the model wrote cannot be told from control tokens
      return False
    return len(ids) <= max_prompt_length

  def produce(scratch: epath.Path) -> dict:
    rows = read_samples(session, iteration, name='written')
    written = new_problems.sift(
        [row['response'] for row in rows], [row['finish_reason'] == 'length' for row in rows],
        train=questions(train), test=questions(test), fits=fits)
    (scratch / 'new_problems.jsonl').write_text(''.join(
        json.dumps({'id': f'new-{iteration}-{n:06d}'} | dataclasses.asdict(w)) + '\n'
        for n, w in enumerate(written)))
    counts = new_problems.count_reasons(written)
    session.record(iteration, 'new_problems', counts)
    return counts

  name = f'{folder}/new_problems'
  session.run.stage(name, (f'{name}.jsonl',), produce)
  lines = session.run.path(name, f'{name}.jsonl').read_text().splitlines()
  kept = [_problem(row['id'], ask(task, row['question']))
          for row in map(json.loads, lines) if row['discarded'] is None]
  return _encoded(session, kept, train, max_prompt_length)


def _problem(prompt_id: str, prompt: str) -> Problem:
  return Problem(prompt_id, prompt, gold='', gold_solution=None, labels=None)


def _encoded(
    session: Session, problems: Sequence[Problem], train: ProblemSet, max_prompt_length: int
) -> ProblemSet:
  taken = next((p.prompt_id for p in problems if p.prompt_id in train.problems), None)
  if taken is not None:
    raise InputError('a training problem has the id of a new one', where='--train',
                     expected='no ids like new-1-000000', found=taken, fix='Give it another id')
  if not problems:
    return ProblemSet({}, [])
  encoded = encode_prompts(session.tokenizer, problems, max_prompt_length=max_prompt_length)
  return ProblemSet({p.prompt_id: p for p in problems}, list(encoded.prompts))
