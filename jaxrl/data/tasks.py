"""Tasks: where question and gold answer stand in a row, and the prompt that is asked.

`gsm8k`, `arc` and `math` ask as in Pang et al. 2024 (iterative reasoning preference optimization):
zero-shot for the first two, four fixed worked examples for `math`. `zebralogic` asks for a table
in JSON after one worked example (`grid_rows.py`). `world` is the embedded world.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable
from typing import Any, Literal

from jaxrl.data.grid_rows import grid_template, read_grid
from jaxrl.data.rows import Row, check_text, describe, get_field
from jaxrl.errors import InputError

MARKER = 'Final answer:'
QUESTION = '{question}'
LETTERS = 'ABCDE'
UNSET = object()   # a field that is absent, unlike one that is null
DIGIT_LETTERS = dict(zip('12345', LETTERS, strict=True))

GSM8K_TEMPLATE = f"""Your task is to answer the question below. Give step by step reasoning before \
you answer, and when you're ready to answer, please use the format "{MARKER} ..."

Question: {QUESTION}

Solution:"""

ARC_TEMPLATE = f"""Your task is to answer the question below. Give step by step reasoning before \
you answer, and when you're ready to answer, conclude using the format \
"{MARKER} (insert letter here)"

Question: {QUESTION}

Solution:"""

MATH_TEMPLATE = rf"""Your task is to answer the last question below. Give step by step reasoning \
before you answer, and when you're ready to answer, please wrap your answer in \boxed, and \
conclude using the format "{MARKER} ..."

Question: The sum of two numbers is $31$ and their difference is $9$. What is the larger number?

Solution: Let the numbers be $x > y$, so $x + y = 31$ and $x - y = 9$. Adding the equations gives \
$2x = 40$, so $x = 20$. The larger number is $\boxed{{20}}$.
{MARKER} $20$

Question: Two fair six-sided dice are rolled. What is the probability that the product of the two \
numbers shown is odd? Express your answer as a common fraction.

Solution: The product is odd exactly when both numbers are odd. Each die shows an odd number with \
probability $\frac{{3}}{{6}} = \frac{{1}}{{2}}$, and the dice are independent, so the probability \
is $\frac{{1}}{{2}} \cdot \frac{{1}}{{2}} = \boxed{{\frac{{1}}{{4}}}}$.
{MARKER} $\frac{{1}}{{4}}$

Question: A right triangle has legs of length $2$ and $6$. What is the length of its hypotenuse? \
Express your answer in simplest radical form.

Solution: By the Pythagorean theorem the hypotenuse is $\sqrt{{2^2 + 6^2}} = \sqrt{{40}}$. Since \
$40 = 4 \cdot 10$, this is $\boxed{{2\sqrt{{10}}}}$.
{MARKER} $2\sqrt{{10}}$

Question: What is the remainder when $7^{{50}}$ is divided by $10$?

Solution: The last digits of the powers of $7$ repeat with period four: $7, 9, 3, 1$. Since \
$50 = 4 \cdot 12 + 2$, the last digit of $7^{{50}}$ is that of $7^2$, which is $9$. The remainder \
is $\boxed{{9}}$.
{MARKER} $9$

Question: {QUESTION}

