"""`python -m experiments.dpo`: losses and variants train, held-out pairs, resume, bad flags."""

import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow.parquet as pq
import pytest
from absl import flags
from absl.testing import flagsaver

from experiments import dpo, dpo_flags, loss_flags
from jaxrl.data.batches import TokenRow
from jaxrl.losses import preference
from jaxrl.losses.preference import LOSSES, needs_reference
from jaxrl.models.hugging_face import load_params, read_config
from jaxrl.runs.metrics import read_metrics
from tests.experiments import in_process, irpo_runs, small_model

FLAGS = flags.FLAGS
SMALL = ('--compute_dtype=float32', '--remat=all', '--batch_size=8', '--score_batch=8',
         '--log_every=1', '--save_every=2', '--length_buckets=47', '--learning_rate=1e-3',
         '--max_steps=2')


def run(*arguments: object) -> irpo_runs.Ended:
  """The command in this process."""
  return in_process.run(dpo, *arguments)


@pytest.fixture(scope='module')
def files(tmp_path_factory):
  """A model, 16 pairs, 8 held-out pairs and 16 labelled rows."""
  folder = tmp_path_factory.mktemp('dpo')
  small_model.write_model(folder / 'model')
  rng = np.random.default_rng(0)

  def row(n):
    a, b = rng.integers(1, 9, 2)
    return {'id': f'p{n}', 'prompt': f'{a}+{b}=?', 'chosen': f'{a + b}', 'rejected': f'{a}, or {b}'}

  pairs = [row(n) for n in range(24)]
  small_model.write_problems(folder / 'train.jsonl', pairs[:16])
  small_model.write_problems(folder / 'test.jsonl', pairs[16:])
  small_model.write_problems(folder / 'labelled.jsonl', [
      {'id': p['id'], 'prompt': p['prompt'], 'completion': p[side], 'label': side == 'chosen'}
      for p, side in zip(pairs[:16], ('chosen', 'rejected') * 8, strict=True)])
  return folder


def arguments(files, name, *more):
  return (f'--model={files / "model"}', f'--train={files / "train.jsonl"}',
          f'--run_dir={files / name}', *SMALL, *more)


@pytest.fixture(scope='module')
def finished(files):
  ended = run(*arguments(files, 'dpo', '--loss_options=beta=0.5',
                         f'--test={files / "test.jsonl"}'))
  assert ended.status == 0, ended.stderr
  return files / 'dpo', ended


def test_the_first_loss_is_ln_2_and_held_out_pairs_are_measured(finished, files):
  folder, ended = finished
  records = read_metrics(folder / 'metrics.jsonl')
  first = next(r for r in records if r['stage'] == 'train' and r['step'] == 1)
  assert first['loss'] == pytest.approx(math.log(2), abs=1e-6)
  held_out = [r for r in records if r['stage'] == 'held_out']
  assert [r['iteration'] for r in held_out] == [0, 1]
  assert 'reward_accuracy' not in held_out[0] and 0 <= held_out[1]['reward_accuracy'] <= 1
  assert held_out[1]['margin'] > 0.01
  assert 'held-out pairs after: chosen above rejected by reward' in ended.stdout
  assert (folder / 'iteration_01' / 'model' / 'model.safetensors').exists()


def test_pairs_hold_the_ids_of_template_and_responses(finished):
  folder, _ = finished
  rows = pq.read_table(folder / 'iteration_01' / 'pairs.parquet').to_pylist()
  assert len(rows) == 16 and rows[0]['prompt_id'] == 'p0'
  assert rows[0]['chosen_ids'][-1] == rows[0]['rejected_ids'][-1] == 2          # EOS
  reference = pq.read_table(folder / 'iteration_01' / 'reference.parquet').to_pylist()
  assert [len(r['chosen_logps']) for r in reference] == [len(r['chosen_ids']) for r in rows]


