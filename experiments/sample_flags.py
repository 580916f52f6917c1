"""Flags of sampling from a file of prompts, checked together before anything is read."""

from __future__ import annotations

import dataclasses
import math
import os

from absl import flags
from etils import epath

from experiments import (
    common_flags,
    data_flags,
    engine_flags,
    lora_flags,
    output_flag,
    rounds_flags,
    score_flags,
    training_flags,
    world,
)
from jaxrl.data.tasks import Task
from jaxrl.errors import InputError
from jaxrl.rewards.checking import AnswerRule
from jaxrl.sampling.requests import SamplingConfig
from jaxrl.sampling.stop_strings import check_stop_strings
from jaxrl.tokens.tokenizer import Tokenizer, decode, response_ids
from jaxrl.training.logps import ComputePolicy

FLAGS = flags.FLAGS

flags.DEFINE_integer('n', 1, 'Samples per prompt.')
flags.DEFINE_integer('top_k', None, 'Draw from so many most probable tokens; default: all.',
                     lower_bound=1)
flags.DEFINE_float('min_p', 0.0, 'Draw from tokens with at least this share of the probability of '
                   'the most probable one.', lower_bound=0.0, upper_bound=1.0)
flags.DEFINE_integer('min_new_tokens', 0, 'Shortest response, in ids.', lower_bound=0)
flags.DEFINE_multi_string('stop', [], 'Text that ends a response; may be given several times.')
flags.DEFINE_list('stop_token_ids', [], 'Ids that end a response, beside those of the model.')
flags.DEFINE_list('logit_bias', [], 'ID:BIAS pairs; the bias is added to the logit of the id.')
flags.DEFINE_list('ban', [], 'Ids that are never drawn.')
flags.DEFINE_string('forced_prefix', None, 'Text that every response begins with.')
flags.DEFINE_float('repetition_penalty', 1.0, 'Divides positive logits, and multiplies negative '
                   'ones, of ids that prompt or response have.')
flags.DEFINE_float('presence_penalty', 0.0, 'Subtracted from logits of ids the response has.')
flags.DEFINE_bool('prompt_logprobs', False, 'Write the log-prob of each id of the prompt as well.')
flags.DEFINE_string('choices_field', None, 'Field with a list of responses to score in place of '
                    'sampling: their log-likelihood, and which is best.')
flags.DEFINE_enum('keep', 'all', ['all', 'best', 'majority'], 'Which samples of a prompt the '
                  'output has: all; the one with the best mean log-prob; one with the answer most '
                  'of them give, read as --task says.')

# The shared flags that act here; the others belong to training and its rounds.
USED = ('model', 'adapter', 'seed', 'mesh', 'compute_dtype', 'logp_chunk', 'batch_size',
        'length_buckets', 'over_length', 'task', 'prompt_field', 'id_field', 'template',
        'temperature', 'top_p', 'max_new_tokens', 'data', 'storage', 'system_in_user',
        'end_of_response')
LENDERS = (common_flags, data_flags, lora_flags, rounds_flags, score_flags, training_flags, world)
# What says how tokens are drawn.
DRAWING = ('n', 'temperature', 'top_p', 'top_k', 'min_p', 'max_new_tokens', 'min_new_tokens',
           'stop', 'stop_token_ids', 'logit_bias', 'ban', 'forced_prefix', 'repetition_penalty',
           'presence_penalty', 'seed', 'keep', *engine_flags.NAMES)
for module in (engine_flags, output_flag):
  flags.adopt_module_key_flags(module)
for key in USED:
  flags.declare_key_flag(key)


@dataclasses.dataclass(frozen=True)
class SampleFlags:
  """What is asked for, as far as it can be said without a tokenizer."""

  output: epath.Path
  n: int
  temperature: float
  sampling: SamplingConfig       # without the forced prefix
  task: Task | None              # how rows become prompts; None: they are in the rows
  choices_field: str | None
  keep: str
  rule: AnswerRule | None        # how answers are read, where --keep asks for that


