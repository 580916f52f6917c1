"""The tokenizer of a local Hugging Face folder, and text of responses to ids and back.

`transformers` is imported when a tokenizer is loaded, not with this module: it costs seconds.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from etils import epath

from jaxrl.errors import InputError

VOCABULARY_FILES = (
    'tokenizer.json', 'tokenizer.model', 'spiece.model', 'sentencepiece.bpe.model', 'tekken.json',
    'vocab.json', 'vocab.txt',
)
OTHER_FILES = (
    'tokenizer_config.json', 'special_tokens_map.json', 'added_tokens.json', 'merges.txt',
    'chat_template.jinja', 'chat_template.json', 'generation_config.json', 'config.json',
)
METASPACE = '\u2581'   # marks a space in sentencepiece vocabularies
PROBE = 'probe'        # a word no template treats specially
# Tags that enclose thinking. A response says them and keeps them, also where a checkpoint marks
# them as special tokens, which text otherwise never becomes and decoding leaves out.
THINKING_TAGS = ('<think>', '</think>', '[THINK]', '[/THINK]')


@dataclasses.dataclass(frozen=True)
class Tokenizer:
  """A tokenizer with the ids the rest of the code needs; ids are below `vocab_size`.

  Attributes:
    hf: the `transformers` tokenizer.
    folder: where it came from, for messages.
    vocab_size: rows of the model's embedding, at least the size of the vocabulary.
    eos_ids: ids at which sampling stops; from the tokenizer and generation_config.json.
    end_id: the id of `eos_ids` that ends an assistant's turn in the chat template.
    pad_id: any valid id, never compared with ids to make a mask.
    bos_id: None for families without one.
    prefix_ids: what the tokenizer puts before plain text: BOS, or nothing.
    newline_ids: ids of a newline, for a tokenizer that puts a space before text; else None.
    response_lead: white space the chat template writes between prompt and response.
    starts_text: a response begins as a text of its own does, with the space that sentencepiece puts
      there: the template ends prompts with a token that splits text (Phi-3).
    special_ids: special ids; text from data never becomes one.
    control_ids: `special_ids`, and added ids the chat template writes; text of prompts never
      becomes one, but a response may say `<think>`.
    control_texts: the strings of `control_ids`, longest first.
    thinking: ids of `THINKING_TAGS` that the checkpoint marks as special; not in `special_ids`.
  """

  hf: Any
  folder: str
  vocab_size: int
  eos_ids: tuple[int, ...]
  end_id: int
  pad_id: int
  bos_id: int | None
  prefix_ids: tuple[int, ...]
  newline_ids: tuple[int, ...] | None
  response_lead: str
  starts_text: bool
  special_ids: frozenset[int]
  control_ids: frozenset[int]
  control_texts: tuple[str, ...]
  thinking: dict[str, int]


def load_tokenizer(folder: os.PathLike[str] | str, *, vocab_size: int) -> Tokenizer:
  """Loads the tokenizer of a local or gs:// folder; never the hub, never code from the folder.

  Args:
    folder: holds what `AutoTokenizer` loads, or a SentencePiece tokenizer.model alone.
    vocab_size: rows of the model's embedding.

  Raises:
    InputError: no such folder or no tokenizer in it, files that do not load or need code, a
      vocabulary larger than the embedding, no end-of-sequence token.
  """
  name = os.fspath(folder)
  path = _existing_folder(name)
  with _local(path) as local:
    hf = _load(local, name)
    from_generation = _generation_eos(path, name)
  rows = max(hf.get_vocab().values(), default=-1) + 1
  if rows == 0:
    raise InputError('the tokenizer has no tokens', where=name, expected='a vocabulary',
                     found='0 tokens', fix='Copy the tokenizer files of the checkpoint again')
  if rows > vocab_size:
    raise InputError('the vocabulary is larger than the embedding of the model', where=name,
                     expected=f'at most {vocab_size} ids', found=f'{rows} ids in the tokenizer',
                     fix='Use the tokenizer that was saved with the model')
  own_eos = () if hf.eos_token_id is None else (hf.eos_token_id,)
  eos_ids = tuple(dict.fromkeys((*own_eos, *from_generation)))
  if not eos_ids:
    raise InputError('the tokenizer has no end-of-sequence token', where=name,
                     expected='eos_token in tokenizer_config.json or eos_token_id in '
                     'generation_config.json', found='neither',
                     fix='Set one of them; sampling could never stop')
  outside = [i for i in eos_ids if not 0 <= i < vocab_size]
  if outside:
    raise InputError('an end-of-sequence id is outside the embedding of the model', where=name,
                     expected=f'ids from 0 to {vocab_size - 1}', found=outside,
                     fix='Correct eos_token_id in generation_config.json')
  special_ids, control_ids, control_texts = _controls(hf, eos_ids)
  thinking = {
      token.content: i for i, token in hf.added_tokens_decoder.items()
      if token.content in THINKING_TAGS and i in special_ids}
  lead, starts_text, end_id = _probe_template(hf, eos_ids)
  return Tokenizer(
      hf=hf, folder=name, vocab_size=vocab_size, eos_ids=eos_ids, end_id=end_id,
      pad_id=eos_ids[0] if hf.pad_token_id is None else hf.pad_token_id,
      bos_id=hf.bos_token_id, prefix_ids=_prefix_ids(hf, name),
      newline_ids=_newline_ids(hf), response_lead=lead, starts_text=starts_text,
      special_ids=special_ids.difference(thinking.values()), control_ids=control_ids,
      control_texts=control_texts, thinking=thinking,
  )


def response_ids(
    tokenizer: Tokenizer, text: str, *, ends: bool, where: str | None = None
) -> list[int]:
  """Ids of a response as they follow the prompt's: no BOS, special strings as plain text.

  The text is encoded as what follows the prompt, with the white space that the chat template
  writes there, so that it begins with the token the model would have sampled.

  Args:
    ends: append `end_id`, for a response that was finished; a cut response never gains one.
    where: file and row for messages.

  Raises:
    InputError: some of the text cannot be encoded but as a control token.
  """
  parts = _split_at(tokenizer.thinking, tokenizer.response_lead + text)
  ids: list[int] = []
  for part in parts:
    if part in tokenizer.thinking:
      ids.append(tokenizer.thinking[part])
    else:
      continues = bool(ids) or not tokenizer.starts_text
      ids += encode_text(tokenizer, part, continues=continues, where=where)
  return ids + [tokenizer.end_id] if ends else ids


def decode(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
  """Text of response ids, without special tokens and as it is.

  Spaces before punctuation and at the start stay, as do tags of thinking: `response_ids` of the
  text gives the ids back wherever they are those that the tokenizer would choose.
  """
  tags = {i: tag for tag, i in tokenizer.thinking.items()}
  text, start = '', 0
  for place, i in enumerate(ids):
    if i in tags:
      text += _decode(tokenizer, ids[start:place], continues=bool(start)) + tags[i]
      start = place + 1
  text += _decode(tokenizer, ids[start:], continues=bool(start))
  return text.removeprefix(tokenizer.response_lead)


def _decode(tokenizer: Tokenizer, ids: Sequence[int], *, continues: bool) -> str:
  def plain(ids: list[int]) -> str:
    return tokenizer.hf.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

  if tokenizer.newline_ids is not None and (continues or not tokenizer.starts_text):
    # Sentencepiece takes a space from the start of a text, which this is not.
    after = plain([*tokenizer.newline_ids, *ids])
    if after.startswith('\n'):
      return after[1:]
  return plain(list(ids))


def _split_at(tags: Iterable[str], text: str) -> list[str]:
  """The text in parts, of which each tag is one of its own."""
  if not tags:
    return [text]
  return [part for part in re.split(f'({"|".join(map(re.escape, tags))})', text) if part]


def encode_text(
    tokenizer: Tokenizer, text: str, *, continues: bool = False, where: str | None = None
) -> list[int]:
  """Ids of text from data: no BOS or EOS added, no control token whatever the text says.

  Args:
    continues: the text follows other text, so sentencepiece puts no space in front.

  Raises:
    InputError: the vocabulary makes a control token of plain text (caught, not worked around).
  """
  hf = tokenizer.hf
  ids = _encode(hf, text)
  if continues and tokenizer.newline_ids is not None:
    # Only the start of a string gains a space: encode after a newline and take that off again.
    width = len(tokenizer.newline_ids)
    after = _encode(hf, '\n' + text)
    if tuple(after[:width]) == tokenizer.newline_ids:
      ids = after[width:]
  bad = tokenizer.special_ids.intersection(ids)
  if bad:
    texts = ', '.join(map(repr, hf.convert_ids_to_tokens(sorted(bad))))
    raise InputError('text would become a control token', where=where or tokenizer.folder,
                     expected='text that the tokenizer can keep apart from control tokens',
                     found=f'text encoded as {texts}',
                     fix='Remove it from the row')
  return ids


def _encode(hf: Any, text: str) -> list[int]:
  # verbose=False: a text over the tokenizer's own length is not its business to warn about.
  encoded = hf(text, add_special_tokens=False, split_special_tokens=True, verbose=False)
  return list(encoded['input_ids'])


# Loading


def _existing_folder(name: str) -> epath.Path:
  expected, fix = 'a local or gs:// folder', 'Give the folder of a checkpoint'
  try:
    path = epath.Path(name)
    exists, is_dir = path.exists(), path.is_dir()
  except (ImportError, OSError) as error:
    raise InputError('the tokenizer folder cannot be read', where=name, expected=expected,
                     found=str(error), fix=fix) from error
  if not name or not exists:
    is_hub_id = name.count('/') == 1 and not name.startswith(('.', '/', '~'))
    found = 'what looks like a hub name; nothing is downloaded' if is_hub_id else 'nothing'
    raise InputError('no such tokenizer folder', where=name or "''", expected=expected, found=found,
                     fix='Download the checkpoint and give its folder' if is_hub_id else fix)
  if not is_dir:
    raise InputError('the tokenizer path is not a folder', where=name, expected=expected,
                     found='a file', fix='Give the folder that holds it')
  if not any((path / file).exists() for file in VOCABULARY_FILES):
    raise InputError('the folder has no tokenizer', where=name,
                     expected='tokenizer.json or tokenizer.model', found='neither',
                     fix="Copy the checkpoint's tokenizer files into the folder")
  return path


@contextlib.contextmanager
def _local(path: epath.Path) -> Iterator[str]:
  """A local folder with the tokenizer's files; `transformers` cannot read gs://."""
  if '://' not in os.fspath(path):
    yield os.fspath(path)
    return
  with tempfile.TemporaryDirectory() as copy:
    for file in VOCABULARY_FILES + OTHER_FILES:
      if (path / file).exists():
        (epath.Path(copy) / file).write_bytes((path / file).read_bytes())
    yield copy


