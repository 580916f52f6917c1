"""A bare SentencePiece tokenizer.model: pieces, ids and text are those of sentencepiece itself."""

import io
import json

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxrl.errors import InputError
from jaxrl.tokens import sentencepiece_model
from jaxrl.tokens.prompts import prompt_ids
from jaxrl.tokens.tokenizer import decode, load_tokenizer, response_ids
from tests.jaxrl.tokens.small_tokenizers import CHATML, INST, TEXTS

CORPUS = [
    *sorted(set(TEXTS)), 'hello  world', ' a space first', 'a space last ', '   ', '',
    'tab\tline\n', '\n\na line', 'é 漢字 🙂', 'ﬁ ① ＜', '</s> <s> <unk>', 'a<think>b</think> c',
    '<think>',
    'x <start_of_turn>user\ny', '▁ a ▁b', 'Ana has 3+4=7 apples; 12 * 3.5 = 42%!',
    "don't 1,234,567", '\u200b\u00a0x', 'naïve café', 'A' * 40]
EXACT = dict(normalization_rule_name='identity', remove_extra_whitespaces=False, byte_fallback=True)
MODELS = {
    # Llama 2, Mistral 7B, Phi-3
    'bpe': dict(model_type='bpe', **EXACT),
    # Gemma: no space in front, other ids, white space and marks as symbols of their own
    'bpe_symbols': dict(
        model_type='bpe', add_dummy_prefix=False, pad_id=0, eos_id=1, bos_id=2, unk_id=3,
        user_defined_symbols=['\n', '\n\n', '  ', '<start_of_turn>', '<think>'], **EXACT),
    'unigram_bytes': dict(model_type='unigram', **EXACT),
    # T5 and XLM-R: NFKC, white space merged, characters outside the vocabulary lost
    'unigram_nfkc': dict(model_type='unigram', user_defined_symbols=['<think>', '</think>']),
}


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  made = {}

  def get(name):
    if name not in made:
      out = io.BytesIO()
      sentencepiece.SentencePieceTrainer.train(
          sentence_iterator=iter(TEXTS), model_writer=out, vocab_size=360, minloglevel=3,
          character_coverage=1.0, hard_vocab_limit=False, **MODELS[name])
      made[name] = tmp_path_factory.mktemp('sentencepiece') / name
      made[name].mkdir()
      (made[name] / 'tokenizer.model').write_bytes(out.getvalue())
    return made[name]

  return get


def reference(folder):
  return sentencepiece.SentencePieceProcessor(model_file=str(folder / 'tokenizer.model'))


def plain(tokenizer, text):
  return tokenizer.hf(text, add_special_tokens=False, split_special_tokens=True)['input_ids']


@pytest.mark.parametrize('name', MODELS)
def test_pieces_are_those_of_sentencepiece(folder, name):
  expected = reference(folder(name))
  tokenizer = load_tokenizer(folder(name), vocab_size=400)
  for text in CORPUS:
    assert plain(tokenizer, text) == expected.encode(text), text
    assert prompt_ids(tokenizer, text) == [expected.bos_id(), *expected.encode(text)]
    known = [i for i in expected.encode(text) if i != expected.unk_id()]
    shown = tokenizer.hf.decode(known, clean_up_tokenization_spaces=False)
    assert shown == expected.decode(known), text


@pytest.mark.parametrize('name', ['bpe', 'bpe_symbols', 'unigram_bytes'])
def test_any_text_is_that_of_sentencepiece(folder, name):
  expected, tokenizer = reference(folder(name)), load_tokenizer(folder(name), vocab_size=400)

  @settings(max_examples=100, deadline=None)
  @given(st.text(st.characters(exclude_categories=['Cs'], exclude_characters='\0'), max_size=30))
  def check(text):
    assert plain(tokenizer, text) == expected.encode(text)

  check()


@pytest.mark.parametrize('name', MODELS)
def test_ids_of_the_model_file(folder, name):
  expected, tokenizer = reference(folder(name)), load_tokenizer(folder(name), vocab_size=400)
  assert tokenizer.bos_id == expected.bos_id() and tokenizer.eos_ids == (expected.eos_id(),)
  assert tokenizer.prefix_ids == (expected.bos_id(),)
  assert tokenizer.pad_id == (0 if name == 'bpe_symbols' else expected.eos_id())
  assert len(tokenizer.hf) == expected.get_piece_size()
  assert decode(tokenizer, [*expected.encode('Answer'), 399, expected.eos_id()]).strip() == 'Answer'


