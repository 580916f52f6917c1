"""Prompts to ids: chat template, BOS, and text from data that never becomes a control token."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable
from typing import Any, Literal, Protocol

from jaxrl.errors import InputError
from jaxrl.tokens.tokenizer import Tokenizer, encode_text

ROLES = ('system', 'user', 'assistant')


@dataclasses.dataclass(frozen=True)
class Message:
  role: str      # one of ROLES
  content: str


Prompt = str | tuple[Message, ...]


class HasPrompt(Protocol):
  """What `encode_prompts` needs of a problem; the data room's records have it."""

  @property
  def prompt_id(self) -> str: ...
  @property
  def prompt(self) -> Prompt: ...
  @property
  def where(self) -> str: ...


@dataclasses.dataclass(frozen=True)
class EncodedPrompt:
  """A prompt as the model is fed it: `text` for people, `ids` for everything else."""

  prompt_id: str
  text: str
  ids: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class EncodedPrompts:
  """Encoded prompts in order, and the ids of those dropped for their length."""

  prompts: tuple[EncodedPrompt, ...]
  dropped: tuple[str, ...]


def encode_prompts(
    tokenizer: Tokenizer,
    problems: Iterable[HasPrompt],
    *,
    max_prompt_length: int,
    over_length: Literal['error', 'drop'] = 'error',
    use_chat_template: bool | None = None,
) -> EncodedPrompts:
  """Encodes every prompt; one longer than `max_prompt_length` ids is an error or dropped.

  Raises:
    InputError: a prompt that cannot be encoded or, with 'error', is too long (names the row);
      nothing left; an unknown policy.
  """
  if over_length not in ('error', 'drop'):
    raise InputError('unknown policy for long prompts', where='--over_length',
                     expected="'error' or 'drop'", found=repr(over_length), fix='Choose one')
  if max_prompt_length < 1:
    raise InputError('no prompt fits', where='--max_prompt_length', expected='1 or more',
                     found=max_prompt_length, fix='Raise the limit')
  kept: list[EncodedPrompt] = []
  dropped: list[str] = []
  for problem in problems:
    where = problem.where or f'prompt {problem.prompt_id!r}'
    ids = prompt_ids(tokenizer, problem.prompt, use_chat_template=use_chat_template, where=where)
    if len(ids) <= max_prompt_length:
      text = render_prompt(tokenizer, problem.prompt, use_chat_template=use_chat_template,
                           where=where)
      kept.append(EncodedPrompt(problem.prompt_id, text, tuple(ids)))
    elif over_length == 'drop':
      dropped.append(problem.prompt_id)
    else:
      raise InputError('the prompt is too long', where=where,
                       expected=f'at most {max_prompt_length} ids (--max_prompt_length)',
                       found=f'{len(ids)} ids',
                       fix='Raise the limit, or drop such rows with --over_length=drop')
  if not kept:
    raise InputError('no prompt is left', where='--max_prompt_length',
                     expected=f'a prompt of at most {max_prompt_length} ids',
                     found=f'{len(dropped)} prompts, all longer', fix='Raise the limit')
  return EncodedPrompts(tuple(kept), tuple(dropped))


def prompt_ids(
    tokenizer: Tokenizer,
    prompt: Prompt,
    *,
    use_chat_template: bool | None = None,
    where: str | None = None,
) -> list[int]:
  """Ids of a prompt up to where the response begins.

  Text is one user message of the chat template, where the tokenizer has one; without, or with
  `use_chat_template=False`, it is encoded as it is after what the tokenizer puts first (BOS).
  Special strings inside the prompt (a typed `</s>`) are encoded as plain text.

  Args:
    use_chat_template: None uses the template if there is one.
    where: file and row for messages.

  Raises:
    InputError: no template where one is needed, a template that refuses the messages, more than
      one BOS at the start, or text that cannot be kept apart from control tokens.
  """
  where = where or tokenizer.folder
  messages = _messages(tokenizer, prompt, use_chat_template, where)
  if messages is None:
    assert isinstance(prompt, str)
    ids = [*tokenizer.prefix_ids, *encode_text(tokenizer, prompt, where=where)]
  else:
    ids = _template_ids(tokenizer, messages, where)
  bos = tokenizer.bos_id
  if bos is not None and ids[:2] == [bos, bos]:
    raise InputError('the prompt starts with BOS more than once', where=where,
                     expected='one BOS', found=f'{tokenizer.hf.bos_token!r} twice or more from the '
                     f'chat template of {tokenizer.folder}',
                     fix='Write bos_token once in chat_template')
  outside = [i for i in ids if not 0 <= i < tokenizer.vocab_size]
  if outside or not ids:
    raise InputError('the prompt has no ids the model knows', where=where,
                     expected=f'ids from 0 to {tokenizer.vocab_size - 1}',
                     found=outside[:5] or 'no ids', fix='Check tokenizer and chat template')
  return ids