def _load(local: str, name: str) -> Any:
  # Its advice to install PyTorch is not for us: tokenizers are all we use of it.
  os.environ.setdefault('TRANSFORMERS_NO_ADVISORY_WARNINGS', '1')
  from transformers import AutoTokenizer

  from jaxrl.tokens import sentencepiece_model

  try:
    if sentencepiece_model.is_bare(local):
      return sentencepiece_model.load(local)
    return AutoTokenizer.from_pretrained(local, local_files_only=True, trust_remote_code=False)
  except Exception as error:  # the Rust side raises bare Exception for damaged files
    message = ' '.join(str(error).split())
    if 'trust_remote_code' in message:
      raise InputError('the tokenizer needs code from its folder, which is never run', where=name,
                       expected='a tokenizer of transformers itself', found="'auto_map'",
                       fix='Convert it to tokenizer.json, or choose another checkpoint') from error
    raise InputError('the tokenizer does not load', where=name,
                     expected='files that transformers can read',
                     found=f'{type(error).__name__}: {message[:200].rstrip(".")}',
                     fix='Copy the tokenizer files of the checkpoint again') from error


def _generation_eos(path: epath.Path, name: str) -> tuple[int, ...]:
  """End-of-sequence ids of generation_config.json: an integer, a list, or none."""
  file = path / 'generation_config.json'
  if not file.exists():
    return ()
  where = f'{name}/generation_config.json'
  try:
    config = json.loads(file.read_text())
  except (ValueError, OSError) as error:
    raise InputError('the file is not JSON', where=where, expected='one JSON object',
                     found=str(error), fix='Copy the file again') from error
  value = config.get('eos_token_id') if isinstance(config, dict) else config
  ids = [] if value is None else value if isinstance(value, list) else [value]
  if any(isinstance(i, bool) or not isinstance(i, int) for i in ids):
    raise InputError("field 'eos_token_id' has the wrong type", where=where,
                     expected='an id or a list of ids', found=repr(value)[:60],
                     fix='Correct the field')
  return tuple(ids)


