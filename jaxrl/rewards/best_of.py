"""One of N responses to a prompt: the one with the best score, or with the answer most give."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np

from jaxrl.errors import InputError
from jaxrl.rewards.checking import AnswerRule, extract_answer
from jaxrl.rewards.voting import majority_vote

Response = TypeVar('Response')


def logprob_sum(logprobs: Sequence[float]) -> float:
  """log p(response | prompt); short responses do well by it."""
  return float(np.sum(np.asarray(logprobs, np.float32), dtype=np.float64))


def logprob_mean(logprobs: Sequence[float]) -> float:
  """Log-prob per token; raises InputError for a response without any."""
  if not len(logprobs):
    raise InputError('a response without ids has no mean log-prob', where='logprob_mean',
                     expected='at least one id', found=0)
  return logprob_sum(logprobs) / len(logprobs)


def best_of(responses: Sequence[Response], score: Callable[[Response], float]) -> int:
  """Place of the response with the highest score; the first of equals.

  Raises:
    InputError: no responses, or a score that is NaN.
  """
  scores = [score(each) for each in responses]
  if not scores or any(map(math.isnan, scores)):
    raise InputError('there is no best response', where='best_of',
                     expected='at least one, with scores that are numbers', found=scores)
  return max(range(len(scores)), key=scores.__getitem__)


@dataclasses.dataclass(frozen=True)
class Majority:
  """What the responses to one prompt agree on; `answer` is None where none could be read."""

  answer: str | None
  votes: int
  answers: tuple[str | None, ...]    # of each response
  chosen: int                        # place of a response that gives `answer`


def majority(
    responses: Sequence[str],
    rule: AnswerRule,
    *,
    labels: Sequence[str] | None = None,
    scores: Sequence[float] | None = None,
) -> Majority:
  """The answer that most responses give; a tie goes to the one seen first.

  Args:
    responses: texts, in the order of their draws.
    labels: options of a multiple-choice item.
    scores: decide which response with the answer is chosen; without them the first one. Where no
      answer could be read they decide among all.

  Raises:
    InputError: no responses.
  """
  answers = tuple(extract_answer(rule, text, labels) for text in responses)
  answer, votes = majority_vote(answers)
  agreeing = [place for place, each in enumerate(answers) if each == answer]
  chosen = agreeing[best_of(agreeing, lambda place: scores[place] if scores else 0.0)]
  return Majority(answer, votes, answers, chosen)
