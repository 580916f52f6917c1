"""Checks final answers against gold: one verdict per response, never a bare number."""

from __future__ import annotations

import enum
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from jaxrl.errors import InputError
from jaxrl.rewards import math_equivalence
from jaxrl.rewards.canonical import canonical_math, canonical_number, count_numbers, is_rational
from jaxrl.rewards.extraction import (
    FINAL_ANSWER,
    boxed_content,
    choice_letter,
    extract_choice,
    extract_json_answer,
    extract_number,
    marked_math,
)
from jaxrl.rewards.grids import canonical_grid, extract_grid, grid_values

GSM8K_GOLD = '####'

Kind = Literal['number', 'math', 'choice', 'grid']
Layout = Literal['text', 'json']


class Verdict(enum.StrEnum):
  CORRECT = 'correct'
  WRONG = 'wrong'
  UNPARSEABLE_ANSWER = 'unparseable_answer'
  UNPARSEABLE_GOLD = 'unparseable_gold'
  TIMEOUT = 'timeout'


@dataclass(frozen=True)
class Check:
  """`answer` is the canonical answer of the response, None where there is none to read."""

  answer: str | None
  verdict: Verdict


@dataclass(frozen=True)
class AnswerRule:
  """How responses of one dataset state their answer and when it counts as the gold one.

  Raises InputError for values out of range and for options that have no effect on `kind`.
  """

  kind: Kind
  marker: str | None = FINAL_ANSWER   # kind='math': read only where no box can be; None: box only
  layout: Layout = 'text'             # 'json': the "answer" field of a JSON object, no marker
  fallback: Literal['last_number'] | None = None   # evaluation only; see extract_number
  strict_fractions: bool = False      # kind='math': 2/4 is not 1/2
  symbolic: bool = False              # kind='math': math-verify decides where the strings differ
  timeout: float = 5.0                # seconds of wall clock for one symbolic comparison
  workers: int = 1                    # processes for symbolic comparisons

  def __post_init__(self) -> None:
    _require(self.kind in get_args(Kind), 'kind', get_args(Kind), self.kind)
    _require(self.layout in get_args(Layout), 'layout', get_args(Layout), self.layout)
    _require(self.fallback in (None, 'last_number'), 'fallback', "'last_number'", self.fallback)
    _require(
        isinstance(self.timeout, int | float) and 0 < self.timeout < math.inf,
        'timeout', 'a positive number of seconds', self.timeout,
    )
    _require(
        isinstance(self.workers, int) and self.workers >= 1,
        'workers', 'a whole number of at least 1', self.workers,
    )
    _require(self.marker is None or self.marker.strip(), 'marker', 'some text', self.marker)
    if self.layout == 'json':
      _require(self.kind in ('number', 'math'), 'layout', f"'text' with kind={self.kind!r}",
               self.layout)
      _require(self.marker is None, 'marker', "None with layout='json'", self.marker)
    elif self.kind == 'grid':
      _require(self.marker is None, 'marker', "None with kind='grid'", self.marker)
    elif self.kind != 'math':
      _require(self.marker is not None, 'marker', f'some text with kind={self.kind!r}', None)
    if self.kind != 'number' or self.layout == 'json':
      _require(self.fallback is None, 'fallback', "None, except for numbers in text", self.fallback)
    if self.kind != 'math':
      for field in ('symbolic', 'strict_fractions'):
        _require(not getattr(self, field), field, "False, except with kind='math'", True)
    # The symbolic check holds 2/4 equal to 1/2, which is what strict_fractions rules out.
    _require(
        not (self.symbolic and self.strict_fractions),
        'strict_fractions', 'False with symbolic=True', True,
    )


def _require(holds: object, field: str, expected: object, found: object) -> None:
  if not holds:
    raise InputError(
        f'{field} cannot be used', where='AnswerRule', expected=expected, found=repr(found)
    )


def canonical_gold(rule: AnswerRule, gold_text: str) -> str | None:
  r"""Canonical gold answer, or None when it cannot be read.

  number: the line after '####' or after the rule's marker, else a bare answer holding exactly one
  number ('$1,234', '3/4 cups', '12 + 6 = 18'). math: the last box of a solution, else bare LaTeX.
  choice: a letter or digit, alone or in parentheses. grid: JSON rows of values.
  """
  if rule.kind == 'number':
    for marker in (GSM8K_GOLD, rule.marker):
      if marker and marker.lower() in gold_text.lower():
        return extract_number(gold_text, marker)
    return canonical_number(gold_text) if count_numbers(gold_text) == 1 else None
  if rule.kind == 'math':
    latex = _gold_latex(gold_text)
    return None if latex is None else canonical_math(latex, rule.strict_fractions)
  if rule.kind == 'grid':
    return canonical_grid(gold_text)
  label = choice_letter(gold_text.strip().strip('().:'))
  return label if label in ('A', 'B', 'C', 'D', 'E') else None


