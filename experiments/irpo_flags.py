"""Flags of IRPO, checked together and turned into a dataclass before anything runs."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

from absl import flags

from experiments import nll_flags, rounds_flags
from experiments.rounds_flags import RoundsConfig
from jaxrl.data.tasks import TASKS
from jaxrl.errors import InputError
from jaxrl.preferences.irpo import GOLD_POLICIES

FLAGS = flags.FLAGS
MODULES = (*rounds_flags.MODULES, nll_flags, sys.modules[__name__])
WORLD_FLAGS = Path(__file__).parent / 'flags' / 'irpo_world.flags'

flags.DEFINE_integer('pairs_per_prompt', 10, 'Pairs per prompt (K).', lower_bound=1)
flags.DEFINE_bool('dedup', False, 'Keep each pair of a prompt once.')
flags.DEFINE_enum('gold_in_winners', 'never', GOLD_POLICIES,
                  'When the worked gold solution counts as a winner.')
flags.DEFINE_enum('nll_reduction', 'seq', ['seq', 'token', 'sum'],
                  'NLL per sequence mean (the paper), batch token mean, or sum.')


@dataclasses.dataclass(frozen=True)
class IrpoConfig(RoundsConfig):
  """Pang et al. 2024: what one run does, apart from model, data and devices."""

  loss: str
  loss_options: dict


def parse(argv: list[str]) -> list[str]:
  """Reads the flags; without --model the settings of the embedded world are the defaults."""
  return rounds_flags.parse(argv, WORLD_FLAGS)


def without_effect() -> dict[str, str]:
  """Flags that the values of the others leave without effect, and why."""
  idle = rounds_flags.without_effect()
  if TASKS[FLAGS.task].gold_solution is None and FLAGS.gold_in_winners != 'never':
    idle['gold_in_winners'] = f'problems of --task={FLAGS.task} have no worked solutions'
  if FLAGS.pairs_per_prompt == 1 and FLAGS.dedup:
    idle['dedup'] = '--pairs_per_prompt=1'
  if FLAGS.nll_alpha == 0:
    idle['nll_reduction'] = '--nll_alpha=0'
  return idle


def check() -> IrpoConfig:
  """The configuration.

  Raises:
    InputError: a value out of range, or a flag that the others leave without effect.
  """
  config = rounds_flags.check(without_effect(), MODULES)
  if FLAGS.samples_per_prompt < 2 and FLAGS.gold_in_winners == 'never':
    raise InputError('one sample per prompt gives no pairs', where='--samples_per_prompt',
                     expected='at least 2, or --gold_in_winners', found=FLAGS.samples_per_prompt)
  # alpha = 0 leaves no NLL term at all: the loss is plain DPO, not DPO plus a zero.
  loss = 'irpo' if FLAGS.nll_alpha else 'dpo'
  options = {'beta': FLAGS.beta}
  if loss == 'irpo':
    options |= {'alpha': FLAGS.nll_alpha, 'nll_reduction': FLAGS.nll_reduction}
  return IrpoConfig(**vars(config), loss=loss, loss_options=options)


def effective() -> dict[str, str]:
  """Flags for the run folder: all that have an effect."""
  return rounds_flags.effective(without_effect(), MODULES)
