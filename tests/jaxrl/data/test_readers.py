"""Rows, problems and examples; each bad input is one sentence that names file, row and field."""

import gzip
import json
import os
import re

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jaxrl.data.readers import ExampleFields, Problem, read_examples, read_problems, read_rows
from jaxrl.data.tasks import get_task
from jaxrl.errors import InputError
from jaxrl.tokens.prompts import Message

WORLD = get_task('world')
GOOD = {'id': 'a', 'question': 'How many?', 'answer': '3'}


def lines(*rows):
  return b''.join(json.dumps(row).encode() + b'\n' for row in rows)


def row_with(**changes):
  return lines(GOOD, {**GOOD, 'id': 'b', **changes})


def parquet(**columns):
  sink = pa.BufferOutputStream()
  pq.write_table(pa.table(columns), sink)
  return sink.getvalue().to_pybytes()


def bad_crc():
  data = bytearray(gzip.compress(lines(GOOD)))
  data[-8] ^= 1
  return bytes(data)


def damaged_page():
  data = bytearray(parquet(id=['a'], question=['q' * 50], answer=['3']))
  data[4:40] = b'\xff' * 36
  return bytes(data)


def without(field):
  return lines({key: value for key, value in GOOD.items() if key != field})


CHOICES = {'label': ['A', 'B'], 'text': ['x', 'y']}


def arc(**changes):
  return lines({'id': 'a', 'question': 'Which?', 'choices': CHOICES, 'answerKey': 'A', **changes})


