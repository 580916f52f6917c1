"""Published styles of chat templates: the ids we train on are those the sampler would produce."""

import json

import pytest
from tokenizers import AddedToken

from jaxrl.errors import InputError
from jaxrl.tokens.prompts import Message, prompt_ids, render_prompt, system_into_user
from jaxrl.tokens.tokenizer import decode, load_tokenizer, response_ids
from tests.jaxrl.tokens import small_tokenizers, template_styles
from tests.jaxrl.tokens.template_styles import STYLES

SYSTEM, USER = Message('system', 'Be brief.'), Message('user', 'How many apples has Ana?')
CHATS = {
    'one turn': (USER,),
    'two turns': (USER, Message('assistant', 'The answer is 7 .'), Message('user', 'What is it?')),
    'system': (SYSTEM, USER),
}
ANSWERS = ('Final answer: 12', 'é 🙂 漢字', '3 + 4 = 7\n\nFinal answer: 12')
THOUGHT = '<think>\nHow many?\n</think>\n\nThe answer is 7 .'


@pytest.fixture(scope='module')
def load(tmp_path_factory):
  made = {}

  def get(name):
    if name not in made:
      folder = template_styles.write(tmp_path_factory.mktemp('style') / name, STYLES[name])
      made[name] = load_tokenizer(folder, vocab_size=999)
    return made[name]

  return get


def tokens(tokenizer, ids):
  return tokenizer.hf.convert_ids_to_tokens(ids)


def rendered(tokenizer, chat, answer):
  """Ids of the whole conversation, by transformers alone."""
  messages = [{'role': m.role, 'content': m.content} for m in chat]
  return tokenizer.hf.apply_chat_template(
      [*messages, {'role': 'assistant', 'content': answer}], return_dict=False)


@pytest.mark.parametrize('name', STYLES)
def test_ends_and_bos(load, name):
  tokenizer, style = load(name), STYLES[name]
  assert tokens(tokenizer, [tokenizer.end_id]) == [style.ends]
  assert {*tokens(tokenizer, tokenizer.eos_ids)} == {style.eos, style.ends}
  ids = prompt_ids(tokenizer, CHATS['one turn'])
  if 'bos_token' in style.template:
    assert tokens(tokenizer, ids[:1]) == [style.bos] and ids[:2] != ids[:1] * 2
  elif style.bos and style.bos not in style.template:
    assert tokenizer.bos_id not in ids
  assert prompt_ids(tokenizer, USER.content) == ids


@pytest.mark.parametrize('name, chat', [
    (name, chat) for name, style in STYLES.items() if style.keeps
    for chat in CHATS if chat != 'system' or style.system])
def test_prompt_response_and_end_are_the_whole_conversation(load, name, chat):
  tokenizer, style = load(name), STYLES[name]
  for answer in ANSWERS:
    whole = rendered(tokenizer, CHATS[chat], answer)
    ours = prompt_ids(tokenizer, CHATS[chat]) + response_ids(tokenizer, answer, ends=False)
    assert tokens(tokenizer, whole[:len(ours)]) == tokens(tokenizer, ours)
    rest = whole[len(ours):]
    assert rest[rest.index(tokenizer.end_id)] == tokenizer.end_id
    between = rest[:rest.index(tokenizer.end_id)]
    assert tokenizer.hf.decode([*ours, *between]).endswith(answer + style.after)
    assert bool(between) == bool(style.after)
    assert response_ids(tokenizer, answer, ends=True) == [*ours, tokenizer.end_id][
        len(prompt_ids(tokenizer, CHATS[chat])):]


@pytest.mark.parametrize('name', STYLES)
@pytest.mark.parametrize('text', [
    *ANSWERS, THOUGHT, ' a space first', '\n\na line first', 'a space last ', '<think>', 'x\n',
    'a </think>\n\n b'])
def test_any_response_is_kept(load, name, text):
  """Also one that the template would strip, trim or lay out anew."""
  tokenizer = load(name)
  ids = response_ids(tokenizer, text, ends=True)
  assert ids[-1] == tokenizer.end_id and not tokenizer.special_ids.intersection(ids[:-1])
  assert decode(tokenizer, ids) == text
  assert response_ids(tokenizer, decode(tokenizer, ids), ends=True) == ids


