"""A run killed anywhere and started again ends with the same bits."""

import os
import pathlib
import random
import signal
import subprocess
import sys
import tempfile
import time

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[3]
COMMAND = (sys.executable, pathlib.Path(__file__).parent / 'run_to_kill.py')
ENVIRONMENT = {**os.environ, 'PYTHONPATH': str(ROOT)}


@pytest.fixture
def folder():
  """In memory where that is possible: the run waits for the disk thousands of times."""
  memory = '/dev/shm' if os.access('/dev/shm', os.W_OK) else None
  with tempfile.TemporaryDirectory(dir=memory) as path:
    yield path


def finish(*arguments):
  command = [*COMMAND, *arguments]
  done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, check=False)
  assert done.returncode == 0, done.stderr[-3000:]
  return done


def test_killed_before_each_file_system_call(folder):
  done = finish('each', folder)
  assert int(done.stdout) > 80   # the hooks did count


def test_killed_at_random_moments(folder):
  finish('run', f'{folder}/whole', '0')
  moments = random.Random(0)
  kills = 0
  for _ in range(4):
    command = [*COMMAND, 'run', f'{folder}/killed', '0.03']
    with subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.PIPE) as process:
      assert process.stdout.readline() == b'ready\n'
      time.sleep(moments.uniform(0.0, 0.15))
      process.kill()
    kills += process.returncode == -signal.SIGKILL
  assert kills > 0
  finish('run', f'{folder}/killed', '0')
  finish('compare', f'{folder}/killed', f'{folder}/whole')
