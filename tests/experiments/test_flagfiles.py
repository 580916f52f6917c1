"""Flag files of published settings: complete, loadable, and with the published numbers."""

import gzip
import json
import pathlib

import jax
import pytest
from absl import flags
from absl.testing import flagsaver
from etils import epath

from experiments import common_flags, irpo, irpo_flags, lora_flags, rounds, sft_flags, world
from jaxrl.data.tasks import TASKS, get_task
from jaxrl.models.config import ModelConfig
from jaxrl.models.hugging_face import save_model
from jaxrl.models.params import init_params
from jaxrl.rewards.checking import AnswerRule
from jaxrl.runs.problem_set import read_problem_set
from jaxrl.tokens.tiny import write_tokenizer
from jaxrl.tokens.tokenizer import load_tokenizer
from tests.shared_data import SHARED, needs_shared

FLAGS = flags.FLAGS
FOLDER = pathlib.Path(irpo_flags.__file__).parent / 'flags'
INPUTS = ('--model=M', '--train=A', '--test=B')

# Pang et al. 2024, version 3: what differs between the three data sets.
PUBLISHED = {
    'gsm8k': {
        'iterations': 4, 'samples_per_prompt': 30, 'temperatures': (0.8, 0.8, 1.3, 1.3),
        'pairs_per_prompt': 10, 'max_pairs': 60_000, 'max_steps': 5000,
        'gold_in_winners': 'always', 'dev_prompts': 1000},
    'arc': {
        'iterations': 3, 'samples_per_prompt': 30, 'temperatures': (0.8, 0.8, 1.3),
        'pairs_per_prompt': 20, 'max_pairs': None, 'max_steps': 4000,
        'gold_in_winners': 'never', 'dev_prompts': 300},
    'math': {
        'iterations': 3, 'samples_per_prompt': 20, 'temperatures': (0.8, 0.8, 1.0),
        'pairs_per_prompt': 15, 'max_pairs': None, 'max_steps': 5000,
        'gold_in_winners': 'never', 'dev_prompts': 0},
}
# Pairs that the paper had in its iterations; training must not end before --max_steps for them.
PAIRS = {'gsm8k': (55_000, 60_000), 'arc': (20_000, 11_000, 5_000), 'math': (75_000,)}
RULES = {
    'gsm8k': AnswerRule('number'), 'arc': AnswerRule('choice'),
    'math': AnswerRule('math', symbolic=True, timeout=5.0)}
# How fast and where, not what.
MACHINE = {
    'run_dir', 'model', 'train', 'test', 'seed', 'mesh', 'remat', 'logp_chunk', 'micro_batches',
    'length_buckets', 'layout', 'pack_shapes', 'pack_multiple', 'log_every', 'offload_optimizer',
    'on_nonfinite', 'peak_tflops', 'moment_dtype', 'keep_last', 'keep_every', 'slots', 'cadence',
    'rollout_tensor', 'kv_cache', 'shrink_slots', 'score_batch'}
# What of the rows is read; the tasks know their own files.
ROWS = {'prompt_field', 'answer_field', 'id_field', 'template', 'train_limit', 'test_limit'}


@pytest.fixture(autouse=True)
def unchanged_flags():
  with flagsaver.flagsaver():
    FLAGS.unparse_flags()
    yield
    FLAGS.mark_as_parsed()   # flagsaver reads values when it restores them


def parse(name: str, *arguments: str) -> irpo_flags.IrpoConfig:
  irpo_flags.parse(['irpo', f'--flagfile={FOLDER / name}', *arguments])
  return irpo_flags.check()


@pytest.mark.parametrize('task', PUBLISHED)
def test_irpo_has_the_published_settings(task):
  config = parse(f'irpo_{task}.flags', *INPUTS)
  found = {
      'iterations': config.iterations, 'samples_per_prompt': config.samples_per_prompt,
      'temperatures': config.temperatures, 'pairs_per_prompt': FLAGS.pairs_per_prompt,
      'max_pairs': FLAGS.max_pairs, 'max_steps': config.max_steps,
      'gold_in_winners': FLAGS.gold_in_winners, 'dev_prompts': FLAGS.dev_prompts}
  assert found == PUBLISHED[task]
  assert FLAGS.task == task and config.rule == RULES[task]
  # The same for all three.
  assert config.loss == 'irpo'
  assert config.loss_options == {'beta': 0.1, 'alpha': 1.0, 'nll_reduction': 'seq'}
  assert config.sampling.top_p == 1.0 and config.sampling.top_k is None
  assert FLAGS.batch_size == 16 and FLAGS.dedup is False
  assert (FLAGS.votes, FLAGS.vote_temperature) == (32, 0.8)
  optimizer = common_flags.optimizer_config()
  assert (optimizer.learning_rate, optimizer.schedule) == (7e-7, 'constant')


@pytest.mark.parametrize('task', PUBLISHED)
def test_the_step_limit_and_not_the_epochs_ends_training(task):
  config = parse(f'irpo_{task}.flags', *INPUTS)
  assert config.max_steps is not None
  for pairs in PAIRS[task]:
    assert config.epochs * pairs / FLAGS.batch_size >= config.max_steps, pairs
  if FLAGS.dev_prompts:   # several looks, the last of them at the limit
    assert config.max_steps % FLAGS.save_every == 0 and config.max_steps >= 5 * FLAGS.save_every


