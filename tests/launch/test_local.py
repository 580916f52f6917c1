"""The launcher: what it would run, whose line is whose, signals, statuses, and nobody left."""

import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launch import local

ROOT = Path(__file__).resolve().parents[2]


def launch(*words, **more):
  return subprocess.run(
      [sys.executable, '-m', 'launch.local', *words], cwd=ROOT, capture_output=True, text=True,
      timeout=120, check=False, **more)


def python(source):
  return ('--', '-c', source)


def config(**changes):
  return local.LocalConfig(**{
      'processes': 3, 'devices_per_process': 2, 'grace': 1.0, 'lost_after': None,
      'command': ('-m', 'experiments.irpo')} | changes)


def test_what_each_process_finds_in_its_environment():
  inherited = {'XLA_FLAGS': '--xla_a=1 --xla_force_host_platform_device_count=8 --xla_b=2'}
  found = local.environment(config(lost_after=2.5), 1, 4321, inherited)
  assert found == {
      'JAX_PLATFORMS': 'cpu', 'JAX_NUM_CPU_DEVICES': '2', 'PYTHONUNBUFFERED': '1',
      'JAXRL_COORDINATOR': '127.0.0.1:4321', 'JAXRL_PROCESSES': '3', 'JAXRL_PROCESS_ID': '1',
      'JAXRL_LOST_AFTER': '2.5', 'XLA_FLAGS': '--xla_a=1 --xla_b=2'}
  assert 'XLA_FLAGS' not in local.environment(config(), 1, 4321, {'XLA_FLAGS': '--xla_a=1'})


def test_a_dry_run_prints_commands_that_a_shell_takes():
  done = launch('--processes=2', '--devices_per_process=2', '--dry_run', '--', '-m',
                'experiments.irpo', '--flagfile=a file', '--processes=7')
  assert done.returncode == 0 and not done.stderr
  lines = [shlex.split(line) for line in done.stdout.splitlines()]
  assert [line[-5:] for line in lines] == 2 * [
      [sys.executable, '-m', 'experiments.irpo', '--flagfile=a file', '--processes=7']]
  assert ['JAXRL_PROCESS_ID=0' in lines[0], 'JAXRL_PROCESS_ID=1' in lines[1]] == [True, True]


@pytest.mark.parametrize(('words', 'sentence'), [
    (('--processes=2',), 'there is nothing to run'),
    (('--', '-m', 'x'), '--processes: the flag is missing'),
    (('--processes=0', '--', '-m', 'x'), 'flag --processes=0: 0 is not a positive integer'),
    (('--processes=2', 'x', '--', '-m', 'y'), "'x': this is not a flag"),
    (('--process=2', '--', '-m', 'y'), "Unknown command line flag 'process'")])
def test_what_cannot_be_run_is_one_sentence(words, sentence):
  done = launch(*words)
  assert done.returncode == 2 and not done.stdout
  assert sentence in done.stderr and done.stderr.count('\n') == 1


def test_lines_carry_the_number_of_their_process():
  done = launch('--processes=3', *python(
      'import os, sys; n = os.environ["JAXRL_PROCESS_ID"]; print("out", n);'
      'print("err", n, file=sys.stderr); sys.stdout.write("unfinished")'))
  assert done.returncode == 0 and not done.stderr
  assert sorted(done.stdout.splitlines()) == sorted(
      f'[{n}] {text}' for n in range(3) for text in (f'out {n}', f'err {n}', 'unfinished'))


def test_the_first_failure_gives_the_status_and_ends_the_others():
  began = time.monotonic()
  done = launch('--processes=3', '--grace=1', *python(
      'import os, sys, time; n = int(os.environ["JAXRL_PROCESS_ID"])\n'
      'time.sleep(60 if n == 2 else 0.3 * n); sys.exit({0: 75, 1: 9}[n])'))
  assert done.returncode == 9, 'process 0 gave the status of one that waited for another'
  assert done.stderr.splitlines() == [
      'launch.local: process 0 ended with status 75', 'launch.local: process 1 ended with status 9',
      'launch.local: ending process 2 after 1 s']
  assert time.monotonic() - began < 30


def test_a_process_that_is_killed_counts_as_a_shell_counts_it():
  done = launch('--processes=1', *python('import os; os.kill(os.getpid(), 9)'))
  assert done.returncode == 137
  assert done.stderr == 'launch.local: process 0 was ended by SIGKILL\n'


@pytest.mark.parametrize(('answer', 'status'), [
    ('lambda *_: sys.exit(0)', 0), ('lambda *_: sys.exit(5)', 5), ('lambda *_: None', 143)])
def test_signals_reach_every_process(answer, status, tmp_path):
  source = (f'import os, signal, sys, time; signal.signal(signal.SIGTERM, {answer})\n'
            f'open(r"{tmp_path}/" + str(os.getpid()), "w").close()\n'
            'time.sleep(60) or time.sleep(60)')
  with subprocess.Popen(
      [sys.executable, '-m', 'launch.local', '--processes=2', '--grace=1', *python(source)],
      cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
    while len(pids := [int(path.name) for path in tmp_path.iterdir()]) < 2:
      time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
  assert process.returncode == status
  for pid in pids:
    with pytest.raises(ProcessLookupError):
      os.kill(pid, 0)
