"""Loading tokenizers, responses to ids and back; every bad folder is one sentence."""

import json
import subprocess
import sys

import pytest
from etils import epath
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxrl.errors import InputError
from jaxrl.tokens import tokenizer as tokenizer_module
from jaxrl.tokens.prompts import prompt_ids
from jaxrl.tokens.tokenizer import decode, load_tokenizer, response_ids
from tests.jaxrl.tokens.small_tokenizers import write

EXACT = ('byte_level', 'metaspace_bpe')   # families that can write any text
TEMPLATES = ('chatml', 'inst', 'none')


@pytest.fixture(scope='module')
def load(tmp_path_factory):
  """A loaded tokenizer per (family, template), each made once."""
  made = {}

  def get(family='byte_level', template='chatml'):
    key = (family, template)
    if key not in made:
      made[key] = load_tokenizer(write(tmp_path_factory.mktemp('t'), family, template),
                                 vocab_size=999)
    return made[key]

  return get


def tokens(tokenizer, ids):
  return tokenizer.hf.convert_ids_to_tokens(ids)


def test_ids(tmp_path):
  tokenizer = load_tokenizer(write(tmp_path, generation={'eos_token_id': [2, 4, 2]}),
                             vocab_size=999)
  assert tokenizer.eos_ids == (4, 2)   # the tokenizer's own first, each once
  assert (tokenizer.bos_id, tokenizer.pad_id, tokenizer.vocab_size) == (1, 0, 999)
  assert tokenizer.prefix_ids == (1,)


@pytest.mark.parametrize('eos', [2, [2]])
def test_eos_from_generation_config_alone(tmp_path, eos):
  folder = write(tmp_path, template='none', eos_token=None, generation={'eos_token_id': eos})
  assert load_tokenizer(folder, vocab_size=999).eos_ids == (2,)


def test_pad_falls_back_to_eos(tmp_path):
  tokenizer = load_tokenizer(write(tmp_path, pad_token=None), vocab_size=999)
  assert tokenizer.pad_id == tokenizer.eos_ids[0]


def test_turn_ends_as_the_template_says(tmp_path):
  """As Gemma: eos_token is </s>, yet a turn ends with <|im_end|>."""
  folder = write(tmp_path, eos_token='</s>', generation={'eos_token_id': [2, 4]})
  tokenizer = load_tokenizer(folder, vocab_size=999)
  assert tokenizer.eos_ids == (2, 4) and tokenizer.end_id == 4
  assert response_ids(tokenizer, 'Answer', ends=True)[-1] == 4


def test_eos_written_after_text_is_not_in_a_prompt(tmp_path):
  folder = write(tmp_path, template='none', adds_eos=True)
  tokenizer = load_tokenizer(folder, vocab_size=999)
  assert tokenizer.prefix_ids == (1,)
  assert not set(prompt_ids(tokenizer, 'How many?')) & set(tokenizer.eos_ids)


@pytest.mark.parametrize('family', EXACT)
@pytest.mark.parametrize('template', TEMPLATES)
@pytest.mark.parametrize('text', [
    'Answer', 'The answer is 7 .', 'a\n\n b  c', 'é 漢字 🙂', '</s>',
    'x <|im_end|>\n<|im_start|>user\n y',
    '<s>', 'it is , well , 5 !'])
def test_response_round_trip(load, family, template, text):
  tokenizer = load(family, template)
  ids = response_ids(tokenizer, text, ends=False)
  assert decode(tokenizer, ids) == text
  assert not set(ids) & tokenizer.special_ids
  assert response_ids(tokenizer, text, ends=True) == [*ids, tokenizer.end_id]
  assert decode(tokenizer, [*ids, tokenizer.end_id, tokenizer.pad_id]) == text


@settings(max_examples=60, deadline=None)
@given(text=st.text(min_size=1, max_size=30))
def test_any_text_round_trips(load, text):
  tokenizer = load('byte_level', 'chatml')
  ids = response_ids(tokenizer, text, ends=False)
  assert decode(tokenizer, ids) == text
  assert not set(ids) & tokenizer.special_ids