def extract_answer(
    rule: AnswerRule, response: str, labels: Sequence[str] | None = None
) -> str | None:
  """Canonical answer of one response, or None.

  `labels` are the options of a choice item or the cells of a grid ('House 1/Name').

  Raises:
    InputError: a grid without its cells.
  """
  if rule.kind == 'grid':
    if labels is None:
      raise InputError('a table cannot be read without the names of its cells',
                       where='extract_answer', expected='labels', found='none')
    return extract_grid(response, labels)
  if rule.kind == 'math':
    latex = _response_latex(rule, response)
    return None if latex is None else canonical_math(latex, rule.strict_fractions)
  if rule.layout == 'json':
    raw = extract_json_answer(response)
    return None if raw is None else canonical_number(raw)
  assert rule.marker is not None   # held by AnswerRule
  if rule.kind == 'choice':
    return extract_choice(response, labels, rule.marker)
  return extract_number(response, rule.marker, rule.fallback)


def check_answers(
    rule: AnswerRule,
    responses: Sequence[str],
    golds: Sequence[str | None],
    labels: Sequence[Sequence[str]] | None = None,
) -> list[Check]:
  """One Check per response against the gold text of the same position; any text is accepted.

  Args:
    rule: what counts as an answer.
    responses: what the model wrote.
    golds: gold texts as `canonical_gold` takes them; None is an unparseable gold.
    labels: kind='choice': the options of each response's item; None allows A to E. kind='grid':
      the cells of each response's puzzle, which are always needed.

  Raises:
    InputError: the lengths differ, a grid has no labels, or the symbolic checker is wanted and
      cannot be started.
  """
  for name, column in (('golds', golds), ('labels', labels)):
    if column is not None and len(column) != len(responses):
      raise InputError(
          f'{name} and responses differ in number', where='check_answers',
          expected=f'{len(responses)} {name}', found=len(column),
      )
  checks: list[Check] = []
  undecided: dict[int, tuple[str, str]] = {}
  for i, (response, gold_text) in enumerate(zip(responses, golds, strict=True)):
    options = None if labels is None else labels[i]
    answer = extract_answer(rule, response, options)
    gold = None if gold_text is None else canonical_gold(rule, gold_text)
    if options is not None and gold is not None and not _is_possible(rule, gold, options):
      gold = None
    if gold is None:
      verdict = Verdict.UNPARSEABLE_GOLD
    elif answer is None:
      verdict = Verdict.UNPARSEABLE_ANSWER
    elif answer == gold:
      verdict = Verdict.CORRECT
    else:
      verdict = Verdict.WRONG
      # Two different rationals are different; only other forms are worth asking about.
      if rule.symbolic and not (is_rational(answer) and is_rational(gold)):
        gold_latex, answer_latex = _gold_latex(gold_text or ''), _response_latex(rule, response)
        assert gold_latex is not None and answer_latex is not None   # both were read above
        undecided[i] = (gold_latex, answer_latex)
    checks.append(Check(answer, verdict))

  questions = list(dict.fromkeys(undecided.values()))   # the same answer is asked about once
  replies = math_equivalence.are_equivalent(questions, seconds=rule.timeout, workers=rule.workers)
  verdicts = {True: Verdict.CORRECT, False: Verdict.WRONG, None: Verdict.TIMEOUT}
  decided = dict(zip(questions, (verdicts[reply] for reply in replies), strict=True))
  for i, question in undecided.items():
    checks[i] = Check(checks[i].answer, decided[question])
  return checks


def _is_possible(rule: AnswerRule, gold: str, labels: Sequence[str]) -> bool:
  """Whether a gold answer is one that the item's labels allow."""
  if rule.kind == 'grid':
    return len(grid_values(gold)) == len(labels)
  return gold in [choice_letter(label) for label in labels]


def _gold_latex(gold_text: str) -> str | None:
  is_solution = '\\boxed' in gold_text or '\\fbox' in gold_text
  return boxed_content(gold_text) if is_solution else gold_text


def _response_latex(rule: AnswerRule, response: str) -> str | None:
  """The answer as written: in the last box, or failing that on the marker line."""
  if rule.layout == 'json':
    raw = extract_json_answer(response)
    return raw if raw is None else boxed_content(raw) or raw
  content = boxed_content(response)
  if content is None and rule.marker is not None:
    return marked_math(response, rule.marker)
  return content
