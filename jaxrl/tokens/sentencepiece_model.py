"""A folder whose tokenizer is a SentencePiece `tokenizer.model` and nothing else.

`AutoTokenizer` converts such a file and loses what it says about text: the space in front
(`add_dummy_prefix`), symbols the user defined, the order of merges. Here the `sentencepiece`
library itself encodes and decodes, so pieces are its own. Imported only when a tokenizer is loaded,
because it imports `transformers`.
"""

from __future__ import annotations

import json
import os
from typing import Any

import sentencepiece
from sentencepiece import sentencepiece_model_pb2
from transformers import AddedToken
from transformers.tokenization_utils_sentencepiece import SentencePieceBackend

MODEL = 'tokenizer.model'
CONFIG = 'tokenizer_config.json'


def is_bare(folder: str) -> bool:
  """Whether the local folder has a SentencePiece model and nothing that says more about it.

  A tokenizer.json, or a class named in tokenizer_config.json, is for `AutoTokenizer`; so is a
  tokenizer.model that is not SentencePiece's (tiktoken's has the same name).
  """
  path = os.path.join(folder, MODEL)
  if not os.path.isfile(path) or os.path.exists(os.path.join(folder, 'tokenizer.json')):
    return False
  config = os.path.join(folder, CONFIG)
  if os.path.exists(config):
    with open(config, 'rb') as file:
      if json.load(file).get('tokenizer_class') is not None:
        return False
  try:
    sentencepiece.SentencePieceProcessor(model_file=path)
  except RuntimeError:
    return False
  return True


class SentencePieceTokenizer(SentencePieceBackend):
  """The interface of `transformers` over `sentencepiece`.

  BOS comes first where the model has one, as the families that ship such files were trained;
  `add_bos_token` in a tokenizer_config.json says otherwise. chat_template.jinja is read as usual.
  """

  def __init__(self, **options: Any):
    proto = sentencepiece_model_pb2.ModelProto()   # type: ignore[attr-defined]
    with open(options['vocab_file'], 'rb') as file:
      proto.ParseFromString(file.read())
    pieces, trainer = proto.pieces, proto.trainer_spec
    for name in ('unk', 'bos', 'eos', 'pad'):
      index = getattr(trainer, f'{name}_id')
      if 0 <= index < len(pieces):
        options.setdefault(f'{name}_token', pieces[index].piece)
    self.add_bos_token = options.setdefault('add_bos_token', True)
    options['legacy'] = True   # sentencepiece itself adds the space in front, not code around it
    options.setdefault('clean_up_tokenization_spaces', False)
    super().__init__(**options)
    # Known as added tokens, so that what a template writes is told from what a prompt says.
    self.add_tokens([
        AddedToken(piece.piece, special=piece.type == piece.CONTROL, normalized=False)
        for piece in pieces if piece.type in (piece.CONTROL, piece.USER_DEFINED)])

  def _update_trie(self, unique_no_split_tokens=None):
    """Text is split at control pieces alone: sentencepiece finds user-defined ones itself, and a
    part of a text that it is given on its own would gain a space in front."""
    for token in self.all_special_tokens:
      self.tokens_trie.add(token)

  def build_inputs_with_special_tokens(self, token_ids_0, token_ids_1=None):
    start = [] if self.bos_token_id is None or not self.add_bos_token else [self.bos_token_id]
    return start + token_ids_0 + (token_ids_1 or [])

  def _convert_id_to_token(self, index):
    """'' for ids of an embedding that is larger than the vocabulary."""
    return self.sp_model.id_to_piece(index) if index < self.sp_model.get_piece_size() else ''

  def convert_tokens_to_string(self, tokens):
    """As sentencepiece decodes: bytes become characters, the space in front goes."""
    return self.sp_model.decode_pieces([token for token in tokens if token])


def load(folder: str) -> SentencePieceTokenizer:
  return SentencePieceTokenizer.from_pretrained(folder, local_files_only=True)
