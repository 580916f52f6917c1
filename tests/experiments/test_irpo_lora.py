"""IRPO that trains adapters: what a run leaves, going on after a kill, and its flags."""

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import flags
from absl.testing import flagsaver
from etils import epath

from experiments import common_flags, irpo_flags, lora_flags, rounds, sft, sft_flags
from jaxrl.errors import InputError
from jaxrl.models import decoder, lora, peft_folder
from jaxrl.models.config import Experts, Lora
from jaxrl.models.hugging_face import load_params, read_config
from jaxrl.models.params import decoder_specs, is_spec
from jaxrl.runs.manifest import read_manifest
from jaxrl.runs.metrics import read_metrics
from jaxrl.training import checkpoint
from tests.experiments import irpo_runs, small_model

LORA = ('--lora_rank=2', '--lora_alpha=3', '--lora_targets=v,up,down')
WANTED = Lora(2, 3.0, ('v', 'up', 'down'))
# Gold solutions as winners, for nothing that random weights say is right.
RUN = (
    *small_model.FLAGS, '--task=gsm8k', '--gold_in_winners=always', '--samples_per_prompt=2',
    '--pairs_per_prompt=1', '--votes=0', '--learning_rate=0.1', '--log_every=1', '--save_every=1',
    '--max_steps=2', '--max_new_tokens=24', '--length_buckets=63', '--over_length=drop')


@pytest.fixture(scope='module')
def inputs(tmp_path_factory):
  base = tmp_path_factory.mktemp('inputs')
  small_model.write_model(base / 'model')
  small_model.write_problems(base / 'train.jsonl', [small_model.problem(n) for n in range(1, 19)])
  small_model.write_problems(base / 'test.jsonl', [small_model.problem(n) for n in range(19, 27)])
  return tuple(f'--{flag}={base / name}' for flag, name in (
      ('model', 'model'), ('train', 'train.jsonl'), ('test', 'test.jsonl')))


def model_of(inputs) -> epath.Path:
  return epath.Path(inputs[0].partition('=')[2])


@pytest.fixture(scope='module')
def run_folder(inputs, tmp_path_factory):
  """Two iterations that nothing interrupted, the first with a look at held-out prompts."""
  folder = tmp_path_factory.mktemp('run') / 'run'
  with pytest.MonkeyPatch.context() as patch:
    ended = start(patch, folder, inputs)
  assert ended.status == 0, ended.stderr
  return folder


class Silence:
  """Stands in for `capsys`, which only functions have."""

  def readouterr(self):
    return '', ''


def start(patch, folder, inputs, *more):
  def accuracy(session, engine, params, *unused):
    """Best at the last look; asked with whole models."""
    jax.tree.map(lambda spec, x: None, decoder_specs(session.model), params, is_leaf=is_spec)
    return {'greedy_accuracy': float(np.square(params['layers']['v']).mean())}

  patch.setattr(rounds, 'greedy_accuracy', accuracy)
  return irpo_runs.run_here(
      Silence(), f'--run_dir={folder}', *inputs, *RUN, *LORA, '--iterations=2', '--dev_prompts=2',
      *more)


def logits(folder_or_params, c, tokens):
  params = (folder_or_params if isinstance(folder_or_params, dict)
            else load_params(folder_or_params, dataclasses.replace(c, lora=None)))
  return np.asarray(decoder.logits(params, decoder.forward(params, tokens, c), c))


TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 261, (2, 8)), jnp.int32)


@pytest.mark.parametrize('iteration', [1, 2])
def test_the_model_is_the_base_with_its_adapter(iteration, run_folder, inputs):
  """The base of an iteration is the model of the one before."""
  folder = run_folder / f'iteration_{iteration:02d}'
  start_of = {1: model_of(inputs), 2: run_folder / 'iteration_01/model'}[iteration]
  c = read_config(start_of)
  found, adapter = peft_folder.read_adapter(folder / 'adapter', c)
  assert found == WANTED
  adapted = dataclasses.replace(c, lora=found)
  base = load_params(start_of, c)
  merged = lora.merge(lora.attach(base, adapter), adapted)
  written = load_params(folder / 'model', c)
  for (path, a), b in zip(
      jax.tree.leaves_with_path(written), jax.tree.leaves(merged), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-8, err_msg=jax.tree_util.keystr(path))
  moved = {path[-1].key for (path, a), b in zip(
      jax.tree.leaves_with_path(written), jax.tree.leaves(base), strict=True)
           if not np.array_equal(a, b)}
  assert moved == {'v', 'up', 'down'}
  np.testing.assert_allclose(
      logits(lora.attach(base, adapter), adapted, TOKENS), logits(folder / 'model', c, TOKENS),
      rtol=1e-4, atol=1e-5)