def _prefix_ids(hf: Any, name: str) -> tuple[int, ...]:
  """What the tokenizer writes before text; what it writes after (EOS) has no place in a prompt."""
  plain, whole = _encode(hf, PROBE), list(hf(PROBE)['input_ids'])
  starts = [i for i in range(len(whole) - len(plain) + 1) if whole[i:i + len(plain)] == plain]
  prefix = tuple(whole[:starts[0]]) if starts else ()
  if len(prefix) > 1 and set(prefix) == {hf.bos_token_id}:
    raise InputError('the tokenizer writes BOS more than once', where=name, expected='one BOS',
                     found=f'{len(prefix)}', fix='Correct post_processor in tokenizer.json')
  return prefix


def _newline_ids(hf: Any) -> tuple[int, ...] | None:
  first = hf.convert_ids_to_tokens(_encode(hf, PROBE)[:1])
  newline = _encode(hf, '\n')
  if not first or not first[0].startswith(METASPACE) or hf.unk_token_id in newline:
    return None
  return tuple(newline)


def _controls(
    hf: Any, eos_ids: tuple[int, ...]
) -> tuple[frozenset[int], frozenset[int], tuple[str, ...]]:
  """Special ids; those and added ids that the template writes; the strings of the latter."""
  templates = hf.chat_template if isinstance(hf.chat_template, dict) else {'': hf.chat_template}
  written = '\0'.join(text for text in templates.values() if text)
  added = hf.added_tokens_decoder
  special = {i for i, token in added.items() if token.special}.union(hf.all_special_ids, eos_ids)
  if hf.unk_token_id not in {*eos_ids, hf.bos_token_id}:
    special.discard(hf.unk_token_id)  # a character outside the vocabulary is no control token
  # White space that is an added token (Gemma's newlines) is ordinary text in templates.
  control = special.union(
      i for i, token in added.items() if token.content in written and not token.content.isspace()
  ) - ({hf.unk_token_id} - special)
  texts = {text for text in hf.convert_ids_to_tokens(sorted(control)) if text}
  ordered = sorted(texts, key=lambda text: (-len(text), text))
  return frozenset(special), frozenset(control), tuple(ordered)


