"""Preference files: pairs of a chosen and a rejected response, or single responses with a label.

Rows of several origins are read alike:

- `prompt` (text or messages), `chosen` and `rejected` (text, or messages of which the last is the
  assistant's);
- no `prompt`: `chosen` and `rejected` are whole conversations that share all but their end;
- `conversations` with `from` and `value`, `chosen` and `rejected` one such message each;
- `question`, `responses` and which of them are right: see `vote_pairs`;
- single responses: `prompt` and `completion`, or `messages`, with a boolean `label`.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
from collections.abc import Iterable, Iterator
from typing import Any

from jaxrl.data.readers import read_exchange, read_prompt
from jaxrl.data.rows import Row, check_text, check_unique, describe, get_field, read_rows, row_id
from jaxrl.errors import InputError
from jaxrl.tokens.prompts import Message, Prompt

SENDERS = {'human': 'user', 'user': 'user', 'gpt': 'assistant', 'assistant': 'assistant',
           'system': 'system'}
RESPONSE_FIELDS = ('responses', 'code', 'response')
RIGHT_FIELDS = ('correct', 'score')


@dataclasses.dataclass(frozen=True)
class Preference:
  """Two responses to one prompt, the first preferred."""

  prompt_id: str
  prompt: Prompt
  chosen: str
  rejected: str
  where: str


@dataclasses.dataclass(frozen=True)
class Labelled:
  """One response and whether it is desirable."""

  prompt_id: str
  prompt: Prompt
  response: str
  label: bool
  where: str


def read_preferences(
    path: os.PathLike[str] | str, limit: int | None = None
) -> tuple[list[Preference], dict[str, int]]:
  """Preferences of a file in order, and counts of what was left out and why.

  Rows whose responses are the same text are left out, and problems of a vote file whose responses
  are all right or all wrong. `limit` counts rows of the file.

  Raises:
    InputError: a file, row or field that cannot be used (the first one found), or nothing left.
  """
  found: list[Preference] = []
  counts = {'rows': 0, 'identical': 0, 'one_sided': 0}
  seen: dict[str, int] = {}
  for row in itertools.islice(read_rows(path), limit):
    prompt_id = row_id(row, 'id', required=False)
    check_unique(seen, row, prompt_id, 'id')
    counts['rows'] += 1
    pairs = list(_pairs(row, prompt_id))
    counts['one_sided'] += not pairs
    for pair in pairs:
      if pair.chosen == pair.rejected:
        counts['identical'] += 1
      else:
        found.append(pair)
  if not found:
    raise InputError('the file has no preference', where=os.fspath(path),
                     expected='rows with prompt, chosen and rejected', found=counts)
  return found, counts


def _pairs(row: Row, prompt_id: str) -> Iterable[Preference]:
  fields = row.fields.keys()
  if 'chosen' not in fields and fields & set(RESPONSE_FIELDS):
    return vote_pairs(row, prompt_id)
  if 'conversations' in fields:
    prompt: Prompt = _shared_messages(row, 'conversations')
    sides = [_sent(row, side, get_field(row, side, 'a message')).content
             for side in ('chosen', 'rejected')]
  elif 'prompt' in fields:
    prompt = read_prompt(row, 'prompt')
    sides = [_response(row, side, prompt) for side in ('chosen', 'rejected')]
  else:
    prompt, sides = _implicit(row)
  _check_turn(row, prompt)
  chosen, rejected = sides
  return [Preference(prompt_id, prompt, chosen, rejected, row.where)]


def _response(row: Row, side: str, prompt: Prompt) -> str:
  """Text, or the last message of a list, which must be the assistant's after the prompt's."""
  value = get_field(row, side, 'text or messages')
  if isinstance(value, str):
    return check_text(value, row.where, f'field {side!r}')
  messages = read_prompt(row, side)
  assert not isinstance(messages, str)
  before = messages[:-1]
  asked = (Message('user', prompt),) if isinstance(prompt, str) else prompt
  if messages[-1].role != 'assistant' or before not in ((), asked):
    raise InputError(f'field {side!r} does not continue the prompt', where=row.where,
                     expected="one assistant message, or the prompt's messages and then one",
                     found=f'{len(messages)} messages, the last from {messages[-1].role}',
                     fix='Correct the row')
  return messages[-1].content


def _implicit(row: Row) -> tuple[Prompt, list[str]]:
  """The conversation that both sides share, and their last messages."""
  chosen, rejected = (read_prompt(row, side) for side in ('chosen', 'rejected'))
  if isinstance(chosen, str) or isinstance(rejected, str) or chosen[:-1] != rejected[:-1] \
      or not chosen[:-1] or chosen[-1].role != 'assistant' or rejected[-1].role != 'assistant':
    raise InputError('the row has no prompt', where=row.where,
                     expected="field 'prompt', or chosen and rejected as messages that share all "
                              'but the last, the assistant\'s',
                     found=f'fields {", ".join(row.fields)}', fix='Correct the row')
  return chosen[:-1], [chosen[-1].content, rejected[-1].content]


def _shared_messages(row: Row, field: str) -> tuple[Message, ...]:
  value = get_field(row, field, 'a list of messages')
  if not isinstance(value, list) or not value:
    raise InputError(f'field {field!r} has the wrong type', where=row.where,
                     expected='a list of messages', found=describe(value), fix='Correct the row')
  return tuple(_sent(row, field, item) for item in value)


def _sent(row: Row, field: str, item: Any) -> Message:
  """A message with `from` and `value`."""
  if not isinstance(item, dict) or item.get('from') not in SENDERS:
    raise InputError(f'field {field!r} is not a message', where=row.where,
                     expected=f"an object with 'from' ({', '.join(SENDERS)}) and 'value'",
                     found=describe(item), fix='Correct the row')
  return Message(SENDERS[item['from']], check_text(
      item.get('value'), row.where, f'the value in field {field!r}'))


def _check_turn(row: Row, prompt: Prompt) -> None:
  if not isinstance(prompt, str) and prompt[-1].role != 'user':
    raise InputError('the prompt does not end with the user', where=row.where,
                     expected='a user message last', found=prompt[-1].role, fix='Correct the row')


def vote_pairs(row: Row, prompt_id: str) -> list[Preference]:
  """Pairs of a problem with several responses: the n-th right one against the n-th wrong one.

  The row has `question` (and `system`, where there is one), the responses under `responses`,
  `code` or `response`, and as many booleans under `correct` or `score`.
  """
  text = check_text(get_field(row, 'question', 'text'), row.where, "field 'question'")
  prompt: Prompt = text
  if row.fields.get('system'):
    prompt = (Message('system', check_text(row.fields['system'], row.where, "field 'system'")),
              Message('user', text))
  responses_field = next(field for field in RESPONSE_FIELDS if field in row.fields)
  right_field = next((field for field in RIGHT_FIELDS if field in row.fields), RIGHT_FIELDS[0])
  responses = get_field(row, responses_field, 'a list of responses')
  right = get_field(row, right_field, 'a list of booleans')
  if not isinstance(responses, list) or not isinstance(right, list) \
      or len(responses) != len(right) or not all(isinstance(x, bool) for x in right):
    raise InputError('responses and their verdicts do not fit together', where=row.where,
                     expected=f'as many booleans in {right_field!r} as responses in '
                              f'{responses_field!r}',
                     found=f'{describe(responses)} and {describe(right)}', fix='Correct the row')
  texts = [check_text(x, row.where, f'a response in {responses_field!r}') for x in responses]
  winners, losers = ([t for t, good in zip(texts, right, strict=True) if good is side]
                     for side in (True, False))
  return [Preference(f'{prompt_id}/{n}', prompt, won, lost, row.where)
          for n, (won, lost) in enumerate(zip(winners, losers, strict=False))]


def read_labelled(path: os.PathLike[str] | str, limit: int | None = None) -> list[Labelled]:
  """Single responses of a file in order; a pair gives a desirable and an undesirable one.

  Raises:
    InputError: a file, row or field that cannot be used (the first one found), or no response.
  """
  found: list[Labelled] = []
  seen: dict[str, int] = {}
  for row in itertools.islice(read_rows(path), limit):
    prompt_id = row_id(row, 'id', required=False)
    check_unique(seen, row, prompt_id, 'id')
    found += _labelled(row, prompt_id)
  if not found:
    raise InputError('the file has no response', where=os.fspath(path),
                     expected='rows with prompt, completion and label')
  return found


def _labelled(row: Row, prompt_id: str) -> Iterator[Labelled]:
  if 'label' not in row.fields:
    for pair in _pairs(row, prompt_id):
      yield Labelled(f'{pair.prompt_id}/chosen', pair.prompt, pair.chosen, True, row.where)
      yield Labelled(f'{pair.prompt_id}/rejected', pair.prompt, pair.rejected, False, row.where)
    return
  label = row.fields['label']
  if not isinstance(label, bool):
    raise InputError("field 'label' has the wrong type", where=row.where,
                     expected='true or false', found=describe(label), fix='Correct the row')
  if 'completion' in row.fields:
    prompt = read_prompt(row, 'prompt')
    _check_turn(row, prompt)
    yield Labelled(prompt_id, prompt, _response(row, 'completion', prompt), label, row.where)
  else:
    prompt, response = read_exchange(row)
    yield Labelled(prompt_id, prompt, response, label, row.where)
