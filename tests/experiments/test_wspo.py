"""`python -m experiments.wspo` on tiny models: its stages, its refusals, its published settings."""

import contextlib
import dataclasses
import json
import pathlib
import shutil

import jax
import numpy as np
import pytest
from absl import flags
from absl.testing import flagsaver
from etils import epath

from experiments import common_flags, wspo, wspo_claims, wspo_flags, wspo_table
from jaxrl.data.batches import TokenRow
from jaxrl.errors import InputError
from jaxrl.models.hugging_face import save_model
from jaxrl.models.params import decoder_specs, is_spec
from jaxrl.runs import tables
from jaxrl.runs.manifest import read_manifest
from jaxrl.runs.weak_stage import LOGPS, Responses, check_lengths, check_tokenizers
from jaxrl.tokens.tiny import write_tokenizer
from jaxrl.tokens.tokenizer import load_tokenizer
from tests.experiments import small_model

FLAGS = flags.FLAGS
FOLDER = pathlib.Path(wspo_flags.__file__).parent / 'flags'
WEAK = dataclasses.replace(small_model.CONFIG, d_model=8, n_heads=1, n_kv=1, d_mlp=16,
                           vocab_size=416)     # padded otherwise
SMALL = ('--length_buckets=47', '--score_batch=8', '--batch_size=8', '--compute_dtype=float32',
         '--remat=all', '--learning_rate=1e-2', '--gamma=0.5', '--epochs=4', '--log_every=1',
         '--save_every=4')


def write_model(folder, config, tokenizer, seed):
  rng = np.random.default_rng(seed)
  params = jax.tree.map(
      lambda spec: rng.normal(0, 0.3, spec.shape).astype(np.float32), decoder_specs(config),
      is_leaf=is_spec)
  save_model(folder, params, config, tokenizer_from=tokenizer)


@dataclasses.dataclass(frozen=True)
class Files:
  """Models and rows of a test."""

  base: pathlib.Path

  def given(self, **other):
    named = {name: self.base / name for name in ('model', 'weak_base', 'weak_aligned')}
    named |= {'train': self.base / 'pairs.jsonl', 'run_dir': self.base / 'run'} | other
    return tuple(f'--{name}={value}' for name, value in named.items() if value is not None)


@pytest.fixture(scope='module')
def made(tmp_path_factory):
  base = epath.Path(tmp_path_factory.mktemp('wspo'))
  write_tokenizer(base / 'tokenizer', ['How many apples has Ana?'], vocab_size=400)
  write_model(base / 'model', small_model.CONFIG, base / 'tokenizer', 0)
  write_model(base / 'weak_base', WEAK, base / 'tokenizer', 1)
  write_model(base / 'weak_aligned', WEAK, base / 'tokenizer', 2)
  (base / 'pairs.jsonl').write_text('\n'.join(json.dumps({
      'id': f'p{n}', 'prompt': f'Ana has {n}.', 'chosen': f'{n} apples',
      'rejected': f'{n + 1} pears'}) for n in range(24)))
  small_model.write_problems(base / 'test.jsonl', [
      {'id': str(n), 'question': f'Ana has {n}.', 'answer': str(n)} for n in range(6)])
  return Files(pathlib.Path(base))


@pytest.fixture
def files(made, tmp_path):
  """Links to the models, and a run folder of its own."""
  for name in ('model', 'weak_base', 'weak_aligned', 'pairs.jsonl'):
    (tmp_path / name).symlink_to(made.base / name)
  return Files(tmp_path)


def run(*arguments):
  """The command in this process; InputErrors are raised."""
  with flagsaver.flagsaver(), contextlib.ExitStack() as stack:
    FLAGS.unparse_flags()
    stack.callback(FLAGS.mark_as_parsed)   # flagsaver reads values when it restores them
    wspo.main(common_flags.only_flags(wspo_flags.parse(['wspo', *map(str, arguments)])))