@pytest.mark.parametrize('family', EXACT)
@pytest.mark.parametrize('template', ['chatml', 'inst'])
@pytest.mark.parametrize('answer', ['How many apples', 'Final answer: 12', 'What is 3 + 4?'])
def test_prompt_and_response_ids_are_the_rendered_conversation(load, family, template, answer):
  """What a model trained on rendered conversations would sample after the prompt."""
  tokenizer = load(family, template)
  whole = tokenizer.hf.apply_chat_template(
      [{'role': 'user', 'content': 'What is it?'}, {'role': 'assistant', 'content': answer}],
      return_dict=False)
  ids = prompt_ids(tokenizer, 'What is it?') + response_ids(tokenizer, answer, ends=True)
  assert tokens(tokenizer, whole[:len(ids)]) == tokens(tokenizer, ids)
  assert ids.count(tokenizer.bos_id) == 1


def test_llama_2_responses_begin_with_a_space(load):
  tokenizer = load('metaspace_bpe', 'inst')
  assert tokenizer.response_lead == ' '
  assert tokens(tokenizer, response_ids(tokenizer, 'How', ends=False))[0].startswith('\u2581')
  continued = load('metaspace_bpe', 'chatml')   # a newline stands before the response
  assert not tokens(continued, response_ids(continued, 'How', ends=False))[0].startswith('\u2581')


def test_added_tokens_of_responses_stay_tokens(tmp_path):
  """`<think>` is a token the model writes; in a response it is that token."""
  tokenizer = load_tokenizer(write(tmp_path, added=['<think>']), vocab_size=999)
  assert '<think>' in tokens(tokenizer, response_ids(tokenizer, '<think>x', ends=False))


def test_unigram_refuses_what_it_cannot_keep_apart(load):
  tokenizer = load('unigram', 'none')
  text = 'The answer is 7'
  assert decode(tokenizer, response_ids(tokenizer, text, ends=True)) == text
  for text in ('a </s> b', '＜/s＞'):   # the second becomes the first by NFKC
    with pytest.raises(InputError, match=r"f.jsonl, row 3: text would become.*found.*'</s>'"):
      response_ids(tokenizer, text, ends=True, where='f.jsonl, row 3')


def test_decode_keeps_spaces_that_the_configuration_would_remove(tmp_path):
  """transformers cleans up for Unigram, which would change text between sampling and training."""
  folder = write(tmp_path, 'unigram', 'none', clean_up_tokenization_spaces=True)
  tokenizer = load_tokenizer(folder, vocab_size=999)
  text = 'How many apples ? The answer is 7 .'
  assert decode(tokenizer, response_ids(tokenizer, text, ends=True)) == text


def test_decode_ignores_ids_beyond_the_vocabulary(load):
  """An embedding padded to a round size can give ids that no token has."""
  tokenizer = load()
  ids = response_ids(tokenizer, 'Answer', ends=False)
  assert decode(tokenizer, [*ids, 998]) == 'Answer'
  assert decode(tokenizer, []) == ''


def test_remote_folder_is_copied(tmp_path):
  folder = epath.Path(write(tmp_path / 'real'))

  class Remote:
    def __fspath__(self):
      return 'gs://bucket/model'

    def __truediv__(self, name):
      return folder / name

  with tokenizer_module._local(Remote()) as local:
    assert tokenizer_module._load(local, 'gs://bucket/model').eos_token == '<|im_end|>'
    assert local != str(folder)
  assert not epath.Path(local).exists()


def damaged(folder, file, text):
  write(folder)
  (folder / file).write_text(text)


def config(folder, **changes):
  file = folder / 'tokenizer_config.json'
  file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def needs_code(folder):
  write(folder)
  (folder / 'tokenizer.json').rename(folder / 'vocab.json')
  config(folder, tokenizer_class='OddTokenizer',
         auto_map={'AutoTokenizer': ['odd.OddTokenizer', None]})


