"""The file of finished samples: whole rows only, each once, the same bits, one writer."""

import errno
import json
import os
import subprocess
import sys
import textwrap

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jaxrl.errors import InputError
from jaxrl.runs.sample_log import open_log, read_header, read_log

HEADER = {'model': 'abc', 'seed': 3, 'stops': ['\n'], 'top_p': 0.9, 'top_k': None}


def row(prompt='a', index=0, **more):
  return {'prompt_id': prompt, 'sample_index': index, 'text': 'Ünï\u2028\n🙂'} | more


def test_rows_come_back_and_are_finished(tmp_path):
  path = tmp_path / 'out.jsonl'
  with open_log(path, HEADER) as log:
    assert len(log) == 0
    log.append([row('a', 0), row('b', 0)])
    assert path.read_text(encoding='utf-8').count('\n') == 3      # at once, not when it is closed
    log.append([])
    log.append([row('a', 1), row('c', None, error='too long')])
    assert ('a', 1) in log and ('b', 1) not in log and len(log) == 4
  with open_log(path, HEADER) as log:
    assert log.finished == {('a', 0), ('b', 0), ('a', 1), ('c', None)}
    log.append([row('b', 1)])
  assert [r['prompt_id'] for r in read_log(path)] == ['a', 'b', 'a', 'c', 'b']
  assert next(read_log(path)) == row('a', 0)
  assert read_header(path) == HEADER


