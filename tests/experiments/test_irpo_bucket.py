"""`experiments.irpo --run_dir=gs://...`: the same bits as in a folder, whatever is lost."""

import os
import pathlib
import re
import signal
import subprocess
import sys

import pytest

from tests.experiments import irpo_runs

SCRIPT = pathlib.Path(__file__).parent / 'bucket_irpo.py'
# Ahead of which change of the bucket the machine is lost; in the order in which a run comes by.
MOMENTS = (
    ('PUT', r'seed/train\.partial/checkpoint/step_00000040/files\.json'),
    ('PUT', r'iteration_01/samples\.partial/drawn\.jsonl\.parts/000001\.0*[1-9]\d{4}'),
    ('PUT', r'iteration_01/train\.partial/checkpoint/step_00000003/state/'),
    ('PUT', r'iteration_01/train\.partial/checkpoint/step_00000005/files\.json'),
    ('PUT', r'iteration_01/shift\.json'),
)


def run(bucket, disk, cache, moment=None):
  """(status, output) on a machine whose disk is new; lost at `moment`."""
  disk.mkdir()
  command = irpo_runs.command(f'--run_dir={bucket.url}/some/run', *irpo_runs.WORLD)
  command = [sys.executable, str(SCRIPT), *command[3:]]
  environment = irpo_runs.environment(cache) | {'TMPDIR': str(disk)}
  with subprocess.Popen(
      command, cwd=irpo_runs.ROOT, env=environment, stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT, text=True) as process:

    def before(verb, name):
      if moment and verb == moment[0] and re.search(moment[1], name):
        os.kill(process.pid, signal.SIGKILL)
        raise ConnectionResetError     # so that it is not put

    bucket.before = before
    output = process.communicate()[0]
  return process.returncode, output


def contents(bucket, folder):
  """What `irpo_runs.contents` says of the objects as files."""
  for name in bucket.names('some/run/'):
    path = folder / name.removeprefix('some/run/')
    if not name.startswith('some/run/lock/'):
      path.parent.mkdir(parents=True, exist_ok=True)
      path.write_bytes(bucket.content(name))
  return irpo_runs.contents(folder)


@pytest.mark.timeout(1800)
def test_a_run_that_loses_its_machine_in_every_stage_ends_with_the_same_bits(
    finished, bucket, tmp_path
):
  said = []
  for number, moment in enumerate(MOMENTS):
    status, output = run(bucket, tmp_path / f'disk{number}', finished.cache, moment)
    said += output.split()
    assert status == -signal.SIGKILL, (moment, output[-3000:])
    if 'step_00000005' in moment[1]:     # the newest checkpoint is damaged: one is before it
      newest = max(name for name in bucket.names() if 'step_00000004/state/d/' in name)
      bucket.objects[newest] = b'?', 1
  status, output = run(bucket, tmp_path / 'disk', finished.cache)
  assert status == 0, output[-3000:]
  said += output.split()
  assert 'step_00000004:thecheckpointisdamaged' in ''.join(said)     # lines are wrapped
  assert re.search('report: gs://.*/some/run/report.html', output)
  whole = irpo_runs.contents(finished.folder)
  assert 'iteration_01/model/model.safetensors' in whole
  assert irpo_runs.differences(whole, contents(bucket, tmp_path / 'found')) == []
  assert not list((tmp_path / 'disk').glob('jaxrl-*'))
