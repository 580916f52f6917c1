"""Problems (question and gold answer) and examples (prompt and response) from files of rows.

A file is read and checked whole before anything is compiled; the first bad row stops the run with
one InputError.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
from collections.abc import Iterable, Iterator
from typing import Any, Literal

from jaxrl.data.rows import (
  Row,
  check_text,
  check_unique,
  describe,
  get_field,
  read_rows,
  row_id,
  text_field,
)
from jaxrl.data.tasks import Task, ask, read_answer
from jaxrl.errors import InputError
from jaxrl.tokens.prompts import ROLES, Message

__all__ = ['Example', 'ExampleFields', 'Problem', 'Row', 'read_examples', 'read_exchange',
           'read_problems', 'read_prompt', 'read_rows']


@dataclasses.dataclass(frozen=True)
class Problem:
  """One question with its gold answer; `where` names file and row in messages."""

  prompt_id: str
  prompt: str | tuple[Message, ...]
  gold: str
  gold_solution: str | None
  labels: tuple[str, ...] | None
  where: str = dataclasses.field(default='', compare=False)


@dataclasses.dataclass(frozen=True)
class Example:
  """One prompt with the response to imitate; `where` names file and row in messages."""

  prompt_id: str
  prompt: str | tuple[Message, ...]
  response: str
  where: str = dataclasses.field(default='', compare=False)


@dataclasses.dataclass(frozen=True)
class ExampleFields:
  """Fields of rows for supervised training; None leaves the choice to the row.

  Without `prompt_field` a row's prompt is `prompt` or, where that is absent, `messages`. Without
  `response_field` the response is `response` or, where that is absent, the last message, which must
  be the assistant's.
  """

  prompt_field: str | None = None
  response_field: str | None = None
  id_field: str | None = None


def read_problems(
    path: os.PathLike[str] | str,
    task: Task,
    limit: int | None = None,
    *,
    missing_gold: Literal['error', 'keep', 'keep_any'] = 'error',
) -> list[Problem]:
  """All problems of a file, or the first `limit`, in file order with unique ids.

  A prompt field that holds messages stays a conversation; the task's template then goes around the
  last one, the user's.

  Args:
    missing_gold: what a null or empty gold answer is. 'keep' makes it '', which scoring counts as
      `unparseable_gold`: real files have a few, and a row that goes uncounted would be worse.
      'keep_any' does so for every answer that is absent or malformed, where gold is not needed.

  Raises:
    InputError: a file, row or field that cannot be used (the first one found).
  """
  if missing_gold not in ('error', 'keep', 'keep_any'):
    raise InputError('unknown policy for missing gold answers', where='--missing_gold',
                     expected="'error', 'keep' or 'keep_any'", found=repr(missing_gold),
                     fix='Choose one')
  problems: list[Problem] = []
  seen: dict[str, int] = {}
  for row in _first(read_rows(path), limit):
    prompt_id = row_id(row, task.id_field, required=task.id_required)
    check_unique(seen, row, prompt_id, task.id_field)
    gold, solution, labels, options = read_answer(
        row, task, keep_missing=missing_gold != 'error', keep_unreadable=missing_gold == 'keep_any'
    )
    prompt = read_prompt(row, task.prompt_field)
    if isinstance(prompt, str):
      prompt = ask(task, prompt.strip() + options)
    else:
      _ends_with_user(row, task.prompt_field, prompt)
      asked = ask(task, prompt[-1].content.strip() + options)
      prompt = (*prompt[:-1], Message('user', asked))
    problems.append(Problem(prompt_id, prompt, gold, solution, labels, row.where))
  return problems


def read_examples(
    path: os.PathLike[str] | str,
    fields: ExampleFields = ExampleFields(),
    limit: int | None = None,
) -> list[Example]:
  """All examples of a file, or the first `limit`, in file order with unique ids.

  Raises:
    InputError: a file, row or field that cannot be used (the first one found).
  """
  examples: list[Example] = []
  seen: dict[str, int] = {}
  for row in _first(read_rows(path), limit):
    id_field = fields.id_field or 'id'
    prompt_id = row_id(row, id_field, required=fields.id_field is not None)
    check_unique(seen, row, prompt_id, id_field)
    prompt, response = read_exchange(row, fields)
    examples.append(Example(prompt_id, prompt, response, row.where))
  return examples


def read_exchange(
    row: Row, fields: ExampleFields = ExampleFields()
) -> tuple[str | tuple[Message, ...], str]:
  """Prompt and response of one row; the prompt is text, or messages of which the user's is last.

  Raises:
    InputError: a field is missing, of the wrong type or empty; messages end with the assistant's
      although the row has a response as well, or with the user's although it has none.
  """
  prompt_field = fields.prompt_field or _present(row, 'prompt', 'messages')
  prompt = read_prompt(row, prompt_field)
  has_response = fields.response_field is not None or 'response' in row.fields
  if not has_response and not isinstance(prompt, str):
    prompt, response = _split_response(row, prompt_field, prompt)
  else:
    response = text_field(row, fields.response_field or 'response')
  if not isinstance(prompt, str):
    _ends_with_user(row, prompt_field, prompt)
  return prompt, response


def _first(rows: Iterator[Row], limit: int | None) -> Iterable[Row]:
  if limit is not None and (isinstance(limit, bool) or not isinstance(limit, int) or limit < 1):
    raise InputError('the limit on rows is not positive', where='--limit',
                     expected='a whole number of rows, 1 or more', found=repr(limit),
                     fix='Leave it out to read all rows')
  return itertools.islice(rows, limit)


def _present(row: Row, *fields: str) -> str:
  return next((field for field in fields if field in row.fields), fields[0])


def read_prompt(row: Row, field: str) -> str | tuple[Message, ...]:
  """Text or messages of a field; raises InputError for anything else, or an empty one."""
  value = get_field(row, field, 'text or a list of messages')
  if isinstance(value, str):
    return text_field(row, field)
  if not isinstance(value, list):
    raise InputError(f'field {field!r} has the wrong type', where=row.where,
                     expected='text or a list of messages', found=describe(value),
                     fix='Correct the row or name another field')
  if not value:
    raise InputError(f'field {field!r} is empty', where=row.where,
                     expected='at least one message', found='[]', fix='Remove the row')
  return tuple(_read_message(row, field, place, item) for place, item in enumerate(value, 1))


def _read_message(row: Row, field: str, place: int, item: Any) -> Message:
  what = f'message {place} of field {field!r}'
  if not isinstance(item, dict) or not {'role', 'content'} <= item.keys():
    raise InputError(f'{what} is not a message', where=row.where,
                     expected="an object {'role': ..., 'content': ...}", found=describe(item),
                     fix='Correct the row')
  role = item['role']
  if role not in ROLES or (role == 'system' and place > 1):
    raise InputError(f'{what} has a role that cannot stand there', where=row.where,
                     expected=f'one of {", ".join(ROLES)}, system only first', found=describe(role),
                     fix='Correct the row')
  return Message(role, check_text(item['content'], row.where, f'the content of {what}'))


def _ends_with_user(row: Row, field: str, prompt: tuple[Message, ...]) -> None:
  if prompt[-1].role != 'user':
    raise InputError(f'field {field!r} does not end with the user', where=row.where,
                     expected="a last message of role 'user'", found=describe(prompt[-1].role),
                     fix='Correct the row')


def _split_response(
    row: Row, field: str, messages: tuple[Message, ...]
) -> tuple[tuple[Message, ...], str]:
  if messages[-1].role != 'assistant' or len(messages) < 2:
    raise InputError(f'field {field!r} has no response', where=row.where,
                     expected="a user's message and then a last one of role 'assistant'",
                     found=f'{len(messages)} messages, the last of role {messages[-1].role!r}',
                     fix="Add the response, or a field 'response'")
  return messages[:-1], messages[-1].content
