"""DIVE from its command line: growing pools, diverse pairs, metrics, flags and verdicts."""

import io
import json
import math
import re
import subprocess
import sys
import types

import numpy as np
import pytest
from absl import flags
from absl.testing import flagsaver
from etils import epath
from rich.console import Console

from experiments import (
    claim_runs,
    dive,
    dive_claims,
    dive_flags,
    dive_table,
    lora_flags,
    sft_flags,
    world,
)
from jaxrl.errors import InputError
from jaxrl.evaluation.statistics import Estimate
from jaxrl.evaluation.text_embedding import hashed_ngrams
from jaxrl.preferences.dive import DiveConfig, build_diverse_pairs, pool_rows
from jaxrl.runs import diversity_stage, report, tables
from jaxrl.runs.metrics import read_metrics
from jaxrl.runs.progress import Progress
from jaxrl.runs.session import PAIR_STREAM, Session
from jaxrl.runs.stages import Run
from tests.experiments import irpo_runs
from tests.experiments.test_flagfiles import INPUTS, MACHINE, ROWS, RULES

FLAGS = flags.FLAGS
FOLDER = dive_flags.WORLD_FLAGS.parent
K, P, VOTES = 12, 3, 4
SETTINGS = (
    '--task=world', '--compute_dtype=float32', '--remat=all', '--iterations=2',
    f'--samples_per_prompt={K}', f'--pairs_per_prompt={P}', '--temperature=0.8',
    '--max_prompt_length=24', '--max_new_tokens=20', '--length_buckets=44', '--logp_chunk=128',
    '--learning_rate=1e-3', '--batch_size=4', f'--votes={VOTES}', '--slots=64',
    '--log_every=1')


@pytest.fixture(scope='module')
def run(finished, tmp_path_factory):
  """Folder and stdout of a run with a global pool and selection."""
  folder = tmp_path_factory.mktemp('dive') / 'run'
  done = subprocess.run(
      [sys.executable, '-m', 'experiments.dive', f'--run_dir={folder}',
       f'--model={finished.folder}/seed/model', f'--train={finished.folder}/world/train.jsonl',
       f'--test={finished.folder}/world/test.jsonl', *SETTINGS],
      cwd=irpo_runs.ROOT, env=irpo_runs.environment(finished.cache), capture_output=True, text=True,
      check=False)
  assert done.returncode == 0, done.stderr[-2000:]
  return epath.Path(folder), done.stdout


def read(folder, iteration, name):
  path = folder / f'iteration_{iteration:02d}/{name}.parquet'
  return tables.read_table(path, getattr(tables, name.upper())).to_pylist()


def scored(folder, iteration):
  return [a | b for a, b in zip(
      read(folder, iteration, 'samples'), read(folder, iteration, 'scores'), strict=True)]


# The run


def test_pairs_are_picked_from_all_iterations(run):
  folder, _ = run
  entries = Run(folder).entries
  seed = Session(*[None] * 7, seed=0, programs=None).stream_seed
  for t in (1, 2):
    pool = pool_rows([scored(folder, n) for n in range(1, t + 1)], global_pool=True)
    by_words, expected = build_diverse_pairs(
        pool, hashed_ngrams([row['response'] for row in pool]),
        DiveConfig(P, True, True, None, 44, seed(t, PAIR_STREAM)))
    # What is left out does not depend on the embeddings, but what is picked does.
    found = entries[f'iteration_{t:02d}/pairs'].counts
    assert found['pairs/pool'] == len(pool) == 24 * K * t
    assert {k: v for k, v in found.items() if 'diversity' not in k} == {
        'pairs/pool': len(pool)} | {k: v for k, v in expected.items() if 'diversity' not in k}
    pairs = read(folder, t, 'pairs')
    picked = [(row['prompt_id'], tuple(row['chosen_ids'])) for row in pairs]
    assert [row['rejected_ids'] for row in pairs] != [row['rejected_ids'] for row in by_words]
    assert len(picked) == len({*picked}) == found['pairs/count'] > 4   # no repeats on a side
  verdicts = {(row['prompt_id'], tuple(row['response_ids'])): row['verdict'] for row in pool}
  assert {verdicts[key] for key in picked} == {'correct'}
  origins = {row['chosen_why'][-13:] for row in pairs}
  assert origins == {'(iteration 1)', '(iteration 2)'}


