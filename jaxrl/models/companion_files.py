"""What lies beside the weights: config.json, tokenizer, chat template, generation settings."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from pathlib import Path
from typing import Any

from jaxrl.errors import InputError
from jaxrl.models.config import ModelConfig
from jaxrl.models.hugging_face_config import CONFIG, parse_config, write_config
from jaxrl.models.model_folder import existing_folder, read_object

GENERATION = 'generation_config.json'
TOKENIZER_VOCABULARIES = (
    'tokenizer.json', 'tokenizer.model', 'spiece.model', 'sentencepiece.bpe.model', 'tekken.json',
    'vocab.json', 'vocab.txt',
)
TOKENIZER_FILES = (
    *TOKENIZER_VOCABULARIES, 'tokenizer_config.json', 'special_tokens_map.json',
    'added_tokens.json', 'merges.txt', 'chat_template.jinja', 'chat_template.json',
)
TEMPLATES = 'additional_chat_templates'   # a folder of them
TOKEN_IDS = ('bos_token_id', 'eos_token_id', 'pad_token_id')


def tokenizer_folder(folder: str | os.PathLike) -> Path:
  """The folder; InputError where it has no tokenizer."""
  path = existing_folder(folder)
  if not any((path / file).is_file() for file in TOKENIZER_VOCABULARIES):
    raise InputError('the folder has no tokenizer to copy', where=path,
                     expected=' or '.join(TOKENIZER_VOCABULARIES),
                     fix='Give the folder of the model that training started from')
  return path


def copy_tokenizer(source: Path | None, folder: Path, ids: dict[str, Any]) -> None:
  """Every file of the tokenizer as it is, and the generation settings, or `ids` in their place."""
  if source is not None:
    for file in (*TOKENIZER_FILES, GENERATION):
      if (source / file).is_file():
        shutil.copyfile(source / file, folder / file)
    if (source / TEMPLATES).is_dir():
      (folder / TEMPLATES).mkdir()
      for template in sorted((source / TEMPLATES).glob('*.jinja')):
        shutil.copyfile(template, folder / TEMPLATES / template.name)
  if not (folder / GENERATION).exists():
    write_object(folder / GENERATION, ids)


def config_of(
    c: ModelConfig, source: Path | None, ids: dict[str, Any], dtype: str) -> dict[str, Any]:
  """The config.json object to write.

  Where the source's own describes this very model it stays as it is but for the type of the
  weights, so that every tool finds what it found there, fields that mean nothing here included.
  """
  path = None if source is None else source / CONFIG
  kept = read_object(path) if path is not None and path.is_file() else {}
  try:
    is_same = parse_config(kept, where=path or CONFIG) == dataclasses.replace(c, lora=None)
  except InputError:                     # none, or that of a tokenizer of any model
    is_same = False
  config = (kept if is_same else write_config(c)) | ids
  config |= {key: dtype for key in ('torch_dtype', 'dtype') if key in config}
  if 'dtype' not in config:
    config['torch_dtype'] = dtype
  config.pop('auto_map', None)           # names code, which is not copied
  return config


def token_ids(source: Path | None, c: ModelConfig) -> dict[str, Any]:
  """`bos_token_id` and its like, from the source's config.json or else from its tokenizer."""
  config = read_object(source / CONFIG) if source and (source / CONFIG).is_file() else {}
  ids = {key: config.get(key) for key in TOKEN_IDS}
  if all(value is None for value in ids.values()) and source is not None:
    settings, vocabulary = (
        read_object(source / file) if (source / file).is_file() else {}
        for file in ('tokenizer_config.json', 'tokenizer.json'))
    added = {token['content']: token['id'] for token in vocabulary.get('added_tokens') or ()}
    for key in TOKEN_IDS:
      token = settings.get(key.removesuffix('_id'))
      ids[key] = added.get(token['content'] if isinstance(token, dict) else token)
  for key, value in ids.items():
    for one in value if isinstance(value, list) else [value]:
      if one is not None and one >= c.vocab_size:
        raise InputError(
            f'{key} of the tokenizer does not fit the model', where=source,
            expected=f'an id below vocab_size {c.vocab_size}', found=one,
            fix='Give the folder of the model that training started from')
  return ids


def write_object(path: Path, value: dict[str, Any]) -> None:
  """JSON as transformers formats it."""
  path.write_text(json.dumps(value, indent=2, sort_keys=True) + '\n', encoding='utf-8')
