"""Opening a run folder: lock, flags, versions."""

import json
import os
import pathlib
import signal
import subprocess
import sys

import pytest
from absl import flags as absl_flags
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxrl.errors import InputError
from jaxrl.parallel import hosts
from jaxrl.runs import folder, stages
from jaxrl.runs.folder import open_run

ROOT = pathlib.Path(__file__).resolve().parents[3]
VERSIONS = {'python': '3', 'jax': '0'}


def open_once(run_dir, flags=None, versions=None, **kwargs):
  flags, versions = flags or {'lr': '0.1'}, versions or VERSIONS
  with open_run(run_dir, flags=flags, versions=versions, **kwargs) as run:
    run.stage('first', ('first.txt',), lambda scratch: (scratch / 'first.txt').write_text('') or {})
    return run


def test_flags_of_a_start_that_did_nothing_bind_nothing(tmp_path):
  for value in ('typo', 'right'):
    with open_run(tmp_path / 'run', flags={'train': value}, versions=VERSIONS):
      pass
  assert (tmp_path / 'run' / 'flags.flags').read_text() == '--train=right\n'
  with pytest.raises(ZeroDivisionError), open_run(
      tmp_path / 'run', flags={'train': 'right'}, versions=VERSIONS) as run:
    run.stage('iteration_01/a', ('iteration_01/a.txt',), lambda scratch: {'x': 1 / 0})
  with pytest.raises(InputError, match="--train was 'right' and is now 'other'"):
    open_once(tmp_path / 'run', {'train': 'other'})


@pytest.mark.parametrize(('where', 'flags', 'sentence'), [
    ('run', {'lr': '0.2'}, '--lr=0.1, as process 0; found --lr=0.2'),
    ('other', {'lr': '0.1'}, 'run, as process 0; found .*other'),
    ('copy', {'lr': '0.1'}, 'lock: this process does not see what another one')])
def test_processes_that_are_not_started_alike_are_refused(
    tmp_path, monkeypatch, where, flags, sentence):
  """The first has opened the folder; `copy` is one of that name on a disk of the other's own."""
  said = []
  monkeypatch.setattr(hosts, 'alone', lambda: False)
  monkeypatch.setattr(hosts, 'broadcast', lambda value: said.append(value) or value)
  open_once(tmp_path / 'run', {'lr': '0.1'})
  if where == 'copy':
    (tmp_path / 'run' / 'lock').write_text('')
    where = 'run'
  monkeypatch.setattr(hosts, 'is_writer', lambda: False)
  monkeypatch.setattr(hosts, 'broadcast', lambda value: said.pop(0))
  monkeypatch.setattr(stages, '_SEEN_WITHIN', 0.0)
  with pytest.raises(InputError, match=sentence):
    open_once(tmp_path / where, flags)


def test_a_new_folder_holds_flags_versions_and_lock(tmp_path):
  run = open_once(tmp_path / 'a' / 'b', {'lr': '0.1', 'run_dir': 'x', 'flagfile': 'y', 'seed': '3'})
  assert (run.folder / 'flags.flags').read_text() == '--lr=0.1\n--seed=3\n'
  assert json.loads((run.folder / 'versions.json').read_text()) == VERSIONS
  owner = json.loads((run.folder / 'lock').read_text())
  assert owner['pid'] == os.getpid() and owner['host'] and owner['start']
  open_once(tmp_path / 'a' / 'b', {'lr': '0.1', 'seed': '3'})


def test_other_flags_are_refused_each_with_old_and_new_value(tmp_path):
  open_once(tmp_path, {'lr': '0.1', 'seed': '3', 'gone': '1', 'verbosity': '0', 'same': ''})
  with pytest.raises(InputError) as caught:
    open_once(
        tmp_path,
        {'lr': '0.2', 'seed': '4', 'new': 'x', 'verbosity': '1', 'same': ''},
        free_flags=('verbosity',),
    )
  message = str(caught.value)
  assert "--lr was '0.1' and is now '0.2'" in message
  assert "--seed was '3' and is now '4'" in message
  assert "--gone was '1' and is now absent" in message
  assert "--new was absent and is now 'x'" in message
  assert 'verbosity' not in message and 'same' not in message
  assert (tmp_path / 'flags.flags').read_text().count('\n') == 5


def test_free_flags_may_differ_and_the_file_keeps_the_first(tmp_path):
  open_once(tmp_path, {'lr': '1', 'progress': 'on'})
  open_once(tmp_path, {'lr': '1', 'progress': 'off'}, free_flags=('progress',))
  assert '--progress=on\n' in (tmp_path / 'flags.flags').read_text()