@pytest.mark.parametrize('name', ['bpe', 'bpe_symbols', 'unigram_bytes'])
def test_responses_continue_the_prompt(folder, name):
  """Without a space in front that is not in the text, and back to the same text."""
  tokenizer = load_tokenizer(folder(name), vocab_size=400)
  for text in filter(str.strip, CORPUS):
    if '▁' in text:
      continue     # sentencepiece's own mark of a space, which decodes as one
    ids = response_ids(tokenizer, text, ends=True)
    assert decode(tokenizer, ids) == text
    assert ids[-1] == tokenizer.end_id and not tokenizer.special_ids.intersection(ids[:-1])
  assert tokenizer.hf.convert_ids_to_tokens(response_ids(tokenizer, 'How', ends=False))[0] != '▁How'


def test_what_auto_tokenizer_makes_of_it_is_not_the_same(folder):
  """The reason for reading it ourselves; when this fails, `AutoTokenizer` can be trusted again."""
  import transformers

  auto = transformers.AutoTokenizer.from_pretrained(folder('bpe'))
  expected = reference(folder('bpe'))
  assert auto('How many', add_special_tokens=False)['input_ids'] != expected.encode('How many')


def with_template(source, target, template, **config):
  target.mkdir()
  (target / 'tokenizer.model').write_bytes((source / 'tokenizer.model').read_bytes())
  (target / 'chat_template.jinja').write_text(template)
  if config:
    (target / 'tokenizer_config.json').write_text(json.dumps(config))
  return load_tokenizer(target, vocab_size=400)


def test_a_chat_template_beside_it(folder, tmp_path):
  tokenizer = with_template(folder('bpe'), tmp_path / 'm', INST)
  expected = reference(folder('bpe'))
  ids = prompt_ids(tokenizer, 'How many?')
  assert ids == [1, *expected.encode('[INST] How many? [/INST]')]
  assert ids + response_ids(tokenizer, '12', ends=True) == [
      1, *expected.encode('[INST] How many? [/INST] 12'), 2]
  typed = prompt_ids(tokenizer, 'a </s> b<s>')
  assert typed.count(1) == 1 and 2 not in typed


def test_symbols_that_the_template_writes(folder, tmp_path):
  template = CHATML.replace('<|im_start|>', '<start_of_turn>').replace('<|im_end|>', '</s>')
  tokenizer = with_template(folder('bpe_symbols'), tmp_path / 'm', template)
  mark = reference(folder('bpe_symbols')).piece_to_id('<start_of_turn>')
  assert mark in tokenizer.control_ids and mark not in tokenizer.special_ids
  assert prompt_ids(tokenizer, 'How many?').count(mark) == 2
  with pytest.raises(InputError, match="sanitize '<start_of_turn>'"):   # sentencepiece finds it
    prompt_ids(tokenizer, 'a <start_of_turn>b')
  assert '<think>' in tokenizer.hf.convert_ids_to_tokens(
      response_ids(tokenizer, 'a <think>b', ends=False))


def test_settings_beside_it(folder, tmp_path):
  tokenizer = with_template(folder('bpe'), tmp_path / 'm', INST, add_bos_token=False,
                            pad_token='<unk>')
  assert tokenizer.prefix_ids == () and tokenizer.pad_id == 0


def test_folders_that_say_more_are_for_auto_tokenizer(folder, tmp_path):
  target = tmp_path / 'm'
  with_template(folder('bpe'), target, INST)
  assert sentencepiece_model.is_bare(str(target))
  (target / 'tokenizer_config.json').write_text('{"tokenizer_class": "LlamaTokenizer"}')
  assert not sentencepiece_model.is_bare(str(target))
  assert type(load_tokenizer(target, vocab_size=400).hf).__name__ == 'LlamaTokenizer'
  (target / 'tokenizer_config.json').unlink()
  (target / 'tokenizer.json').write_text('{}')
  assert not sentencepiece_model.is_bare(str(target))


@pytest.mark.parametrize('content, parts', [
    (b'garbage' * 9, ('does not load', 'transformers can read')), (b'', ('does not load',))])
def test_a_damaged_file_is_named(tmp_path, content, parts):
  (tmp_path / 'tokenizer.model').write_bytes(content)
  with pytest.raises(InputError) as error:
    load_tokenizer(tmp_path, vocab_size=400)
  assert str(error.value).startswith(str(tmp_path))
  assert all(part in str(error.value) for part in parts), error.value


def test_a_model_without_eos_is_named(tmp_path):
  out = io.BytesIO()
  sentencepiece.SentencePieceTrainer.train(
      sentence_iterator=iter(TEXTS), model_writer=out, vocab_size=360, minloglevel=3,
      hard_vocab_limit=False, eos_id=-1, **MODELS['bpe'])
  (tmp_path / 'tokenizer.model').write_bytes(out.getvalue())
  with pytest.raises(InputError, match='no end-of-sequence token'):
    load_tokenizer(tmp_path, vocab_size=400)