# what: file name, bytes, then what the message must name: place, fault, expected, found, fix.
BAD = {
    'empty file': ('f.jsonl', b'', '', 'empty', 'at least one row', '0 bytes', 'Write'),
    'zero rows': ('f.jsonl', b'\n \n', '', 'no rows', 'at least one row', '0 rows', 'Write'),
    'empty gzip': ('f.jsonl.gz', gzip.compress(b''), '', 'no rows', 'row', '0 rows', 'Write'),
    'cut gzip': ('f.jsonl.gz', gzip.compress(lines(GOOD))[:-6], '', 'gzip stream is damaged',
                 'whole gzip', 'end-of-stream', 'again'),
    'gzip cut in its header': ('f.jsonl.gz', gzip.compress(lines(GOOD))[:5], '', 'after row 0',
                               'whole gzip', 'end-of-stream', 'again'),
    'gzip with a bad CRC': ('f.jsonl.gz', bad_crc(), '', 'damaged after row 1', 'whole gzip', 'CRC',
                            'again'),
    'gzip with rubbish inside': ('f.jsonl.gz', gzip.compress(b'x')[:10] + b'\xff' * 30, '',
                                 'damaged',
                                 'whole gzip', 'Error -3', 'again'),
    'gzip with rubbish after': ('f.jsonl.gz', gzip.compress(lines(GOOD)) + b'rubbish', '',
                                'damaged',
                                'whole gzip', 'Not a gzipped', 'again'),
    'named gz, plain': ('f.jsonl.gz', lines(GOOD), '', 'not gzip', '1f 8b', '7b 22', 'Drop .gz'),
    'unknown extension': ('f.csv', b'a,b\n', '', 'format', '.parquet', ".csv", 'convert'),
    'no extension': ('f', lines(GOOD), '', 'format', '.jsonl', '(none)', 'Rename'),
    'invalid UTF-8': ('f.jsonl', lines(GOOD) + b'{"id": "\xff"}\n', 'row 2', 'not UTF-8', 'UTF-8',
                      'byte 0xff at byte 9', 'Save'),
    'UTF-16': ('f.jsonl', lines(GOOD).decode().encode('utf-16'), 'row 1', 'not UTF-8', 'UTF-8',
               'UTF-16', 'Save'),
    'invalid JSON': ('f.jsonl', lines(GOOD) + b'{"id": x}\n', 'row 2', 'column 8', 'JSON object',
                     'Expecting value', 'Correct'),
    'object over many lines': ('f.jsonl', b'{\n"id": 1\n}\n', 'row 1', 'invalid JSON', 'one line',
                               'double quotes', 'per line'),
    'two objects on a line': ('f.jsonl', b'{} {}\n', 'row 1', 'column 4', 'one JSON object',
                              'Extra data', 'per line'),
    'raw control character': ('f.jsonl', b'{"id": "\x00"}\n', 'row 1', 'invalid JSON', 'JSON',
                              'control character', 'Correct'),
    'row is a number': ('f.jsonl', lines(GOOD) + b'7\n', 'row 2', 'not an object', '{...}',
                        'a number 7', 'per line'),
    'row is text': ('f.jsonl', b'"hello"\n', 'row 1', 'not an object', '{...}', "text 'hello'",
                    'per'),
    'array of objects': ('f.json', json.dumps([GOOD]).encode(), 'row 1', 'JSON array', 'per line',
                         "starts with '['", 'own line'),
    'array over many lines': ('f.json', json.dumps([GOOD], indent=1).encode(), 'row 1',
                              'JSON array',
                              'per line', "starts with '['", 'own line'),
    'nested JSON': ('f.jsonl', b'{"a":' * 100_000, 'row 1', 'nested', 'flat', 'levels', 'Flatten'),
    'NaN': ('f.jsonl', b'{"answer": NaN}\n', 'row 1', 'NaN is not JSON', 'finite', 'NaN',
            'Replace'),
    'Infinity': ('f.jsonl', b'{"a": -Infinity}\n', 'row 1', 'not JSON', 'finite', '-Inf',
                 'Replace'),
    'overflow': ('f.jsonl', b'{"a": 1e999}\n', 'row 1', 'out of range', 'finite', '1e999',
                 'Replace'),
    'huge integer': ('f.jsonl', b'{"a": ' + b'9' * 5000 + b'}\n', 'row 1', 'invalid JSON',
                     'usual size', 'limit', 'Correct'),
    'duplicate key': ('f.jsonl', b'{"id": 1, "id": 2}\n', 'row 1', "'id' occurs twice", 'once',
                      '1 and 2', 'Remove'),
    'missing question': ('f.jsonl', without('question'), 'row 1', "'question' is missing", 'text',
                         "'id', 'answer'", 'Name the field'),
    'missing answer': ('f.jsonl', without('answer'), 'row 1', "'answer' is missing", 'gold answer',
                       "'id', 'question'", 'Name the field'),
    'row without fields': ('f.jsonl', b'{}\n', 'row 1', 'is missing', 'gold', 'no fields', 'Name'),
    'null question': ('f.jsonl', row_with(question=None), 'row 2', "'question' is null", 'text',
                      'null', 'Fill in'),
    'null answer': ('f.jsonl', row_with(answer=None), 'row 2', "'answer' is null", 'gold', 'null',
                    'Fill in'),
    'null id': ('f.jsonl', row_with(id=None), 'row 2', "'id' is null", 'unique id', 'null',
                'Fill in'),
    'question is a number': ('f.jsonl', row_with(question=5), 'row 2', "'question' has the wrong",
                             'text', 'a number 5', 'Correct'),
    'question is an object': ('f.jsonl', row_with(question={'a': 1}), 'row 2', "'question' has",
                              'messages', 'an object', 'Correct'),
    'answer is a list': ('f.jsonl', row_with(answer=['3']), 'row 2',
                         "'answer': the gold answer has",
                         'text', "a list ['3']", 'Correct'),
    'answer is a boolean': ('f.jsonl', row_with(answer=True), 'row 2', "'answer'", 'text',
                            'a boolean True', 'Correct'),
    'id is a boolean': ('f.jsonl', row_with(id=True), 'row 2', "'id' has the wrong type", 'text',
                        'a boolean', 'Correct'),
    'id is a fraction': ('f.jsonl', row_with(id=1.5), 'row 2', "'id' has the wrong type", 'text',
                         'a number 1.5', 'Correct'),
    'empty question': ('f.jsonl', row_with(question=''), 'row 2', "'question' is empty", 'text',
                       "''",
                       'Fill in'),
    'blank question': ('f.jsonl', row_with(question=' \n\t'), 'row 2', "'question' is empty",
                       'text',
                       r"' \n\t'", 'Fill in'),
    'blank answer': ('f.jsonl', row_with(answer=' '), 'row 2', 'gold answer is empty', 'text',
                     "' '",
                     'Fill in'),
    'duplicate id': ('f.jsonl', row_with(id='a'), "row 2, field 'id'", "'a' occurs twice",
                     'different id', 'row 1', 'another id'),
    'duplicate id of two types': ('f.jsonl', lines({**GOOD, 'id': 1}, {**GOOD, 'id': '1'}), 'row 2',
                                  'occurs twice', 'different id', 'row 1', 'another id'),
    'NUL': ('f.jsonl', row_with(question='a\0b'), 'row 2', 'NUL', 'without NUL', 'character 2',
            'Remove'),
    'lone surrogate': ('f.jsonl', row_with(question='ab\ud800'), 'row 2', 'surrogate', 'UTF-8',
                       'U+D800 at character 3', 'repair'),
    'lone surrogate in the id': ('f.jsonl', row_with(id='\udc00'), 'row 2', "'id' holds half",
                                 'UTF-8', 'U+DC00', 'repair'),
    'no messages': ('f.jsonl', row_with(question=[]), 'row 2', "'question' is empty", 'message',
                    '[]', 'Remove'),
    'message without content': ('f.jsonl', row_with(question=[{'role': 'user'}]), 'row 2',
                                "message 1 of field 'question'", "'content'", 'an object',
                                'Correct'),
    'unknown role': ('f.jsonl', row_with(question=[{'role': 'bot', 'content': 'x'}]), 'row 2',
                     'role', 'system, user, assistant', "'bot'", 'Correct'),
    'role is a list': ('f.jsonl', row_with(question=[{'role': [], 'content': 'x'}]), 'row 2',
                       'role',
                       'system, user', 'a list []', 'Correct'),
    'late system role': ('f.jsonl', row_with(question=[{'role': 'user', 'content': 'x'},
                                                       {'role': 'system', 'content': 'x'}]),
                         'row 2', 'message 2', 'system only first', "'system'", 'Correct'),
    'blank content': ('f.jsonl', row_with(question=[{'role': 'user', 'content': ' '}]), 'row 2',
                      "content of message 1 of field 'question' is empty", 'text', "' '",
                      'Fill in'),
    'content in parts': ('f.jsonl', row_with(question=[{'role': 'user', 'content': [{}]}]), 'row 2',
                         'content of message 1', 'text', 'a list', 'Correct'),
    'ends with assistant': ('f.jsonl', row_with(question=[{'role': 'assistant', 'content': 'x'}]),
                            'row 2', 'does not end with the user', "'user'", "'assistant'",
                            'Correct'),
    'not parquet': ('f.parquet', lines(GOOD), '', 'not Parquet', '50 41 52 31', '7b 22', 'rename'),
    'cut parquet': ('f.parquet', parquet(id=['a'])[:-9], '', 'damaged after row 0', 'whole Parquet',
                    'magic bytes', 'again'),
    'parquet of four bytes': ('f.parquet', b'PAR1', '', 'damaged', 'whole Parquet', '4 bytes',
                              'again'),
    'damaged parquet page': ('f.parquet', damaged_page(), '', 'damaged', 'whole Parquet', 'found',
                             'again'),
    'empty parquet': ('f.parquet', parquet(id=pa.array([], 'string')), '', 'no rows', 'one row',
                      '0 rows', 'Write'),
    'parquet without a column': ('f.parquet', parquet(id=['a'], answer=['3']), 'row 1',
                                 "'question' is missing", 'text', "'id', 'answer'", 'Name'),
    'parquet column of numbers': ('f.parquet', parquet(id=['a'], question=[1.5], answer=['3']),
                                  'row 1', "'question' has the wrong type", 'text', '1.5',
                                  'Correct'),
    'parquet null': ('f.parquet', parquet(id=['a', 'b'], question=['q', None], answer=['1', '2']),
                     'row 2', "'question' is null", 'text', 'null', 'Fill in'),
    'parquet NaN': ('f.parquet', parquet(id=['a'], question=['q'], answer=[float('nan')]), 'row 1',
                    'not a finite number', 'finite', 'nan', 'Correct'),
    'parquet binary text': ('f.parquet', parquet(id=['a'], question=[b'q'], answer=['1']), 'row 1',
                            "'question' has the wrong type", 'text', "bytes b'q'", 'Correct'),
}

