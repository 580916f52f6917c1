"""metrics.jsonl and TensorBoard events across kills and restarts."""

import errno
import json
import math
import os
import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxrl.errors import InputError
from jaxrl.runs.metrics import MetricsLog, read_metrics


def fixed_clock():
  return 100.0


def read_events(folder):
  """[(global step, tag, value)] and the number of files; checks that each file starts anew."""
  from tensorboardX.proto.event_pb2 import Event, SessionLog

  found, names = [], sorted(os.listdir(folder))
  for name in names:
    content = (folder / name).read_bytes()
    events = []
    while content:
      (length,) = struct.unpack('<Q', content[:8])
      events.append(Event.FromString(content[12:12 + length]))
      content = content[16 + length:]
    assert events[1].session_log.status == SessionLog.START and events[1].step == 0
    found += [(e.step, v.tag, v.simple_value) for e in events for v in e.summary.value]
  return found, len(names)


def test_records_are_lines_in_the_order_of_their_keys(tmp_path):
  path = tmp_path / 'metrics.jsonl'
  with MetricsLog(path, clock=fixed_clock) as log:
    log.write(1, 'train', 1, {'loss': np.float32(0.1), 'tokens': np.int32(7), 'perf/rate': 2.5})
    assert path.read_text() == (   # there before the log is closed
        '{"iteration": 1, "stage": "train", "step": 1, "loss": 0.10000000149011612, "tokens": 7, '
        '"perf/rate": 2.5, "perf/time": 100.0}\n'
    )
  assert read_metrics(path) == [json.loads(path.read_text())]


def test_numbers_that_are_not_finite_are_kept_in_valid_json(tmp_path):
  path = tmp_path / 'metrics.jsonl'
  with MetricsLog(path, clock=fixed_clock) as log:
    log.write(1, 'train', 1, {'a': math.nan, 'b': np.float32(np.inf), 'perf/c': -math.inf})

  def refuse(constant):
    raise AssertionError(constant)

  line = json.loads(path.read_text(), parse_constant=refuse)
  assert line['a'] is None and line['a/nonfinite'] == 'nan'
  assert line['b'] is None and line['b/nonfinite'] == 'inf'
  assert line['perf/c'] is None and line['perf/c/nonfinite'] == '-inf'
  (record,) = read_metrics(path)
  assert math.isnan(record['a']) and record['b'] == math.inf and record['perf/c'] == -math.inf
  assert not any('nonfinite' in name for name in record)
  events = dict((tag, value) for _, tag, value in read_events(tmp_path / 'events')[0])
  assert math.isnan(events['train/a']) and events['train/b'] == math.inf


records = st.lists(
    st.tuples(st.integers(1, 2), st.sampled_from(['train', 'evaluate'])), max_size=12
)


@settings(deadline=None, max_examples=40)
@given(records, st.data())
def test_killed_and_resumed_logs_equal_an_uninterrupted_one(tmp_path_factory, order, data):
  folder = tmp_path_factory.mktemp('metrics')
  steps, script = {}, []
  for key in sorted(order, key=lambda key: key[0]):   # iterations follow one another
    steps[key] = steps.get(key, 0) + 1
    script.append((*key, steps[key]))

  def write(log, some):
    for iteration, stage, step in some:
      log.write(iteration, stage, step, {'loss': iteration + 1 / step})

  (folder / 'a').mkdir()
  with MetricsLog(folder / 'a' / 'metrics.jsonl', clock=fixed_clock) as log:
    write(log, script)
  (folder / 'b').mkdir()
  path = folder / 'b' / 'metrics.jsonl'
  killed = data.draw(st.integers(0, len(script)))
  kept = data.draw(st.integers(0, killed))
  log = MetricsLog(path, clock=fixed_clock)
  write(log, script[:killed])
  log.close()
  with open(path, 'ab') as file:
    file.write(b'{"iteration": 1, "sta'[: data.draw(st.integers(0, 21))])
  with MetricsLog(path, clock=fixed_clock) as log:
    last = {(i, stage): None for i, stage, _ in script}
    last |= {(i, stage): step for i, stage, step in script[:kept]}
    for (iteration, stage), step in last.items():
      log.rewind(iteration, stage, step)
    write(log, script[kept:])
  if script:
    assert path.read_bytes() == (folder / 'a' / 'metrics.jsonl').read_bytes()
    assert read_events(folder / 'b' / 'events') == read_events(folder / 'a' / 'events')
    assert read_events(folder / 'b' / 'events')[1] == 1


