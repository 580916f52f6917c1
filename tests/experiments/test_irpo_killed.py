"""`python -m experiments.irpo` killed anywhere and started again ends with the same bits."""

import os
import pathlib
import random
import re
import shutil
import signal
import subprocess
import time

import pytest

from tests.experiments import irpo_runs

# One moment in every stage that takes time; in the order in which a run comes by.
MOMENTS = (
    ('before', r'world/problems\.partial/dev\.jsonl'),
    ('before', r'seed/train\.partial/checkpoint/\.step_00000040\.partial$'),
    ('half:2', r'iteration_01/samples\.partial/drawn\.jsonl'),
    ('before', r'iteration_01/samples\.partial/\.samples\.parquet'),
    ('before', r'iteration_01/reference\.partial/\.finished\.json'),
    ('before', r'iteration_01/train\.partial/checkpoint/\.step_00000003\.partial/files\.json'),
    ('before', r'iteration_01/train\.partial/model$'),
)


def damage(path: pathlib.Path) -> pathlib.Path:
  """Changes one byte of the file, or of the largest one in the folder."""
  files = [path] if path.is_file() else [p for p in path.rglob('*') if p.is_file()]
  largest = max(files, key=lambda p: p.stat().st_size)
  content = bytearray(largest.read_bytes())
  content[len(content) // 2] ^= 1
  largest.write_bytes(content)
  return path


def test_a_run_killed_in_every_stage_ends_with_the_same_bits(finished, tmp_path):
  folder = tmp_path / 'killed'
  flags = (f'--run_dir={folder}', *irpo_runs.WORLD)
  damaged = None
  for moment in MOMENTS:
    ended = irpo_runs.run(*flags, cache=finished.cache, kill=moment)
    assert ended.status == -signal.SIGKILL, (moment, ended.stderr[-2000:])
    assert damaged is None or re.search(f'{damaged}: the .* is damaged', ended.stdout)
    damaged = None
    if 'step_00000003' in moment[1]:   # step_1 is left to go on from
      damaged = damage(folder / 'iteration_01/train.partial/checkpoint/step_00000002')
  ended = irpo_runs.run(*flags, cache=finished.cache)
  assert ended.status == 0, ended.stderr[-3000:]
  whole, killed = irpo_runs.contents(finished.folder), irpo_runs.contents(folder)
  assert 'iteration_01/model/model.safetensors' in whole
  assert irpo_runs.differences(whole, killed) == []


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_random_kills_end_with_the_same_bits(tmp_path):
  """At least 25 kills from outside at random moments, over two iterations with a choice of steps.

  The reference run keeps no compiled programs, so that results do not depend on those either.
  """
  flags = (*irpo_runs.WORLD, '--iterations=2', '--dev_prompts=4', '--seed_check_every=10')
  whole = irpo_runs.run(f'--run_dir={tmp_path / "whole"}', *flags, cache=None)
  assert whole.status == 0, whole.stderr[-3000:]
  expected = irpo_runs.contents(tmp_path / 'whole')
  moments, kills, stages = random.Random(0), 0, set()
  while kills < 25:
    folder = tmp_path / 'killed'
    status = None
    while status != 0:
      status = kill_at_random(folder, flags, tmp_path / 'cache', moments)
      assert status in (0, -signal.SIGKILL), status
      kills += status != 0
      if status != 0:
        stages |= {p.name for p in folder.rglob('*.partial')}
    assert irpo_runs.differences(expected, irpo_runs.contents(folder)) == []
    shutil.rmtree(folder)
  print(f'{kills} kills, among others in {sorted(stages)}')


def kill_at_random(
    folder: pathlib.Path, flags: tuple[str, ...], cache: pathlib.Path, moments: random.Random
) -> int:
  """Waits for a random number of changes to the folder, then a moment, then kills the run."""
  changes, pause = moments.randint(1, 30), moments.uniform(0, 0.2)
  with subprocess.Popen(
      irpo_runs.command(f'--run_dir={folder}', *flags), cwd=irpo_runs.ROOT,
      env=irpo_runs.environment(cache), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
  ) as process:
    seen = None
    while changes and process.poll() is None:
      now = {(root, *sorted(names)) for root, _, names in os.walk(folder)}
      changes -= seen is not None and now != seen
      seen = now
      time.sleep(0.02)
    time.sleep(pause)
    process.kill()
  return process.returncode