BAD_ARC = {
    'choices missing': (lines({'question': 'q', 'answerKey': 'A'}), "'choices' is missing",
                        "'label'",
                        "'question', 'answerKey'", 'Name'),
    'choices is a list': (arc(choices=['x', 'y']), 'wrong type', "'label'", 'a list', 'Correct'),
    'choices without texts': (arc(choices={'label': ['A']}), "needs the lists", "'text'",
                              'an object',
                              'Correct'),
    'lists of two lengths': (arc(choices={'label': ['A', 'B'], 'text': ['x']}), 'number of options',
                             '2 to 5', '2 labels and 1 texts', 'Correct'),
    'six options': (arc(choices={'label': list('ABCDEF'), 'text': list('uvwxyz')}),
                    'number of options', '2 to 5', '6 labels', 'Correct'),
    'label twice': (arc(choices={'label': ['A', '1'], 'text': ['x', 'y']}), 'repeats a label',
                    'object', "['A', '1']", 'Correct'),
    'unknown label': (arc(choices={'label': ['A', 'Z'], 'text': ['x', 'y']}), 'is not a label',
                      'A to E', "'Z'", 'Correct'),
    'empty option': (arc(choices={'label': ['A', 'B'], 'text': ['x', ' ']}), 'option (B)', 'text',
                     "' '", 'Fill in'),
    'answer is no label': (arc(answerKey='right'), 'gold answer is not a label', 'A to E',
                           "'right'",
                           'Correct'),
    'answer is no option': (arc(answerKey='C'), 'not one of the options', 'one of A, B', "'C'",
                            'Correct'),
}