# What absl reads back: any text on one line that does not end with white space.
values = st.text(st.characters(exclude_categories=('Cs',), exclude_characters='\r\n')).filter(
    lambda value: value == value.rstrip()
)


@settings(deadline=None, max_examples=100)
@given(st.lists(values, min_size=1, max_size=4))
def test_absl_reads_the_flag_file_back(tmp_path_factory, texts):
  path = tmp_path_factory.mktemp('flags') / 'flags.flags'
  given_flags = {f'name_{i}': text for i, text in enumerate(texts)}
  path.write_bytes(folder.encode_flags(given_flags).encode())
  read = absl_flags.FlagValues()
  for name in given_flags:
    absl_flags.DEFINE_string(name, 'default', '', flag_values=read)
  read(['program', f'--flagfile={path}'])
  assert {name: read[name].value for name in given_flags} == given_flags
  assert folder.decode_flags(path) == given_flags


@pytest.mark.parametrize('value', ['a\nb', 'a\r', 'a ', '\t', '\ud800'])
def test_a_value_that_no_flag_file_holds_is_refused(tmp_path, value):
  with pytest.raises(InputError, match='--stop: '):
    open_once(tmp_path / 'run', {'stop': value})
  assert not (tmp_path / 'run').exists()


def test_folders_that_are_no_runs_are_refused_untouched(tmp_path):
  (tmp_path / 'thesis.tex').write_text('x')
  with pytest.raises(InputError, match='not a run.*found thesis.tex'):
    open_once(tmp_path)
  assert os.listdir(tmp_path) == ['thesis.tex']
  with pytest.raises(InputError, match='not a folder'):
    open_once(tmp_path / 'thesis.tex')
  with pytest.raises(InputError, match='cannot be written'):
    open_once(tmp_path / 'thesis.tex' / 'run')


def test_damaged_flags_are_named_with_their_line(tmp_path):
  open_once(tmp_path, {'a': '1', 'b': '2'})
  (tmp_path / 'flags.flags').write_text('--a=1\n--b')
  with pytest.raises(InputError, match='flags.flags line 2'):
    open_once(tmp_path)


def test_versions_of_earlier_starts_are_kept(tmp_path):
  for jax in ('1', '1', '2', '3', '3'):
    open_once(tmp_path, versions={'jax': jax})
  found = json.loads((tmp_path / 'versions.json').read_text())
  assert found == {'jax': '3', 'earlier': [{'jax': '2'}, {'jax': '1'}]}
  (tmp_path / 'versions.json').write_text('{"jax"')
  with pytest.raises(InputError, match='versions.json: the file is damaged'):
    open_once(tmp_path)


def test_current_versions_name_the_devices():
  found = folder.current_versions()
  assert found['devices'].startswith('8 x ')
  assert list(found) == ['python', 'jax', 'jaxlib', 'jaxrl', 'platform', 'devices']
  json.dumps(found)


HOLDER = """
import os, sys, time
from jaxrl.runs.folder import open_run
with open_run(sys.argv[1], flags={'lr': '0.1'}, versions={'python': '3', 'jax': '0'}):
  if os.fork() == 0:   # a worker that outlives its parent must not keep the lock
    print(os.getpid(), flush=True)
    time.sleep(60)
    os._exit(0)
  time.sleep(60)
"""


def test_a_second_process_is_refused_until_the_first_is_killed(tmp_path):
  command = [sys.executable, '-c', HOLDER, str(tmp_path)]
  with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as holder:
    child = int(holder.stdout.readline())
    try:
      with pytest.raises(InputError) as caught:
        open_once(tmp_path)
      owner = json.loads((tmp_path / 'lock').read_text())
      assert owner['pid'] == holder.pid
      for part in (f'process {holder.pid}', f'host {owner["host"]}', owner['start']):
        assert part in str(caught.value)
      holder.send_signal(signal.SIGKILL)
      holder.wait()
      open_once(tmp_path)
    finally:
      os.kill(child, signal.SIGKILL)
      holder.kill()


def test_one_process_cannot_open_a_run_twice(tmp_path):
  with open_run(tmp_path, flags={'lr': '0.1'}, versions=VERSIONS):
    with pytest.raises(InputError, match=f'in use by process {os.getpid()}'):
      open_once(tmp_path)
  open_once(tmp_path)


def test_the_room_does_not_start_jax():
  names = ('folder', 'forget', 'metrics', 'progress', 'stages', 'tables')
  code = f'import sys; from jaxrl.runs import {", ".join(names)}; sys.exit("jax" in sys.modules)'
  assert subprocess.run([sys.executable, '-c', code], check=False, cwd=ROOT).returncode == 0
