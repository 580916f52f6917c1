"""Flags of DIVE, checked together and turned into a dataclass before anything runs."""

from __future__ import annotations

import dataclasses
import math
import sys
from pathlib import Path

from absl import flags

from experiments import irpo_flags, nll_flags, rounds_flags
from experiments.rounds_flags import RoundsConfig
from jaxrl.errors import InputError
from jaxrl.preferences.diverse_selection import OBJECTIVES
from jaxrl.preferences.isolation_forest import (
    SMALLEST_POOL,
    Contamination,
    check_contamination,
)

FLAGS = flags.FLAGS
OWN = rounds_flags.MODULES
LENDERS = (irpo_flags, nll_flags)
MODULES = (*OWN, *LENDERS, sys.modules[__name__])
BORROWED = ('pairs_per_prompt',)
WORLD_FLAGS = Path(__file__).parent / 'flags' / 'dive_world.flags'
# What other methods set otherwise.
DEFAULTS = {'pairs_per_prompt': 5, 'beta': 0.4}
RELEASED_NLL = 0.5                          # the released code adds 0.5 NLL to a whole DPO

flags.DEFINE_bool('global_pool', True, 'Build pairs from the responses of all iterations so far, '
                  'not of this one only.')
flags.DEFINE_bool('selection', True, 'Leave outliers out and pick diverse responses; else pick at '
                  'random. Without this and --global_pool: plain self-improvement.')
flags.DEFINE_enum('diversity', 'embedding', OBJECTIVES, 'What the picked responses are to have '
                  'much of; mix is the mean of both.')
flags.DEFINE_string('contamination', '0.1', 'Share of the responses left out as outliers, or auto: '
                    'all that the forest scores above 0.5.')
flags.DEFINE_enum('encoder', 'model', ['model', 'ngrams'], 'Embedding of a response: mean hidden '
                  'state of the reference model, or hashed n-grams of its words.')
flags.DEFINE_float('alpha', 0.5, 'Weight of the preference term; 1 - alpha is that of the NLL of '
                   'chosen responses.')
flags.DEFINE_bool('dive_release_loss', False, 'The loss of the released code, DPO + 0.5 NLL, in '
                  'place of the paper\'s.')

for module in OWN:
  flags.adopt_module_key_flags(module)
for key in BORROWED:
  flags.declare_key_flag(key)


@dataclasses.dataclass(frozen=True)
class DiveRun(RoundsConfig):
  """Qin et al. 2025: what one run does, apart from model, data and devices."""

  loss: str
  loss_options: dict
  first_loss: float                         # preference loss before the first update
  contamination: Contamination
  encoder: str


def parse(argv: list[str]) -> list[str]:
  """Reads the flags; without --model the settings of the embedded world are the defaults."""
  for name, value in DEFAULTS.items():
    FLAGS.set_default(name, value)
  return rounds_flags.parse(argv, WORLD_FLAGS)


def without_effect() -> dict[str, str]:
  """Flags that the values of the others leave without effect, and why."""
  idle = rounds_flags.without_effect()
  for lender in LENDERS:
    idle |= {flag.name: 'it belongs to another experiment'
             for flag in FLAGS.get_flags_for_module(lender) if flag.name not in BORROWED}
  largest_pool = FLAGS.samples_per_prompt * (FLAGS.iterations if FLAGS.global_pool else 1)
  is_filtered = largest_pool > SMALLEST_POOL        # a side has at most all but one of it
  if not FLAGS.selection:
    idle |= dict.fromkeys(('diversity', 'contamination', 'encoder'), '--noselection')
  elif not is_filtered:
    idle['contamination'] = f'a pool of fewer than {SMALLEST_POOL} responses is kept whole'
  if FLAGS.selection and FLAGS.diversity == 'distinct_n' and (
      not is_filtered or contamination() == 0):
    idle['encoder'] = '--diversity=distinct_n without a filter reads words alone'
  if FLAGS.iterations == 1:
    idle['global_pool'] = '--iterations=1'
  if FLAGS.dive_release_loss:
    idle['alpha'] = '--dive_release_loss'
  return idle


def contamination() -> Contamination:
  """--contamination as `isolation_forest.inliers` takes it."""
  text = FLAGS.contamination
  try:
    value: Contamination = 'auto' if text == 'auto' else float(text)
    check_contamination(value)
  except (ValueError, InputError):
    raise InputError('the share of outliers cannot be used', where='--contamination',
                     expected='a number in [0, 0.5], or auto', found=text) from None
  return value


def check() -> DiveRun:
  """The configuration.

  Raises:
    InputError: a value out of range, or a flag that the others leave without effect.
  """
  config = rounds_flags.check(without_effect(), MODULES)
  if FLAGS.samples_per_prompt < 2:
    raise InputError('one sample per prompt gives no pairs', where='--samples_per_prompt',
                     expected='at least 2', found=FLAGS.samples_per_prompt)
  if not 0 < FLAGS.alpha <= 1:
    raise InputError('the weight of the preference term is out of range', where='--alpha',
                     expected='a number > 0 and at most 1', found=FLAGS.alpha)
  loss, options, first = 'dive', {'beta': FLAGS.beta, 'alpha': FLAGS.alpha}, FLAGS.alpha
  if FLAGS.dive_release_loss:
    loss, options, first = 'irpo', {'beta': FLAGS.beta, 'alpha': RELEASED_NLL}, 1.0
  elif FLAGS.alpha == 1:
    # No NLL term at all: the loss is plain DPO, not DPO plus a zero.
    loss, options = 'dpo', {'beta': FLAGS.beta}
  return DiveRun(**vars(config), loss=loss, loss_options=options, first_loss=first * math.log(2),
                 contamination=contamination(),
                 # Where no embedding is read the cheap ones will do.
                 encoder='ngrams' if 'encoder' in without_effect() else FLAGS.encoder)


def effective() -> dict[str, str]:
  """Flags for the run folder: all that have an effect."""
  return rounds_flags.effective(without_effect(), MODULES)
