"""A restart on other data is refused, by content and not by time or name."""

import os
import types

import pytest
from etils import epath

from jaxrl.errors import InputError
from jaxrl.runs.folder import open_run
from jaxrl.runs.input_stage import input_stage


def test_changed_data_is_named(tmp_path):
  data = epath.Path(tmp_path / 'train.jsonl')
  data.write_text('{"question": "1+1", "answer": "2"}\n')

  def start():
    with open_run(tmp_path / 'run', flags={}, versions={}) as run:
      input_stage(types.SimpleNamespace(run=run), {'train': data})

  start()
  os.utime(data)
  start()
  data.write_text('{"question": "1+1", "answer": "3"}\n')
  with pytest.raises(InputError, match='train.jsonl: the train file changed'):
    start()