def metrics(folder, stage):
  return [row for row in map(json.loads, (folder / 'metrics.jsonl').read_text().splitlines())
          if row['stage'] == stage]


@pytest.fixture(scope='module')
def finished(made):
  run(*made.given(held_out_prompts=4, test=made.base / 'test.jsonl'), *SMALL, '--task=world',
      '--max_prompt_length=40', '--max_new_tokens=8', '--slots=8')
  return made.base / 'run'


def logps(folder, name):
  table = tables.read_table(folder / 'iteration_01' / f'{name}.parquet', LOGPS)
  return [np.asarray(row) for row in table['logps'].to_pylist()]


def test_a_run_stores_log_ratios_and_follows_them(finished):
  stages = read_manifest(finished)
  own = ('responses', 'weak_base', 'weak_aligned', 'reference_logps', 'train', 'trained', 'follow')
  assert list(stages) == [
      'inputs', *(f'iteration_01/{name}' for name in own),
      *(f'{place}/evaluation' for place in wspo_table.MODELS.values())]
  assert stages['iteration_01/responses'].counts['train'] == 20
  gaps = [a - b for a, b in zip(logps(finished, 'weak_aligned'), logps(finished, 'weak_base'))]
  rows = tables.read_table(
      finished / 'iteration_01' / 'responses.parquet', wspo.RESPONSES).to_pylist()
  assert [len(gap) for gap in gaps] == [len(row['response_ids']) for row in rows]
  held = [n for n, row in enumerate(rows) if row['held_out']]
  change = [new - logps(finished, 'reference_logps')[n]
            for new, n in zip(logps(finished, 'trained'), held)]
  found = stages['iteration_01/follow'].counts
  d_s, d_w = np.concatenate(change), np.concatenate([gaps[n] for n in held])
  np.testing.assert_allclose(found['error'], np.abs(0.5 * d_s - d_w).mean(), rtol=1e-5)
  np.testing.assert_allclose(found['weak_gap_max'], np.abs(d_w).max(), rtol=1e-5)
  assert found['ratio_expected'] == 2 and found['ratio'] > 0
  losses = [row['loss'] for row in metrics(finished, 'train')]
  assert losses[-1] < losses[0]


def test_a_finished_run_is_read_again_and_a_changed_weak_model_is_refused(made, tmp_path):
  weak = tmp_path / 'weak_aligned'
  weak.symlink_to(made.base / 'weak_aligned')
  again = made.given(run_dir=tmp_path / 'run', weak_aligned=weak)
  run(*again, *SMALL)
  before = read_manifest(tmp_path / 'run')
  run(*again, *SMALL)
  assert read_manifest(tmp_path / 'run') == before
  # The same flags, but one weak model was replaced where it lay.
  weak.unlink()
  write_model(epath.Path(weak), WEAK, epath.Path(made.base / 'tokenizer'), 9)
  with pytest.raises(InputError, match='computed for something else'):
    run(*again, *SMALL)


@pytest.mark.parametrize(('arguments', 'message'), [
    (('--gamma=0',), 'gamma'), (('--weak_accuracy=0.5',), 'no embedded world'),
    (('--slots=8',), 'no --test'), (('--beta=0.2',), 'another experiment'),
    (('--held_out_prompts=24',), 'no prompt would be left'),
    (('--max_length=12',), 'too long')])
def test_flags_that_cannot_be_used_are_refused(files, arguments, message):
  with pytest.raises(InputError, match=message):
    run(*files.given(), *SMALL, *arguments)


def test_the_embedded_world_takes_no_files():
  with pytest.raises(InputError, match='own problems and models'):
    run('--train=A')


def test_equal_weak_models_are_refused(files):
  with pytest.raises(InputError, match='same parameters'):
    run(*files.given(weak_aligned=files.base / 'weak_base'), *SMALL)


