"""A run from its command line: what it leaves, how it is repeated, and what stops it."""

import json
import re
import shutil

import pytest
from absl import flags

from experiments import irpo_flags
from jaxrl.runs.folder import decode_flags
from jaxrl.runs.forget import forget_stage
from jaxrl.runs.lock import hold_lock
from tests.experiments import irpo_runs


@pytest.fixture
def copy(finished, tmp_path):
  shutil.copytree(finished.folder, tmp_path / 'run')
  return tmp_path / 'run'


def mtimes(folder):
  """Of what a run that has nothing to do must leave alone: all but lock, event files and report."""
  return {
      path: path.stat().st_mtime_ns for path in folder.rglob('*')
      if path.is_file() and path.parent.name != 'events'
      and path.name not in ('lock', 'report.html')}


def again(capsys, folder, *more):
  """The run's own flags, in this process."""
  return irpo_runs.run_here(capsys, f'--run_dir={folder}', *irpo_runs.WORLD, *more)


def test_a_finished_run_only_prints_its_table(finished, copy):
  before = mtimes(copy)
  ended = irpo_runs.run(f'--run_dir={copy}', *irpo_runs.WORLD, cache=finished.cache)
  assert ended.status == 0, ended.stderr
  assert mtimes(copy) == before

  def tables(text):
    return text[text.index('IRPO'):text.rindex('\n', 0, text.rindex('report: '))]

  assert tables(ended.stdout) == tables(finished.ended.stdout)
  assert 'steps/s' not in ended.stdout and 'samples/s' not in ended.stdout
  assert ended.stderr == ''


def test_the_recorded_flags_repeat_the_run(finished, tmp_path):
  ended = irpo_runs.run(f'--flagfile={finished.folder / "flags.flags"}',
                        f'--run_dir={tmp_path / "other"}', cache=finished.cache)
  assert ended.status == 0, ended.stderr
  whole, other = map(irpo_runs.contents, (finished.folder, tmp_path / 'other'))
  assert irpo_runs.differences(whole, other) == []


def test_the_recorded_flags_are_all_that_act(finished):
  recorded = decode_flags(finished.folder / 'flags.flags')
  known = {f.name for m in irpo_flags.MODULES for f in flags.FLAGS.get_flags_for_module(m)}
  assert recorded.keys() < known
  assert recorded['seed_accuracy'] == '0.0' and recorded['dedup'] == 'true'
  assert not {'run_dir', 'model', 'train', 'check_timeout'} & recorded.keys()


def test_other_flags_are_refused(copy, capsys):
  ended = again(capsys, copy, '--beta=0.123', '--nll_alpha=0')
  assert ended.status == 2
  assert re.search(r"--beta was '0\.\d+' and is now '0\.123'", ended.stderr)
  assert re.search(r"--nll_alpha was '[\d.]+' and is now '0\.0'", ended.stderr)
  assert "--nll_reduction was 'seq' and is now absent" in ended.stderr
  assert ended.stderr.count('\n') == 1


def test_a_second_process_is_refused(copy, capsys):
  with hold_lock(copy / 'lock'):
    ended = again(capsys, copy)
  assert ended.status == 2
  assert 'the run folder is in use by process' in ended.stderr and ended.stderr.count('\n') == 1


def flip(path):
  content = bytearray(path.read_bytes())
  content[len(content) // 2] ^= 1
  path.write_bytes(content)


def shorten(path):
  path.write_bytes(path.read_bytes()[:-40])


# The first stage that is redone, the file that is spoilt, how, and what is said of it.
DAMAGE = [
    ('iteration_01/scores', 'iteration_01/samples.parquet', flip, 'iteration_01/samples'),
    ('iteration_01/pairs', 'iteration_01/scores.parquet', shorten, 'iteration_01/scores'),
    ('iteration_01/reference', 'iteration_01/pairs.parquet', flip, 'iteration_01/pairs'),
    ('iteration_01/train', 'iteration_01/reference.parquet', flip, 'iteration_01/reference'),
    ('iteration_01/evaluation', 'iteration_01/model/model.safetensors', flip, 'iteration_01/train'),
    ('iteration_01/evaluation', 'iteration_01/model/config.json', shorten, 'iteration_01/train'),
    ('iteration_01/samples', 'seed/model/model.safetensors', shorten, 'seed/train'),
    ('iteration_00/evaluation', 'world/train.jsonl', flip, 'world/problems'),
    (None, 'iteration_01/evaluation.parquet', flip, 'iteration_01/evaluation'),
]


@pytest.mark.parametrize('redone, name, spoil, stage', DAMAGE)
def test_a_damaged_file_is_named(redone, name, spoil, stage, copy, capsys):
  if redone is not None:
    forget_stage(copy, redone)
  spoil(copy / name)
  ended = again(capsys, copy)
  assert ended.status == 2, ended
  output = copy / re.sub(r'/model/.*', '/model', name)   # a folder is one output
  assert ended.stderr.startswith(f'error: {output}: ')
  assert f'stage {stage} ' in ended.stderr and 'python -m jaxrl.runs.forget' in ended.stderr
  assert ended.stderr.count('\n') == 1


@pytest.mark.parametrize('name', ['manifest.json', 'metrics.jsonl', 'flags.flags', 'versions.json'])
def test_a_damaged_record_of_the_run_is_named(name, copy, capsys):
  path = copy / name
  path.write_bytes(b'\xff' + path.read_bytes()[1:])
  ended = again(capsys, copy)
  assert ended.status == 2
  assert ended.stderr.startswith(f'error: {path}') and ended.stderr.count('\n') == 1


def test_a_full_disk_is_named_and_the_run_goes_on_later(finished, copy):
  forget_stage(copy, 'iteration_01/samples')
  log = copy / 'iteration_01/samples.partial/drawn.jsonl'
  flags_of_run = (f'--run_dir={copy}', *irpo_runs.WORLD)
  ended = irpo_runs.run(*flags_of_run, cache=finished.cache, kill=('full:2', r'drawn\.jsonl'))
  assert ended.status == 2
  assert ended.stderr.startswith(f'error: {log}: there is no space left on the disk')
  assert ended.stderr.count('\n') == 1
  lines = [json.loads(line) for line in log.read_text().splitlines()]
  assert 'header' in lines[0]     # and as many samples as the disk took
  assert all('response_ids' in line for line in lines[1:])
  ended = irpo_runs.run(*flags_of_run, cache=finished.cache)
  assert ended.status == 0, ended.stderr
  whole, other = map(irpo_runs.contents, (finished.folder, copy))
  assert irpo_runs.differences(whole, other) == []


def test_the_report_is_there_and_stdout_ends_with_its_path(finished):
  report = finished.folder / 'report.html'
  assert '<html' in report.read_text()[:500].lower()
  assert finished.ended.stdout.rstrip().endswith(f'report: {report}')
  assert finished.ended.stderr == ''