def test_the_same_command_again_trains_nothing_and_a_changed_file_is_refused(finished, files):
  again = run(*arguments(files, 'dpo', '--loss_options=beta=0.5',
                         f'--test={files / "test.jsonl"}'))
  assert again.status == 0 and 'step 1/' not in again.stdout
  text = (files / 'train.jsonl').read_text()
  try:
    (files / 'train.jsonl').write_text(text.replace('or', 'und'))
    changed = run(*arguments(files, 'dpo', '--loss_options=beta=0.5',
                             f'--test={files / "test.jsonl"}'))
  finally:
    (files / 'train.jsonl').write_text(text)
  assert changed.status == 2 and 'train file changed' in changed.stderr


# One loss of each kind here; values and gradients of all are the subject of the loss tests.
@pytest.mark.parametrize(('name', 'more'), [
    ('simpo', ()), ('bco', ('--micro_batches=1',)), ('aot', ()),
    ('mixed', ('--loss=dpo:0.8,bco:0.2,nll:1', '--loss_options=bco.delta_mode=none,dpo.beta=0.3')),
    ('wpo', ('--loss=dpo', '--wpo')), ('ld', ('--loss=dpo', '--ld_alpha=0.5')),
    ('tr', ('--loss=dpo', '--reference_sync_steps=1', '--reference_sync_mix=0.5')),
    ('lora', ('--loss=irpo', '--lora_rank=2', '--loss_options=beta=0.3,alpha=0.5')),
    ('lora_bco', ('--loss=bco', '--lora_rank=2', '--micro_batches=1'))])
def test_losses_and_variants_train(files, name, more):
  loss = () if any(m.startswith('--loss=') for m in more) else (f'--loss={name}',)
  ended = run(*arguments(files, f'run_{name}', *loss, *more))
  assert ended.status == 0, ended.stderr
  records = [r for r in read_metrics(files / f'run_{name}' / 'metrics.jsonl')
             if r['stage'] == 'train']
  assert [r['step'] for r in records] == [1, 2]
  assert all(np.isfinite(r['loss']) and r['grad_norm'] > 0 for r in records)
  has_reference = (files / f'run_{name}' / 'iteration_01' / 'reference.parquet').exists()
  assert has_reference == (name != 'simpo')


def test_the_reference_of_tr_dpo_moves(files):
  """With mix 1 after every step the policy meets itself: every loss is ln 2."""
  ended = run(*arguments(files, 'tr_one', '--reference_sync_steps=1', '--reference_sync_mix=1'))
  assert ended.status == 0, ended.stderr
  losses = [r['loss'] for r in read_metrics(files / 'tr_one' / 'metrics.jsonl')
            if r['stage'] == 'train']
  np.testing.assert_allclose(losses, math.log(2), atol=1e-5)


@pytest.mark.parametrize('more', [(), ('--lora_rank=2',)])
def test_kto_trains_on_labelled_rows(files, more):
  name = f'kto{len(more)}'
  ended = run(f'--model={files / "model"}', f'--train={files / "labelled.jsonl"}',
              f'--run_dir={files / name}', *SMALL, '--loss=kto', '--loss_options=beta=0.5', *more)
  assert ended.status == 0, ended.stderr
  records = [r for r in read_metrics(files / name / 'metrics.jsonl') if r['stage'] == 'train']
  assert records[0]['loss'] == pytest.approx(0.5, abs=1e-5)      # policy = reference, z0 = 0
  assert records[1]['loss'] < 0.5 and 'rewards/desirable' in records[0]


def test_another_reference_is_scored_in_any_storage(files):
  """int8 gives other log-probs than float32, and close ones."""
  found = {}
  for storage in ('float32', 'int8'):
    name = f'reference_{storage}'
    ended = run(*arguments(files, name, f'--reference={files / "model"}',
                           f'--reference_storage={storage}'))
    assert ended.status == 0, ended.stderr
    rows = pq.read_table(files / name / 'iteration_01' / 'reference.parquet').to_pylist()
    found[storage] = np.concatenate([r['chosen_logps'] for r in rows])
  gap = np.abs(found['int8'] - found['float32'])
  assert 0 < gap.max() < 0.05


def test_mismatched_responses_come_from_the_row_before_in_the_group():
  rows = [TokenRow([n], [10 + n]) for n in range(7)]
  found = dpo.mismatched(rows, 3)                     # groups 0-2 and 3-6: no row stands alone
  assert [r.prompt_ids for r in found] == [[n] for n in range(7)]
  assert [r.response_ids[0] - 10 for r in found] == [2, 0, 1, 6, 3, 4, 5]