def test_reference_of_an_old_response_is_the_latest_model(run):
  folder, _ = run
  drawn = {(row['prompt_id'], row['sample_index']): row for row in read(folder, 1, 'samples')}
  old = 0
  for pair, reference in zip(
      read(folder, 2, 'pairs'), read(folder, 2, 'reference'), strict=True):
    if pair['chosen_why'].endswith('(iteration 1)'):
      sample = drawn[pair['prompt_id'], pair['chosen_index']]
      assert sample['response_ids'] == pair['chosen_ids']
      assert np.abs(np.subtract(sample['logprobs'], reference['chosen_logps'])).max() > 1e-3
      old += 1
  assert old


def test_the_report_tells_old_responses_from_samples(run):
  folder, _ = run
  data = report.gather(folder, max_prompts=200, max_bytes=10**7)
  prompts = next(c for c in data['choices'] if c['id'] == 'samples-2')['prompts']
  rows = {(row['prompt_id'], row['pair_index']): row for row in read(folder, 2, 'pairs')}
  for prompt in prompts:
    for pair in prompt['pairs']:
      row = rows.pop((prompt['id'], pair['pair']))
      texts = {s['index']: s['response'] for s in prompt['samples']}
      for side in ('chosen', 'rejected'):
        if row[f'{side}_why'].endswith('(iteration 2)'):
          assert pair[side] == row[f'{side}_index'] and pair[side] in texts
        else:                 # unless this iteration drew the very same text there
          assert (pair[f'{side}_earlier'] == row[f'{side}_index']) == (pair[side] is None)
  assert not rows
  earlier = [pair for p in prompts for pair in p['pairs'] if pair['chosen_earlier'] is not None]
  assert earlier


def test_training_starts_at_alpha_ln_2(run):
  first = next(r for r in read_metrics(run[0] / 'metrics.jsonl')
               if (r['stage'], r['step']) == ('train', 1))
  assert first['loss/preference'] == pytest.approx(0.5 * math.log(2), abs=1e-4)


def test_diversity_is_that_of_votes_and_of_samples(run):
  folder, _ = run
  vocabulary = json.loads((folder / 'iteration_02/model/config.json').read_text())['vocab_size']
  records = [r for r in read_metrics(folder / 'metrics.jsonl') if r['stage'] == 'diversity']
  assert [r['iteration'] for r in records] == [0, 1, 2]
  for t, record in enumerate(records):
    votes = [row for row in read(folder, t, 'evaluation') if row['kind'] == 'vote']
    expected = {'test': diversity_stage.measure(votes, vocabulary)}
    if t:
      expected['samples'] = diversity_stage.measure(scored(folder, t), vocabulary)
    flat = {f'{a}/{b}': value for a, found in expected.items() for b, value in found.items()}
    numbers = json.loads((folder / f'iteration_{t:02d}/diversity.json').read_text())
    assert numbers == pytest.approx(flat) == {key: record[key] for key in numbers}
    assert numbers['test/responses'] == 16 * VOTES
    assert 0 < numbers['test/negative/distinct_n'] < 1
    assert 0 < numbers['test/negative/embedding'] < 1
  assert numbers['samples/positive/questions'] > 0


