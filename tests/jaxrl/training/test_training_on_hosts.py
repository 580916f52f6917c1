"""Several processes over loopback: all save the same step, refuse together, and go on exactly."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxrl.parallel import hosts
from jaxrl.training.checkpoint import Checkpoints, damage
from launch.local import free_port
from tests import tiny_training as tiny
from tests.jaxrl.training import run_in_processes as program

ROOT = Path(__file__).resolve().parents[3]


def run(folder, processes, devices, *runs):
  """What each process saw, by the name of the run."""
  shared = {
      **os.environ, 'PYTHONPATH': str(ROOT), hosts.PROCESSES: str(processes),
      hosts.COORDINATOR: f'127.0.0.1:{free_port()}',
      'XLA_FLAGS': f'--xla_force_host_platform_device_count={devices}'}
  running = [
      subprocess.Popen(
          [sys.executable, program.__file__, str(folder), json.dumps(runs)],
          env=shared | {hosts.PROCESS_ID: str(n)}, stdout=subprocess.PIPE,
          stderr=subprocess.STDOUT, text=True)
      for n in range(processes)]
  try:
    said = [process.communicate(timeout=120)[0] for process in running]
  finally:
    for process in running:
      process.kill()
  assert [p.returncode for p in running] == [0] * processes, '\n'.join(said)
  seen = [json.loads((folder / f'{n}.json').read_text()) for n in range(processes)]
  return {name: [s[name] for s in seen] for name in seen[0]}


def end_of(folder, name):
  """The final state of a run, as this one process reads it."""
  like = tiny.start_state(tiny.one_device())
  step, state = Checkpoints(folder / f'{name}_end').restore(like)
  assert step == program.STEPS
  return jax.tree.map(np.asarray, state)


@pytest.mark.parametrize(('processes', 'devices'), [
    (2, 2), pytest.param(4, 1, marks=pytest.mark.slow)])
def test_a_run_on_several_hosts(tmp_path, processes, devices):
  last = processes - 1
  said = run(
      tmp_path, processes, devices,
      {'name': 'whole', 'save_every': 3},
      {'name': 'refused', 'save_every': 3, 'refuse': last},
      {'name': 'cut', 'save_every': 6, 'terminate': [last, 1]})

  assert all(s['ended'] == 'whole' and s['resumed'] == [0] for s in said['whole'])
  assert list(said['whole'][0]['log']) == ['3', '6']
  assert damage(next(tmp_path.glob('whole/step_*'))) is None
  assert len(list(tmp_path.glob('whole/step_00000003/state/ocdbt.process_*'))) == processes

  # The disk of one process is full: all hear of it and nothing is published.
  for process, s in enumerate(said['refused']):
    assert s['ended'].startswith('InputError') and 'File too large' in s['ended']
    assert (f'process {last}' in s['ended']) == (process != last)
  assert not list(tmp_path.glob('refused/step_*'))

  # One process gets SIGTERM in step 2: all save step 4, between two logs.
  assert {s['ended'] for s in said['cut']} == {
      'Preempted: the run was asked to end; step 4 of 6 is saved'}
  assert [list(s['log']) for s in said['cut']] == [['3']] * processes
  shutil.copytree(tmp_path / 'cut', tmp_path / 'moved')
  again = run(tmp_path, processes, devices, {'name': 'cut', 'save_every': 6})['cut']
  for s in again:
    assert (s['ended'], s['resumed']) == ('whole', [4])
    assert s['log'] == {'6': said['whole'][0]['log']['6']}
  whole = end_of(tmp_path, 'whole')
  for a, b in zip(
      jax.tree.leaves(end_of(tmp_path, 'cut')), jax.tree.leaves(whole), strict=True):
    np.testing.assert_array_equal(a, b)

  # One process with other devices goes on from what several have saved.
  ended, log, resumed, state = program.train_in(
      tmp_path / 'moved', mesh=tiny.one_device(), save_every=6)
  assert (ended, resumed) == ('whole', [4])
  assert log['6'] == pytest.approx(said['whole'][0]['log']['6'], rel=1e-5)
  for a, b in zip(jax.tree.leaves(state.params), jax.tree.leaves(whole.params), strict=True):
    np.testing.assert_allclose(a, b, atol=1e-5)
