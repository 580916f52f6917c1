"""Stages: published whole, skipped, verified, redone after being forgotten."""

import errno
import json
import os
import subprocess

import pytest
from etils import epath

from jaxrl.errors import InputError
from jaxrl.runs import durable, manifest, stages, tables
from jaxrl.runs.folder import open_run
from jaxrl.runs.forget import main as forget

NAME, TEXT, MODEL = 'iteration_01/train', 'iteration_01/log.txt', 'iteration_01/model'
OUTPUTS = (TEXT, MODEL)


def start(run_dir):
  return open_run(run_dir, flags={'seed': '1'}, versions={'jax': '1'})


def produce(scratch):
  (scratch / 'log.txt').write_text('hello')
  os.makedirs(scratch / 'model' / 'shards', exist_ok=True)
  (scratch / 'model' / 'config.json').write_text('{}')
  (scratch / 'model' / 'shards' / '0').write_bytes(b'\0' * 10)
  (scratch / 'notes').write_text('not an output')
  return {'steps': 3}


def refuse(scratch):
  raise AssertionError('produced again')


def test_a_finished_stage_is_skipped_in_this_process_and_the_next(tmp_path):
  with start(tmp_path) as run:
    first = run.stage(NAME, OUTPUTS, produce)
    assert run.stage(NAME, OUTPUTS, refuse) == first
  with start(tmp_path) as run:
    assert run.stage(NAME, OUTPUTS, refuse) == first
    assert run.entries == {NAME: first}
    assert run.path(NAME, TEXT).read_text() == 'hello'
    assert (run.path(NAME, MODEL) / 'shards' / '0').read_bytes() == b'\0' * 10
  assert first.counts == {'steps': 3} and first.seconds >= 0
  assert [(output.path, output.bytes) for output in first.outputs] == [(TEXT, 5), (MODEL, 12)]
  assert sorted(os.listdir(tmp_path / 'iteration_01')) == ['log.txt', 'model']


def test_of_several_processes_one_writes_and_the_others_are_told(tmp_path, monkeypatch):
  said, called = [], []
  made = {'process': 1}

  def tell(value):
    said.append(json.loads(json.dumps(value)))
    return value

  def write(scratch, made):
    called.append('produce')
    return produce(scratch) | made

  def together(scratch):
    called.append(scratch.name)
    return made

  run = stages.Run(epath.Path(tmp_path), stages.Team(True, tell))
  first = run.stage(NAME, OUTPUTS, write, together)
  assert run.stage(NAME, OUTPUTS, refuse, refuse) == first and first.counts['process'] == 1
  assert called == ['train.partial', 'produce']

  other = stages.Run(epath.Path(tmp_path), stages.Team(False, lambda value: said.pop(0)))
  assert other.stage(NAME, OUTPUTS, refuse, together) == first
  assert other.stage(NAME, OUTPUTS, refuse, refuse) == first
  assert called == ['train.partial', 'produce', 'train.partial'] and not said
  assert other.entries == {NAME: first} and not other.writes
  (tmp_path / TEXT).write_text('changed')     # the one that writes sees to it
  assert other.path(NAME, TEXT).read_text() == 'changed'
  os.rename(tmp_path / MODEL, tmp_path / 'elsewhere')
  monkeypatch.setattr(stages, '_SEEN_WITHIN', 0.0)
  with pytest.raises(InputError, match='model: this process does not see what another one'):
    other.path(NAME, MODEL)


def test_the_manifest_counts_rows_of_tables_and_hashes_files(tmp_path):
  rows = [{'chosen_logps': [1.0], 'rejected_logps': []}] * 7

  def write(scratch):
    tables.write_table(scratch / 'reference.parquet', rows, tables.REFERENCE)
    return {}

  with start(tmp_path) as run:
    run.stage('iteration_01/reference', ('iteration_01/reference.parquet',), write)
  found = json.loads((tmp_path / 'manifest.json').read_text())
  (output,) = found['stages']['iteration_01/reference']['outputs']
  shell = subprocess.check_output(['sha256sum', tmp_path / output['path']], text=True)
  assert output['rows'] == 7
  assert output['sha256'] == shell.split()[0]
  assert output['bytes'] == os.path.getsize(tmp_path / output['path'])