def _probe_template(hf: Any, eos_ids: tuple[int, ...]) -> tuple[str, bool, int]:
  """`response_lead`, `starts_text` and `end_id`, from a rendered turn.

  Gemma ends turns with another id than its `eos_token`; Llama 2 writes a space before responses.
  """
  unknown = '', False, eos_ids[0]
  if not hf.chat_template:
    return unknown
  turn = [{'role': 'user', 'content': PROBE}]
  answered = [*turn, {'role': 'assistant', 'content': PROBE}]
  try:
    asked = hf.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
    whole = hf.apply_chat_template(answered, tokenize=False)
  except Exception:  # a template is a program: it may serve prompts only, or fail in any way
    return unknown   # a bad one is named with the first prompt
  tail_ids = hf(whole.rpartition(PROBE)[2], add_special_tokens=False)['input_ids']
  end_id = next((i for i in tail_ids if i in eos_ids), eos_ids[0])
  # Templates that open `<think>` for the model, or drop it from earlier turns, write another text
  # when they ask than they keep: the response begins where asking ended.
  if not whole.startswith(asked):
    return '', False, end_id
  lead = whole[len(asked):].partition(PROBE)[0]
  lead = lead if lead.isspace() else ''
  asked_ids, whole_ids = (
      hf(text, add_special_tokens=False)['input_ids'] for text in (asked, whole))
  alone = _encode(hf, lead + PROBE)
  follows = whole_ids[len(asked_ids):len(asked_ids) + len(alone)]
  return lead, whole_ids[:len(asked_ids)] == asked_ids and follows == alone, end_id