def test_side_needs_a_preference_file(files):
  path = files.base / 'rows.jsonl'
  path.write_text(json.dumps({'prompt': 'Ana has 2.', 'response': '2 apples'}))
  with pytest.raises(InputError, match='no preference file'):
    run(*files.given(train=path), *SMALL, '--side=chosen')


def test_the_side_decides_what_is_read(files, monkeypatch):
  class Read(BaseException):
    pass

  def look(session, examples, limit):
    assert examples[0].response == '1 pears' and limit == small_model.CONFIG.max_length
    raise Read

  monkeypatch.setattr(wspo, 'encode', look)
  with pytest.raises(Read):
    run(*files.given(), *SMALL, '--side=rejected')


def edited(folder, path, edit):
  """A copy of a tokenizer with one JSON file changed."""
  copy = path / 'tokenizer'
  shutil.copytree(folder, copy)
  edit(copy)
  return load_tokenizer(copy, vocab_size=500)


def edit_file(name, edit):
  return lambda folder: small_model.edit_json(folder / name, edit)


@pytest.mark.parametrize(('edit', 'message'), [
    (edit_file('tokenizer.json', lambda t: t['model']['vocab'].update(
        {'#': t['model']['vocab']['!'], '!': t['model']['vocab']['#']})),
     r"differ in id \d+; expected '!', as in .*; found '#'"),
    (edit_file('tokenizer_config.json', lambda t: t.update(eos_token='<bos>')), 'end'),
    (edit_file('tokenizer_config.json', lambda t: t.update(
        chat_template=t['chat_template'].replace('<|" + message', '<| " + message'))),
     'chat template, from character'),
    (edit_file('tokenizer.json', lambda t: t.update(normalizer={'type': 'Lowercase'})),
     'how they split text')])
def test_tokenizers_that_differ_are_refused(made, tmp_path, edit, message):
  ours = load_tokenizer(made.base / 'tokenizer', vocab_size=400)
  check_tokenizers(ours, edited(made.base / 'tokenizer', tmp_path / 'same', lambda _: None),
                   ['Ana has 2.'])
  with pytest.raises(InputError, match=message):
    check_tokenizers(ours, edited(made.base / 'tokenizer', tmp_path, edit), ['Ana has 2.'])


def test_log_probs_must_fit_the_responses():
  responses = Responses(['a'], [TokenRow([1], [2, 3])], (8,), 1)
  check_lengths('F', responses, [np.zeros(2)])
  with pytest.raises(InputError, match='F, a: .* expected 2 numbers.* found 3'):
    check_lengths('F', responses, [np.zeros(3)])


def test_the_slope_is_one_over_gamma_where_the_error_is_zero():
  weak = [np.array([0.5, -1.0]), np.array([2.0])]
  found = wspo.follow([4 * w for w in weak], weak, 0.25)
  assert found['error'] == 0 and found['explained'] == 1
  assert found['ratio'] == found['ratio_expected'] == 4
  assert (found['weak_gap_max'], found['weak_gap'], found['strong_gap']) == (2, 0.5, 2)
  assert found['error_at_start'] == wspo.follow([0 * w for w in weak], weak, 0.25)['error']


def test_every_model_answers_the_same_problems(finished):
  answers = wspo_table.greedy(finished)
  assert [len(by_problem) for by_problem in answers.values()] == [6] * 4


def test_answers_are_compared_problem_by_problem():
  e = wspo_table.compare({'a': False, 'b': True}, {'b': True, 'a': True})
  assert e.value == 0.5


# Gao et al., released configurations: (coefficient, learning rate, epochs, batch on 4 GPUs).
PUBLISHED = {
    'wspo_sft_lora': (None, 2e-5, 3, 2 * 4 * 4), 'wspo_sft_full': (None, 2e-6, 2, 4 * 8 * 4),
    'wspo_dpo_lora': (0.01, 5e-6, 3, 1 * 8 * 4), 'wspo_dpo_full': (0.1, 1e-5, 1, 1 * 4 * 4),
    'wspo_lora': (0.1, 5e-6, 3, 1 * 8 * 4), 'wspo_full': (0.1, 1e-5, 1, 1 * 4 * 4)}
