"""Problems of a file, validated and encoded before anything is compiled."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence, Set
from typing import Literal

from jaxrl.data.readers import Problem, read_problems
from jaxrl.data.tasks import Task
from jaxrl.preferences.irpo import cap
from jaxrl.rewards.checking import AnswerRule
from jaxrl.runs.score_stage import check_gold
from jaxrl.runs.session import Session
from jaxrl.tokens.prompts import EncodedPrompt, encode_prompts
from jaxrl.tokens.tokenizer import response_ids


@dataclasses.dataclass(frozen=True)
class ProblemSet:
  """Problems by id, and the prompts of those that are asked, in file order."""

  problems: Mapping[str, Problem]
  prompts: Sequence[EncodedPrompt]

  def held_out(self, count: int, seed: int) -> list[EncodedPrompt]:
    """`count` of the prompts, chosen uniformly; none for 0."""
    return cap(self.prompts, count, seed) if count else []

  def joined(self, others: ProblemSet) -> ProblemSet:
    """These problems and then others, none of which has an id of these."""
    return ProblemSet({**self.problems, **others.problems}, [*self.prompts, *others.prompts])

  def without(self, prompts: Sequence[EncodedPrompt]) -> ProblemSet:
    """The same problems, of which those of `prompts` are not asked."""
    ids = {prompt.prompt_id for prompt in prompts}
    return ProblemSet(self.problems, [p for p in self.prompts if p.prompt_id not in ids])


def read_problem_set(
    session: Session, path: os.PathLike[str], task: Task, rule: AnswerRule, *, limit: int | None,
    max_prompt_length: int, over_length: Literal['error', 'drop'],
    labelled: Callable[[Sequence[str]], Set[str]] | None = None,
) -> ProblemSet:
  """Reads, checks and encodes every problem; what is left out is counted in one line.

  A problem whose gold answer is missing or cannot be parsed is not asked. `labelled` takes the ids
  of all problems to those whose gold is needed; of the others it may be anything.

  Raises:
    InputError: the first row that cannot be used; more than 1 percent of unparseable gold.
  """
  problems = read_problems(
      path, task, limit, missing_gold='keep' if labelled is None else 'keep_any')
  judged = problems
  if labelled is not None:
    ids = labelled([p.prompt_id for p in problems])
    judged = [p for p in problems if p.prompt_id in ids]
  unparsed = check_gold(judged, rule, str(path))
  asked = [p for p in problems if p.prompt_id not in unparsed]
  encoded = encode_prompts(
      session.tokenizer, asked, max_prompt_length=max_prompt_length, over_length=over_length)
  session.progress.line(
      f'{path}: {len(problems)} problems, {len(encoded.dropped)} dropped for their length, '
      f'{len(unparsed)} left out for a gold answer that cannot be parsed')
  return ProblemSet({p.prompt_id: p for p in problems}, list(encoded.prompts))


def gold_response_ids(session: Session, problems: Mapping[str, Problem]) -> dict[str, list[int]]:
  """Response ids of worked gold solutions, by prompt id, where the data has them."""
  return {
      p.prompt_id: response_ids(session.tokenizer, p.gold_solution, ends=True)
      for p in problems.values() if p.gold_solution is not None
  }