def without_effect() -> dict[str, str]:
  """Flags that the values of the others leave without effect, and why."""
  idle = {flag.name: 'nothing is trained' for lender in LENDERS
          for flag in FLAGS.get_flags_for_module(lender) if flag.name not in USED}
  if not FLAGS['task'].present:
    idle['template'] = 'no --task whose template it would replace'
  elif FLAGS.system_in_user:
    idle['system_in_user'] = f'prompts of --task={FLAGS.task} have no system message'
  if FLAGS.choices_field is not None:
    idle |= dict.fromkeys(DRAWING, 'with --choices_field nothing is drawn')
  else:
    idle['end_of_response'] = 'no --choices_field, so no responses are given'
    if not FLAGS.prompt_logprobs:
      idle |= dict.fromkeys(('batch_size', 'length_buckets', 'logp_chunk'),
                            'nothing is scored without --prompt_logprobs or --choices_field')
    if common_flags.numbers('temperature', 1) == [0]:
      idle |= dict.fromkeys(('top_p', 'top_k', 'min_p', 'seed'), '--temperature=0 is greedy')
  return idle


def check() -> SampleFlags:
  """What is asked for.

  Raises:
    InputError: a flag is missing, out of range or has no effect; two contradict each other; the
      output has nowhere to go.
  """
  for name, why in without_effect().items():
    common_flags.refuse(FLAGS[name].present > 0, name, why)
  for name, expected in (('model', 'a Hugging Face folder'), ('data', 'a file of prompts'),
                         ('output', 'a file to write')):
    if not FLAGS[name].value:
      raise InputError('sampling needs this flag', where=f'--{name}', expected=expected,
                       found='none')
  common_flags.check_finite(*LENDERS)
  if FLAGS.over_length == 'truncate':
    raise InputError('prompts are never cut', where='--over_length', expected='error or drop',
                     found='truncate')
  if FLAGS.adapter and FLAGS.storage == 'int8':
    raise InputError('an adapter goes on weights as they are', where='--storage',
                     expected='float32 or bfloat16 with --adapter', found='int8')
  return SampleFlags(
      output=_output(), n=FLAGS.n, temperature=_temperature(), sampling=_sampling(),
      task=data_flags.task() if FLAGS['task'].present else None,
      choices_field=FLAGS.choices_field, keep=_keep(),
      rule=data_flags.answer_rule() if FLAGS.keep == 'majority' else None)


def _output() -> epath.Path:
  output = epath.Path(FLAGS.output)
  if '://' in FLAGS.output or output.suffix != '.jsonl':
    raise InputError('samples are written as JSON lines on a local disk', where='--output',
                     expected='a path that ends in .jsonl', found=FLAGS.output)
  if not os.path.isdir(output.parent):
    raise InputError('the folder of the output does not exist', where=f'--output={output}',
                     expected='a path in a folder that exists', fix='Make the folder first')
  return output


def _temperature() -> float:
  """The temperature, checked against the number of samples."""
  temperature, = common_flags.numbers('temperature', 1)
  if temperature < 0:
    raise InputError('temperature out of range', where='--temperature', expected='a number >= 0',
                     found=temperature)
  if FLAGS.n < 1:
    raise InputError('nothing would be sampled', where='--n', expected='at least 1', found=FLAGS.n)
  greedy = {'--temperature': temperature == 0, '--top_k': FLAGS.top_k == 1,
            '--top_p': FLAGS.top_p == 0, '--min_p': FLAGS.min_p == 1}
  for flag, same in greedy.items():
    if same and FLAGS.n > 1:
      raise InputError('all samples of a prompt would be the same', where=flag,
                       expected='another value, or --n=1', found=f'it with --n={FLAGS.n}')
  return temperature


def _keep() -> str:
  if FLAGS.keep != 'all' and FLAGS.n < 2:
    raise InputError('there would be nothing to choose from', where='--keep',
                     expected='at least --n=2', found=f'{FLAGS.keep} with --n={FLAGS.n}')
  if FLAGS.keep == 'majority' and not FLAGS['task'].present:
    raise InputError('nothing says how answers are read', where='--keep',
                     expected='--task with majority', found='none')
  return FLAGS.keep