def render_prompt(
    tokenizer: Tokenizer,
    prompt: Prompt,
    *,
    use_chat_template: bool | None = None,
    where: str | None = None,
) -> str:
  """The prompt as text, for people; re-encoding it need not give `prompt_ids`."""
  where = where or tokenizer.folder
  messages = _messages(tokenizer, prompt, use_chat_template, where)
  if messages is None:
    assert isinstance(prompt, str)
    return prompt
  return _apply(tokenizer, messages, where, tokenize=False)


def system_into_user(prompt: Prompt) -> Prompt:
  """The system text and a blank line in front of the first user message, in place of its own.

  For chat templates without a system role (Gemma 2, Mistral 7B), which refuse one. Never done
  unasked: a template that has the role was trained with it.
  """
  if isinstance(prompt, str) or len(prompt) < 2 or prompt[0].role != 'system':
    return prompt
  system, first, *rest = prompt
  if first.role != 'user':
    return prompt
  return (Message('user', f'{system.content}\n\n{first.content}'), *rest)


def _messages(
    tokenizer: Tokenizer, prompt: Prompt, use_chat_template: bool | None, where: str
) -> tuple[Message, ...] | None:
  """The messages to render, or None for text without a template."""
  has_template = bool(tokenizer.hf.chat_template)
  needs = not isinstance(prompt, str) or use_chat_template is True
  if needs and not has_template:
    raise InputError('the tokenizer has no chat template', where=where,
                     expected=f'chat_template in {tokenizer.folder}',
                     found='none' if isinstance(prompt, str) else 'none, for a list of messages',
                     fix='Use an instruction-tuned checkpoint, or prompts of plain text')
  if not isinstance(prompt, str):
    if use_chat_template is False:
      raise InputError('messages cannot be encoded without a chat template', where=where,
                       expected='text as prompt', found='a list of messages',
                       fix='Leave the chat template on')
    return prompt
  return (Message('user', prompt),) if has_template and use_chat_template is not False else None


def _template_ids(tokenizer: Tokenizer, messages: tuple[Message, ...], where: str) -> list[int]:
  """Ids of the rendered messages, control tokens from the template only.

  `sanitize_control_tokens` of `transformers` encodes control strings of the messages as text. Two
  things it does not promise are checked: that no other text becomes a control token (Unicode
  normalisation, a vocabulary that spells one), and that the option exists: older versions ignore
  it.
  """
  def neutral(text: str) -> str:
    return re.sub('|'.join(map(re.escape, tokenizer.control_texts)), 'x', text)

  plain = tuple(Message(m.role, neutral(m.content)) for m in messages)
  for message, original in zip(plain, messages, strict=True):
    encode_text(tokenizer, original.content, where=where)
    found = tokenizer.control_ids.intersection(
        tokenizer.hf(message.content, add_special_tokens=False, verbose=False)['input_ids']
    )
    if found:
      raise _not_guaranteed(tokenizer, found, where)
  ids = _apply(tokenizer, messages, where, tokenize=True)
  if plain != messages:
    expected = _control_counts(tokenizer, _apply(tokenizer, plain, where, tokenize=True))
    counts = _control_counts(tokenizer, ids)
    if counts != expected:
      different = {i for i in counts.keys() | expected.keys() if counts.get(i) != expected.get(i)}
      raise _not_guaranteed(tokenizer, different, where)
  return ids


def _control_counts(tokenizer: Tokenizer, ids: list[int]) -> dict[int, int]:
  return {i: ids.count(i) for i in tokenizer.control_ids.intersection(ids)}


def _not_guaranteed(tokenizer: Tokenizer, ids: Iterable[int], where: str) -> InputError:
  texts = ', '.join(map(repr, tokenizer.hf.convert_ids_to_tokens(sorted(ids))))
  return InputError('text would become a control token', where=where,
                    expected='text that the tokenizer can keep apart from control tokens',
                    found=f'text encoded as {texts}', fix='Remove it from the row')


def _apply(
    tokenizer: Tokenizer, messages: tuple[Message, ...], where: str, *, tokenize: bool
) -> Any:
  """The rendered conversation up to the assistant's turn: ids, or text for people."""
  chat = [dataclasses.asdict(message) for message in messages]
  # Only ids need marking: text keeps what was typed.
  options = {'sanitize_control_tokens': True, 'return_dict': False} if tokenize else {}
  try:
    rendered = tokenizer.hf.apply_chat_template(
        chat, tokenize=tokenize, add_generation_prompt=True, **options
    )
  except Exception as error:  # a template is a program, which can fail in any way
    roles = ', '.join(message.role for message in messages)
    reason = ' '.join(str(error).split())[:200].rstrip('.')
    raise InputError(f'the chat template of {tokenizer.folder} refuses the messages', where=where,
                     expected='roles and text that the template takes',
                     found=f'roles {roles}: {reason}',
                     fix='Put the system text into the first user message, or use another template'
                     if messages[0].role == 'system'
                     else 'Change the messages or use another template') from error
  return list(rendered) if tokenize else rendered
