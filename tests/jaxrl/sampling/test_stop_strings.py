"""Stop strings: the same place as a search of every prefix, for a fraction of the decoding."""

import functools

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from jaxrl.errors import InputError
from jaxrl.sampling.stop_strings import check_stop_strings, first_stop
from jaxrl.tokens.tokenizer import decode, load_tokenizer, response_ids
from tests.jaxrl.tokens import small_tokenizers

# Bytes and their decoder; bytes inside a sentencepiece vocabulary; a space that is taken off.
STYLES = [('byte_level', 'chatml'), ('byte_level', 'inst'), ('metaspace_bpe', 'inst'),
          ('metaspace_bpe', 'none'), ('unigram_bytes', 'chatml'), ('unigram', 'none')]
TEXT = 'The answer is 7. 日本語 Ünï 🙂🙃\n\nNext: 3 + 4\n  END x'


@functools.cache
def tokenizer_of(family, template):
  import pathlib
  import tempfile
  with tempfile.TemporaryDirectory() as folder:
    return load_tokenizer(
        small_tokenizers.write(pathlib.Path(folder), family, template), vocab_size=600)


@functools.cache
def decoder_of(style):
  return functools.partial(decode, tokenizer_of(*style))


def brute_force(ids, stops, decode_text):
  return next((n for n in range(1, len(ids) + 1)
               if any(stop in decode_text(ids[:n]) for stop in stops)), None)


def by_looks(ids, looks, stops, decode_text):
  """What an engine finds that looks after these numbers of ids."""
  start = 0
  for end in (*looks, len(ids)):
    found = first_stop(ids[:end], start, stops, decode_text)
    if found is not None:
      return found
    start = end
  return None


def agree(style, ids, looks, stops):
  decode_text = decoder_of(style)
  expected = brute_force(ids, stops, decode_text)
  assert by_looks(ids, looks, stops, decode_text) == expected
  return expected


@st.composite
def responses(draw):
  """Ids, looks and stop strings: text that a model might write, random ids, or both."""
  style = draw(st.sampled_from(STYLES))
  tokenizer = tokenizer_of(*style)
  size = len(tokenizer.hf)
  spelled = ''.join(draw(st.lists(
      st.sampled_from([*TEXT, *TEXT.split(' '), ' ', '\n', '\n\n', '日本']), max_size=12)))
  written = response_ids(tokenizer, spelled, ends=False) if spelled else []
  parts = draw(st.lists(st.one_of(
      st.just(written), st.lists(st.integers(0, size - 1), max_size=6),
      st.lists(st.integers(0, 270), max_size=8)), max_size=4))
  ids = [i for part in parts for i in part]
  looks = sorted(draw(st.lists(st.integers(0, len(ids)), max_size=4)))
  text = decoder_of(style)(ids)
  stops = draw(st.lists(st.one_of(
      st.sampled_from(['\n', '\n\n', ' ', 'END', 'answer is', '日本', '🙂', 'Ünï', '. ']),
      st.text(TEXT, min_size=1, max_size=4),
      st.integers(0, max(len(text) - 1, 0)).flatmap(
          lambda at: st.integers(1, 9).map(lambda n: text[at:at + n] or 'x'))),
      min_size=1, max_size=3))
  return style, ids, looks, [s for s in stops if '\N{REPLACEMENT CHARACTER}' not in s] or ['x']


@settings(max_examples=400, deadline=None, suppress_health_check=list(HealthCheck))
@given(responses())
@example((('metaspace_bpe', 'none'), [], [], ['x']))
def test_the_same_place_as_a_search_of_every_prefix(case):
  style, ids, looks, stops = case
  agree(style, ids, looks, stops)


@pytest.mark.parametrize('style', STYLES)
@pytest.mark.parametrize('stop', ['日本', 'answer is 7', '🙂🙃', '\n\n', 'ext: 3', 'END'])
def test_across_tokens_and_inside_characters(style, stop):
  tokenizer = tokenizer_of(*style)
  ids = response_ids(tokenizer, TEXT, ends=False)
  if stop not in decode(tokenizer, ids):
    assert style[0] == 'unigram'              # has no such characters
    return
  for cadence in (1, 2, 5, 16, 400):
    found = agree(style, ids, range(cadence, len(ids), cadence), [stop, 'never'])
    assert found is not None


def test_a_look_decodes_what_is_new():
  decode_text = decoder_of(('byte_level', 'chatml'))
  ids = response_ids(tokenizer_of('byte_level', 'chatml'), 'one two three four ' * 300, ends=False)
  decoded = []

  def counted(part):
    decoded.append(len(part))
    return decode_text(part)

  assert first_stop(ids, 0, ['once'], counted) is None
  decoded.clear()
  for start in range(16, len(ids) - 16, 16):
    assert first_stop(ids[:start + 16], start, ['once upon a time'], counted) is None
  assert len(ids) > 1000 and max(decoded) <= 40 and sum(decoded) < 4 * len(ids)


def test_no_stops_or_nothing_new():
  decode_text = decoder_of(('byte_level', 'chatml'))
  assert first_stop([300, 301], 0, [], decode_text) is None
  assert first_stop([300, 301], 2, [decode_text([300])], decode_text) is None


@pytest.mark.parametrize('stops', [[''], ['a', ''], ['\N{REPLACEMENT CHARACTER}']])
def test_stop_strings_that_mean_nothing(stops):
  with pytest.raises(InputError, match='--stop: a stop string'):
    check_stop_strings(stops)