@pytest.mark.parametrize('terminal', [True, False])
def test_the_tables(run, terminal):
  folder, said = run
  file = io.StringIO()
  console = Console(file=file, width=80, force_terminal=terminal, color_system=None)
  session = types.SimpleNamespace(run=Run(folder), progress=Progress(console))
  dive_table.show(session)
  text = file.getvalue()
  columns = [*dive_table.RESULTS, *dive_table.DIVERSITY, *dive_table.PICKED]
  if terminal:
    assert all(len(line) <= 80 for line in text.splitlines()[:-1])
    words = {word for column in columns for word in column.split()}
    assert words <= set(text.replace('┃', ' ').split())     # no header is cut inside a word
  else:
    assert all(column in said for column in columns)
  start, _, last = dive_table.rows(session)
  found = Run(folder).entries['iteration_02/diversity'].counts
  assert last['n-grams wrong'] == f'{found["test/negative/distinct_n"]:.3f}'
  assert last['any of K %'] == f'{100 * found["test/solved"]:.1f}'
  assert (start['pool'], last['pool']) == ('-', str(24 * K * 2))


def test_a_response_drawn_twice_is_embedded_once(monkeypatch):
  seen = []

  def fake(params, rows, *args, **kwargs):
    seen.extend((*row.prompt_ids, *row.response_ids) for row in rows)
    return np.array([[row.response_ids[0]] for row in rows], np.float32)

  monkeypatch.setattr(dive, 'embed_rows', fake)
  session = types.SimpleNamespace(
      model=None, compute=None, mesh=None, tokenizer=types.SimpleNamespace(pad_id=0))
  this = types.SimpleNamespace(session=session, model=types.SimpleNamespace(params=None))
  pool = [{'prompt_ids': [p], 'response_ids': [r], 'response': f'{r} {r}'}
          for p, r in [(1, 5), (1, 6), (1, 5), (2, 5), (1, 6)]]
  check(*MODEL)
  assert dive.embed(this, pool, 'model').ravel().tolist() == [5, 6, 5, 5, 6]
  assert seen == [(1, 5), (1, 6), (2, 5)]
  by_words = dive.embed(this, pool, 'ngrams')
  np.testing.assert_array_equal(by_words, hashed_ngrams([row['response'] for row in pool]))


# Flags

MODEL = ('--model=M', '--train=A', '--test=B')
OWN = ('global_pool', 'selection', 'diversity', 'contamination', 'encoder', 'alpha',
       'dive_release_loss')
IDLE = [
    *((flag, ('--noselection',)) for flag in (
        '--diversity=mix', '--contamination=auto', '--encoder=ngrams')),
    ('--contamination=0.2', ('--noglobal_pool', '--samples_per_prompt=8')),
    ('--contamination=0.2', ('--iterations=2', '--samples_per_prompt=4')),
    ('--encoder=ngrams', ('--diversity=distinct_n', '--contamination=0')),
    ('--encoder=ngrams', ('--diversity=distinct_n', '--noglobal_pool', '--samples_per_prompt=8')),
    ('--global_pool', ('--iterations=1',)),
    ('--alpha=0.7', ('--dive_release_loss',)),
    ('--nll_alpha=0.7', ()),
    ('--dedup', ()),
    ('--gold_in_winners=always', ()),
    ('--nll_reduction=sum', ()),
]
WORKS = [
    (),
    ('--noselection',),
    ('--noglobal_pool', '--samples_per_prompt=9', '--contamination=0.2'),
    ('--diversity=distinct_n', '--encoder=ngrams'),
    ('--diversity=mix', '--contamination=0', '--encoder=ngrams'),
    ('--dive_release_loss',),
    ('--alpha=1', '--contamination=auto'),
    ('--iterations=1',),
    MODEL,
]
REFUSED = [
    ('--alpha=0', '--alpha: .*a number > 0 and at most 1; found 0'),
    ('--alpha=1.1', '--alpha: .*found 1.1'),
    ('--alpha=nan', '--alpha: .*finite number'),
    ('--contamination=0.6', r'--contamination: .*a number in \[0, 0.5\], or auto; found 0.6'),
    ('--contamination=nan', '--contamination: .*found nan'),
    ('--contamination=some', '--contamination: .*found some'),
    ('--samples_per_prompt=1', '--samples_per_prompt: .*at least 2; found 1'),
]