def _ids(name: str) -> tuple[int, ...]:
  """A list flag as ids, each once."""
  texts: list[str] = FLAGS[name].value or []
  try:
    ids = tuple(map(int, texts))
  except ValueError:
    raise InputError('not a list of ids', where=f'--{name}', expected='whole numbers',
                     found=','.join(texts)) from None
  if len({*ids}) < len(ids):
    raise InputError('an id is there twice', where=f'--{name}', expected='each once', found=ids)
  return ids


def _biases() -> tuple[tuple[int, float], ...]:
  biases = []
  for text in FLAGS.logit_bias:
    token, _, bias = text.partition(':')
    try:
      biases.append((int(token), float(bias)))
    except ValueError:
      raise InputError('the bias cannot be read', where='--logit_bias',
                       expected='ID:BIAS, for instance 13:-2.5', found=repr(text)) from None
    if not math.isfinite(biases[-1][1]):
      raise InputError('the bias is no number', where='--logit_bias',
                       expected='a finite one; --ban takes ids that are never drawn', found=text)
  return tuple(biases)


def _sampling() -> SamplingConfig:
  check_stop_strings(FLAGS.stop)
  biases, banned, stops = _biases(), _ids('ban'), _ids('stop_token_ids')
  for name, ids in (('logit_bias', {token for token, _ in biases}), ('stop_token_ids', {*stops})):
    if ids & {*banned}:
      raise InputError('an id that is never drawn', where=f'--{name}', expected='none of --ban',
                       found=sorted(ids & {*banned}))
  return SamplingConfig(
      FLAGS.max_new_tokens, top_p=FLAGS.top_p, top_k=FLAGS.top_k, min_p=FLAGS.min_p,
      min_new_tokens=FLAGS.min_new_tokens, repetition_penalty=FLAGS.repetition_penalty,
      presence_penalty=FLAGS.presence_penalty,
      logit_bias=(*biases, *((token, -math.inf) for token in banned)),
      stop_ids=stops, stop_strings=tuple(dict.fromkeys(FLAGS.stop)))


def complete_sampling(sampling: SamplingConfig, tokenizer: Tokenizer) -> SamplingConfig:
  """The settings with the ids of --forced_prefix, checked against the vocabulary.

  Raises:
    InputError: an id outside the vocabulary; a prefix without ids, with too many, or that stops.
  """
  biased = [token for token, _ in _biases()]
  for name, outside in (('stop_token_ids', sampling.stop_ids), ('ban', _ids('ban')),
                        ('logit_bias', biased)):
    bad = [token for token in outside if not 0 <= token < tokenizer.vocab_size]
    if bad:
      raise InputError('the vocabulary has no such token', where=f'--{name}',
                       expected=f'0 to {tokenizer.vocab_size - 1}', found=bad)
  if FLAGS.forced_prefix is None:
    return sampling
  ids = tuple(response_ids(
      tokenizer, FLAGS.forced_prefix, ends=False, where='--forced_prefix')
      if FLAGS.forced_prefix else ())
  if not ids:
    raise InputError('the forced prefix has no ids', where='--forced_prefix',
                     expected='some text', found=repr(FLAGS.forced_prefix))
  text = decode(tokenizer, ids)
  if any(stop in text for stop in sampling.stop_strings):
    raise InputError('every response would stop in its forced prefix', where='--forced_prefix',
                     expected='text without --stop', found=repr(text))
  return dataclasses.replace(sampling, forced_ids=ids)


def storage() -> str:
  """Weights are kept in the type they are computed in, unless --storage says another."""
  return FLAGS.storage if FLAGS['storage'].present else FLAGS.compute_dtype


def compute_policy() -> ComputePolicy:
  """Of scoring: no backward pass, so nothing is recomputed."""
  return ComputePolicy(FLAGS.compute_dtype, FLAGS.logp_chunk, remat='all')
