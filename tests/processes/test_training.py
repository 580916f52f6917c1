"""Training in several processes: the same bits as in one, whatever is killed and who goes on."""

import json
import re

import numpy as np
import pytest

from tests.launch_processes import ROOT, Launched
from tests.processes import train

pytestmark = pytest.mark.processes
TRAIN = ROOT / 'tests' / 'processes' / 'train.py'


def launch(processes, folder, *kill):
  return Launched(processes, TRAIN, folder, *kill,
                  devices_per_process=train.DEVICES // processes)


@pytest.fixture(scope='module')
def alone(tmp_path_factory):
  """(leaves, log) of one process that has all the devices."""
  folder = tmp_path_factory.mktemp('alone')
  run = launch(1, folder)
  assert run.status == 0, run.all
  return read(folder)[:2]


def read(folder):
  """(leaves, log, the steps it was resumed at)."""
  with np.load(folder / 'result.npz') as found:
    leaves = [found[name] for name in found.files]
  return leaves, *json.loads((folder / 'log.json').read_text())


def assert_same_bits(folder, alone, resumed):
  """The result in `folder` and its log from step `resumed` on."""
  leaves, log, steps = read(folder)
  for found, expected in zip(leaves, alone[0], strict=True):
    np.testing.assert_array_equal(found, expected)
  assert steps == [resumed]
  assert log == {step: numbers for step, numbers in alone[1].items() if int(step) > resumed}


def test_four_processes_are_as_one(alone, tmp_path):
  run = launch(4, tmp_path)
  assert run.status == 0, run.all
  assert_same_bits(tmp_path, alone, 0)
  assert len(alone[0]) > 20 and max(np.abs(x).max() for x in alone[0]) > 1


def test_one_of_four_is_killed_and_two_go_on(alone, tmp_path):
  run = launch(4, tmp_path, 'batch', 4, 2)     # step 2 is saved; step 4 may or may not be
  assert run.status == 137 and run.statuses()[2] == 'was ended by SIGKILL', run.all
  for n in (0, 1, 3):
    assert run.statuses()[n] == 'ended with status 75', run.all
    (sentence,) = run.errors(n)
    assert re.match(rf'process {n} of 4 stopped while it (waited for|was in) ', sentence)
    assert 'because process 2 was lost (no sign of life' in sentence
  saved = sorted(path.name for path in (tmp_path / 'checkpoint').glob('step_*'))
  assert saved[0] == 'step_00000002'
  run = launch(2, tmp_path)
  assert run.status == 0, run.all
  assert_same_bits(tmp_path, alone, int(saved[-1].removeprefix('step_')))


def test_all_are_killed_while_saving(alone, tmp_path):
  run = launch(2, tmp_path, 'publish', 4, 'all')
  assert run.status == 137 and set(run.statuses().values()) == {'was ended by SIGKILL'}, run.all
  assert (tmp_path / 'checkpoint' / '.step_00000004.partial').exists()
  assert not (tmp_path / 'result.npz').exists()
  run = launch(2, tmp_path)
  assert run.status == 0, run.all
  assert_same_bits(tmp_path, alone, 2)


def test_all_are_killed_between_saves(alone, tmp_path):
  run = launch(2, tmp_path, 'batch', 1, 'all')
  assert run.status == 137 and not list(tmp_path.glob('checkpoint/step_*')), run.all
  run = launch(4, tmp_path)
  assert run.status == 0, run.all
  assert_same_bits(tmp_path, alone, 0)
