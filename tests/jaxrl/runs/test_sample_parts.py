"""Samples of several processes: which one draws what, and how their logs become one."""

import json

import pytest
from etils import epath

from jaxrl.errors import InputError
from jaxrl.runs import sample_parts, stages
from jaxrl.runs.sample_log import open_log, read_log

HEADER = {'model': 'm'}


def row(prompt, draw, text='a'):
  return {'prompt_id': prompt, 'sample_index': draw, 'text': text}


def write(folder, process, rows, header=HEADER):
  with open_log(folder / sample_parts.part(process), header) as log:
    log.append(rows)


@pytest.mark.parametrize(('count', 'expected'), [
    (1, [[0, 2, 3, 4, 6]]),
    (2, [[0, 4, 6], [2, 3]]),             # 'a' and 'd', 'b'
    (4, [[0], [2, 3], [4, 6], []])])
def test_draws_of_a_prompt_stay_together(monkeypatch, count, expected):
  monkeypatch.setattr(sample_parts.jax, 'process_count', lambda: count)
  prompts = ['a', 'a', 'b', 'b', 'd', 'd', 'd']
  assert sample_parts.shares([0, 2, 3, 4, 6], prompts) == expected


def test_parts_of_a_killed_run_are_joined_once(tmp_path):
  folder = epath.Path(tmp_path)
  write(folder, 0, [row('a', 0), row('c', 0)])
  write(folder, 2, [row('b', 1), row('c', 0)])        # the last was moved before a kill
  write(folder, 11, [row('d', 0)])
  with (tmp_path / 'drawn.11.jsonl').open('a') as file:
    file.write('{"prompt_id": "e", "sam')
  (tmp_path / 'drawn.3.jsonl').write_text('{"header": {"mod')
  sample_parts.join_parts(folder, HEADER)
  drawn = [(r['prompt_id'], r['sample_index']) for r in read_log(folder / sample_parts.LOG)]
  assert drawn == [('a', 0), ('c', 0), ('d', 0), ('b', 1)]
  assert sorted(p.name for p in tmp_path.glob('*.jsonl')) == ['drawn.jsonl']
  before = (tmp_path / 'drawn.jsonl').read_bytes()
  sample_parts.join_parts(folder, HEADER)
  assert (tmp_path / 'drawn.jsonl').read_bytes() == before


def test_a_part_of_another_model_is_refused_and_left(tmp_path):
  folder = epath.Path(tmp_path)
  write(folder, 1, [row('a', 0)], header={'model': 'other'})
  with pytest.raises(InputError, match="drawn.1.jsonl: .*another model; expected m; found other"):
    sample_parts.join_parts(folder, HEADER)
  assert json.loads((tmp_path / 'drawn.1.jsonl').read_text().splitlines()[1]) == row('a', 0)


def test_a_part_that_is_not_seen_is_named(tmp_path, monkeypatch):
  monkeypatch.setattr(stages, '_SEEN_WITHIN', 0.0)
  write(epath.Path(tmp_path), 1, [row('a', 0)])
  with pytest.raises(InputError, match='drawn.2.jsonl: this process does not see'):
    sample_parts.join_parts(epath.Path(tmp_path), HEADER, expected=3)
