"""`python -m experiments.export`: what transformers makes of the folder, and what stops it."""

import json
import os
import pathlib
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from absl import flags

from experiments import export
from jaxrl.models.hugging_face import load_params, read_config, save_model
from jaxrl.runs.folder import open_run
from jaxrl.runs.lock import hold_lock
from tests import hugging_face_oracle as oracle
from tests.experiments import in_process, irpo_runs, small_model

FLAGS = flags.FLAGS
PROMPT = [{'role': 'user', 'content': 'How many apples has Ana?'}]


def run(*arguments: object) -> irpo_runs.Ended:
  """The command in this process."""
  return in_process.run(export, '--mesh=1,8,1', *arguments)


def write_run(folder, model, iterations=2):
  """A run as the train stage leaves it: one model per iteration, each with other weights."""
  c = read_config(model)
  params = load_params(model, c)
  with open_run(folder, flags={'model': str(model), 'seed': '0'}, versions={}) as run:
    for n in range(1, iterations + 1):
      moved = jax.tree.map(lambda x, n=n: x * (1 + 0.1 * n), params)

      def produce(scratch, moved=moved):
        save_model(scratch / 'model', moved, c, tokenizer_from=model, dtype=jnp.float32)
        return {}

      run.stage(f'iteration_{n:02d}/train', (f'iteration_{n:02d}/model',), produce)


@pytest.fixture(scope='module')
def made(tmp_path_factory):
  """A bfloat16 checkpoint and a run of two iterations that started from it."""
  base = tmp_path_factory.mktemp('export')
  small_model.write_model(base / 'float32')
  c = read_config(base / 'float32')
  save_model(base / 'start', load_params(base / 'float32', c), c, tokenizer_from=base / 'float32',
             dtype=jnp.bfloat16)
  small_model.edit_json(base / 'start' / 'generation_config.json',
                        lambda value: value.update(temperature=0.6, do_sample=True))
  write_run(base / 'run', base / 'start')
  return base


def weights(folder):
  return safetensors.numpy.load_file(pathlib.Path(folder) / 'model.safetensors')


def assert_transformers_gives_our_logits(folder, params, c):
  import transformers

  model, notes = transformers.AutoModelForCausalLM.from_pretrained(
      folder, dtype=oracle.torch.float32, output_loading_info=True)
  assert not any(notes.values()), notes
  tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
  ids = tokenizer.apply_chat_template(PROMPT, add_generation_prompt=True, return_dict=False)
  tokens = np.array([ids])
  theirs = oracle.torch_logits(model.eval(), tokens)
  ours = oracle.our_logits(params, tokens, c)
  assert np.abs(ours - theirs).max() < 2e-5 * np.abs(theirs).max()
  return model


def test_transformers_loads_the_last_iteration(made, tmp_path):
  ended = run(f'--run_dir={made / "run"}', f'--output={tmp_path / "out"}', '--dtype=float32')
  assert ended.status == 0, ended.stderr
  source = made / 'run' / 'iteration_02' / 'model'
  c = read_config(source)
  model = assert_transformers_gives_our_logits(tmp_path / 'out', load_params(source, c), c)
  assert model.generation_config.temperature == 0.6
  for name, value in weights(source).items():           # float32 is exact
    np.testing.assert_array_equal(weights(tmp_path / 'out')[name], value)
  for file in ('tokenizer.json', 'tokenizer_config.json', 'generation_config.json'):
    assert (tmp_path / 'out' / file).read_bytes() == (made / 'start' / file).read_bytes()
  lines = ended.stdout.splitlines()
  assert lines[0].startswith(f'{source}: as it was when iteration_02/train finished, ')
  assert lines[-1].startswith(f'{tmp_path / "out"}: float32, ') and len(lines) == 2


def test_the_type_is_that_of_the_start(made, tmp_path):
  ended = run(f'--run_dir={made / "run"}', f'--output={tmp_path / "out"}', '--iteration=1')
  assert ended.status == 0, ended.stderr
  trained = weights(made / 'run' / 'iteration_01' / 'model')
  found = weights(tmp_path / 'out')
  assert found.keys() == trained.keys()
  for name, value in found.items():
    assert value.dtype == jnp.bfloat16
    np.testing.assert_array_equal(value, trained[name].astype(jnp.bfloat16))
  assert json.loads((tmp_path / 'out' / 'config.json').read_text())['torch_dtype'] == 'bfloat16'
  assert ': bfloat16, ' in ended.stdout
  moved = float(ended.stdout.split('changed the weights by ')[1].split()[0])
  assert 2 ** -11 < moved < 2 ** -8
  params = jax.tree.map(lambda x: x.astype(jnp.float32), load_params(
      tmp_path / 'out', read_config(tmp_path / 'out')))
  assert_transformers_gives_our_logits(tmp_path / 'out', params, read_config(tmp_path / 'out'))


def test_shards(made, tmp_path):
  ended = run(f'--run_dir={made / "run"}', f'--output={tmp_path / "out"}', '--max_shard_size=8KB',
              '--dtype=float32')
  assert ended.status == 0, ended.stderr
  index = json.loads((tmp_path / 'out' / 'model.safetensors.index.json').read_text())
  files = set(index['weight_map'].values())
  assert len(files) > 1 and f'in {len(files)} files' in ended.stdout
  source = made / 'run' / 'iteration_02' / 'model'
  c = read_config(source)
  assert_transformers_gives_our_logits(tmp_path / 'out', load_params(source, c), c)