def test_float32_comes_back_to_the_bit(tmp_path):
  bits = np.random.default_rng(0).integers(0, 2**32, 20_000, dtype=np.uint32)
  numbers = bits.view(np.float32)
  numbers = np.concatenate([numbers[np.isfinite(numbers)], np.float32([0, -0.0, 1e-45, 3.4e38])])
  with open_log(tmp_path / 'x', {}) as log:
    log.append([row(logprobs=numbers.tolist())])
    log.append([row(index=1, logprobs=[float(str(x)) for x in numbers[:500]])])
  whole, short = (np.float32(r['logprobs']) for r in read_log(tmp_path / 'x'))
  np.testing.assert_array_equal(whole.view(np.uint32), numbers.view(np.uint32))
  np.testing.assert_array_equal(short.view(np.uint32), numbers[:500].view(np.uint32))


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_a_file_cut_anywhere_goes_on(tmp_path_factory, data):
  """Rows before the cut are there, the torn one is not, and all can be drawn again once."""
  path = tmp_path_factory.mktemp('log') / 'out.jsonl'
  rows = [row(f'p{n % 3}', n // 3, text='x' * data.draw(st.integers(0, 9))) for n in range(7)]
  with open_log(path, HEADER) as log:
    log.append(rows)
  content = path.read_bytes()
  cut = data.draw(st.integers(0, len(content)))
  path.write_bytes(content[:cut])
  said = []
  with open_log(path, HEADER, say=said.append) as log:
    kept = max(content[:cut].count(b'\n') - 1, 0)
    assert log.finished == {(r['prompt_id'], r['sample_index']) for r in rows[:kept]}
    log.append([r for r in rows if (r['prompt_id'], r['sample_index']) not in log])
  assert path.read_bytes() == content
  torn = cut > 0 and content[cut - 1:cut] != b'\n'
  assert len(said) == torn
  if torn:
    assert str(path) in said[0] and 'cut short' in said[0]


@pytest.mark.parametrize('change, message', [
    ({'seed': 4}, 'begun with another seed; expected 4; found 3'),
    ({'stops': []}, r"begun with another stops; expected \[\]; found \['\\n'\]"),
    ({'more': None}, 'begun with another more'),
    ({'top_p': 0.90001}, 'begun with another top_p; expected 0.90001; found 0.9')])
def test_other_settings_are_refused(tmp_path, change, message):
  path = tmp_path / 'out.jsonl'
  with open_log(path, HEADER) as log:
    log.append([row()])
  before = path.read_bytes()
  with pytest.raises(InputError, match=message), open_log(path, HEADER | change):
    pass
  lesser = {key: value for key, value in HEADER.items() if key != 'model'}
  with pytest.raises(InputError, match='another model'), open_log(path, lesser):
    pass
  assert path.read_bytes() == before


DAMAGES = {
    'not JSON': (b'{"prompt_id": "a", \n', 'line 3: the line is damaged'),
    'zeros': (b'\0\0\0\0\n', 'line 3: the line is damaged'),
    'not UTF-8': (b'{"prompt_id": "\xff"}\n', 'line 3: the line is damaged'),
    'a number': (b'7\n', 'line 3: the line is damaged; expected a JSON object; found'),
    'no id': (b'{"sample_index": 0}\n', 'line 3: the row is not a sample'),
    'no index': (b'{"prompt_id": "z"}\n', 'line 3: the row is not a sample'),
    'index': (b'{"prompt_id": "z", "sample_index": true}\n', 'line 3: the row is not a sample'),
    'twice': (b'{"prompt_id": "a", "sample_index": 0}\n',
              "line 3: the sample is there twice.*prompt 'a', draw 0, as in line 2"),
}


@pytest.mark.parametrize('case', DAMAGES)
def test_damage_is_named(tmp_path, case):
  path = tmp_path / 'out.jsonl'
  damage, message = DAMAGES[case]
  with open_log(path, HEADER) as log:
    log.append([row('a'), row('b')])
  first, second, third = path.read_bytes().splitlines(keepends=True)
  path.write_bytes(first + second + damage + third)
  before = path.read_bytes()
  with pytest.raises(InputError, match=message), open_log(path, HEADER):
    pass
  assert path.read_bytes() == before


def test_other_files_are_left_alone(tmp_path):
  path = tmp_path / 'rows.jsonl'
  path.write_text('{"prompt": "hi"}\n')
  with pytest.raises(InputError, match='line 1: this is not a file of samples'), \
      open_log(path, HEADER):
    pass
  with pytest.raises(InputError, match='this is not a file of samples'):
    list(read_log(path))
  assert path.read_text() == '{"prompt": "hi"}\n'
  with pytest.raises(InputError, match='no such file'):
    list(read_log(tmp_path / 'none'))
  with pytest.raises(InputError, match='the folder of the file does not exist'), \
      open_log(tmp_path / 'none' / 'x', HEADER):
    pass


@pytest.mark.parametrize('bad, message', [
    (row('a', 0), "the sample is already there.*prompt 'a', draw 0 again"),
    (row('b', 0), "the sample is already there.*prompt 'b', draw 0 again"),
    (row('c', 0, logprobs=[float('nan')]), "prompt 'c', draw 0: the row cannot be written"),
    (row('c', 0, logprobs=np.zeros(2)), 'the row cannot be written as JSON'),
    (row(3, 0), 'the row is not a sample'), ({'prompt_id': 'c'}, 'the row is not a sample')])
def test_a_bad_row_loses_nothing_and_adds_nothing(tmp_path, bad, message):
  path = tmp_path / 'out.jsonl'
  with open_log(path, HEADER) as log:
    log.append([row('a', 0)])
    before = path.read_bytes()
    with pytest.raises(InputError, match=message):
      log.append([row('b', 0), bad])
    assert path.read_bytes() == before and len(log) == 1
    log.append([row('b', 0)])


def test_one_writer(tmp_path):
  path = tmp_path / 'out.jsonl'
  with open_log(path, HEADER), \
      pytest.raises(InputError, match=f'the file is being written by process {os.getpid()} on'), \
      open_log(path, HEADER):
    pass
  with open_log(path, HEADER):
    pass


def test_a_killed_writer(tmp_path):
  """Rows that `append` returned from are there; the lock is free again."""
  path = tmp_path / 'out.jsonl'
  script = textwrap.dedent(f'''
      import os, signal
      from jaxrl.runs.sample_log import open_log
      with open_log({str(path)!r}, {{}}) as log:
        log.append([{{'prompt_id': 'a', 'sample_index': 0}}])
        os.write(log._descriptor, b'{{"prompt_id": "b", ')
        os.kill(os.getpid(), signal.SIGKILL)
  ''')
  assert subprocess.run([sys.executable, '-c', script], check=False).returncode == -9
  with open_log(path, {}) as log:
    assert log.finished == {('a', 0)}
    log.append([row('b', 0)])
  assert [json.loads(line).get('prompt_id') for line in path.read_text().splitlines()] == [
      None, 'a', 'b']


def test_a_full_disk_is_named_and_leaves_whole_lines(tmp_path, monkeypatch):
  """The disk takes half of the rows and then no more."""
  path = tmp_path / 'out.jsonl'
  write, left = os.write, [40]

  def write_some(descriptor, content):
    if not left[0]:
      raise OSError(errno.ENOSPC, 'No space left on device')
    content = content[:left[0]]
    left[0] -= len(content)
    return write(descriptor, content)

  with open_log(path, HEADER) as log:
    log.append([row('a', 0)])
    before = path.read_bytes()
    monkeypatch.setattr(os, 'write', write_some)
    with pytest.raises(InputError, match='no space left on the disk'):
      log.append([row('b', 0)])
    monkeypatch.setattr(os, 'write', write)
    assert path.read_bytes() == before and ('b', 0) not in log
    log.append([row('b', 0)])