def test_peft_loads_the_adapter(run_folder):
  torch = pytest.importorskip('torch')
  peft = pytest.importorskip('peft')
  import transformers
  first, second = (run_folder / f'iteration_{n:02d}' for n in (1, 2))
  c = read_config(second / 'model')
  expected = logits(second / 'model', c, TOKENS)
  base = transformers.AutoModelForCausalLM.from_pretrained(first / 'model', dtype=torch.float32)
  model = peft.PeftModel.from_pretrained(base, second / 'adapter').eval()
  with torch.no_grad():
    found = model(torch.from_numpy(np.array(TOKENS, np.int64))).logits.numpy()
  np.testing.assert_allclose(found, expected, atol=2e-5 * np.abs(expected).max(), rtol=0)


def test_training_starts_at_ln_2_and_looks_at_merged_models(run_folder):
  records = read_metrics(run_folder / 'metrics.jsonl')
  assert [r['step'] for r in records if r['stage'] == 'train'] == [1, 2, 1, 2]
  first = [r for r in records if r['stage'] in ('train', 'select') and r['step'] == 1]
  assert len(first) == 4
  for record in first:
    assert abs(record['loss/preference'] - math.log(2)) < 1e-6
  assert [r['step'] for r in records if r['stage'] == 'select_dev'] == [1, 2, 1, 2]
  entries = read_manifest(run_folder)
  for t in (1, 2):
    outputs = [o.path for o in entries[f'iteration_{t:02d}/train'].outputs]
    assert outputs == [f'iteration_{t:02d}/model', f'iteration_{t:02d}/adapter']
  # Each iteration has its own fresh adapter on the model before it.
  before, after = (entries[f'iteration_{t:02d}/train'].counts for t in (1, 2))
  assert after['before'] == before['after'] != after['after']


class Killed(BaseException):
  pass


def test_a_killed_run_ends_with_the_same_bits(run_folder, inputs, tmp_path, monkeypatch):
  saves, save = [], checkpoint.Checkpoints.save

  def save_and_die(self, step, state, *rest):
    save(self, step, state, *rest)
    self.wait()
    saves.append((sum(x.size for x in jax.tree.leaves(state.params)), self._folder.parent.name))
    if len(saves) == 3:
      raise Killed

  monkeypatch.setattr(checkpoint.Checkpoints, 'save', save_and_die)
  with pytest.raises(Killed):
    start(monkeypatch, tmp_path / 'run', inputs)
  monkeypatch.undo()
  # The adapter alone: A [1, 16, 2] and B [1, 2, 16] of v, and so on; the model has 9,000.
  assert saves == [
      (64 + 96 + 96, f'{stage}.partial') for stage in ('select', 'select', 'train')]
  assert start(monkeypatch, tmp_path / 'run', inputs).status == 0
  whole, other = map(irpo_runs.contents, (run_folder, tmp_path / 'run'))
  assert irpo_runs.differences(whole, other) == []


def test_an_adapter_is_merged_into_the_model_at_the_start(run_folder, inputs, tmp_path):
  """The run then begins with what iteration 1 ended with."""
  ended = irpo_runs.run_here(
      Silence(), f'--run_dir={tmp_path / "run"}', *inputs, *RUN, '--iterations=1',
      f'--adapter={run_folder / "iteration_01/adapter"}')
  assert ended.status == 0
  entries = read_manifest(tmp_path / 'run')
  expected = read_manifest(run_folder)['iteration_01/train'].counts
  merged = entries['start/merge'].counts
  assert merged['before'] == expected['before'] and merged['targets'] == 'v,up,down'
  c = read_config(tmp_path / 'run/start/model')
  for a, b in zip(jax.tree.leaves(load_params(tmp_path / 'run/start/model', c)),
                  jax.tree.leaves(load_params(run_folder / 'iteration_01/model', c)), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-8)
  assert entries['iteration_01/train'].counts['before'] == merged['after']
  assert [o.path for o in entries['iteration_01/train'].outputs] == ['iteration_01/model']