Solution:""".replace('\\\n', '')   # a raw string keeps the marks of continued lines


@dataclasses.dataclass(frozen=True)
class Task:
  """How rows of one data set become a prompt and a gold answer.

  `gold` takes the answer field to the gold answer, where that is no table; `gold_solution` takes it
  to a worked solution in the style that the prompt asks for, or is None where the data has none.
  `choices_field` names the options of multiple choice, which become part of the question. Of kind
  `grid` the answer field holds a table: its cells are the labels, and the form to fill in becomes
  part of the question.
  `marker` is None where no line is marked. `id_required` is set when the user names the id field;
  else rows without it get the file's stem and their row number.
  """

  name: str
  prompt_field: str
  answer_field: str
  template: str
  answer_kind: Literal['number', 'math', 'choice', 'grid']
  gold: Callable[[Any, str], str]
  gold_solution: Callable[[Any], str | None] | None = None
  choices_field: str | None = None
  marker: str | None = MARKER
  id_field: str = 'id'
  id_required: bool = False


# Gold answers


def plain_gold(value: Any, where: str) -> str:
  """A bare answer: text, or a JSON number."""
  if isinstance(value, int | float) and not isinstance(value, bool):
    if not math.isfinite(value):  # Parquet can hold NaN
      raise InputError('the gold answer is not a finite number', where=where,
                       expected='a finite number', found=describe(value),
                       fix='Correct or remove the row')
    return str(value)
  return check_text(value, where, 'the gold answer').strip()


def gsm8k_gold(value: Any, where: str) -> str:
  """What follows the last `####` of a worked solution; a bare number is taken as it is."""
  text = plain_gold(value, where)
  _, mark, after = text.rpartition('####')
  answer = after.strip()
  if (mark and not answer) or not re.search(r'\d', answer):
    raise InputError('the gold answer has no number', where=where,
                     expected="a solution that ends in a line '#### N', or a bare number",
                     found=f'{text[-40:]!r}', fix='Correct the row or name another answer field')
  if not mark and not re.fullmatch(r'[-+$]*[\d,.]+%?', answer):
    raise InputError("the gold solution has no '####' line", where=where,
                     expected="a solution that ends in a line '#### N', or a bare number",
                     found=f'{text[-40:]!r}', fix='Correct the row or name another answer field')
  return answer


def gsm8k_solution(value: Any) -> str | None:
  """The worked solution in the style of the prompt; None where the answer is a bare number.

  Calculator marks `<<48/2=24>>` go and `#### N` becomes `Final answer: N`; the likelihood term of
  the loss would else teach a second way to give the answer.
  """
  before, mark, after = str(value).rpartition('####')
  steps = re.sub(r'<<[^<>]*>>', '', before).strip()
  return f'{steps}\n{MARKER} {after.strip()}' if mark and steps else None


def choice_gold(value: Any, where: str) -> str:
  """The letter of the right option; some files number the options 1 to 5."""
  return _letter(value, where, 'the gold answer')


def _letter(value: Any, where: str, what: str) -> str:
  label = str(value).strip() if isinstance(value, str | int) else ''
  letter = DIGIT_LETTERS.get(label, label)
  if len(letter) != 1 or letter not in LETTERS:
    raise InputError(f'{what} is not a label', where=where,
                     expected='a letter A to E or a digit 1 to 5', found=describe(value),
                     fix='Correct the row')
  return letter


def read_choices(row: Row, field: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
  """Labels (letters) and texts of the options from {'label': [...], 'text': [...]}."""
  expected = "an object {'label': [...], 'text': [...]} with 2 to 5 options"
  value = get_field(row, field, expected)

  def bad(what: str, found: str) -> InputError:
    return InputError(f'field {field!r} {what}', where=row.where, expected=expected, found=found,
                      fix='Correct the row')

  if not isinstance(value, dict):
    raise bad('has the wrong type', describe(value))
  labels, texts = value.get('label'), value.get('text')
  if not isinstance(labels, list) or not isinstance(texts, list):
    raise bad("needs the lists 'label' and 'text'", describe(value))
  if len(labels) != len(texts) or not 2 <= len(labels) <= len(LETTERS):
    raise bad('has the wrong number of options', f'{len(labels)} labels and {len(texts)} texts')
  letters = tuple(_letter(label, row.where, f'a label of field {field!r}') for label in labels)
  if len(set(letters)) != len(letters):
    raise bad('repeats a label', describe(labels))
  return letters, tuple(
      check_text(text, row.where, f'option ({letter}) of field {field!r}').strip()
      for letter, text in zip(letters, texts, strict=True)
  )


def read_answer(
    row: Row, task: Task, *, keep_missing: bool = False, keep_unreadable: bool = False
) -> tuple[str, str | None, tuple[str, ...] | None, str]:
  """Gold answer, gold solution or None, labels or None, and the options as lines ('' if none).

  Of a grid the labels are its cells, and the lines the form of the answer.

  With `keep_missing` a null or empty gold answer is '', which no checker can parse; with
  `keep_unreadable` an absent or malformed one is as well.
  """
  if task.answer_kind == 'grid':
    gold, cells, form = read_grid(
        row, task.answer_field, keep_blank=keep_missing or keep_unreadable)
    return gold, None, cells, form
  where = f'{row.where}, field {task.answer_field!r}'
  value = row.fields.get(task.answer_field, UNSET)
  is_missing = value is None or (isinstance(value, str) and not value.strip())
  if keep_missing and is_missing:
    gold, solution = '', None
  else:
    try:
      value = get_field(row, task.answer_field, f'a gold answer of kind {task.answer_kind}')
      gold = task.gold(value, where)
      solution = task.gold_solution(value) if task.gold_solution else None
    except InputError:
      if not keep_unreadable:
        raise
      gold, solution = '', None
  if task.choices_field is None:
    return gold, solution, None, ''
  labels, texts = read_choices(row, task.choices_field)
  if gold and gold not in labels:
    if not keep_unreadable:
      raise InputError('the gold answer is not one of the options', where=where,
                       expected=f'one of {", ".join(labels)}', found=describe(value),
                       fix='Correct the row')
    gold = ''
  options = ''.join(f'\n({label}) {text}' for label, text in zip(labels, texts, strict=True))
  return gold, solution, labels, options


def ask(task: Task, question: str) -> str:
  """The prompt text: the template with the question in place of `{question}`."""
  return task.template.replace(QUESTION, question)  # not str.format: LaTeX is full of braces


TASKS: dict[str, Task] = {
    'gsm8k': Task('gsm8k', 'question', 'answer', GSM8K_TEMPLATE, 'number', gsm8k_gold,
                  gold_solution=gsm8k_solution),
    'math': Task('math', 'problem', 'answer', MATH_TEMPLATE, 'math', plain_gold),
    'arc': Task('arc', 'question', 'answerKey', ARC_TEMPLATE, 'choice', choice_gold,
                choices_field='choices'),
    'world': Task('world', 'question', 'answer', QUESTION, 'number', plain_gold),
    'zebralogic': Task('zebralogic', 'puzzle', 'solution', grid_template(QUESTION), 'grid',
                       plain_gold, marker=None),
}


def get_task(
    name: str,
    *,
    prompt_field: str | None = None,
    answer_field: str | None = None,
    id_field: str | None = None,
    template: str | None = None,
) -> Task:
  """The named task with what the user gave in place of its own fields and template.

  Raises:
    InputError: unknown task, empty field name, or a template without `{question}`.
  """
  if name not in TASKS:
    raise InputError(f'unknown task {name!r}', where='--task',
                     expected=f'one of {", ".join(TASKS)}',
                     found=repr(name), fix='Choose one of these')
  given = {'prompt_field': prompt_field, 'answer_field': answer_field, 'id_field': id_field}
  for flag, field in given.items():
    if field is not None and not field.strip():
      raise InputError('the field name is empty', where=f'--{flag}', expected='the name of a field',
                       found=repr(field), fix='Name a field or leave the flag out')
  if template is not None and QUESTION not in template:
    raise InputError('the prompt template has no place for the question', where='--template',
                     expected=f'text that contains {QUESTION}', found=repr(template[:60]),
                     fix=f'Write {QUESTION} where the question goes')
  changes: dict[str, Any] = {flag: field for flag, field in given.items() if field is not None}
  if template is not None:
    changes['template'] = template
  return dataclasses.replace(TASKS[name], **changes, id_required=id_field is not None)