def test_a_cut_stage_finds_what_it_had_written(tmp_path):
  def cut(scratch):
    durable.write_file(scratch / 'part_0', b'a')
    raise KeyboardInterrupt

  def resume(scratch):
    (scratch / 'all').write_bytes((scratch / 'part_0').read_bytes() + b'b')
    return {}

  with pytest.raises(KeyboardInterrupt), start(tmp_path) as run:
    run.stage('i/s', ('i/all',), cut)
  assert (tmp_path / 'i' / 's.partial' / 'part_0').exists()
  with start(tmp_path) as run:
    run.stage('i/s', ('i/all',), resume)
    assert run.path('i/s', 'i/all').read_bytes() == b'ab'
  assert not (tmp_path / 'i' / 's.partial').exists()


def damage_text(folder):
  (folder / TEXT).write_text('hellO')


def damage_model(folder):
  (folder / MODEL / 'shards' / '0').write_bytes(b'\0' * 9 + b'\1')


def rename_in_model(folder):
  (folder / MODEL / 'shards' / '0').rename(folder / MODEL / 'shards' / '1')


def add_to_model(folder):
  (folder / MODEL / 'more').write_text('')


@pytest.mark.parametrize(
    ('damage', 'output'),
    [
        (damage_text, TEXT),
        (damage_model, MODEL),
        (rename_in_model, MODEL),
        (add_to_model, MODEL),
        (lambda folder: (folder / TEXT).unlink(), TEXT),
    ],
)
def test_a_changed_output_is_named_and_what_the_error_says_repairs_it(
    tmp_path, capsys, damage, output
):
  calls = []

  def later(scratch):
    calls.append('later')
    (scratch / 'x').write_text('x')
    return {}

  def all_stages(run):
    run.stage('iteration_00/eval', ('iteration_00/e',), lambda s: (s / 'e').write_text('') or {})
    run.stage(NAME, OUTPUTS, produce)
    run.stage('iteration_02/later', ('iteration_02/x',), later)

  with start(tmp_path) as run:
    all_stages(run)
  before = (tmp_path / 'manifest.json').read_text()
  damage(tmp_path)
  with start(tmp_path) as run:
    all_stages(run)
    with pytest.raises(InputError) as caught:
      run.path(NAME, output)
  message = str(caught.value)
  assert message.startswith(str(tmp_path / output))
  command = message.split('`')[1].split()
  assert command[:3] == ['python', '-m', 'jaxrl.runs.forget']
  assert forget(command[3:]) == 0
  assert capsys.readouterr().out == f'will be redone: {NAME}, iteration_02/later\n'
  with start(tmp_path) as run:
    all_stages(run)
    run.path(NAME, output)
  assert calls == ['later', 'later']
  assert without_seconds(before) == without_seconds((tmp_path / 'manifest.json').read_text())


def without_seconds(text):
  return [line for line in text.splitlines() if '"seconds"' not in line]


def test_forgetting_needs_a_run_a_stage_and_the_lock(tmp_path, capsys):
  assert forget([str(tmp_path), NAME]) == 1
  assert 'not a run folder' in capsys.readouterr().err
  with start(tmp_path) as run:
    run.stage(NAME, OUTPUTS, produce)
    assert forget([str(tmp_path), NAME]) == 1
    assert 'in use by process' in capsys.readouterr().err
  assert forget([str(tmp_path), 'train']) == 1
  assert f'expected one of {NAME}' in capsys.readouterr().err


