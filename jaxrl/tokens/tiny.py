"""Trains a small tokenizer for a model made from scratch and writes it as a Hugging Face folder."""

from __future__ import annotations

import json
from collections.abc import Iterable

from etils import epath
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

SPECIAL = ('<pad>', '<bos>', '<eos>', '<|user|>', '<|assistant|>')
CHAT_TEMPLATE = (
    '{{ bos_token }}{% for message in messages %}'
    '{{ "<|" + message["role"] + "|>" + message["content"] }}'
    '{% if message["role"] == "assistant" %}{{ eos_token }}{% endif %}{% endfor %}'
    '{% if add_generation_prompt %}{{ "<|assistant|>" }}{% endif %}')


def write_tokenizer(folder: epath.Path, texts: Iterable[str], *, vocab_size: int = 384) -> int:
  """Byte-level BPE with single digits, so any text can be encoded; returns the vocabulary size."""
  tokenizer = Tokenizer(models.BPE())
  tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
      pre_tokenizers.Digits(individual_digits=True),
      pre_tokenizers.ByteLevel(add_prefix_space=False)])
  tokenizer.decoder = decoders.ByteLevel()
  tokenizer.train_from_iterator(texts, trainers.BpeTrainer(
      vocab_size=vocab_size, special_tokens=list(SPECIAL), show_progress=False,
      initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
  folder.mkdir(parents=True, exist_ok=True)
  (folder / 'tokenizer.json').write_text(tokenizer.to_str(pretty=True))
  (folder / 'tokenizer_config.json').write_text(json.dumps({
      'tokenizer_class': 'PreTrainedTokenizerFast',
      'pad_token': '<pad>', 'bos_token': '<bos>', 'eos_token': '<eos>',
      'clean_up_tokenization_spaces': False,
      'model_input_names': ['input_ids', 'attention_mask'],
      'chat_template': CHAT_TEMPLATE}, indent=2))
  return tokenizer.get_vocab_size()