def test_sft_trains_an_adapter(inputs, tmp_path):
  """The held-out loss after training is that of the merged model, looked at during training too."""
  rows = [{'prompt': f'Ana has {n}.', 'response': f'She has {n}.'} for n in range(16)]
  small_model.write_problems(tmp_path / 'rows.jsonl', rows)
  with flagsaver.flagsaver():
    flags.FLAGS.unparse_flags()
    sft_flags.parse([
        'sft', inputs[0], f'--train={tmp_path / "rows.jsonl"}', f'--test={tmp_path / "rows.jsonl"}',
        f'--run_dir={tmp_path / "run"}', '--lora_rank=4', '--learning_rate=0.03', '--batch_size=8',
        '--epochs=3', '--log_every=1', '--save_every=2', '--eval_every=4',
        '--compute_dtype=float32', '--length_buckets=63'])
    common_flags.ends_with_sentence(sft.main)(['sft'])
  records = read_metrics(tmp_path / 'run/metrics.jsonl')
  held_out = {r['step']: r['nll'] for r in records if r['stage'] == 'held_out'}
  assert held_out.keys() == {0, 4, 6} and held_out[0] > held_out[4] > held_out[6]
  first = next(r for r in records if r['stage'] == 'train')
  assert first['loss'] > held_out[4]
  c = read_config(tmp_path / 'run/sft/model')
  found, adapter = peft_folder.read_adapter(tmp_path / 'run/sft/adapter', c)
  assert found == Lora(4, 8.0, lora.TARGETS)
  merged = lora.merge(lora.attach(load_params(model_of(inputs), c), adapter),
                      dataclasses.replace(c, lora=found))
  for a, b in zip(jax.tree.leaves(load_params(tmp_path / 'run/sft/model', c)),
                  jax.tree.leaves(merged), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7)


# Flags


@pytest.fixture
def parsed():
  with flagsaver.flagsaver():
    yield lambda *arguments: (irpo_flags.parse(['irpo', *arguments]), irpo_flags.check())
    flags.FLAGS.mark_as_parsed()


MODEL = ('--model=M', '--train=A', '--test=B')


@pytest.mark.parametrize('arguments, message', [
    (('--lora_alpha=3',), '--lora_alpha: the flag would have no effect; found no --lora_rank'),
    (('--lora_targets=q',), '--lora_targets: the flag would have no effect'),
    (('--lora_rslora',), '--lora_rslora: the flag would have no effect'),
    (('--adapter=D',), '--adapter: the flag would have no effect; found no --model'),
    (('--lora_rank=2', '--lora_alpha=0'), '--lora_alpha: .*a number > 0; found 0'),
    (('--lora_rank=2', '--lora_alpha=nan'), '--lora_alpha: .*a finite number'),
    (('--lora_rank=2', '--lora_targets=q,head'), '--lora_targets: .*q,k,v,o.*found q,head'),
    (('--lora_rank=2', '--lora_targets=q,q'), '--lora_targets: .*each once; found q,q'),
    (('--lora_rank=2', '--lora_targets='), '--lora_targets: .*some of'),
])
def test_flags_that_cannot_work_are_refused(arguments, message, parsed):
  with pytest.raises(InputError, match=message):
    parsed(*arguments)


def test_the_adapter_that_flags_ask_for(parsed):
  parsed(*MODEL)
  c = small_model.CONFIG
  assert lora_flags.adapted(c) is None
  parsed(*MODEL, '--lora_rank=4')
  assert lora_flags.adapted(c).lora == Lora(4, 8.0, lora.TARGETS)
  mixture = dataclasses.replace(c, experts=Experts(4, 2))
  assert lora_flags.adapted(mixture).lora.targets == ('q', 'k', 'v', 'o')
  effective = irpo_flags.effective()
  assert effective['lora_rank'] == '4' and effective['lora_rslora'] == 'false'
  assert 'adapter' not in effective
  parsed(*MODEL, '--lora_rank=9', '--lora_alpha=1.5', '--lora_targets=up,q', '--lora_rslora')
  assert lora_flags.adapted(c).lora == Lora(9, 1.5, ('q', 'up'), True)
  assert lora_flags.adapted(c).lora.scale == 0.5
  with pytest.raises(InputError, match='experts are not supported.*found up'):
    lora_flags.adapted(mixture)


def test_the_embedded_world_with_adapters(finished, tmp_path):
  """From the seed model of the shared run, whose responses are right and wrong."""
  seed, world = finished.folder / 'seed/model', finished.folder / 'world'
  idle = ('--world_', '--seed_')
  ended = irpo_runs.run(
      f'--run_dir={tmp_path / "run"}', f'--model={seed}', '--task=world',
      f'--train={world / "train.jsonl"}', f'--test={world / "test.jsonl"}', '--dedup',
      *(flag for flag in irpo_runs.WORLD if not flag.startswith(idle)),
      '--compute_dtype=float32', '--learning_rate=3e-3', '--lora_rank=4', cache=finished.cache)
  assert ended.status == 0, ended.stderr
  records = [r for r in read_metrics(tmp_path / 'run/metrics.jsonl') if r['stage'] == 'train']
  assert abs(records[0]['loss/preference'] - math.log(2)) < 1e-4
  assert records[-1]['loss'] < records[0]['loss']
  folder = tmp_path / 'run/iteration_01/adapter'
  config = json.loads((folder / peft_folder.CONFIG).read_text())
  assert config['r'] == 4 and config['lora_alpha'] == 8 and len(config['target_modules']) == 7