def test_a_damaged_manifest_is_named_and_deleting_it_redoes_the_run(tmp_path):
  with start(tmp_path) as run:
    run.stage(NAME, OUTPUTS, produce)
  path = tmp_path / 'manifest.json'
  whole = path.read_bytes()
  for cut in range(0, len(whole) - 2, 7):
    path.write_bytes(whole[:cut])
    with pytest.raises(InputError, match='manifest.json: the manifest is damaged'):
      with start(tmp_path):
        pass
  for other in ('[]', '{"format": 2, "stages": {}}', '{"format": 1, "stages": {"a": {}}}', '3'):
    path.write_text(other)
    with pytest.raises(InputError, match='manifest.json: .*delete it'):
      with start(tmp_path):
        pass
  path.unlink()
  with start(tmp_path) as run:
    run.stage(NAME, OUTPUTS, produce)
  assert without_seconds(whole.decode()) == without_seconds(path.read_text())


@pytest.mark.parametrize(
    'path', ['../x', '/etc/x', 'a/../../x', '.', '', 'a//b', 'a/./b', 'a/', '..\\x']
)
def test_paths_out_of_the_folder_are_refused(tmp_path, path):
  with start(tmp_path / 'run') as run:
    with pytest.raises(InputError, match='not a path inside the run folder'):
      run.stage('s', (path,), refuse)
    with pytest.raises(InputError, match='not a path inside the run folder'):
      run.stage(path + '/..', ('x',), refuse)
  content = {'format': 1, 'stages': {'s': {
      'outputs': [{'path': path, 'bytes': 1, 'sha256': ''}], 'seconds': 1, 'counts': {}}}}
  (tmp_path / 'run' / 'manifest.json').write_text(json.dumps(content))
  with pytest.raises(InputError, match='not a path inside the run folder'):
    with start(tmp_path / 'run'):
      pass


def test_links_are_refused_wherever_they_are(tmp_path):
  outside, folder = tmp_path / 'outside', tmp_path / 'run'
  outside.mkdir()
  (outside / 'log.txt').write_text('hello')

  def link_output(scratch):
    produce(scratch)
    (scratch / 'log.txt').unlink()
    os.symlink(outside / 'log.txt', scratch / 'log.txt')
    return {}

  def link_in_model(scratch):
    produce(scratch)
    os.symlink(outside, scratch / 'model' / 'out')
    return {}

  with start(folder) as run:
    (folder / 'a').symlink_to(outside)
    with pytest.raises(InputError, match='/run/a: this is a symbolic link'):
      run.stage('s', ('a/x',), refuse)
    with pytest.raises(InputError, match='/run/a: this is a symbolic link'):
      run.stage('a/s', ('x',), refuse)
    with pytest.raises(InputError, match='log.txt: this is a symbolic link'):
      run.stage('s', OUTPUTS, link_output)
    durable.remove(folder / 's.partial')
    with pytest.raises(InputError, match='model/out: this is a symbolic link'):
      run.stage('s', OUTPUTS, link_in_model)
    durable.remove(folder / 's.partial')
    run.stage(NAME, OUTPUTS, produce)
  (folder / TEXT).unlink()
  (folder / TEXT).symlink_to(outside / 'log.txt')   # the same bytes, but not ours
  with start(folder) as run, pytest.raises(InputError, match='log.txt: this is a symbolic link'):
    run.path(NAME, TEXT)
  assert os.listdir(outside) == ['log.txt']


def test_misuse_of_names_is_refused(tmp_path):
  with start(tmp_path) as run:
    run.stage(NAME, OUTPUTS, produce)
    for outputs in [(), ('manifest.json',), ('events/x',), ('a/.finished.json',), ('a.partial',),
                    ('a/x', 'b/x'), (TEXT,)]:
      with pytest.raises(InputError):
        run.stage('other', outputs, refuse)
    with pytest.raises(InputError, match='finished with other outputs'):
      run.stage(NAME, (TEXT,), refuse)
    with pytest.raises(InputError, match='other has not finished'):
      run.path('other', TEXT)
    with pytest.raises(InputError, match='has no output'):
      run.path(NAME, 'x')
    with pytest.raises(InputError, match='did not write this output'):
      run.stage('other', ('x',), lambda scratch: {})