@pytest.fixture(autouse=True)
def restored_flags():
  with flagsaver.flagsaver():
    FLAGS.unparse_flags()
    yield
    FLAGS.mark_as_parsed()


def check(*arguments):
  dive_flags.parse(['dive', *arguments])
  return dive_flags.check()


@pytest.mark.parametrize(('idle', 'others'), IDLE)
def test_a_flag_without_effect_is_refused(idle, others):
  name = idle.removeprefix('--').partition('=')[0]
  with pytest.raises(InputError, match=f'^--{name}: the flag would have no effect; found .*\\.'):
    check(*others, idle)
  assert name not in dive_flags.effective()


def test_flags_of_its_own_have_a_case():
  here = {flag.name for flag in FLAGS.get_flags_for_module(dive_flags)}
  assert here == {*OWN}
  always = {'selection', 'dive_release_loss'}
  assert {idle.removeprefix('--').partition('=')[0] for idle, _ in IDLE} >= here - always


@pytest.mark.parametrize('arguments', WORKS)
def test_effective_flags_are_accepted_and_mean_the_same(arguments):
  config, effective = check(*arguments), dive_flags.effective()
  assert not {'nll_alpha', 'dedup'} & effective.keys()
  with flagsaver.flagsaver():
    FLAGS.unparse_flags()
    for module in dive_flags.MODULES:
      for flag in FLAGS.get_flags_for_module(module):
        flag.unparse()
    assert check(*(f'--{name}={text}' for name, text in effective.items())) == config
    assert dive_flags.effective() == effective
    FLAGS.mark_as_parsed()


@pytest.mark.parametrize(('argument', 'message'), REFUSED)
def test_values_out_of_range_are_refused(argument, message):
  with pytest.raises(InputError, match=message):
    check(argument)


def test_the_loss():
  config = check(*MODEL, '--alpha=0.25')
  assert (config.loss, config.loss_options) == ('dive', {'beta': 0.4, 'alpha': 0.25})
  assert config.first_loss == pytest.approx(0.25 * math.log(2))
  config = check(*MODEL, '--alpha=1')
  assert (config.loss, config.loss_options) == ('dpo', {'beta': 0.4})


def test_the_released_loss_is_dpo_and_half_the_nll():
  config = check('--dive_release_loss', '--beta=0.3')
  assert (config.loss, config.loss_options) == ('irpo', {'beta': 0.3, 'alpha': 0.5})
  assert config.first_loss == pytest.approx(math.log(2))


def test_defaults_differ_from_those_of_irpo():
  check(*MODEL)
  assert (FLAGS.pairs_per_prompt, FLAGS.beta, FLAGS.global_pool, FLAGS.selection) == (
      5, 0.4, True, True)


def test_helpshort_lists_the_flags_that_act_and_no_others():
  done = subprocess.run(
      [sys.executable, '-m', 'experiments.dive', '--helpshort'], cwd=irpo_runs.ROOT,
      env=irpo_runs.environment(None), capture_output=True, text=True, check=False)
  listed = set(re.findall(r'^\s+--(?:\[no\])?(\w+):', done.stdout, re.MULTILINE))
  acting = {flag.name for module in (*dive_flags.OWN, dive_flags)
            for flag in FLAGS.get_flags_for_module(module)} | {'pairs_per_prompt'}
  assert acting <= listed and not {'nll_alpha', 'dedup'} & listed
  assert done.stdout.startswith('DIVE: Diversified Iterative Self-Improvement')


# Flag files


