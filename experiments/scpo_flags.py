"""Flags of ScPO, checked together and turned into a dataclass before anything runs."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

from absl import flags

from experiments import common_flags, data_flags, nll_flags, rounds_flags
from experiments.rounds_flags import RoundsConfig
from jaxrl.data.tasks import Task
from jaxrl.errors import InputError

FLAGS = flags.FLAGS
MODULES = (*rounds_flags.MODULES, nll_flags, sys.modules[__name__])
WORLD_FLAGS = Path(__file__).parent / 'flags' / 'scpo_world.flags'

flags.DEFINE_list('tau_fraction', ['0.5'], 'Share of the votes that the top answer of a problem '
                  'needs, per iteration; the last repeats.')
flags.DEFINE_integer('extra_samples', 0, 'Further responses per problem, which may be rejected but '
                     'do not vote.', lower_bound=0)
flags.DEFINE_float('extra_temperature', 1.2, 'Their temperature.')
flags.DEFINE_bool('allow_unparsed_rejected', True, 'A response without a readable answer may be '
                  'the rejected one.')
flags.DEFINE_bool('weighted', True, 'Weigh each pair by its margin of votes; else all weigh 1.')
flags.DEFINE_float('labelled_fraction', 0.0, 'Share of the training problems whose gold answers '
                   'are used in place of votes (semi-supervised).', lower_bound=0.0,
                   upper_bound=1.0)
flags.DEFINE_string('answer_marker', None, 'What stands before the final answer of a response; '
                    'default: the task\'s, "Final answer:".')
flags.DEFINE_list('num_generated', ['0'], 'New problems that the model is asked to write, per '
                  'iteration; the last repeats.')
flags.DEFINE_integer('few_shot', 4, 'Training questions that it sees for each.', lower_bound=1)
flags.DEFINE_float('new_problem_temperature', 0.7, 'Temperature at which it writes.')
flags.DEFINE_integer('max_new_problem', 256, 'Longest new problem, in ids.', lower_bound=1)
flags.DEFINE_integer('max_writer_prompt', 1024, 'Longest prompt of few-shot questions, in ids; '
                     'longer ones are left out.', lower_bound=1)
flags.DEFINE_float('world_writer_share', 0.0, 'Examples of writing that the seed model is trained '
                   'on, as a share of --world_sft.', lower_bound=0.0)


@dataclasses.dataclass(frozen=True)
class ScpoConfig(RoundsConfig):
  """Prasad et al. 2024: what one run does, apart from model, data and devices."""

  tau_fractions: tuple[float, ...]   # per iteration
  extra_temperatures: tuple[float, ...]
  num_generated: tuple[int, ...]     # per iteration
  task: Task
  loss: str
  loss_options: dict


def parse(argv: list[str]) -> list[str]:
  """Reads the flags; without --model the settings of the embedded world are the defaults."""
  return rounds_flags.parse(argv, WORLD_FLAGS)


def without_effect() -> dict[str, str]:
  """Flags that the values of the others leave without effect, and why."""
  idle = rounds_flags.without_effect()
  if FLAGS.extra_samples == 0:
    idle['extra_temperature'] = '--extra_samples=0'
  if set(FLAGS.num_generated) == {'0'}:
    idle |= dict.fromkeys(
        ('few_shot', 'new_problem_temperature', 'max_new_problem', 'max_writer_prompt',
         'world_writer_share'), '--num_generated=0')
  if FLAGS.model is not None:
    idle['world_writer_share'] = '--model is given, so there is no embedded world'
  return idle


def check() -> ScpoConfig:
  """The configuration.

  Raises:
    InputError: a value out of range, or a flag that the others leave without effect.
  """
  config = rounds_flags.check(without_effect(), MODULES)
  if FLAGS.samples_per_prompt < 2:
    raise InputError('a single vote is always unanimous', where='--samples_per_prompt',
                     expected='at least 2', found=FLAGS.samples_per_prompt)
  taus = tuple(common_flags.numbers('tau_fraction', FLAGS.iterations))
  if not all(0 < tau <= 1 for tau in taus):
    raise InputError('a share of the votes is out of range', where='--tau_fraction',
                     expected='numbers > 0 and at most 1', found=FLAGS.tau_fraction)
  if FLAGS.extra_samples and FLAGS.extra_temperature <= 0:
    raise InputError('all extra samples would be the same', where='--extra_temperature',
                     expected='a number > 0', found=FLAGS.extra_temperature)
  counts = common_flags.numbers('num_generated', FLAGS.iterations)
  if not all(count >= 0 and count == int(count) for count in counts):
    raise InputError('a number of problems is out of range', where='--num_generated',
                     expected='whole numbers of at least 0', found=FLAGS.num_generated)
  if any(counts) and FLAGS.new_problem_temperature <= 0:
    raise InputError('equal prompts would give equal problems', where='--new_problem_temperature',
                     expected='a number > 0', found=FLAGS.new_problem_temperature)
  task = data_flags.task()
  if any(counts) and (task.choices_field is not None or task.answer_kind == 'grid'):
    raise InputError('problems with options or tables cannot be written', where='--num_generated',
                     expected=f'0 with --task={task.name}', found=FLAGS.num_generated)
  if FLAGS.answer_marker is not None and not FLAGS.answer_marker.strip():
    raise InputError('the marker is empty', where='--answer_marker', expected='some text',
                     found=repr(FLAGS.answer_marker))
  if FLAGS.labelled_fraction == 1 and not any(counts):
    raise InputError('nothing would be voted on', where='--labelled_fraction',
                     expected='a number below 1, or --num_generated',
                     found=FLAGS.labelled_fraction,
                     fix='With gold for all problems use experiments.irpo')
  # alpha = 0 leaves no NLL term at all: the loss is weighted DPO, not that plus a zero.
  loss = 'scpo' if FLAGS.nll_alpha else 'dpo'
  options = {'beta': FLAGS.beta} | ({'alpha': FLAGS.nll_alpha} if FLAGS.nll_alpha else {})
  rule = config.rule
  if FLAGS.answer_marker is not None:
    rule = dataclasses.replace(rule, marker=FLAGS.answer_marker)
  return ScpoConfig(
      **vars(config) | {'rule': rule}, tau_fractions=taus,
      extra_temperatures=(FLAGS.extra_temperature,) * FLAGS.extra_samples,
      num_generated=tuple(map(int, counts)), task=task, loss=loss, loss_options=options)


def effective() -> dict[str, str]:
  """Flags for the run folder: all that have an effect."""
  return rounds_flags.effective(without_effect(), MODULES)
