"""Flags that the iterated methods share, checked together before anything runs."""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Iterable
from types import ModuleType

import jax
from absl import flags

from experiments import (
    common_flags,
    data_flags,
    engine_flags,
    lora_flags,
    training_flags,
    world,
)
from jaxrl.data.tasks import TASKS
from jaxrl.errors import InputError
from jaxrl.rewards.checking import AnswerRule
from jaxrl.sampling.requests import SamplingConfig

FLAGS = flags.FLAGS
MODULES = (common_flags, data_flags, engine_flags, lora_flags, training_flags, world,
           sys.modules[__name__])

flags.DEFINE_integer('iterations', 3, 'Iterations.', lower_bound=1)
flags.DEFINE_integer('samples_per_prompt', 8, 'Responses drawn per training prompt (N).',
                     lower_bound=1)
flags.DEFINE_list('temperature', ['0.8'], 'Sampling temperature per iteration; the last repeats.')
flags.DEFINE_float('top_p', 1.0, 'Nucleus of all draws but greedy ones; 1 keeps everything.')
flags.DEFINE_integer('max_new_tokens', 512, 'Longest response, in ids.', lower_bound=1)
flags.DEFINE_integer('max_prompt_length', 512, 'Longest prompt, in ids.', lower_bound=1)
flags.DEFINE_integer('max_pairs', None, 'Most pairs per iteration; default: no cap.', lower_bound=1)
flags.DEFINE_float('beta', 0.1, 'DPO beta: the larger, the closer to the reference.')
flags.DEFINE_integer('dev_prompts', 0, 'Training prompts, with their gold answers, held out to '
                     'choose the number of steps. 0: none.', lower_bound=0)
flags.DEFINE_integer('votes', 8, 'Samples per held-out problem for the majority vote; 0: none.',
                     lower_bound=0)
flags.DEFINE_float('vote_temperature', 0.8, 'Temperature of the vote.', lower_bound=0.0)
flags.DEFINE_integer('score_batch', 32, 'Responses per batch of the reference stage.',
                     lower_bound=1)


@dataclasses.dataclass(frozen=True)
class RoundsConfig:
  """What the rounds of one run are, apart from the method, model, data and devices."""

  iterations: int
  samples_per_prompt: int
  temperatures: tuple[float, ...]   # per iteration
  sampling: SamplingConfig
  rule: AnswerRule
  epochs: float
  max_steps: int | None


def parse(argv: list[str], world_flags: os.PathLike[str]) -> list[str]:
  """Reads the flags; without --model the settings of the embedded world are the defaults."""
  rest = FLAGS(argv)
  if FLAGS.model is None:
    common_flags.set_defaults(world_flags)
  return rest


def without_effect() -> dict[str, str]:
  """Flags that the values of the others leave without effect, and why."""
  idle = lora_flags.without_effect() | training_flags.without_effect()
  if FLAGS.model is None:
    own = ('train', 'test', 'prompt_field', 'answer_field', 'id_field', 'template')
    idle |= dict.fromkeys(own, 'the embedded world has its own problems')
    if FLAGS.task != 'world':
      idle['task'] = 'the embedded world has its own task'
    if FLAGS.seed_first_check < FLAGS.seed_check_every:
      idle['seed_first_check'] = f'--seed_check_every={FLAGS.seed_check_every}'
  else:
    idle |= dict.fromkeys((flag.name for flag in FLAGS.get_flags_for_module(world)),
                          '--model is given, so there is no embedded world')
  if TASKS[FLAGS.task].answer_kind != 'math':
    idle['check_timeout'] = f'--task={FLAGS.task} compares no expressions'
  if FLAGS.votes == 0:
    idle['vote_temperature'] = '--votes=0'
  return idle


def check(idle: dict[str, str], modules: Iterable[ModuleType]) -> RoundsConfig:
  """The configuration; `idle` are all flags of `modules` without effect, and why.

  Raises:
    InputError: a value out of range, or a flag that the others leave without effect.
  """
  for name, why in idle.items():
    common_flags.refuse(FLAGS[name].present > 0, name, why)
  common_flags.check_finite(*modules)
  if FLAGS.model is None:
    world.check_flags()
  else:
    for name in ('train', 'test'):
      if FLAGS[name].value is None:
        raise InputError('a model needs problems', where=f'--{name}', expected='a file',
                         found='none')
  if FLAGS.over_length == 'truncate':
    raise InputError('prompts are never cut', where='--over_length', expected='error or drop',
                     found='truncate')
  if FLAGS.beta <= 0:
    raise InputError('beta out of range', where='--beta', expected='a number > 0', found=FLAGS.beta)
  if FLAGS.epochs <= 0:
    raise InputError('there is nothing to train', where='--epochs', expected='a number > 0',
                     found=FLAGS.epochs)
  temperatures = tuple(common_flags.numbers('temperature', FLAGS.iterations))
  if min(temperatures) <= 0:
    raise InputError('all samples of a prompt would be the same', where='--temperature',
                     expected='numbers > 0', found=temperatures)
  if FLAGS.top_p == 0:
    raise InputError('all samples of a prompt would be the same', where='--top_p',
                     expected='a number > 0', found=0)
  if FLAGS.votes > 1 and FLAGS.vote_temperature == 0:
    raise InputError('all votes on a problem would be the same', where='--vote_temperature',
                     expected='a number > 0, or --votes=0', found=0)
  if FLAGS.max_steps is not None and FLAGS.max_steps <= FLAGS.warmup_steps:
    raise InputError('the warm-up leaves no step at full learning rate', where='--warmup_steps',
                     expected=f'fewer than --max_steps={FLAGS.max_steps}',
                     found=FLAGS.warmup_steps)
  common_flags.optimizer_config()
  lora_flags.check()
  return RoundsConfig(
      iterations=FLAGS.iterations, samples_per_prompt=FLAGS.samples_per_prompt,
      temperatures=temperatures, sampling=SamplingConfig(FLAGS.max_new_tokens, top_p=FLAGS.top_p),
      rule=data_flags.answer_rule(), epochs=FLAGS.epochs, max_steps=FLAGS.max_steps)


def longest_row() -> int:
  """Most ids of a prompt and a response together."""
  return FLAGS.max_prompt_length + FLAGS.max_new_tokens


def check_devices(mesh: jax.sharding.Mesh) -> None:
  """Raises InputError where rows do not divide over the devices of the mesh."""
  training_flags.check_devices(mesh)
  common_flags.check_multiple('score_batch', mesh)
  if FLAGS.model is None and FLAGS.layout == 'padded':
    common_flags.check_multiple('seed_batch_size', mesh)


def effective(idle: dict[str, str], modules: Iterable[ModuleType]) -> dict[str, str]:
  """Flags for the run folder: all of `modules` that have an effect."""
  return {
      name: text for name, text in common_flags.effective_flags(*modules).items()
      if name not in idle
  }