@pytest.mark.parametrize('task', ['gsm8k', 'math'])
@pytest.mark.parametrize('variant', dive_claims.VARIANTS)
def test_published_settings(task, variant):
  config = check(
      f'--flagfile={FOLDER / f"dive_{task}.flags"}', *INPUTS, *dive_claims.VARIANTS[variant])
  assert (config.iterations, config.samples_per_prompt, FLAGS.pairs_per_prompt) == (6, 10, 5)
  assert set(config.temperatures) == {0.7} and config.sampling.top_p == 0.95
  assert config.sampling.max_new_tokens == 1024
  assert (config.loss, config.loss_options) == ('dive', {'beta': 0.4, 'alpha': 0.5})
  assert (FLAGS.learning_rate, FLAGS.schedule, FLAGS.batch_size) == (3e-8, 'constant', 64)
  assert (config.epochs, config.max_steps, FLAGS.max_pairs) == (1, None, None)
  assert (FLAGS.votes, FLAGS.vote_temperature) == (50, 0.7)
  assert FLAGS.task == task and config.rule == RULES[task]
  assert (FLAGS.diversity, config.contamination, FLAGS.encoder) == ('embedding', 0.1, 'model')


@pytest.mark.parametrize('task', ['gsm8k', 'math'])
def test_published_files_spell_out_every_flag_of_the_method(task):
  check(f'--flagfile={FOLDER / f"dive_{task}.flags"}', *INPUTS)
  unused = {*dive_flags.without_effect(), *MACHINE, *ROWS}
  silent = {
      flag.name for module in set(dive_flags.MODULES) - {lora_flags, world}
      for flag in FLAGS.get_flags_for_module(module) if not flag.present} - unused
  # No cap and no limit can only be said by silence; the switches choose the variant.
  assert silent == {'max_pairs', 'max_steps', 'param_dtype', 'global_pool', 'selection',
                    'diversity', 'contamination', 'encoder', 'dive_release_loss'}


def test_published_settings_of_the_first_model():
  path = FOLDER / 'dive_sft_gsm8k.flags'
  sft_flags.parse(['sft', f'--flagfile={path}', '--model=M', '--train=A'])
  sft_flags.check()
  assert (FLAGS.learning_rate, FLAGS.schedule, FLAGS.epochs) == (1e-6, 'cosine', 3)


@pytest.mark.parametrize('variant', dive_claims.VARIANTS)
def test_the_world_file_goes_with_every_variant(variant):
  config = check(*claim_runs.without_world(dive_flags.WORLD_FLAGS), *INPUTS,
                 *dive_claims.VARIANTS[variant])
  assert config.loss_options == {'beta': 0.4, 'alpha': 0.5}
  assert FLAGS.pairs_per_prompt < config.samples_per_prompt / 2   # else there is nothing to select


def test_the_world_of_dive_has_several_styles_of_solutions():
  check()
  assert FLAGS.world_styles == 4
  assert check('--world_styles=1') and FLAGS.world_styles == 1
  with pytest.raises(InputError, match='world_styles.*no embedded world'):
    check(*MODEL, '--world_styles=2')


# Claims


def test_relative_gain_by_hand():
  before = {f'{n}': 0.2 + 0.2 * (n % 2) for n in range(10)}                       # mean 0.3
  after = {f'{n}': 0.3 + 0.3 * (n % 2) for n in range(10)} | {'more': 0.45}       # mean 0.45
  gain = dive_claims.relative_gain(before, after)
  assert gain.value == pytest.approx(0.5) and gain.low < 0.5 < gain.high
  same = dive_claims.relative_gain(before, {key: 1.2 * value for key, value in before.items()})
  assert (same.value, same.low, same.high) == pytest.approx((0.2, 0.2, 0.2))


def test_no_gain_where_there_is_nothing_to_compare():
  enough, few = {f'{n}': 0.2 for n in range(10)}, {f'{n}': 0.2 for n in range(9)}
  assert dive_claims.relative_gain(enough, enough).value == 0
  assert dive_claims.relative_gain(few, enough) is None
  assert dive_claims.relative_gain(enough, few) is None
  assert dive_claims.relative_gain(dict.fromkeys(enough, 1e-8), enough) is None