def test_global_steps_go_on_over_iterations(tmp_path):
  with MetricsLog(tmp_path / 'metrics.jsonl') as log:
    log.write(0, 'evaluate', 0, {'accuracy': 0.1})
    for iteration in (1, 2, 3):
      for step in (5, 10):
        log.write(iteration, 'train', step, {'loss': 1.0, 'perf/rate': 2.0})
      log.write(iteration, 'evaluate', 0, {'accuracy': 0.5})
  events, _ = read_events(tmp_path / 'events')
  assert [step for step, tag, _ in events if tag == 'train/loss'] == [5, 10, 15, 20, 25, 30]
  assert [step for step, tag, _ in events if tag == 'evaluate/accuracy'] == [0, 1, 2, 3]
  assert {tag for _, tag, _ in events} == {'train/loss', 'train/perf/rate', 'evaluate/accuracy'}


def test_rewinding_drops_events_even_if_nothing_is_written_after(tmp_path):
  for step in (1, 2):
    with MetricsLog(tmp_path / 'metrics.jsonl') as log:
      log.write(1, 'train', step, {'loss': 1.0})
  with MetricsLog(tmp_path / 'metrics.jsonl') as log:
    log.rewind(1, 'train', 1)   # drops step 2
  assert read_events(tmp_path / 'events') == ([(1, 'train/loss', 1.0)], 1)
  with MetricsLog(tmp_path / 'metrics.jsonl') as log:
    log.rewind(1, 'train', None)
  assert (tmp_path / 'metrics.jsonl').read_bytes() == b''
  assert read_events(tmp_path / 'events')[0] == []


def test_a_step_that_does_not_follow_is_refused(tmp_path):
  with MetricsLog(tmp_path / 'metrics.jsonl') as log:
    log.write(1, 'train', 2, {'loss': 1.0})
    for step in (1, 2):
      with pytest.raises(ValueError, match='not after step 2'):
        log.write(1, 'train', step, {'loss': 1.0})
    for name in ('step', 'loss/nonfinite'):
      with pytest.raises(ValueError, match='cannot name a number'):
        log.write(1, 'train', 3, {name: 1.0})
    log.write(2, 'train', 1, {'loss': 1.0})
    log.write(1, 'evaluate', 1, {'loss': 1.0})
  with MetricsLog(tmp_path / 'metrics.jsonl') as log, pytest.raises(ValueError):
    log.write(1, 'train', 2, {'loss': 1.0})


@pytest.mark.parametrize(
    'line', ['{"iteration": 1', '[]', '{"iteration": 1, "stage": 2, "step": 3}']
)
def test_a_damaged_line_is_named(tmp_path, line):
  path = tmp_path / 'metrics.jsonl'
  path.write_text('{"iteration": 1, "stage": "train", "step": 1}\n' + line + '\n')
  for use in (read_metrics, MetricsLog):
    with pytest.raises(InputError, match='metrics.jsonl line 2: the line is damaged'):
      use(path)
  with pytest.raises(InputError, match='no metrics'):
    read_metrics(tmp_path / 'missing')


def test_a_full_disk_leaves_whole_lines_only(tmp_path, monkeypatch):
  path = tmp_path / 'metrics.jsonl'
  real = os.write
  with MetricsLog(path, clock=fixed_clock) as log:
    log.write(1, 'train', 1, {'loss': 1.0})
    whole, calls = path.read_bytes(), []

    def part_of_it(descriptor, content):
      calls.append(descriptor)
      if len(calls) > 1:
        raise OSError(errno.ENOSPC, 'No space left on device')
      return real(descriptor, content[:10])

    monkeypatch.setattr(os, 'write', part_of_it)
    with pytest.raises(InputError, match='metrics.jsonl: there is no space left'):
      log.write(1, 'train', 2, {'loss': 1.0})
    monkeypatch.setattr(os, 'write', real)
    assert path.read_bytes() == whole
    log.write(1, 'train', 2, {'loss': 1.0})
  assert [record['step'] for record in read_metrics(path)] == [1, 2]