def assert_says(error, *parts):
  """Every part is there, in the order where, what, expected, found, fix."""
  message = str(error.value)
  assert 'expected' in message and 'found' in message and message.endswith('.')
  place = 0
  for part in parts:
    at = message.find(part, place)
    assert at >= 0, (part, message[place:], message)
    place = at


@pytest.mark.parametrize('case', BAD)
def test_bad_input_is_named(tmp_path, case):
  name, data, *parts = BAD[case]
  path = tmp_path / name
  path.write_bytes(data)
  with pytest.raises(InputError) as error:
    read_problems(path, WORLD)
  assert_says(error, str(path), *parts)


@pytest.mark.parametrize('case', BAD_ARC)
def test_bad_choices_are_named(tmp_path, case):
  data, *parts = BAD_ARC[case]
  path = tmp_path / 'f.jsonl'
  path.write_bytes(data)
  with pytest.raises(InputError) as error:
    read_problems(path, get_task('arc'))
  assert_says(error, f'{path}, row 1', *parts)


@pytest.mark.parametrize('name, found, fix', [
    ('missing.jsonl', 'nothing', 'Check the path'),
    ('folder.jsonl', 'a directory', 'one file'),
    ('pipe.jsonl', 'a pipe or device', 'one file'),
    ('dangling.jsonl', 'nothing', 'Check the path'),
])
def test_not_a_file(tmp_path, name, found, fix):
  (tmp_path / 'folder.jsonl').mkdir()
  os.mkfifo(tmp_path / 'pipe.jsonl')
  (tmp_path / 'dangling.jsonl').symlink_to(tmp_path / 'nowhere')
  with pytest.raises(InputError) as error:
    list(read_rows(tmp_path / name))
  assert_says(error, name, '.jsonl', found, fix)


def test_empty_path_and_path_with_nul():
  for path in ('', 'a\0b.jsonl'):
    with pytest.raises(InputError) as error:
      list(read_rows(path))
    assert_says(error, 'no such file', 'nothing', 'Check the path')


def test_no_permission(tmp_path, monkeypatch):
  path = tmp_path / 'f.jsonl'
  path.write_bytes(lines(GOOD))

  def deny(*_args, **_kwargs):   # the tests may run as root, whom chmod does not stop
    raise PermissionError(13, 'Permission denied')

  monkeypatch.setattr('etils.epath.gpath._GPath.open', deny)
  with pytest.raises(InputError) as error:
    list(read_rows(path))
  assert_says(error, str(path), 'cannot be read', 'readable', 'Permission denied', 'permissions')