@pytest.mark.parametrize('name', ['qwen_3', 'deepseek_r1'])
def test_thinking_is_part_of_the_response_and_not_of_history(load, name):
  tokenizer = load(name)
  ids = response_ids(tokenizer, THOUGHT, ends=True)
  tags = tokenizer.hf.convert_tokens_to_ids(['<think>', '</think>'])
  assert [i for i in ids if i in tags] == tags           # as tokens, once each
  chat = (USER, Message('assistant', THOUGHT), Message('user', 'What is it?'))
  history = render_prompt(tokenizer, chat).removesuffix('<think>\n')
  assert 'The answer is 7 .' in history and 'How many?\n</think>' not in history
  # Typed by a user they are text: no one else opens or closes the model's thinking.
  typed = prompt_ids(tokenizer, f'a {THOUGHT} b')
  asked = prompt_ids(tokenizer, 'a b')
  assert [typed.count(i) for i in tags] == [asked.count(i) for i in tags]


def test_templates_that_open_thinking_ask_for_its_end(load):
  """The response begins inside: what the sampler produced has no opening tag."""
  tokenizer = load('deepseek_r1')
  ids = prompt_ids(tokenizer, 'How many?')
  assert tokenizer.hf.decode(ids).endswith('<｜Assistant｜><think>\n')
  sampled = 'Two.\n</think>\n\nTwo.'
  assert decode(tokenizer, response_ids(tokenizer, sampled, ends=True)) == sampled
  whole = rendered(tokenizer, (USER,), sampled)
  assert '</think>' not in tokenizer.hf.decode(whole)    # why responses never go through it


def test_end_of_a_turn_whose_prompt_opens_thinking(tmp_path):
  """What is kept does not begin as what was asked, and still says how turns end."""
  template = template_styles.DEEPSEEK_R1.replace('<｜end▁of▁sentence｜>', '<|im_end|>')
  folder = small_tokenizers.write(
      tmp_path / 't', template=template, eos_token='</s>', generation={'eos_token_id': [2, 4]})
  tokenizer = load_tokenizer(folder, vocab_size=999)
  assert tokens(tokenizer, [tokenizer.end_id]) == ['<|im_end|>'] and tokenizer.response_lead == ''


def test_tags_marked_as_special_stay_in_responses(tmp_path):
  """Decoding leaves special tokens out, and text never becomes one; these are what was thought."""
  added = [AddedToken(tag, special=True, normalized=False) for tag in ('<think>', '</think>')]
  for family in ('byte_level', 'metaspace_bpe'):
    tokenizer = load_tokenizer(
        small_tokenizers.write(tmp_path / family, family, added=added), vocab_size=999)
    ids = response_ids(tokenizer, THOUGHT, ends=True)
    assert [t for t in tokens(tokenizer, ids) if 'think' in t] == ['<think>', '</think>']
    assert decode(tokenizer, ids) == THOUGHT
    prompt = prompt_ids(tokenizer, f'a {THOUGHT}')
    assert not set(tokenizer.thinking.values()) & set(prompt)


@pytest.mark.parametrize('name', [name for name in STYLES if not STYLES[name].system])
def test_a_system_message_that_the_template_refuses(load, name):
  tokenizer = load(name)
  with pytest.raises(InputError, match='roles system, user: .* Put the system text into the first'):
    prompt_ids(tokenizer, CHATS['system'], where='f.jsonl, row 4')
  moved = system_into_user(CHATS['system'])
  assert moved == (Message('user', f'{SYSTEM.content}\n\n{USER.content}'),)
  assert f'{SYSTEM.content}\n\n{USER.content}' in render_prompt(tokenizer, moved)
  if name == 'gemma_2':   # and this is what Gemma 3's own template does
    assert render_prompt(tokenizer, moved) == render_prompt(load('gemma_3'), CHATS['system'])


@pytest.mark.parametrize('name', [name for name in STYLES if STYLES[name].system])
def test_a_system_message_is_written_once(load, name):
  text = render_prompt(load(name), CHATS['system'])
  assert text.count(SYSTEM.content) == 1 and text.index('brief') < text.index('apples')


def test_system_into_user_leaves_other_prompts_alone():
  for prompt in ('text', (USER,), (SYSTEM,), (SYSTEM, Message('assistant', 'a'), USER)):
    assert system_into_user(prompt) == prompt
  longer = (SYSTEM, USER, Message('assistant', 'a'), USER)
  assert system_into_user(longer)[1:] == longer[2:]


def test_a_template_file_of_its_own(tmp_path):
  """Newer checkpoints keep it in chat_template.jinja."""
  folder = template_styles.write(tmp_path / 't', STYLES['llama_3'])
  config = json.loads((folder / 'tokenizer_config.json').read_text())
  template = config.pop('chat_template')
  expected = prompt_ids(load_tokenizer(folder, vocab_size=999), 'How many?')
  (folder / 'tokenizer_config.json').write_text(json.dumps(config))
  (folder / 'chat_template.jinja').write_text(template)
  assert prompt_ids(load_tokenizer(folder, vocab_size=999), 'How many?') == expected
