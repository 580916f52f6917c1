"""A whole run of experiments.irpo on gs:// in several processes, one of which is killed."""

import pytest

from tests.experiments import small_model
from tests.processes.test_irpo import ATOL, assert_same, launch

pytestmark = pytest.mark.processes


def test_four_processes_and_then_two_leave_in_a_bucket_what_one_leaves_in_a_folder(
    bucket, tmp_path, monkeypatch
):
  monkeypatch.setenv('JAX_COMPILATION_CACHE_DIR', str(tmp_path / 'cache'))
  monkeypatch.setenv('JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS', '0')
  monkeypatch.setenv('JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES', '-1')
  small_model.write_model(tmp_path / 'model')
  for split, numbers in (('train', range(10)), ('test', range(10, 15))):
    small_model.write_problems(tmp_path / f'{split}.jsonl', map(small_model.problem, numbers))
  flags = (
      f'--model={tmp_path / "model"}', f'--train={tmp_path / "train.jsonl"}',
      f'--test={tmp_path / "test.jsonl"}', '--task=gsm8k', *small_model.FLAGS,
      '--gold_in_winners=always', '--iterations=2', '--samples_per_prompt=3',
      '--pairs_per_prompt=2', '--votes=2', '--layout=padded', '--learning_rate=1e-3',
      '--log_every=1', '--save_every=1')
  run = launch(1, tmp_path / 'expected', flags)
  assert run.status == 0, run.all

  run = launch(4, f'{bucket.url}/run', flags, (2, 'train', 3))
  assert run.status == 137, run.all
  assert 'run/iteration_01/pairs.parquet' in bucket.objects
  assert 'run/iteration_01/train.partial/checkpoint/step_00000001/files.json' in bucket.objects
  shards = bucket.names('run/iteration_01/train.partial/checkpoint/step_00000001/state/ocdbt')
  assert {name.split('/')[6] for name in shards} == {f'ocdbt.process_{n}' for n in range(4)}
  assert not bucket.names('run/iteration_01/samples.partial')

  run = launch(2, f'{bucket.url}/run', flags)
  assert run.status == 0, run.all
  for name in bucket.names('run/'):
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(bucket.content(name))
  assert not list((tmp_path / 'run').rglob('*.partial'))
  assert assert_same(tmp_path / 'run', tmp_path / 'expected') < ATOL