def test_measures_of_a_question():
  rows = [{'prompt_id': p, 'response': r, 'answer': '1', 'verdict': v} for p, r, v in [
      ('a', 'x y', 'correct'), ('a', 'x z', 'correct'), ('a', 'w', 'wrong'),
      ('b', 'x', 'wrong'), ('b', 'x', 'unparseable_answer')]]
  found = dive_claims.by_question(rows)
  assert found['distinct-n, right'] == {'a': pytest.approx((3 / 4 + 1) / 2)}
  assert found['distinct-n, wrong'] == {'b': 0.5}
  assert found['embedding, wrong'] == {'b': pytest.approx(0, abs=1e-6)}
  assert found['embedding, right'].keys() == {'a'}


def _seed(gain=0.2, width=0.05, change=-0.3, right=(1, 0) * 20, after=(1, 0) * 20):
  def estimates(value):
    return {name: None if value is None else vars(Estimate(value, value - width, value + width))
            for name in dive_claims.MEASURES}

  variants = {name: {'right': after, 'gain': estimates(gain)} for name in dive_claims.VARIANTS}
  variants[dive_claims.VANILLA] = {'right': right, 'change': estimates(change)}
  return {'seed': 0, 'variants': variants}


def _verdicts(*seeds):
  """Those on diversity, on accuracy and on vanilla, each kind once."""
  found = [v['verdict'] for v in dive_claims.verdicts(seeds).values()]
  assert len(found) == 11
  kinds = {*found[:4]}, {*found[4:7]}, {*found[7:]}
  assert all(len(kind) == 1 for kind in kinds)
  return [kind.pop() for kind in kinds]


def test_all_claims_can_hold():
  assert _verdicts(_seed()) == ['holds'] * 3
  assert _verdicts(_seed(gain=0.2), _seed(gain=0.22), _seed(gain=0.24)) == ['holds'] * 3


@pytest.mark.parametrize(('changes', 'expected'), [
    ({'gain': 0.08, 'width': 0.01}, ['does not hold', 'holds', 'holds']),
    ({'gain': 0.08, 'width': 0.05}, ['undecided', 'holds', 'holds']),
    ({'gain': 0.3, 'width': 0.31}, ['undecided', 'holds', 'undecided']),
    ({'gain': None}, ['undecided', 'holds', 'holds']),
    ({'change': 0.3}, ['holds', 'holds', 'does not hold']),
    ({'right': (1,) * 40, 'after': (1, 0, 0, 0) * 10}, ['holds', 'does not hold', 'holds']),
    ({'right': (1, 0) * 20, 'after': (0, 1) * 20}, ['holds', 'undecided', 'holds'])])
def test_each_claim_can_come_out_another_way(changes, expected):
  assert _verdicts(_seed(**changes)) == expected


def test_seeds_that_disagree_leave_a_claim_undecided():
  assert _verdicts(_seed(gain=0.6), _seed(gain=-0.1))[0] == 'undecided'


def test_a_run_is_summarised(run):
  folder, _ = run
  summary = dive_claims.summarise({0: dict.fromkeys(dive_claims.VARIANTS, folder)})
  row = summary['seeds'][0]['variants']
  assert len(row[dive_claims.BOTH]['accuracy']) == 3 and len(row[dive_claims.BOTH]['right']) == 16
  votes = diversity_stage.measure(
      [r for r in read(folder, 2, 'evaluation') if r['kind'] == 'vote'], 400)
  for name, key in dive_claims.MEASURES.items():
    found = row[dive_claims.BOTH]['diversity'][name]
    assert (found and found['value']) == pytest.approx(votes.get(key))
    gain = row['global']['gain'][name]
    assert gain is None if 'right' in name and not gain else gain['value'] == pytest.approx(0)
  assert summary['verdicts'][f'{dive_claims.BOTH} is at most 5 points less accurate than vanilla'][
      'verdict'] == 'holds'
  json.dumps(summary, allow_nan=False)
