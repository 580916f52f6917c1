"""Runs on gs://: what reaches the bucket, when, and what a fresh machine finds of it."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import time

import pytest

from jaxrl import objects
from jaxrl.errors import InputError
from jaxrl.runs import durable, forget, working_copy
from jaxrl.runs.folder import open_run
from jaxrl.runs.metrics import MetricsLog, read_metrics
from jaxrl.runs.sample_log import open_log, read_log
from jaxrl.runs.working_copy import working_folder

ROOT = pathlib.Path(__file__).resolve().parents[3]
KILLED = pathlib.Path(__file__).parent / 'bucket_run_to_kill.py'
HEADER = {'model': 'm'}


@pytest.fixture(autouse=True)
def temporary(tmp_path, monkeypatch):
  monkeypatch.setattr(tempfile, 'tempdir', str(tmp_path))
  return tmp_path


def row(n):
  return {'prompt_id': str(n), 'sample_index': 0, 'response': 'x' * n}


def opened(bucket, **flags):
  return open_run(f'{bucket.url}/run', flags={'seed': '1'} | flags, versions={'jax': '0'})


def make(scratch):
  (scratch / 'model').mkdir()
  (scratch / 'model' / 'a.safetensors').write_bytes(b'weights')
  (scratch / 'model' / 'config.json').write_bytes(b'{}')
  (scratch / 'left').write_text('scratch')
  return {'n': 1}


@pytest.mark.parametrize('every', [5, pytest.param(1, marks=pytest.mark.slow)])
def test_killed_at_changes_of_the_bucket(bucket, every):
  del bucket     # only whether the client is there
  done = subprocess.run(
      [sys.executable, KILLED, str(every)], env={**os.environ, 'PYTHONPATH': str(ROOT)},
      capture_output=True, text=True, check=False)
  assert done.returncode == 0, done.stderr[-3000:]
  assert int(done.stdout) > 12      # the changes were counted


def test_a_stage_is_published_before_it_is_finished_and_its_scratch_goes(bucket):
  with opened(bucket) as run:
    run.stage('a/train', ('a/model',), make)
  asked = [name for verb, name in bucket.asked if verb == 'PUT']
  assert asked.index('run/a/model/config.json') < asked.index('run/manifest.json')
  assert not any('.partial' in name or name.endswith('left') for name in asked)
  assert bucket.content('run/a/model/a.safetensors') == b'weights'


def test_a_fresh_machine_brings_weights_when_they_are_asked_for(bucket):
  with opened(bucket) as run:
    run.stage('a/train', ('a/model',), make)
  bucket.asked.clear()
  with opened(bucket) as run:
    assert run.entries['a/train'].counts == {'n': 1}
    assert ('GET', 'run/a/model/a.safetensors') not in bucket.asked
    path = run.path('a/train', 'a/model')
    assert (path / 'a.safetensors').read_bytes() == b'weights'
    assert str(durable.shared(path)) == f'{bucket.url}/run/a/model'


def test_what_was_changed_in_the_bucket_is_named_by_its_name_there(bucket):
  with opened(bucket) as run:
    run.stage('a/train', ('a/model',), make)
  bucket.objects['run/a/model/a.safetensors'] = b'others.', 1
  with pytest.raises(InputError, match=f'^{bucket.url}/run/a/model: this output was changed'):
    with opened(bucket) as run:
      run.path('a/train', 'a/model')
  with pytest.raises(InputError, match=f"{bucket.url}/run: .*--seed was '1' and is now '2'"):
    with opened(bucket, seed='2'):
      pass


def test_a_second_process_is_refused(bucket):
  with opened(bucket):
    with pytest.raises(InputError, match=f'{bucket.url}/run: the run folder is in use by process'):
      with opened(bucket):
        pass


def test_a_run_that_was_stopped_and_followed_changes_nothing_more(bucket):
  script = ('import sys; from jaxrl.runs import lease; from jaxrl.runs.folder import open_run\n'
            'times = lease.Times\n'
            'lease.Times = lambda: times(renew=0.2, end=3, take_over=6)\n'
            'lease._machine = lambda: sys.argv[2]      # no other sees that this process lives\n'
            'with open_run(sys.argv[1], flags={}, versions={}) as run:\n'
            '  for n in range(4):\n'
            '    name = f"s{n}.txt"\n'
            '    run.stage(f"s{n}", (name,), lambda s: (s / name).write_text("") or {})')

  def start(machine):
    return subprocess.Popen(
        [sys.executable, '-c', script, f'{bucket.url}/run', machine], stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True, env={**os.environ, 'PYTHONPATH': str(ROOT)})

  first = start('first')

  def stop(verb, name):
    if verb == 'PUT' and name.endswith('s2.txt') and not stopped:
      stopped.append(name)
      os.kill(first.pid, signal.SIGSTOP)

  stopped = []
  bucket.before = stop
  while not stopped:
    assert first.poll() is None
    time.sleep(0.1)
  second = start('second')
  assert second.wait(100) == 0, second.stderr.read()
  assert 'if nothing is heard' in second.stdout.read()
  assert len(json.loads(bucket.content('run/manifest.json'))['stages']) == 4
  bucket.asked.clear()
  os.kill(first.pid, signal.SIGCONT)
  assert first.wait(60) == 75
  assert 'the run stopped here' in first.stderr.read()
  assert not [name for verb, name in bucket.asked if verb != 'GET' and '/lock/' not in name]


def test_other_folders_of_the_bucket_are_no_runs(bucket):
  bucket.objects['run/thesis.tex'] = b'', 1
  with pytest.raises(InputError, match='has files in it, but is not a run.*found thesis.tex'):
    with opened(bucket):
      pass
  assert bucket.names() == ['run/thesis.tex']
  with pytest.raises(InputError, match='gs://other/run: there is no such bucket'):
    with open_run('gs://other/run', flags={}, versions={}):
      pass


def test_a_stage_is_forgotten_in_the_bucket(bucket):
  with opened(bucket) as run:
    run.stage('a/train', ('a/model',), make)
  assert forget.forget_stage(f'{bucket.url}/run', 'a/train') == ('a/train',)
  assert json.loads(bucket.content('run/manifest.json'))['stages'] == {}


def test_metrics_reach_the_bucket_with_every_sync_and_are_one_object_at_the_end(bucket):
  with working_folder(f'{bucket.url}/run') as folder:
    with MetricsLog(folder / 'metrics.jsonl') as log:
      for step in range(3):
        log.write(1, 'train', step, {'loss': 1.0})
        log.sync()
      assert len(bucket.names('run/metrics.jsonl.parts/')) == 3
      log.rewind(1, 'train', 0)
      assert len(bucket.names('run/metrics.jsonl.parts/')) == 1
      log.write(1, 'train', 1, {'loss': 2.0})
    assert bucket.names('run/metrics') == ['run/metrics.jsonl'] and bucket.names('run/events/')
  with working_folder(f'{bucket.url}/run') as folder:
    assert [r['loss'] for r in read_metrics(folder / 'metrics.jsonl')] == [1.0, 2.0]


def test_what_a_killed_writer_left_of_a_log_is_found_by_the_next(bucket, monkeypatch):
  monkeypatch.setattr(working_copy, 'LOG_SECONDS', 0.0)
  monkeypatch.setattr(working_copy, '_MOST_PARTS', 4)
  parts, snapshots = 'run/s.partial/drawn.jsonl.parts/', []

  def after(verb, name):
    if name.startswith(parts):
      snapshots.append({n: c for n, c in bucket.objects.items() if n.startswith(parts)})

  bucket.after = after
  with working_folder(f'{bucket.url}/run') as folder:
    (folder / 's.partial').mkdir()
    with open_log(folder / 's.partial' / 'drawn.jsonl', HEADER) as log:
      for n in range(8):
        log.append([row(n)])
  bucket.after = lambda verb, name: None
  assert len(snapshots) > 12        # of parts put, and of those that one replaced
  found = []
  for snapshot in snapshots:
    bucket.objects = dict(snapshot)
    with working_folder(f'{bucket.url}/run') as folder:
      found.append([r['prompt_id'] for r in read_log(folder / 's.partial' / 'drawn.jsonl')])
  assert all(len(a) <= len(b) for a, b in zip(found, found[1:], strict=False))    # nothing is lost
  assert found[0] == [] and found[-1] == [str(n) for n in range(8)]


def test_two_machines_see_each_others_logs(bucket):
  """Each process of a run has a working copy of its own."""
  url, seen = f'{bucket.url}/run', []
  with working_folder(url) as mine:
    os.makedirs(mine / 's.partial')
    other = working_copy.WorkingCopy(f'{mine}-other', url)
    os.makedirs(other.path_of('s.partial'))
    working_copy._open.append(other)
    try:
      with open_log(other.path_of('s.partial/drawn.1.jsonl'), HEADER) as log:
        log.append([row(1)])
        log.sync()
        seen.append(durable.names(mine / 's.partial'))
        seen.append(list(read_log(mine / 's.partial' / 'drawn.1.jsonl')))
        durable.remove(mine / 's.partial' / 'drawn.1.jsonl')
        seen.append(durable.names(mine / 's.partial'))
    finally:
      working_copy._open.remove(other)
  assert seen == [['drawn.1.jsonl'], [row(1)], []]


def test_the_folder_of_this_machine_goes_also_after_a_kill(bucket, temporary):
  script = ('import os, sys; from jaxrl.runs.working_copy import working_folder\n'
            'with working_folder(sys.argv[1]) as folder: os.kill(os.getpid(), 9)')
  subprocess.run([sys.executable, '-c', script, f'{bucket.url}/run'],
                 env={**os.environ, 'TMPDIR': str(temporary)}, check=False)
  (left,) = os.listdir(temporary)
  with working_folder(f'{bucket.url}/run') as folder:
    assert left not in os.listdir(temporary) and folder.name == 'run'
    with working_folder(f'{bucket.url}/run'):
      assert folder.exists()         # it is in use
  assert os.listdir(temporary) == []


def test_a_bucket_that_refuses_is_named(bucket):
  with pytest.raises(InputError, match=f'{bucket.url}/run/.*: the bucket refused this; found'):
    with opened(bucket) as run:
      bucket.refuses = 'a/model'
      run.stage('a/train', ('a/model',), make)
  bucket.refuses = None
  with opened(bucket) as run:
    assert run.stage('a/train', ('a/model',), make).counts == {'n': 1}


def test_without_its_package_a_bucket_is_one_sentence(monkeypatch):
  monkeypatch.setitem(sys.modules, 'gcsfs', None)
  with pytest.raises(InputError, match=r"expected gcsfs.* pip install 'jaxrl\[gcs\]'"):
    with open_run('gs://bucket/run', flags={}, versions={}):
      pass


@pytest.mark.parametrize('path', ['s3://bucket/run', 'gs://', 'gs:///run', 'https://a/b'])
def test_other_kinds_of_paths_are_refused(path):
  with pytest.raises(InputError, match='expected a path of this machine, or gs://BUCKET/NAME'):
    objects.stored(path)