def test_a_full_disk_in_a_stage_is_one_sentence_and_the_stage_goes_on_later(tmp_path, monkeypatch):
  def full(*unused):
    raise OSError(errno.ENOSPC, 'No space left on device')

  real = os.fsync
  for failing in range(6):
    left = [failing]

    def fsync(descriptor, left=left):
      left[0] -= 1
      if left[0] < 0:
        full()
      real(descriptor)

    folder = tmp_path / str(failing)
    with start(folder) as run:
      monkeypatch.setattr(os, 'fsync', fsync)
      with pytest.raises(InputError, match=f'{folder}.*: there is no space left'):
        run.stage(NAME, OUTPUTS, produce)
      monkeypatch.setattr(os, 'fsync', real)
      run.stage(NAME, OUTPUTS, produce)
      assert run.path(NAME, TEXT).read_text() == 'hello'

  def write(scratch):
    with open(scratch / 'x', 'w'):
      full()

  with start(tmp_path / 'run') as run, pytest.raises(InputError, match='s.partial: there is no'):
    run.stage('s', ('x',), write)


def cut_after(monkeypatch, run, writes):
  """Runs the stage until manifest or journal have been written so many times."""
  real, left = durable.write_file, [writes]

  def write_file(path, content):
    if not left[0]:
      raise KeyboardInterrupt
    left[0] -= 1
    real(path, content)

  def remove(path):   # the scratch folder, once everything has been written
    if not left[0]:
      raise KeyboardInterrupt

  with monkeypatch.context() as patch:
    patch.setattr(durable, 'write_file', write_file)
    if writes == 2:
      patch.setattr(durable, 'remove', remove)
    with pytest.raises(KeyboardInterrupt):
      run.stage(NAME, OUTPUTS, produce)


def test_a_stage_cut_while_it_is_published_is_not_produced_again(tmp_path, monkeypatch):
  with start(tmp_path) as run:
    cut_after(monkeypatch, run, 1)
    assert not run.entries and (tmp_path / TEXT).exists()
  with start(tmp_path) as run:
    assert run.stage(NAME, OUTPUTS, refuse).counts == {'steps': 3}
    run.path(NAME, MODEL)
  assert sorted(os.listdir(tmp_path / 'iteration_01')) == ['log.txt', 'model']


def test_a_stage_damaged_while_it_is_published_is_produced_again(tmp_path, monkeypatch):
  with start(tmp_path) as run:
    cut_after(monkeypatch, run, 1)
  damage_text(tmp_path)
  with start(tmp_path) as run:
    run.stage(NAME, OUTPUTS, produce)
    assert run.path(NAME, TEXT).read_text() == 'hello'


def test_a_forgotten_stage_is_not_published_again_from_what_a_kill_left(tmp_path, monkeypatch):
  with start(tmp_path) as run:
    cut_after(monkeypatch, run, 2)
  assert (tmp_path / f'{NAME}.partial').exists()
  with start(tmp_path) as run:
    run.forget(NAME)
    with pytest.raises(AssertionError, match='produced again'):
      run.stage(NAME, OUTPUTS, refuse)


def test_counts_that_json_cannot_hold_are_refused_before_publishing(tmp_path):
  with start(tmp_path) as run:
    for bad in (float('nan'), object()):
      with pytest.raises((ValueError, TypeError)):
        run.stage(NAME, OUTPUTS, lambda scratch, bad=bad: {**produce(scratch), 'bad': bad})
  assert not (tmp_path / TEXT).exists()


def test_the_hash_of_a_folder_depends_on_where_names_end(tmp_path):
  hashes = set()
  for i, files in enumerate([{'a': b'bc'}, {'ab': b'c'}, {'a': b'', 'bc': b''}, {'a/b': b'c'}]):
    for name, content in files.items():
      path = tmp_path / str(i) / name
      path.parent.mkdir(parents=True, exist_ok=True)
      path.write_bytes(content)
    hashes.add(manifest.describe(tmp_path / str(i), 'x').sha256)
  assert len(hashes) == 4
