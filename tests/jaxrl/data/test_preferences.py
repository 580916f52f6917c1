"""Preference files in each of their shapes, the real ones, and rows that cannot be used."""

import json

import pytest

from jaxrl.data.preferences import read_labelled, read_preferences
from jaxrl.errors import InputError
from jaxrl.tokens.prompts import Message
from tests.shared_data import SHARED, needs_shared

USER, ANSWER = {'role': 'user', 'content': 'q'}, {'role': 'assistant', 'content': 'good'}
OTHER = {'role': 'assistant', 'content': 'bad'}


def write(tmp_path, *rows):
  path = tmp_path / 'rows.jsonl'
  path.write_text('\n'.join(json.dumps(row) for row in rows))
  return path


@pytest.mark.parametrize(('row', 'prompt'), [
    ({'prompt': 'q', 'chosen': 'good', 'rejected': 'bad'}, 'q'),
    ({'prompt': 'q', 'chosen': [USER, ANSWER], 'rejected': [USER, OTHER]}, 'q'),
    ({'prompt': [USER], 'chosen': [ANSWER], 'rejected': [OTHER]}, (Message('user', 'q'),)),
    ({'chosen': [USER, ANSWER], 'rejected': [USER, OTHER]}, (Message('user', 'q'),)),
    ({'conversations': [{'from': 'human', 'value': 'q'}],
      'chosen': {'from': 'gpt', 'value': 'good'}, 'rejected': {'from': 'gpt', 'value': 'bad'}},
     (Message('user', 'q'),)),
])
def test_every_shape_of_a_pair(tmp_path, row, prompt):
  (pair,), counts = read_preferences(write(tmp_path, {'id': 7} | row))
  assert (pair.prompt_id, pair.prompt, pair.chosen, pair.rejected) == ('7', prompt, 'good', 'bad')
  assert counts == {'rows': 1, 'identical': 0, 'one_sided': 0}


def test_right_and_wrong_responses_are_paired_in_step(tmp_path):
  row = {'question': 'q', 'responses': ['a', 'b', 'c', 'd', 'e'],
         'correct': [True, False, True, True, False]}
  one_sided = {'question': 'r', 'responses': ['a'], 'correct': [True]}
  pairs, counts = read_preferences(write(tmp_path, row, one_sided))
  assert [(p.prompt_id, p.chosen, p.rejected) for p in pairs] == [
      ('rows-1/0', 'a', 'b'), ('rows-1/1', 'c', 'e')]
  assert counts['one_sided'] == 1


def test_identical_responses_are_left_out_and_counted(tmp_path):
  same = {'prompt': 'q', 'chosen': 'x', 'rejected': 'x'}
  pairs, counts = read_preferences(write(
      tmp_path, same, {'prompt': 'q', 'chosen': 'x', 'rejected': 'y'}))
  assert len(pairs) == 1 and counts['identical'] == 1
  with pytest.raises(InputError, match='no preference'):
    read_preferences(write(tmp_path, same))


@pytest.mark.parametrize('row', [
    {'prompt': 'q', 'completion': 'good', 'label': True},
    {'prompt': [USER], 'completion': [ANSWER], 'label': True},
    {'messages': [USER, ANSWER], 'label': True},
])
def test_every_shape_of_a_labelled_response(tmp_path, row):
  (found,) = read_labelled(write(tmp_path, row))
  assert found.response == 'good' and found.label is True


def test_a_pair_is_a_desirable_and_an_undesirable_response(tmp_path):
  found = read_labelled(write(tmp_path, {'prompt': 'q', 'chosen': 'good', 'rejected': 'bad'}))
  assert [(x.response, x.label) for x in found] == [('good', True), ('bad', False)]


@pytest.mark.parametrize(('row', 'words'), [
    ({'prompt': 'q', 'chosen': 'a'}, 'rejected'),
    ({'prompt': 'q', 'chosen': 'a', 'rejected': ''}, 'empty'),
    ({'prompt': 'q', 'chosen': 3, 'rejected': 'b'}, 'wrong type'),
    ({'prompt': [USER, ANSWER], 'chosen': 'a', 'rejected': 'b'}, 'end with the user'),
    ({'prompt': 'other', 'chosen': [USER, ANSWER], 'rejected': 'b'}, 'continue the prompt'),
    ({'chosen': 'a', 'rejected': 'b'}, 'no prompt'),
    ({'chosen': [USER, ANSWER], 'rejected': [ANSWER, OTHER]}, 'no prompt'),
    ({'conversations': [{'from': 'bot', 'value': 'q'}], 'chosen': {}, 'rejected': {}}, 'message'),
    ({'question': 'q', 'responses': ['a', 'b'], 'correct': [True]}, 'fit together'),
    ({'question': 'q', 'responses': ['a'], 'correct': [1]}, 'fit together'),
])
def test_rows_that_cannot_be_used(tmp_path, row, words):
  with pytest.raises(InputError, match=words) as error:
    read_preferences(write(tmp_path, row))
  assert 'rows.jsonl' in str(error.value)


@pytest.mark.parametrize('label', ['yes', 1, None])
def test_labels_are_booleans(tmp_path, label):
  with pytest.raises(InputError, match='label'):
    read_labelled(write(tmp_path, {'prompt': 'q', 'completion': 'a', 'label': label}))


@needs_shared
def test_the_real_files():
  pairs, counts = read_preferences(SHARED / 'preference_demo' / 'dpo_en.jsonl')
  assert counts['rows'] == 231 and len(pairs) + counts['identical'] == 231
  labelled = read_labelled(SHARED / 'preference_demo' / 'kto_en.jsonl')
  assert len(labelled) == 238 and 0 < sum(x.label for x in labelled) < 238
  votes, counts = read_preferences(SHARED / 'math_votes' / 'math_cot_8_responses.jsonl')
  assert counts['rows'] == 50 and counts['one_sided'] > 0 and votes
  assert all(isinstance(p.prompt, tuple) and p.prompt[0].role == 'system' for p in votes)