@pytest.mark.parametrize('name', sorted(set(LOSSES) - {'rdpo_len', 'reward_aware'}))
def test_the_expected_first_loss_is_that_of_equal_policies(name):
  config = loss_flags.LossConfig({name: (1.0, {})}, preference.PLAIN, None, None)
  with flagsaver.flagsaver():
    FLAGS.unparse_flags()
    FLAGS(['dpo'])
    expected = dpo.first_loss(config)
  assert (expected is not None) == needs_reference(name)
  if expected is not None:
    one = jnp.ones((1, 1))
    equal = dict.fromkeys(('policy_chosen', 'policy_rejected', 'ref_chosen', 'ref_rejected'), -one)
    terms, _ = preference.totals(name, preference.survey(name, preference.pair_sums(
        equal | {'chosen_mask': one, 'rejected_mask': one}))[0])
    assert expected == pytest.approx(float(terms['preference'][0]), rel=1e-6)


@pytest.mark.parametrize(('more', 'words'), [
    (('--loss=ppo',), 'unknown loss'), (('--loss_options=gamma=1',), "no option 'gamma'"),
    (('--loss_options=beta',), 'name=value'), (('--loss=dpo,dpo',), 'named twice'),
    (('--loss=dpo:2',), 'only scales'), (('--loss=dpo:0.5,nll:x',), 'positive number'),
    (('--loss=dpo,nll', '--loss_options=beta=1'), 'loss.name=value'),
    (('--loss=simpo', '--reference_free'), 'reference'), (('--loss=aot,bco',), 'whole batch'),
    (('--loss=kto,nll',), 'mixes with no other'), (('--loss=aot', '--wpo'), 'WPO'),
    (('--divergence_alpha=0.5',), 'no effect'), (('--reference_sync_mix=0.5',), 'no effect'),
    (('--loss=simpo', '--reference=x'), 'no effect'), (('--reference_storage=int8',), 'no effect'),
    (('--temperature=1',), 'no effect'), (('--max_length=5',), 'too long'),
    (('--reference_sync_steps=2', '--lora_rank=2'), 'copy of the model'),
    (('--train=/nowhere.jsonl',), 'nowhere'), (('--batch_size=3',), 'nothing to do'),
    (('--batch_size=12', '--layout=padded'), 'divide')])
def test_bad_flags_end_with_one_sentence(files, more, words, tmp_path):
  ended = run(*arguments(files, 'bad', *more), f'--run_dir={tmp_path / "run"}')
  assert ended.status == 2 and words in ended.stderr, ended.stderr
  assert ended.stderr.count('\n') == 1 and ended.stderr.startswith('error: ')


def test_long_rows_are_dropped_or_cut_and_counted(files):
  ended = run(*arguments(files, 'cut', '--max_length=12', '--over_length=truncate'))
  assert ended.status == 0 and 'truncated' in ended.stdout, ended.stderr
  rows = pq.read_table(files / 'cut' / 'iteration_01' / 'pairs.parquet').to_pylist()
  assert max(len(r['prompt_ids']) + len(r['rejected_ids']) for r in rows) == 12


def test_the_trained_model_is_a_folder_like_the_first(finished, files):
  folder, _ = finished
  model = folder / 'iteration_01' / 'model'
  c = read_config(model)
  assert c == read_config(files / 'model')
  before, after = load_params(files / 'model', c), load_params(model, c)
  moved = jax.tree.map(lambda x, y: float(np.abs(x - y).max()), before, after)
  assert max(jax.tree.leaves(moved)) > 1e-4


@pytest.mark.parametrize('name', ['wspo_dpo_full', 'wspo_dpo_lora'])
def test_published_settings_are_accepted(name, files):
  """The weak models of WSPO are aligned by this experiment."""
  folder = pathlib.Path(dpo.__file__).parent / 'flags'
  with flagsaver.flagsaver():
    FLAGS.unparse_flags()
    FLAGS(['dpo', f'--flagfile={folder / name}.flags', f'--model={files / "model"}',
           f'--train={files / "train.jsonl"}'])
    assert list(dpo_flags.check().parts) == ['dpo']
