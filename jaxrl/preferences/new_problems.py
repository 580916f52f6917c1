"""Problems that a model writes itself from a few examples, and which of them are worth asking.

Prasad et al. 2024 (Self-Consistency Preference Optimization), section 2: the model sees questions
of the training set, never answers, and writes one more. What it writes is only a question; whether
it can be answered shows in whether the model's own answers agree.
"""

from __future__ import annotations

import collections
import dataclasses
import re
import unicodedata
from collections.abc import Callable, Collection, Sequence

import numpy as np

from jaxrl.data.tasks import QUESTION
from jaxrl.tokens.prompts import Prompt

EXAMPLES = '{examples}'


@dataclasses.dataclass(frozen=True)
class WriterTemplate:
  """How one more problem is asked for."""

  text: str                   # with {examples} in it
  label: str                  # before each example
  between: str                # them


WRITER = WriterTemplate(f"""Below are some problems. Write exactly one new problem of similar \
style and difficulty. It must be self-contained and solvable. Write only the question, without a \
solution.

{EXAMPLES}

New problem:""", 'Problem: ', '\n\n')
# Of the embedded world, whose models read little and know no other words.
WORLD_WRITER = WriterTemplate(f'New:\n{EXAMPLES}', '', '\n')


def question_of(prompt: Prompt, template: str) -> str:
  """The bare question of a prompt that `template` was put around."""
  text = prompt if isinstance(prompt, str) else prompt[-1].content
  before, _, after = template.partition(QUESTION)
  return text.removeprefix(before).removesuffix(after).strip()


def choose_examples(count: int, total: int, few_shot: int, seed: int) -> list[list[int]]:
  """For each of `count` prompts `few_shot` different ones of `total` questions, uniformly.

  Raises:
    ValueError: there are fewer questions than a prompt shows.
  """
  if total < few_shot:
    raise ValueError(f'{few_shot} examples cannot be chosen from {total} questions')
  return [
      np.random.default_rng((seed, n)).choice(total, few_shot, replace=False).tolist()
      for n in range(count)]


def writer_prompt(questions: Sequence[str], template: WriterTemplate = WRITER) -> str:
  """The text that asks for one more question."""
  examples = template.between.join(template.label + question for question in questions)
  return template.text.replace(EXAMPLES, examples)


def clean_question(response: str) -> str:
  """The question in a response: without a label before it, and without what was added to it."""
  text = re.sub(r'^\W*(?:new )?(?:problem|question)(?: \d+)?\W*:[\s*_]*', '', response.strip(),
                flags=re.IGNORECASE)
  # Base models go on: with a solution, or with one more problem.
  added = r'(?:^|\n)\s*\W*(?:(?:new )?(?:problem|question)\b[^\n]{0,8}:|solution\b|answer\b)'
  text = re.split(added, text, maxsplit=1, flags=re.IGNORECASE)[0]
  return text.strip()


def normalise(question: str) -> str:
  """What two questions have in common that differ in letter case and white space alone."""
  return ' '.join(unicodedata.normalize('NFKC', question).casefold().split())


@dataclasses.dataclass(frozen=True)
class Written:
  """A response of the writer and why it is discarded; None where it is kept."""

  question: str
  discarded: str | None


REASONS = ('cut', 'empty', 'in_test', 'in_train', 'repeated', 'unusable')


def sift(
    responses: Sequence[str], is_cut: Sequence[bool], *, train: Collection[str],
    test: Collection[str], fits: Callable[[str], bool],
) -> list[Written]:
  """The question of each response, in order, and the first reason against it, of `REASONS`.

  `is_cut` says which responses were ended by the length limit; `train` and `test` are questions
  that are known already; `fits` says whether a question can be asked at all.
  """
  known = {normalise(q): 'in_train' for q in train} | {normalise(q): 'in_test' for q in test}
  out = []
  for response, cut in zip(responses, is_cut, strict=True):
    question = clean_question(response)
    key = normalise(question)
    reason = 'cut' if cut else 'empty' if not key else known.get(key)
    if reason is None:
      known[key] = 'repeated'
      reason = None if fits(question) else 'unusable'
    out.append(Written(question, reason))
  return out


def count_reasons(written: Sequence[Written]) -> dict[str, int]:
  """How many were written and kept, and how many were discarded for each reason."""
  found = collections.Counter(w.discarded for w in written)
  return {'written': len(written), 'kept': found[None]} | {
      f'discarded/{reason}': found[reason] for reason in REASONS}