@pytest.mark.parametrize('task', PUBLISHED)
def test_irpo_spells_out_every_flag_of_the_method(task):
  parse(f'irpo_{task}.flags', *INPUTS)
  unused = {*irpo_flags.without_effect(), *MACHINE, *ROWS}
  silent = {
      flag.name for module in set(irpo_flags.MODULES) - {lora_flags, world}
      for flag in FLAGS.get_flags_for_module(module) if not flag.present} - unused
  assert silent <= {'max_pairs'}   # no cap can only be said by silence
  assert ('max_pairs' in silent) == (PUBLISHED[task]['max_pairs'] is None)


def test_every_flag_file_is_tried_here():
  names = {path.name for path in FOLDER.glob('irpo_*.flags')} - {'irpo_world.flags'}
  assert names == {*(f'irpo_{task}.flags' for task in PUBLISHED), 'irpo_gsm8k_small.flags',
                   'irpo_llama2_70b.flags'}


def test_the_pod_runs_the_published_settings_of_gsm8k():
  parse('irpo_gsm8k.flags', *INPUTS)
  expected = irpo_flags.effective()
  parse('irpo_llama2_70b.flags', *INPUTS)
  assert irpo_flags.effective() == expected


def test_the_small_settings_fit_the_small_model():
  """What the SFT flags make, the IRPO flags can sample from and train."""
  sft_flags.parse(['sft', f'--flagfile={FOLDER / "sft_gsm8k_small.flags"}', '--train=A'])
  sft_flags.check()
  model = sft_flags.new_config(FLAGS.vocab_size)
  FLAGS.unparse_flags()
  config = parse('irpo_gsm8k_small.flags', *INPUTS)
  longest = FLAGS.max_prompt_length + config.sampling.max_new_tokens
  assert longest <= model.max_length
  assert common_flags.length_buckets(longest)[-1] >= longest - 1
  assert config.iterations == 1 and FLAGS.gold_in_winners == 'always'


class Said:
  """A session as far as reading problems needs one."""

  def __init__(self, tokenizer):
    self.tokenizer, self.progress, self.lines = tokenizer, self, []

  def line(self, text):
    self.lines.append(text)


@needs_shared
def test_the_two_problems_of_math_without_an_answer_are_counted_and_not_asked(tmp_path):
  with gzip.open(SHARED / 'math' / 'train.jsonl.gz', 'rt') as lines:
    rows = [json.loads(line) for line in lines]
  unanswered = {row['id'] for row in rows if row['answer'] is None}
  assert len(unanswered) == 2
  path = tmp_path / 'problems.jsonl'   # all of them take a minute
  path.write_text('\n'.join(
      json.dumps(row) for n, row in enumerate(rows) if n < 250 or row['id'] in unanswered))
  size = write_tokenizer(epath.Path(tmp_path), ['Final answer: 5'], vocab_size=261)
  session = Said(load_tokenizer(tmp_path, vocab_size=size))
  found = read_problem_set(
      session, path, get_task('math', template='{question}'), RULES['math'],
      limit=None, max_prompt_length=10_000,
      over_length='error')
  assert {*found.problems} - {p.prompt_id for p in found.prompts} == unanswered
  assert '252 problems' in session.lines[0] and '2 left out for a gold answer' in session.lines[0]


class Started(BaseException):
  """The first stage of a run was reached."""


FILES = {
    'gsm8k': ('gsm8k/train.jsonl.gz', 'gsm8k/test.jsonl'),
    'arc': ('arc_challenge/train.jsonl', 'arc_challenge/test.jsonl'),
    'math': ('math/train.jsonl.gz', 'math/test.jsonl.gz')}


@pytest.fixture(scope='module')
def model(tmp_path_factory):
  """Random weights that can read as far as the published settings ask."""
  base = epath.Path(tmp_path_factory.mktemp('model'))
  texts = [TASKS[name].template for name in FILES] + ['How many apples are left?', r'\frac{1}{2}']
  config = ModelConfig(
      family='llama', vocab_size=write_tokenizer(base / 'tokenizer', texts, vocab_size=1000),
      d_model=16, n_layers=1, n_heads=2, n_kv=2, d_head=8, d_mlp=32, max_length=4096,
      tie_embeddings=True)
  save_model(base / 'model', init_params(jax.random.key(0), config), config,
             tokenizer_from=base / 'tokenizer')
  return base / 'model'


@needs_shared
@pytest.mark.parametrize('task', FILES)
def test_irpo_starts_on_the_real_files(task, model, tmp_path, monkeypatch):
  """Everything is read, checked and built; the first evaluation gets the prompts."""
  def evaluate(session, iteration, engine, start, test):
    assert iteration == 0 and start.params and test.votes == 32
    assert engine.sampling.max_new_tokens == FLAGS.max_new_tokens
    texts = {prompt.text for prompt in test.prompts}
    assert len(texts) == 8 and all('Final answer:' in text for text in texts)
    raise Started

  monkeypatch.setattr(rounds, 'evaluation_stage', evaluate)
  train, test = (SHARED / name for name in FILES[task])
  irpo_flags.parse([
      'irpo', f'--flagfile={FOLDER / f"irpo_{task}.flags"}', f'--run_dir={tmp_path / "run"}',
      f'--model={model}', f'--train={train}', f'--test={test}', '--train_limit=16',
      '--test_limit=8', '--dev_prompts=4', '--over_length=drop'])
  with pytest.raises(Started):
    irpo.main(['irpo'])