@pytest.mark.parametrize('limit', [0, -1, True, 1.5])
def test_bad_limit(tmp_path, limit):
  path = tmp_path / 'f.jsonl'
  path.write_bytes(lines(GOOD))
  with pytest.raises(InputError) as error:
    read_problems(path, WORLD, limit)
  assert_says(error, '--limit', '1 or more', repr(limit), 'all rows')


def test_formats_agree(tmp_path):
  rows = [{**GOOD, 'id': f'r{i}', 'question': f'é {i}?'} for i in range(3)]
  text = lines(*rows)
  files = {
      'a.jsonl': text, 'b.jsonl.gz': gzip.compress(text), 'c.jsonl': gzip.compress(text),
      'd.json.gz': gzip.compress(text), 'e.jsonl': b'\xef\xbb\xbf' + text,
      'f.jsonl': text.replace(b'\n', b'\r\n'), 'g.jsonl': text.rstrip(),
      'h.parquet': parquet(**{key: [row[key] for row in rows] for key in GOOD}),
      'i.jsonl.gz': gzip.compress(text[:40]) + gzip.compress(text[40:]),
  }
  for name, data in files.items():
    (tmp_path / name).write_bytes(data)
    read = list(read_rows(tmp_path / name))
    assert [dict(row.fields) for row in read] == rows, name
    assert [row.number for row in read] == [1, 2, 3], name


def test_row_numbers_are_line_numbers(tmp_path):
  path = tmp_path / 'f.jsonl'
  path.write_bytes(b'\n' + lines(GOOD) + b'\n\n' + lines({**GOOD, 'id': 'b'}))
  assert [row.number for row in read_rows(path)] == [2, 5]


def test_parquet_rows_count_over_batches(tmp_path):
  path = tmp_path / 'f.parquet'
  pq.write_table(pa.table({'x': list(range(3000))}), path, row_group_size=700)
  rows = list(read_rows(path))
  assert [row.number for row in rows] == list(range(1, 3001))
  assert [row.fields['x'] for row in rows] == list(range(3000))


def test_problems(tmp_path):
  path = tmp_path / 'p.jsonl'
  path.write_bytes(lines(GOOD, {'id': 7, 'question': ' Why? ', 'answer': 4}))
  assert read_problems(path, WORLD) == [
      Problem('a', 'How many?', '3', None, None), Problem('7', 'Why?', '4', None, None)]
  assert read_problems(path, WORLD, 1) == [Problem('a', 'How many?', '3', None, None)]
  assert [p.where for p in read_problems(path, WORLD)] == [f'{path}, row 1', f'{path}, row 2']


def test_limit_does_not_read_on(tmp_path):
  path = tmp_path / 'p.jsonl'
  path.write_bytes(lines(GOOD) + b'not json\n')
  assert len(read_problems(path, WORLD, 1)) == 1


def test_ids_are_made_from_name_and_row(tmp_path):
  path = tmp_path / 'train.v2.jsonl'
  path.write_bytes(b'\n' + lines({'question': 'q', 'answer': '1'},
                                 {'question': 'q', 'answer': '2'}))
  assert [p.prompt_id for p in read_problems(path, WORLD)] == ['train-2', 'train-3']
  with pytest.raises(InputError) as error:   # a field that the user names must be there
    read_problems(path, get_task('world', id_field='id'))
  assert_says(error, 'row 2', "'id' is missing", 'unique id', "'question', 'answer'", 'Name')


@pytest.mark.parametrize('gold', [None, '', ' '])
def test_missing_gold_is_kept_on_request_only(tmp_path, gold):
  path = tmp_path / 'p.jsonl'
  path.write_bytes(row_with(answer=gold))
  with pytest.raises(InputError):
    read_problems(path, WORLD)
  kept = read_problems(path, WORLD, missing_gold='keep')
  assert [p.gold for p in kept] == ['3', '']
  path.write_bytes(without('answer'))
  with pytest.raises(InputError, match="'answer' is missing"):   # an absent field is a wrong name
    read_problems(path, WORLD, missing_gold='keep')
  assert [p.gold for p in read_problems(path, WORLD, missing_gold='keep_any')] == ['']
  with pytest.raises(InputError, match="'error', 'keep' or 'keep_any'"):
    read_problems(path, WORLD, missing_gold='drop')