ROWS = {'sft': 207_865, 'dpo': 61_135, 'wspo': 61_135}


def settings(name):
  lines = (FOLDER / f'{name}.flags').read_text().splitlines()
  return dict(line.removeprefix('--').split('=', 1) for line in lines if line.startswith('--'))


@pytest.mark.parametrize('name', PUBLISHED)
def test_flag_files_have_the_published_settings(name):
  found, (coefficient, rate, epochs, batch) = settings(name), PUBLISHED[name]
  if coefficient is not None:
    text = found.get('gamma') or found['loss_options'].removeprefix('beta=')
    assert float(text) == coefficient
  assert (float(found['learning_rate']), float(found['epochs'])) == (rate, epochs)
  assert int(found['batch_size']) == batch
  assert (found['schedule'], found['compute_dtype']) == ('cosine', 'bfloat16')
  assert found['max_length'] == '4096' and ('lora_rank' in found) == name.endswith('lora')
  kind = name.split('_')[1] if name.count('_') == 2 else 'wspo'
  assert int(found['warmup_steps']) == round(epochs * ROWS[kind] / batch / 10)


@pytest.mark.parametrize('name', ['wspo_lora', 'wspo_full'])
def test_flag_files_are_taken(name):
  with flagsaver.flagsaver(), contextlib.ExitStack() as stack:
    FLAGS.unparse_flags()
    stack.callback(FLAGS.mark_as_parsed)
    wspo_flags.parse(['wspo', f'--flagfile={FOLDER / name}.flags', '--model=M', '--weak_base=A',
                      '--weak_aligned=B', '--train=T'])
    assert wspo_flags.check() == {'gamma': 0.1, 'level': 'token'}
    assert FLAGS.side == 'chosen'


def test_every_flag_file_is_tried_here():
  names = {path.stem for path in FOLDER.glob('wspo_*.flags')}
  assert names == {*PUBLISHED, 'wspo_world'}


def _seed(number=0, over_weak=0.1, over_strong=0.2, ratios=(1.5, 4.0, 0.9)):
  def difference(value):
    return {'value': value, 'low': value - 0.05, 'high': value + 0.05, 'text': f'{value}'}

  return {'seed': number, 'gammas': [
      {'gamma': gamma, 'ratio': ratio, 'ratio_expected': 1 / gamma,
       'weak gain': difference(0.2), 'over weak aligned': difference(over_weak),
       'over strong base': difference(over_strong)}
      for gamma, ratio in zip((0.5, 0.1, 1.0), ratios, strict=True)]}


@pytest.mark.parametrize(('changes', 'expected'), [
    ({}, ['holds'] * 4),
    ({'over_weak': -0.1}, ['holds', 'does not hold', 'holds', 'holds']),
    ({'over_strong': 0.01}, ['holds', 'holds', 'undecided', 'holds']),
    ({'ratios': (1.5, 1.4, 0.9)}, ['holds', 'holds', 'holds', 'does not hold'])])
def test_verdicts_are_computed_from_the_figures(changes, expected):
  found = wspo_claims.verdicts([_seed(0, **changes)])
  assert [v['verdict'] for v in found.values()] == expected


def test_verdicts_over_seeds_take_the_interval_over_seeds():
  seeds = [_seed(n, over_weak=value) for n, value in enumerate((0.04, 0.045, 0.042))]
  assert list(wspo_claims.verdicts(seeds).values())[1]['verdict'] == 'holds'
  seeds = [_seed(n, over_weak=value) for n, value in enumerate((0.04, -0.045, 0.042))]
  assert list(wspo_claims.verdicts(seeds).values())[1]['verdict'] == 'undecided'
