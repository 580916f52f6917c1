"""The flags of IRPO: documented, checked together, and an error where they would do nothing."""

import math
import re

import pytest
from absl import flags
from absl.testing import flagsaver

from experiments import (
    common_flags,
    data_flags,
    engine_flags,
    irpo_flags,
    lora_flags,
    nll_flags,
    rounds_flags,
    training_flags,
    world,
)
from jaxrl.errors import InputError
from jaxrl.training.loop import NonFiniteError
from tests.experiments import irpo_runs

FLAGS = flags.FLAGS
MODEL = ('--model=M', '--train=A', '--test=B')
EVERY_FLAG = {
    flag.name: flag for module in irpo_flags.MODULES for flag in FLAGS.get_flags_for_module(module)}

# Flag, and others with which it does nothing.
IDLE = [
    *((f'--{name}=x', ()) for name in (
        'train', 'test', 'prompt_field', 'answer_field', 'id_field', 'template')),
    ('--task=gsm8k', ()),
    ('--task=math', ()),
    ('--gold_in_winners=always', ()),
    ('--gold_in_winners=if_empty', (*MODEL, '--task=math')),
    ('--gold_in_winners=always', (*MODEL, '--task=arc')),
    ('--gold_in_winners=always', (*MODEL, '--task=zebralogic')),
    ('--check_timeout=3', ()),
    ('--check_timeout=3', MODEL),
    ('--check_timeout=3', (*MODEL, '--task=arc')),
    ('--check_timeout=3', (*MODEL, '--task=zebralogic')),
    ('--vote_temperature=0.5', ('--votes=0',)),
    ('--vote_temperature=0.8', ('--votes=0',)),         # the default, said aloud
    ('--nll_reduction=token', ('--nll_alpha=0',)),
    ('--nll_reduction=seq', ('--nll_alpha=0',)),
    ('--dedup', ('--pairs_per_prompt=1',)),
    ('--seed_first_check=10', ('--seed_check_every=20',)),
    *((f'--{name}=30', MODEL) for name in (
        'world_sft', 'world_train', 'world_dev', 'world_test', 'world_min_steps',
        'world_max_steps', 'seed_max_steps', 'seed_check_every', 'seed_first_check',
        'seed_batch_size')),
    ('--world_styles=2', MODEL),
    ('--seed_accuracy=0.5', MODEL),
    *((flag, MODEL) for flag in ('--lora_alpha=8', '--lora_targets=q', '--lora_rslora')),
    ('--adapter=x', ()),
    ('--seed_learning_rate=1', MODEL),
    ('--max_skips=2', ()),
    ('--moment_block=64', ()),
    ('--moment_dtype=bfloat16', ('--optimizer=adamw8bit',)),
    *((flag, ('--optimizer=adafactor',)) for flag in ('--adam_b1=0.8', '--adam_b2=0.8')),
    *((flag, ('--layout=padded',)) for flag in ('--pack_shapes=3', '--pack_multiple=8')),
]
# Flags that act whatever the others are, limits that may never be reached included.
ALWAYS = {
    'run_dir', 'model', 'seed', 'mesh', 'compute_dtype', 'param_dtype', 'remat', 'logp_chunk',
    'learning_rate',
    'schedule', 'warmup_steps', 'weight_decay', 'clip_norm', 'batch_size',
    'micro_batches', 'epochs', 'max_steps', 'length_buckets', 'log_every', 'save_every', 'layout',
    'optimizer', 'offload_optimizer', 'on_nonfinite', 'peak_tflops', 'keep_last', 'keep_every',
    'train_limit', 'test_limit', 'over_length', 'iterations', 'samples_per_prompt', 'temperature',
    'top_p', 'max_new_tokens', 'max_prompt_length', 'pairs_per_prompt', 'max_pairs', 'beta',
    'nll_alpha', 'lora_rank', 'dev_prompts', 'votes', 'slots', 'cadence',
    'rollout_tensor', 'kv_cache', 'shrink_slots', 'score_batch'}
WORKS = [
    (),
    ('--votes=0',),
    ('--nll_alpha=0',),
    ('--pairs_per_prompt=1',),
    ('--nodedup', '--pairs_per_prompt=7'),
    ('--task=world', '--gold_in_winners=never'),
    ('--max_pairs=5', '--temperature=0.7,0.9', '--iterations=2'),
    MODEL,
    (*MODEL, '--task=math', '--check_timeout=2'),
    (*MODEL, '--task=zebralogic', '--votes=16'),
    (*MODEL, '--gold_in_winners=always', '--samples_per_prompt=1'),
    (*MODEL, '--votes=1', '--vote_temperature=0'),
    (*MODEL, '--task=arc', '--template=Q: {question}', '--id_field=n', '--answer_field=a'),
]
REFUSED = [
    (('--beta=0',), '--beta: .*a number > 0; found 0'),
    (('--beta=nan',), '--beta: .*finite number; found nan'),
    (('--nll_alpha=inf',), '--nll_alpha: .*finite number; found inf'),
    (('--learning_rate=nan',), '--learning_rate: .*finite number'),
    (('--learning_rate=0',), '--learning_rate: nothing would be learned'),
    (('--adam_b1=1',), '--adam_b1: .*below 1; found 1'),
    (('--adam_b2=1',), '--adam_b2: .*below 1; found 1'),
    (('--epochs=0',), '--epochs: there is nothing to train'),
    (('--temperature=0',), '--temperature: all samples of a prompt would be the same'),
    (('--temperature=0.8,nan',), '--temperature: .*finite'),
    (('--temperature=warm',), '--temperature: not a list of numbers; found warm'),
    (('--temperature=',), '--temperature: .*expected 1 to 3 numbers; found 0'),
    (('--temperature=1,1,1', '--iterations=2'), '--temperature: .*1 to 2 numbers; found 3'),
    (('--samples_per_prompt=1',), '--samples_per_prompt: one sample per prompt gives no pairs'),
    (('--vote_temperature=0',), '--vote_temperature: all votes on a problem would be the same'),
    (('--max_steps=5', '--warmup_steps=5'), '--warmup_steps: .*fewer than --max_steps=5'),
    (('--top_p=0',), '--top_p: all samples of a prompt would be the same'),
    (('--top_p=1.5',), '--top_p: top_p out of range'),
    (('--over_length=truncate',), '--over_length: prompts are never cut'),
    (('--world_min_steps=5',), '--world_min_steps: .*at most --world_max_steps=4'),
    (('--world_sft=14000', '--world_min_steps=1', '--world_max_steps=1'),
     '--world_sft: there are not so many different problems; expected at most 13000'),
    (('--seed_max_steps=70',), '--seed_max_steps: .*a multiple of --seed_check_every=20'),
    (('--seed_max_steps=10', '--seed_check_every=10'), '--seed_max_steps: .*at least 20'),
    (('--seed_learning_rate=0',), '--seed_learning_rate: the seed would learn nothing'),
    (('--model=M', '--train=A'), '--test: a model needs problems'),
    (('--model=M', '--test=A'), '--train: a model needs problems'),
]