def test_any_gold_is_kept_where_none_is_needed(tmp_path):
  path = tmp_path / 'p.jsonl'
  row = {'question': 'q', 'choices': {'label': ['A', 'B'], 'text': ['x', 'y']}}
  path.write_bytes(lines(*(row | {'answerKey': key} for key in ('B', 'D', 'none', 7))))
  with pytest.raises(InputError, match='not one of the options'):
    read_problems(path, get_task('arc'), missing_gold='keep')
  kept = read_problems(path, get_task('arc'), missing_gold='keep_any')
  assert [p.gold for p in kept] == ['B', '', '', '']
  assert {p.labels for p in kept} == {('A', 'B')}


def test_messages_stay_a_conversation(tmp_path):
  path = tmp_path / 'p.jsonl'
  chat = [{'role': 'system', 'content': 'Be brief.'}, {'role': 'user', 'content': 'How many?'}]
  path.write_bytes(lines({**GOOD, 'question': chat}))
  [problem] = read_problems(path, get_task('world', template='Q: {question} A:'))
  assert problem.prompt == (Message('system', 'Be brief.'), Message('user', 'Q: How many? A:'))


def test_examples(tmp_path):
  path = tmp_path / 'sft.jsonl'
  user, bot = {'role': 'user', 'content': 'hi'}, {'role': 'assistant', 'content': ' yo\n'}
  path.write_bytes(lines(
      {'prompt': 'p', 'response': ' r\n'}, {'id': 3, 'messages': [user, bot]},
      {'messages': [user], 'response': 'r'}))
  read = read_examples(path)
  assert [(e.prompt_id, e.prompt, e.response) for e in read] == [
      ('sft-1', 'p', ' r\n'), ('3', (Message('user', 'hi'),), ' yo\n'),
      ('sft-3', (Message('user', 'hi'),), 'r')]
  assert len(read_examples(path, limit=2)) == 2


def test_example_fields(tmp_path):
  path = tmp_path / 'sft.jsonl'
  path.write_bytes(lines({'q': 'p', 'a': 'r', 'key': 'k'}))
  [example] = read_examples(path, ExampleFields('q', 'a', 'key'))
  assert (example.prompt_id, example.prompt, example.response) == ('k', 'p', 'r')


@pytest.mark.parametrize('row, parts', [
    ({'prompt': 'p'}, ("'response' is missing", 'text', "'prompt'", 'Name')),
    ({'response': 'r'}, ("'prompt' is missing", 'text or', "'response'", 'Name')),
    ({'prompt': 'p', 'response': ''}, ("'response' is empty", 'text', "''", 'Fill in')),
    ({'prompt': 'p', 'response': None}, ("'response' is null", 'text', 'null', 'Fill in')),
    ({'prompt': 'p', 'response': ['r']}, ("'response' has the wrong", 'text', 'a list', 'Correct')),
    ({'messages': [{'role': 'user', 'content': 'x'}]},
     ("'messages' has no response", "'assistant'", "role 'user'", "'response'")),
    ({'messages': [{'role': 'assistant', 'content': 'x'}]},
     ("'messages' has no response", "'assistant'", '1 messages', "'response'")),
    ({'messages': [{'role': 'assistant', 'content': 'x'}] * 2},
     ('does not end with the user', "'user'", "'assistant'", 'Correct')),
    ({'messages': 'text', 'prompt': 5, 'response': 'r'},
     ("'prompt' has the wrong type", 'messages', 'a number 5', 'Correct')),
])
def test_bad_examples(tmp_path, row, parts):
  path = tmp_path / 'sft.jsonl'
  path.write_bytes(lines(row))
  with pytest.raises(InputError) as error:
    read_examples(path)
  assert_says(error, f'{path}, row 1', *parts)


def test_messages_stay_short(tmp_path):
  """A large value is cut, so that the message is still a sentence."""
  path = tmp_path / 'f.jsonl'
  path.write_bytes(row_with(answer=['x' * 10_000]))
  with pytest.raises(InputError) as error:
    read_problems(path, WORLD)
  assert len(re.sub(re.escape(str(path)), '', str(error.value))) < 300
