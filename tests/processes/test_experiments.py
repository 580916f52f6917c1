"""Other experiments in several processes: stages that IRPO has not, commands that refuse."""

import json

import numpy as np
import pytest
import safetensors.numpy

from experiments import dpo, sft, sft_flags
from tests.experiments import in_process, small_model
from tests.launch_processes import Launched

pytestmark = pytest.mark.processes
COMMON = ('--compute_dtype=float32', '--batch_size=8', '--max_steps=2', '--log_every=1',
          '--save_every=1', '--length_buckets=47', '--learning_rate=1e-3', '--layout=padded')
# As conftest.py has it, so that both compile alike.
DEVICES = 8


@pytest.fixture(scope='module')
def files(tmp_path_factory):
  """A model, 16 pairs and 16 responses."""
  folder = tmp_path_factory.mktemp('files')
  small_model.write_model(folder / 'model')
  small_model.write_problems(folder / 'pairs.jsonl', [
      {'id': f'p{n}', 'prompt': f'{n}+2=?', 'chosen': f'{n + 2}', 'rejected': f'{n}, or 2'}
      for n in range(16)])
  small_model.write_problems(folder / 'responses.jsonl', [
      {'id': f'r{n}', 'prompt': f'{n}+2=?', 'response': f'It is {n + 2}'} for n in range(16)])
  return folder


def in_two(name, folder, *flags):
  return Launched(2, '-m', f'experiments.{name}', f'--run_dir={folder}', *flags,
                  devices_per_process=DEVICES // 2, lost_after=20)


def assert_same(folder, expected, model):
  """Counts and parameters of two runs are the same but for rounding."""
  found, wanted = (json.loads((path / 'manifest.json').read_text())['stages']
                   for path in (folder, expected))
  assert list(found) == list(wanted)
  for stage in wanted:
    for name, count in wanted[stage]['counts'].items():
      if name not in ('before', 'after'):      # hashes of parameters
        assert found[stage]['counts'][name] == pytest.approx(count, abs=1e-5), (stage, name)
  ours, theirs = (safetensors.numpy.load_file(path / model / 'model.safetensors')
                  for path in (folder, expected))
  for name in theirs:
    np.testing.assert_allclose(ours[name], theirs[name], atol=1e-5)


def test_an_adapter_trained_on_pairs_and_held_out_ones(files, tmp_path):
  flags = (f'--model={files / "model"}', f'--train={files / "pairs.jsonl"}', '--score_batch=8',
           f'--test={files / "pairs.jsonl"}', '--lora_rank=2', *COMMON)
  ended = in_process.run(dpo, f'--run_dir={tmp_path / "one"}', *flags)
  assert ended.status == 0, ended.stderr
  run = in_two('dpo', tmp_path / 'two', *flags)
  assert run.status == 0, run.all
  assert_same(tmp_path / 'two', tmp_path / 'one', 'iteration_01/model')
  ours, theirs = (safetensors.numpy.load_file(
      tmp_path / name / 'iteration_01/adapter/adapter_model.safetensors')
                  for name in ('two', 'one'))
  assert all(np.abs(ours[name] - theirs[name]).max() < 1e-5 for name in theirs)


def test_a_new_model_and_its_held_out_loss(files, tmp_path):
  flags = (f'--train={files / "responses.jsonl"}', f'--test={files / "responses.jsonl"}',
           '--eval_every=1', '--d_model=16', '--layers=1', '--heads=2', '--kv_heads=2',
           '--d_mlp=32', '--vocab_size=300', '--max_length=48', *COMMON)
  ended = in_process.run(sft, f'--run_dir={tmp_path / "one"}', *flags, parse=sft_flags.parse)
  assert ended.status == 0, ended.stderr
  run = in_two('sft', tmp_path / 'two', *flags)
  assert run.status == 0, run.all
  assert_same(tmp_path / 'two', tmp_path / 'one', 'sft/model')
  ours, theirs = ((tmp_path / name / 'metrics.jsonl').read_text().splitlines()
                  for name in ('two', 'one'))
  assert len(ours) == len(theirs)


def test_a_command_for_one_process_says_so(files, tmp_path):
  run = Launched(2, '-m', 'experiments.score', f'--model={files / "model"}',
                 f'--data={files / "responses.jsonl"}', f'--output={tmp_path / "out.jsonl"}')
  assert run.status == 2, run.all
  assert any('does not run in several processes; expected 1 process; found 2.' in line
             for line in run.lines[0]), run.all
  assert not list(tmp_path.iterdir())