@pytest.fixture(autouse=True)
def restored_flags():
  with flagsaver.flagsaver():
    yield
    FLAGS.mark_as_parsed()


def check(*arguments):
  irpo_flags.parse(['irpo', *arguments])
  return irpo_flags.check()


def test_every_flag_is_documented():
  for flag in EVERY_FLAG.values():
    text = re.sub(r'^<[\w|]+>: ', '', flag.help or '')   # the values of an enum come first
    assert text.endswith('.') and len(text) > 10, flag.name


def test_helpshort_lists_every_flag():
  said = irpo_runs.run('--helpshort', cache=None).stdout
  listed = set(re.findall(r'^\s+--(?:\[no\])?(\w+):', said, re.MULTILINE))
  assert EVERY_FLAG.keys() <= listed
  assert said.startswith('Iterative Reasoning Preference Optimization')


@pytest.mark.parametrize('idle, others', IDLE)
def test_a_flag_without_effect_is_refused(idle, others):
  name = idle.removeprefix('--').partition('=')[0]
  with pytest.raises(InputError, match=f'^--{name}: the flag would have no effect; found .*\\.'):
    check(*others, idle)
  assert name not in irpo_flags.effective()


def test_every_flag_is_known_to_act_or_has_a_case():
  cases = {idle.removeprefix('--').partition('=')[0] for idle, _ in IDLE}
  assert cases | ALWAYS == EVERY_FLAG.keys()
  assert not cases & ALWAYS


@pytest.mark.parametrize('arguments', WORKS)
def test_effective_flags_are_accepted_and_mean_the_same(arguments):
  config = check(*arguments)
  effective = irpo_flags.effective()
  with flagsaver.flagsaver():
    FLAGS.unparse_flags()
    for flag in EVERY_FLAG.values():
      flag.unparse()
    again = check(*(f'--{name}={text}' for name, text in effective.items()))
    assert again == config
    assert irpo_flags.effective() == effective
    FLAGS.mark_as_parsed()


@pytest.mark.parametrize('arguments, message', REFUSED)
def test_values_out_of_range_are_refused(arguments, message):
  with pytest.raises(InputError, match=message):
    check(*arguments)


def test_settings_of_the_world_are_defaults():
  """They give way to what the user says, wherever that stands, and do not count as given."""
  check('--votes=0', '--remat=all')
  assert FLAGS.task == 'world' and FLAGS.dedup and FLAGS.remat == 'all' and FLAGS.votes == 0
  assert FLAGS['vote_temperature'].present == 0


def test_a_model_is_run_with_the_flags_own_defaults():
  check(*MODEL)
  assert FLAGS.task == 'gsm8k' and FLAGS.remat == 'attn' and not FLAGS.dedup


def test_run_dir_may_be_named_like_a_flag():
  check('--run_dir', 'model')
  assert FLAGS.run_dir == 'model' and FLAGS.task == 'world'


def test_lengths():
  check('--length_buckets=50,80')
  assert common_flags.length_buckets(81) == (50, 80)
  for buckets, longest in (('50,80', 82), ('50,80', 40), ('80,80', 81), ('x', 9), ('0,9', 9)):
    check(f'--length_buckets={buckets}')
    with pytest.raises(InputError, match='^--length_buckets: '):
      common_flags.length_buckets(longest)


@pytest.mark.parametrize('error', [
    InputError('bad', where='f'), flags.Error('bad\nflag'), NonFiniteError('step 3: nan')])
def test_what_a_user_can_mend_ends_with_one_sentence(error, capsys):
  def fail():
    raise error

  with pytest.raises(SystemExit) as end:
    common_flags.ends_with_sentence(fail)()
  assert end.value.code == 2
  assert re.fullmatch(r'error: [^\n]+\n', capsys.readouterr().err)


def test_other_errors_keep_their_traceback():
  with pytest.raises(ZeroDivisionError):
    common_flags.ends_with_sentence(lambda: 1 / 0)()


def test_modules_hold_all_flags():
  assert set(irpo_flags.MODULES) == {
      common_flags, data_flags, engine_flags, irpo_flags, lora_flags, nll_flags, rounds_flags,
      training_flags,
      world}
  assert all(not isinstance(f.value, float) or math.isfinite(f.value) for f in EVERY_FLAG.values())
