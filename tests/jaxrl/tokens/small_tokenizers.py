"""Small tokenizers of each family, trained in a moment and written as Hugging Face folders."""

import json

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

TEXTS = ['How many apples has Ana? Final answer: 12', 'What is 3 + 4? The answer is 7 .',
         'You are a helper. Be brief.', 'user assistant system probe Answer'] * 20
SPLIT = (   # of Llama 3
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
SPECIAL = ['<pad>', '<s>', '</s>', '<|im_start|>', '<|im_end|>']

CHATML = (
    '{{ bos_token }}{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n'
    '{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}')
# Mistral and Llama 2: no system role, a space before the response, EOS after it.
INST = (
    '{{ bos_token }}{% for m in messages %}{% if m.role == "system" %}'
    '{{ raise_exception("System role not supported") }}{% elif m.role == "user" %}'
    '[INST] {{ m.content | trim }} [/INST]{% else %} {{ m.content | trim }}{{ eos_token }}'
    '{% endif %}{% endfor %}')
TEMPLATES = {'chatml': CHATML, 'inst': INST, 'none': None}


def byte_level():
  tokenizer = Tokenizer(models.BPE())
  tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  tokenizer.decoder = decoders.ByteLevel()
  tokenizer.train_from_iterator(TEXTS, trainers.BpeTrainer(
      vocab_size=400, special_tokens=SPECIAL, show_progress=False,
      initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
  return tokenizer


def metaspace_bpe():
  """As Llama 2: a space in front of text, bytes for what the vocabulary lacks."""
  tokenizer = Tokenizer(models.BPE(unk_token='<unk>', byte_fallback=True, fuse_unk=True))
  tokenizer.normalizer = normalizers.Sequence([
      normalizers.Prepend('\u2581'), normalizers.Replace(' ', '\u2581')])
  tokenizer.decoder = decoders.Sequence([
      decoders.Replace('\u2581', ' '), decoders.ByteFallback(), decoders.Fuse(),
      decoders.Strip(' ', 1, 0)])
  tokenizer.train_from_iterator(TEXTS, trainers.BpeTrainer(
      vocab_size=420, show_progress=False,
      special_tokens=['<unk>', *SPECIAL, *(f'<0x{i:02X}>' for i in range(256))]))
  data = json.loads(tokenizer.to_str())
  byte_tokens = {f'<0x{i:02X}>' for i in range(256)}   # trained as special, yet part of the model
  data['added_tokens'] = [t for t in data['added_tokens'] if t['content'] not in byte_tokens]
  return Tokenizer.from_str(json.dumps(data))


def unigram():
  """As T5 and XLM-R: NFKC, and a vocabulary that has the special strings as pieces."""
  tokenizer = Tokenizer(models.Unigram())
  tokenizer.normalizer = normalizers.NFKC()
  tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
  tokenizer.decoder = decoders.Metaspace()
  tokenizer.train_from_iterator(
      [*TEXTS, '<|[]/{}'], trainers.UnigramTrainer(
          vocab_size=200, show_progress=False, unk_token='<unk>',
          special_tokens=['<unk>', *SPECIAL]))
  return tokenizer


def split_bytes():
  """As Llama 3 and Qwen: a pattern splits text, digits in threes, then bytes are merged."""
  tokenizer = Tokenizer(models.BPE(ignore_merges=True))
  tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
      pre_tokenizers.Split(Regex(SPLIT), 'isolated'),
      pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
  tokenizer.decoder = decoders.ByteLevel()
  tokenizer.train_from_iterator(TEXTS, trainers.BpeTrainer(
      vocab_size=400, special_tokens=SPECIAL, show_progress=False,
      initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
  return tokenizer


def replaced_bpe():
  """As Gemma: spaces are replaced, none is put in front; bytes for what the vocabulary lacks."""
  tokenizer = metaspace_bpe()
  tokenizer.normalizer = normalizers.Replace(' ', '\u2581')
  tokenizer.decoder = decoders.Sequence([
      decoders.Replace('\u2581', ' '), decoders.ByteFallback(), decoders.Fuse()])
  return tokenizer


def unigram_bytes():
  """As SentencePiece's Unigram with byte fallback: a space in front, nothing is normalised."""
  trained = Tokenizer(models.Unigram())
  trained.pre_tokenizer = pre_tokenizers.Metaspace()
  trained.train_from_iterator(TEXTS, trainers.UnigramTrainer(
      vocab_size=200, show_progress=False, unk_token='<unk>', special_tokens=['<unk>']))
  pieces = json.loads(trained.to_str())['model']['vocab']
  bytes_ = [(f'<0x{i:02X}>', -20.0) for i in range(256)]
  tokenizer = Tokenizer(models.Unigram(
      [*map(tuple, pieces), *bytes_], unk_id=0, byte_fallback=True))
  tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme='first')
  tokenizer.decoder = decoders.Sequence([
      decoders.Replace('\u2581', ' '), decoders.ByteFallback(), decoders.Fuse(),
      decoders.Strip(' ', 1, 0)])
  tokenizer.add_special_tokens(SPECIAL)
  return tokenizer


FAMILIES = {
    'byte_level': byte_level, 'metaspace_bpe': metaspace_bpe, 'unigram': unigram,
    'split_bytes': split_bytes, 'replaced_bpe': replaced_bpe, 'unigram_bytes': unigram_bytes}


def write(folder, family='byte_level', template='chatml', *, adds_bos=True, adds_eos=False,
          added=(), generation=None, **config):
  """Writes a folder; returns it. `config` goes into tokenizer_config.json (None removes a key)."""
  tokenizer = FAMILIES[family]()
  for token in added:
    tokenizer.add_tokens([token if isinstance(token, AddedToken) else AddedToken(token)])
  if adds_bos or adds_eos:
    single = ['<s>'] * adds_bos + ['$A'] + ['</s>'] * adds_eos
    tokenizer.post_processor = processors.TemplateProcessing(
        single=' '.join(single),
        special_tokens=[(t, tokenizer.token_to_id(t)) for t in ('<s>', '</s>')])
  folder.mkdir(parents=True, exist_ok=True)
  tokenizer.save(str(folder / 'tokenizer.json'))
  fields = {'tokenizer_class': 'PreTrainedTokenizerFast', 'pad_token': '<pad>', 'bos_token': '<s>',
            'eos_token': '<|im_end|>' if template == 'chatml' else '</s>',
            'unk_token': None if family in ('byte_level', 'split_bytes') else '<unk>',
            'chat_template': TEMPLATES.get(template, template), **config}
  fields = {key: value for key, value in fields.items() if value is not None}
  (folder / 'tokenizer_config.json').write_text(json.dumps(fields))
  if generation is not None:
    (folder / 'generation_config.json').write_text(json.dumps(generation))
  return folder
