"""Flags of IRPO, checked together and turned into dataclasses before anything runs."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import jax
from absl import flags

from experiments import common_flags, data_flags, lora_flags, world
from jaxrl.data.tasks import TASKS
from jaxrl.errors import InputError
from jaxrl.preferences.irpo import GOLD_POLICIES
from jaxrl.rewards.checking import AnswerRule
from jaxrl.sampling.requests import SamplingConfig
from jaxrl.training.loop import LoopConfig, check_loop

FLAGS = flags.FLAGS
MODULES = (common_flags, data_flags, lora_flags, world, sys.modules[__name__])
WORLD_FLAGS = Path(__file__).parent / 'flags' / 'irpo_world.flags'

flags.DEFINE_integer('iterations', 3, 'Iterations.', lower_bound=1)
flags.DEFINE_integer('samples_per_prompt', 8, 'Responses drawn per training prompt (N).',
                     lower_bound=1)
flags.DEFINE_list('temperature', ['0.8'], 'Sampling temperature per iteration; the last repeats.')
flags.DEFINE_float('top_p', 1.0, 'Nucleus of all draws but greedy ones; 1 keeps everything.')
flags.DEFINE_integer('max_new_tokens', 512, 'Longest response, in ids.', lower_bound=1)
flags.DEFINE_integer('max_prompt_length', 512, 'Longest prompt, in ids.', lower_bound=1)
flags.DEFINE_integer('pairs_per_prompt', 10, 'Pairs per prompt (K).', lower_bound=1)
flags.DEFINE_integer('max_pairs', None, 'Most pairs per iteration; default: no cap.', lower_bound=1)
flags.DEFINE_bool('dedup', False, 'Keep each pair of a prompt once.')
flags.DEFINE_enum('gold_in_winners', 'never', GOLD_POLICIES,
                  'When the worked gold solution counts as a winner.')
flags.DEFINE_float('beta', 0.1, 'DPO beta: the larger, the closer to the reference.')
flags.DEFINE_float('nll_alpha', 1.0, 'Weight of the NLL of chosen responses; 0 is plain DPO.',
                   lower_bound=0.0)
flags.DEFINE_enum('nll_reduction', 'seq', ['seq', 'token', 'sum'],
                  'NLL per sequence mean (the paper), batch token mean, or sum.')
flags.DEFINE_integer('dev_prompts', 0, 'Training prompts held out to choose the number of steps; '
                     'the model is then trained again on all pairs for that many. 0: none.',
                     lower_bound=0)
flags.DEFINE_integer('votes', 8, 'Samples per held-out problem for the majority vote; 0: none.',
                     lower_bound=0)
flags.DEFINE_float('vote_temperature', 0.8, 'Temperature of the vote.', lower_bound=0.0)
flags.DEFINE_integer('slots', 256, 'Responses decoded together.', lower_bound=1)
flags.DEFINE_integer('part_prompts', 256, 'Prompts per part of the sample stage; a kill loses '
                     'at most one part.', lower_bound=1)
flags.DEFINE_integer('score_batch', 32, 'Responses per batch of the reference stage.',
                     lower_bound=1)


@dataclasses.dataclass(frozen=True)
class IrpoConfig:
  """Pang et al. 2024: what one run does, apart from model, data and devices."""

  iterations: int
  samples_per_prompt: int
  temperatures: tuple[float, ...]
  loss: str
  loss_options: dict
  sampling: SamplingConfig
  rule: AnswerRule
  epochs: float
  max_steps: int | None


def parse(argv: list[str]) -> list[str]:
  """Reads the flags; without --model the settings of the embedded world are the defaults."""
  rest = FLAGS(argv)
  if FLAGS.model is None:
    common_flags.set_defaults(WORLD_FLAGS)
  return rest


def without_effect() -> dict[str, str]:
  """Flags that the values of the others leave without effect, and why."""
  task = TASKS[FLAGS.task]
  idle = lora_flags.without_effect()
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
  if task.gold_solution is None and FLAGS.gold_in_winners != 'never':
    idle['gold_in_winners'] = f'problems of --task={FLAGS.task} have no worked solutions'
  if task.answer_kind != 'math':
    idle['check_timeout'] = f'--task={FLAGS.task} compares no expressions'
  if FLAGS.pairs_per_prompt == 1 and FLAGS.dedup:
    idle['dedup'] = '--pairs_per_prompt=1'
  if FLAGS.votes == 0:
    idle['vote_temperature'] = '--votes=0'
  if FLAGS.nll_alpha == 0:
    idle['nll_reduction'] = '--nll_alpha=0'
  return idle


def check() -> IrpoConfig:
  """The configuration.

  Raises:
    InputError: a value out of range, or a flag that the others leave without effect.
  """
  for name, why in without_effect().items():
    common_flags.refuse(FLAGS[name].present > 0, name, why)
  common_flags.check_finite(*MODULES)
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
  if FLAGS.samples_per_prompt < 2 and FLAGS.gold_in_winners == 'never':
    raise InputError('one sample per prompt gives no pairs', where='--samples_per_prompt',
                     expected='at least 2, or --gold_in_winners', found=FLAGS.samples_per_prompt)
  temperatures = tuple(common_flags.numbers('temperature', FLAGS.iterations))
  if min(temperatures) <= 0:
    raise InputError('all samples of a prompt would be the same', where='--temperature',
                     expected='numbers > 0', found=temperatures)
  if FLAGS.votes > 1 and FLAGS.vote_temperature == 0:
    raise InputError('all votes on a problem would be the same', where='--vote_temperature',
                     expected='a number > 0, or --votes=0', found=0)
  if FLAGS.max_steps is not None and FLAGS.max_steps <= FLAGS.warmup_steps:
    raise InputError('the warm-up leaves no step at full learning rate', where='--warmup_steps',
                     expected=f'fewer than --max_steps={FLAGS.max_steps}',
                     found=FLAGS.warmup_steps)
  # alpha = 0 leaves no NLL term at all: the loss is plain DPO, not DPO plus a zero.
  loss = 'irpo' if FLAGS.nll_alpha else 'dpo'
  options = {'beta': FLAGS.beta}
  if loss == 'irpo':
    options |= {'alpha': FLAGS.nll_alpha, 'nll_reduction': FLAGS.nll_reduction}
  common_flags.optimizer_config()
  lora_flags.check()
  return IrpoConfig(
      iterations=FLAGS.iterations, samples_per_prompt=FLAGS.samples_per_prompt,
      temperatures=temperatures, loss=loss, loss_options=options,
      sampling=SamplingConfig(FLAGS.max_new_tokens, top_p=FLAGS.top_p),
      rule=data_flags.answer_rule(), epochs=FLAGS.epochs, max_steps=FLAGS.max_steps)


def check_devices(mesh: jax.sharding.Mesh) -> None:
  """Raises InputError where rows do not divide over the devices of the mesh."""
  check_loop(LoopConfig(1, FLAGS.log_every, FLAGS.save_every), batch_size=FLAGS.batch_size,
             micro_batches=FLAGS.micro_batches, mesh=mesh)
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