def test_a_run_that_goes_on_can_be_exported_from(made, tmp_path):
  """Its process holds the lock, and its third iteration is half done."""
  folder = tmp_path / 'run'
  shutil.copytree(made / 'run', folder)
  (folder / 'iteration_03' / 'train.partial').mkdir(parents=True)
  with hold_lock(folder / 'lock'):
    ended = run(f'--run_dir={folder}', f'--output={tmp_path / "out"}')
    assert ended.status == 0 and 'iteration_02/train' in ended.stdout
    ended = run(f'--run_dir={folder}', f'--output={tmp_path / "third"}', '--iteration=3')
  assert ended.status == 2 and not (tmp_path / 'third').exists()
  assert 'expected a finished stage iteration_03/train' in ended.stderr
  assert 'found models of iteration_01/train, iteration_02/train' in ended.stderr


def test_a_run_of_irpo(finished, tmp_path):
  """The embedded world's own run, by the command; iteration 0 is the seed model."""
  for more, stage in (((), 'iteration_01/train'), (('--iteration=0',), 'seed/train')):
    output = tmp_path / stage.replace('/', '_')
    done = subprocess.run(
        [sys.executable, '-m', 'experiments.export', f'--run_dir={finished.folder}',
         f'--output={output}', *more], cwd=irpo_runs.ROOT,
        env=irpo_runs.environment(finished.cache), capture_output=True, text=True, check=False)
    assert done.returncode == 0 and done.stderr == '', done.stderr
    assert f'as it was when {stage} finished' in done.stdout and ': float32, ' in done.stdout
    source = finished.folder / stage.replace('train', 'model')
    c = read_config(source)
    assert_transformers_gives_our_logits(output, load_params(source, c), c)


def test_a_run_of_sft(made, tmp_path):
  """Its result has a name of its own; what it made to start from is iteration 0."""
  c = read_config(made / 'start')
  params = load_params(made / 'start', c)
  with open_run(tmp_path / 'run', flags={'seed': '0'}, versions={}) as run_folder:
    for stage, output, factor in (('sft/data', 'sft/start', 1.0), ('sft/train', 'sft/model', 2.0)):

      def produce(scratch, output=output, factor=factor):
        save_model(scratch / output[4:], jax.tree.map(lambda x: x * factor, params), c,
                   tokenizer_from=made / 'start', dtype=jnp.float32)
        return {}

      run_folder.stage(stage, (output,), produce)
  for name, more in (('sft/model', ()), ('sft/start', ('--iteration=0',))):
    output = tmp_path / name[4:]
    ended = run(f'--run_dir={tmp_path / "run"}', f'--output={output}', *more)
    assert ended.status == 0, ended.stderr
    for key, value in weights(tmp_path / 'run' / name).items():
      np.testing.assert_array_equal(weights(output)[key], value)


def test_what_cannot_be_exported_is_named(made, tmp_path):
  good = f'--run_dir={made / "run"}', f'--output={tmp_path / "out"}'
  other = tmp_path / 'other'
  shutil.copytree(made / 'run', other)
  weights_file = other / 'iteration_02' / 'model' / 'model.safetensors'
  weights_file.write_bytes(weights_file.read_bytes()[:-4] + b'\0\0\0\1')
  empty = tmp_path / 'empty'
  with open_run(empty, flags={'seed': '0'}, versions={}):
    pass
  moved = tmp_path / 'moved'
  shutil.copytree(made / 'run', moved)
  (moved / 'flags.flags').write_text('--model=/nowhere/at/all\n--seed=0\n')
  for arguments, expected in [
      ([f'--run_dir={tmp_path / "none"}', good[1]], 'this is not a run folder'),
      ([f'--run_dir={made / "start"}', good[1]], 'found a folder without it'),
      ([f'--run_dir={empty}', good[1]], 'found models of no stage. Wait until it has finished'),
      ([*good, '--iteration=7'], 'expected a finished stage iteration_07/train'),
      ([*good, '--iteration=0'], 'A run that was given a --model starts from that'),
      ([good[0], f'--output={made / "start"}'], 'the output already exists'),
      ([good[0]], '--output: exporting needs this flag'),
      ([good[1]], '--run_dir: exporting needs this flag'),
      ([*good, '--max_shard_size=big'], '--max_shard_size: the size cannot be read'),
      ([*good, '--seed=3'], '--seed: the flag would have no effect'),
      ([*good, '--dtype=int8'], 'dtype'),
      ([f'--run_dir={other}', good[1]], 'this output was changed after stage iteration_02/train'),
      ([f'--run_dir={moved}', good[1]], 'tells no --dtype')]:
    ended = run(*arguments)
    assert ended.status == 2 and ended.stderr.count('\n') == 1, (arguments, ended)
    assert expected in ended.stderr, ended.stderr
    assert not os.path.lexists(tmp_path / 'out')
  assert run(f'--run_dir={moved}', good[1], '--dtype=float32').status == 0


@pytest.mark.parametrize('text, expected', [
    ('5GB', 5_000_000_000), ('1.5 MiB', 1_572_864), ('700', 700), ('2KB', 2000), ('1G', 10**9)])
def test_sizes(text, expected):
  assert export.shard_bytes(text) == expected
