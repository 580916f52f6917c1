"""Flags of WSPO, checked together before anything runs."""

from __future__ import annotations

import sys
from pathlib import Path

import jax
from absl import flags

from experiments import (
    common_flags,
    data_flags,
    engine_flags,
    lora_flags,
    rounds_flags,
    sft_flags,
    training_flags,
    world,
)
from jaxrl.errors import InputError
from jaxrl.losses.wspo import LEVELS

FLAGS = flags.FLAGS
OWN = (common_flags, data_flags, engine_flags, lora_flags, training_flags, world)
LENDERS = (rounds_flags, sft_flags)
MODULES = (*OWN, *LENDERS, sys.modules[__name__])
WORLD_FLAGS = Path(__file__).parent / 'flags' / 'wspo_world.flags'
# What is sampled here is greedy answers, and what is trained on comes from a file.
SAMPLING = ('max_new_tokens', 'max_prompt_length')
BORROWED = (*SAMPLING, 'score_batch', 'max_length')
# The strong model of the embedded world starts better than the weak one.
STRONG_ACCURACY = 0.5

flags.DEFINE_string('weak_base', None, 'Model folder: the weak model before its alignment.')
flags.DEFINE_string('weak_aligned', None, 'Model folder: the weak model after it.')
flags.DEFINE_float('gamma', 0.1, 'Of gamma d_s = d_w: the strong log-ratio is to be 1/gamma times '
                   'the weak one.')
flags.DEFINE_enum('level', 'token', LEVELS, 'Squared error per token (the paper), or of their sum.')
flags.DEFINE_enum('side', 'chosen', ['chosen', 'rejected'],
                  'Which response of a preference file is learned from.')
flags.DEFINE_integer('held_out_prompts', 0, 'Prompts of --train kept apart, to measure on them how '
                     'well the strong log-ratio follows the weak one.', lower_bound=0)
flags.DEFINE_float('weak_accuracy', 0.35, 'Embedded world: greedy dev accuracy at which the weak '
                   'base stops training.', lower_bound=0.0, upper_bound=1.0)
flags.DEFINE_integer('weak_iterations', 2, 'Embedded world: iterations of IRPO that align the weak '
                     'model.', lower_bound=1)

for module in OWN:
  flags.adopt_module_key_flags(module)
for key in BORROWED:
  flags.declare_key_flag(key)


def parse(argv: list[str]) -> list[str]:
  """Reads the flags; without --model the settings of the embedded world are the defaults."""
  rest = FLAGS(argv)
  if FLAGS.model is None:
    FLAGS.set_default('seed_accuracy', STRONG_ACCURACY)
    common_flags.set_defaults(WORLD_FLAGS)
  return rest


def without_effect() -> dict[str, str]:
  """Flags that the values of the others leave without effect, and why."""
  idle = lora_flags.without_effect() | training_flags.without_effect()
  for lender in LENDERS:
    idle |= {flag.name: 'it belongs to another experiment'
             for flag in FLAGS.get_flags_for_module(lender) if flag.name not in BORROWED}
  if FLAGS.model is None:
    own = ('train', 'test', 'prompt_field', 'answer_field', 'id_field', 'template', 'weak_base',
           'weak_aligned', 'adapter')
    idle |= dict.fromkeys(own, 'the embedded world has its own problems and models')
    if FLAGS.task != 'world':
      idle['task'] = 'the embedded world has its own task'
    if FLAGS.seed_first_check < FLAGS.seed_check_every:
      idle['seed_first_check'] = f'--seed_check_every={FLAGS.seed_check_every}'
    idle['check_timeout'] = 'the embedded world compares no expressions'
    return idle
  idle |= dict.fromkeys((flag.name for flag in FLAGS.get_flags_for_module(world)),
                        '--model is given, so there is no embedded world')
  idle |= dict.fromkeys(('weak_accuracy', 'weak_iterations'),
                        '--model is given, so there is no embedded world')
  if FLAGS.test is None:
    of_test = ('task', 'test_limit', 'prompt_field', 'answer_field', 'id_field', 'template',
               'check_timeout', *SAMPLING, *engine_flags.NAMES)
    idle |= dict.fromkeys(of_test, 'no --test problems to answer')
  elif FLAGS.task != 'math':
    idle['check_timeout'] = f'--task={FLAGS.task} compares no expressions'
  return idle


def check() -> dict[str, object]:
  """Options of the loss.

  Raises:
    InputError: a value out of range, or a flag that the others leave without effect.
  """
  for name, why in without_effect().items():
    common_flags.refuse(FLAGS[name].present > 0, name, why)
  common_flags.check_finite(*MODULES)
  if FLAGS.model is None:
    world.check_flags()
  else:
    for name, what in (('weak_base', 'a Hugging Face folder'),
                       ('weak_aligned', 'a Hugging Face folder'),
                       ('train', 'a preference file, or rows with prompt and response')):
      if FLAGS[name].value is None:
        raise InputError('nothing to learn from', where=f'--{name}', expected=what, found='none')
  if FLAGS.gamma <= 0:
    raise InputError('gamma out of range', where='--gamma', expected='a number > 0',
                     found=FLAGS.gamma)
  if FLAGS.epochs <= 0:
    raise InputError('there is nothing to train', where='--epochs', expected='a number > 0',
                     found=FLAGS.epochs)
  common_flags.optimizer_config()
  lora_flags.check()
  return {'gamma': FLAGS.gamma, 'level': FLAGS.level}


def check_devices(mesh: jax.sharding.Mesh) -> None:
  """Raises InputError where rows do not divide over the devices of the mesh."""
  training_flags.check_devices(mesh)
  common_flags.check_multiple('score_batch', mesh)
  if FLAGS.model is None:
    common_flags.check_multiple('seed_batch_size', mesh)


def effective() -> dict[str, str]:
  """Flags for the run folder: all that have an effect."""
  idle = without_effect()
  return {
      name: text for name, text in common_flags.effective_flags(*MODULES).items()
      if name not in idle
  }
