"""Whole runs of experiments.irpo in several processes: what one has, whatever is killed."""

import json
import re

import numpy as np
import pyarrow.parquet as pq
import pytest
import safetensors.numpy

from tests.experiments import small_model
from tests.launch_processes import ROOT, Launched

pytestmark = pytest.mark.processes
KILLED = ROOT / 'tests' / 'processes' / 'killed_irpo.py'
# Devices by processes; the product is what XLA sees of the run.
DEVICES = 8
# Of samples whose tokens are the same; measured, with room for other processors.
ATOL = 1e-5


@pytest.fixture(scope='module', autouse=True)
def cache(tmp_path_factory):
  """Programs of one run serve the next ones."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setenv('JAX_COMPILATION_CACHE_DIR', str(tmp_path_factory.mktemp('cache')))
    patch.setenv('JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS', '0')
    patch.setenv('JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES', '-1')
    yield


@pytest.fixture(scope='module')
def flags(tmp_path_factory):
  """A random model, of which no answer is right, so that gold solutions win."""
  folder = tmp_path_factory.mktemp('model')
  small_model.write_model(folder / 'model')
  for split, numbers in (('train', range(10)), ('test', range(10, 15))):
    small_model.write_problems(folder / f'{split}.jsonl', map(small_model.problem, numbers))
  return (
      f'--model={folder / "model"}', f'--train={folder / "train.jsonl"}',
      f'--test={folder / "test.jsonl"}', '--task=gsm8k', *small_model.FLAGS,
      '--gold_in_winners=always', '--iterations=2', '--samples_per_prompt=3',
      '--pairs_per_prompt=2', '--votes=2', '--layout=padded', '--learning_rate=1e-3',
      '--log_every=1', '--save_every=1')


def launch(processes, folder, flags, kill=(), devices=DEVICES):
  command = [KILLED, *kill] if kill else ['-m', 'experiments.irpo']
  return Launched(processes, *command, f'--run_dir={folder}', *flags,
                  devices_per_process=devices // processes, lost_after=20)


@pytest.fixture(scope='module')
def eight(flags, tmp_path_factory):
  """The run of one process with eight devices."""
  folder = tmp_path_factory.mktemp('eight') / 'run'
  run = launch(1, folder, flags)
  assert run.status == 0, run.all
  return folder


def parameters(folder, iteration):
  return safetensors.numpy.load_file(
      folder / f'iteration_{iteration:02d}' / 'model' / 'model.safetensors')


def assert_same(folder, expected):
  """Samples, pairs, verdicts and counts are the same; parameters and log-probs but for rounding.

  Returns the largest difference of a parameter.
  """
  found, wanted = (json.loads((path / 'manifest.json').read_text())['stages']
                   for path in (folder, expected))
  assert list(found) == list(wanted)
  for stage in wanted:
    for name, count in wanted[stage]['counts'].items():
      if name not in ('before', 'after'):      # hashes of parameters
        assert found[stage]['counts'][name] == pytest.approx(count, abs=ATOL), (stage, name)
    for output in (output['path'] for output in wanted[stage]['outputs']):
      if not output.endswith('.parquet'):
        continue
      ours, theirs = (pq.read_table(path / output) for path in (folder, expected))
      assert ours.column_names == theirs.column_names
      for column in set(ours.column_names) - {'source_model'}:
        a, b = ours[column].to_pylist(), theirs[column].to_pylist()
        if column.endswith(('logprobs', 'logps')):
          assert [len(x) for x in a] == [len(x) for x in b]
          np.testing.assert_allclose(np.concatenate(a), np.concatenate(b), atol=ATOL)
        else:
          assert a == b, (output, column)
  worst = 0.0
  for iteration in (1, 2):
    ours, theirs = (parameters(path, iteration) for path in (folder, expected))
    assert ours.keys() == theirs.keys()
    worst = max(worst, *(float(np.abs(ours[name] - theirs[name]).max()) for name in theirs))
  return worst


def test_four_processes_and_one_device_are_as_one_of_eight(flags, eight, tmp_path, record_property):
  run = launch(4, tmp_path / 'four', flags)
  assert run.status == 0, run.all
  # One process speaks, and nothing is left of what the others wrote.
  assert all(not any('iteration' in line for line in run.lines[n]) for n in (1, 2, 3)), run.all
  assert any('iteration 2: sample:' in line for line in run.lines[0])
  assert {path.name for path in tmp_path.glob('four/iteration_01/*')} == {
      path.name for path in eight.glob('iteration_01/*')}
  assert not list((tmp_path / 'four').rglob('*.partial'))
  four = assert_same(tmp_path / 'four', eight)
  run = launch(1, tmp_path / 'one', flags, devices=1)
  assert run.status == 0, run.all
  one = assert_same(tmp_path / 'one', eight)
  print(f'parameters differ by {four:.3g} (4 x 2) and {one:.3g} (1 device) from 1 x 8')
  record_property('largest difference', max(four, one))
  assert max(four, one) < ATOL


def test_a_run_goes_on_with_other_processes_where_one_was_killed(flags, eight, tmp_path):
  folder = tmp_path / 'run'
  run = launch(4, folder, flags, (2, 'sample', 3))
  assert run.status == 137 and run.statuses()[2] == 'was ended by SIGKILL', run.all
  for n in (0, 1, 3):
    assert run.statuses()[n] == 'ended with status 75', run.all
    (sentence,) = run.errors(n)
    assert re.match(rf'process {n} of 4 stopped while it waited for ', sentence)
    assert 'because process 2 was lost (no sign of life' in sentence
  scratch = folder / 'iteration_01' / 'samples.partial'
  drawn = {path.name: len(path.read_text().splitlines()) - 1 for path in scratch.glob('*.jsonl')}
  # Ten prompts of three draws each; the third draw of process 2 was not written any more.
  assert drawn == {'drawn.jsonl': 9, 'drawn.1.jsonl': 9, 'drawn.2.jsonl': 2, 'drawn.3.jsonl': 6}

  run = launch(2, folder, flags, (1, 'train', 3))
  assert run.status == 137 and run.statuses()[1] == 'was ended by SIGKILL', run.all
  (sentence,) = run.errors(0)
  assert 'because process 1 was lost (no sign of life' in sentence
  # 26 of 30 were there, of two prompts some were missing, and process 0 drew those of one.
  assert any(re.search('iteration 1: sample: (27|28|29) samples$', line)
             for line in run.lines[0]), run.all
  assert (folder / 'iteration_01' / 'pairs.parquet').exists()
  assert (folder / 'iteration_01' / 'train.partial' / 'checkpoint' / 'step_00000001').exists()

  run = launch(1, folder, flags)
  assert run.status == 0, run.all
  steps = [line.split()[1] for line in run.lines[0] if re.match(r'  step \d/3', line)]
  assert len(steps) < 6 and steps[-4:] == ['3/3', '1/3', '2/3', '3/3'], run.all
  assert assert_same(folder, eight) < ATOL