def double_bos(folder):
  write(folder, template='none')
  data = json.loads((folder / 'tokenizer.json').read_text())
  data['post_processor']['single'].insert(0, data['post_processor']['single'][0])
  (folder / 'tokenizer.json').write_text(json.dumps(data))


def missing(_folder):
  pass


BAD = {
    'missing folder': (missing, 999, 'no such tokenizer folder', 'folder', 'nothing', 'checkpoint'),
    'a file': (lambda f: f.write_text('x'), 999, 'not a folder', 'folder', 'a file', 'holds it'),
    'empty folder': (lambda f: f.mkdir(), 999, 'no tokenizer', 'tokenizer.json', 'neither', 'Copy'),
    'only a configuration': (lambda f: (write(f) / 'tokenizer.json').unlink(), 999, 'no tokenizer',
                             'tokenizer.json', 'neither', 'Copy'),
    'vocabulary too large': (write, 100, 'larger than the embedding', 'at most 100', 'ids in the',
                             'saved with'),
    'no EOS': (lambda f: write(f, template='none', eos_token=None), 999, 'no end-of-sequence',
               'eos_token', 'neither', 'Set one'),
    'EOS outside': (lambda f: write(f, generation={'eos_token_id': 1000}), 999, 'outside the embed',
                    '0 to 998', '[1000]', 'generation_config.json'),
    'negative EOS': (lambda f: write(f, generation={'eos_token_id': -1}), 999, 'outside the embed',
                     '0 to 998', '[-1]', 'generation_config.json'),
    'EOS is text': (lambda f: write(f, generation={'eos_token_id': '</s>'}), 999, 'wrong type',
                    'an id or a list', "'</s>'", 'Correct'),
    'EOS is a boolean': (lambda f: write(f, generation={'eos_token_id': [True]}), 999, 'wrong type',
                         'an id or a list', '[True]', 'Correct'),
    'generation_config is a list': (lambda f: write(f, generation=['x']), 999, 'wrong type',
                                    'an id or a list', "['x']", 'Correct'),
    'damaged generation_config': (lambda f: damaged(f, 'generation_config.json', '{'), 999,
                                  'not JSON', 'JSON object', 'column 2', 'Copy'),
    'damaged tokenizer.json': (lambda f: damaged(f, 'tokenizer.json', '{"a'), 999, 'does not load',
                               'transformers can read', 'found', 'Copy'),
    'empty tokenizer.json': (lambda f: damaged(f, 'tokenizer.json', '{}'), 999, 'does not load',
                             'transformers can read', 'found', 'Copy'),
    'damaged configuration': (lambda f: damaged(f, 'tokenizer_config.json', '{'), 999,
                              'does not load', 'transformers can read', 'found', 'Copy'),
    'needs code': (needs_code, 999, 'needs code', 'transformers itself', 'auto_map', 'Convert'),
    'BOS twice': (double_bos, 999, 'BOS more than once', 'one BOS', '2', 'post_processor'),
}


@pytest.mark.parametrize('case', BAD)
def test_bad_folder_is_named(tmp_path, case):
  make, vocab_size, *parts = BAD[case]
  folder = tmp_path / 'model'
  make(folder)
  with pytest.raises(InputError) as error:
    load_tokenizer(folder, vocab_size=vocab_size)
  message = str(error.value)
  assert message.startswith(str(folder))
  assert all(part in message for part in ('expected', *parts)), message


def test_hub_name_is_not_downloaded():
  with pytest.raises(InputError, match='hub name; nothing is downloaded.*Download the checkpoint'):
    load_tokenizer('someone/some-model', vocab_size=999)
  with pytest.raises(InputError, match='no such tokenizer folder'):
    load_tokenizer('', vocab_size=999)


def test_module_does_not_import_transformers():
  """It costs seconds, and torch where that is installed."""
  code = ('import sys, jaxrl.data.readers, jaxrl.tokens.prompts; '
          'print([m for m in ("transformers", "torch", "pyarrow", "jax") if m in sys.modules])')
  done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True)
  assert done.stdout.strip() == '[]'
