"""Processes meet, agree and end together; where one is lost the others say so and leave."""

import re

import pytest

from tests.launch_processes import LOST_AFTER, ROOT, Launched

JOINED = ROOT / 'tests' / 'processes' / 'joined.py'
pytestmark = pytest.mark.processes
LOST = 'ended with status 75'


def test_processes_meet_agree_and_end():
  run = Launched(2, JOINED, 'nothing', 9, devices_per_process=2)
  assert run.status == 0, run.all
  for n in range(2):
    # Native code writes lines too, and into those of others.
    said = [line for line in run.lines[n] if line.startswith(('devices', 'told', 'long', 'end'))]
    gathered = None if n else [(0, set(), 0), (1, {'1'}, 2000000)]
    assert said == ['devices 4 sum 6.0', f"told {{'from': 0}} writer {n == 0}",
                    f"long {{'0'}} 3000000 gathered {gathered}", 'end']


def test_a_process_killed_while_others_are_in_a_collective():
  """The collective never returns in some of them, and raises in others."""
  run = Launched(3, JOINED, 'collective', 1)
  assert run.status == 137 and run.statuses() == {
      0: LOST, 1: 'was ended by SIGKILL', 2: LOST}, run.all
  for n in (0, 2):
    assert len(run.errors(n)) == 1
    assert re.fullmatch(
        rf'process {n} of 3 stopped while it was in \w+ \(tests/processes/joined.py, line \d+\), '
        rf'because process 1 was lost \(no sign of life for {LOST_AFTER:g} s\); the same command '
        r'goes on from the last checkpoint\.', run.errors(n)[0])
  assert not any('Traceback' in line for n in (0, 2) for line in run.lines[n])
  assert run.seconds < 60


def test_the_process_that_keeps_the_store_is_killed():
  """JAX aborts all others at once, from native code."""
  run = Launched(2, JOINED, 'barrier', 0)
  assert run.status == 137 and run.statuses() == {0: 'was ended by SIGKILL', 1: LOST}, run.all
  (sentence,) = run.errors(1)
  assert 'because process 0 was lost (the connection to it broke)' in sentence
  assert re.match(r'process 1 of 2 stopped while it waited for the barrier "', sentence)


def test_the_process_that_keeps_the_store_no_longer_answers():
  """Nothing is closed, as where a machine loses its network; the launcher ends what is left."""
  run = Launched(2, JOINED, 'suspended', 0, lost_after=4, grace=1)
  assert run.status == 75 and run.statuses() == {1: LOST}, run.all
  assert run.said[-1] == 'launch.local: ending process 0 after 1 s'
  (sentence,) = run.errors(1)
  assert 'because process 0 was lost (the connection to it broke)' in sentence


def test_who_does_not_come_to_a_barrier_in_time():
  run = Launched(2, JOINED, 'late', 1)
  assert run.status == 75 and run.statuses() == {0: LOST, 1: LOST}
  waited = 'process 0 of 2 waited 1 s at the barrier "the end of the stage", where process 1 did'
  assert run.errors(0) == [f'{waited} not come.']
  (sentence,) = run.errors(1)
  assert waited in sentence and '(tests/processes/joined.py, line ' in sentence


def test_a_process_whose_interpreter_stands_still_is_not_lost():
  """Native code that keeps the interpreter's lock, as some phases of a compilation do."""
  run = Launched(2, JOINED, 'stopped', 1, lost_after=4)
  assert run.status == 0 and all(lines[-1] == 'end' for lines in run.lines), run.all


@pytest.mark.parametrize(('what', 'victim', 'status', 'why'), [
    ('error', 1, 1, 'process 1 stopped with KeyError'),
    ('status', 0, 2, 'process 0 ended with status 2')])
def test_a_process_that_fails_ends_the_others(what, victim, status, why):
  run = Launched(2, JOINED, what, victim)
  other = 1 - victim
  assert run.status == status, run.all
  assert run.statuses() == {victim: f'ended with status {status}', other: LOST}
  (sentence,) = run.errors(other)
  assert f'because {why}; see what it wrote.' in sentence and 'was in collective' in sentence
  assert ('KeyError' in '\n'.join(run.lines[victim])) == (what == 'error')
