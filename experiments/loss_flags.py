"""Flags that choose a preference loss, mixtures and variants included."""

from __future__ import annotations

import dataclasses
from typing import Any

from absl import flags

from jaxrl.errors import InputError
from jaxrl.losses import preference
from jaxrl.losses.pairs import DIVERGENCES, PairOptions
from jaxrl.training.objectives import MovingReference, Parts, check_mixture

FLAGS = flags.FLAGS

flags.DEFINE_list('loss', ['dpo'], 'A loss by name, or several with weights: dpo:0.8,bco:0.2,'
                  'nll:1. docs/preference_losses.md lists them.')
flags.DEFINE_list('loss_options', [], 'Options of the loss as name=value, of one of several as '
                  'loss.name=value; see docs/preference_losses.md for their defaults.')
flags.DEFINE_bool('reference_free', False, 'Take the reference to be 0.')
flags.DEFINE_float('ld_alpha', 1.0, 'LD-DPO: weight of tokens beyond the shorter response; 1: off.',
                   lower_bound=0.0, upper_bound=1.0)
flags.DEFINE_enum('divergence', 'reverse_kl', DIVERGENCES, 'f-divergence to the reference.')
flags.DEFINE_float('divergence_alpha', None, 'Alpha of --divergence=alpha.')
flags.DEFINE_bool('wpo', False, 'WPO: weigh each pair by how likely the policy finds it.')
flags.DEFINE_integer('reference_sync_steps', None, 'TR-DPO: steps between moves of the reference '
                     'towards the policy; default: it stays.', lower_bound=1)
flags.DEFINE_float('reference_sync_mix', 0.6, 'TR-DPO: share of the policy in each move.',
                   lower_bound=0.0, upper_bound=1.0)


@dataclasses.dataclass(frozen=True)
class LossConfig:
  """What is minimised; `kto_options` is set for KTO, which has rows in place of pairs."""

  parts: Parts
  pair_options: PairOptions
  moving: MovingReference | None
  kto_options: dict[str, Any] | None

  @property
  def needs_reference(self) -> bool:
    return self.kto_options is not None or any(
        preference.needs_reference(name, self.pair_options) for name in self.parts)


def without_effect() -> dict[str, str]:
  """Flags that the values of the others leave without effect, and why."""
  idle = {}
  if FLAGS.divergence != 'alpha':
    idle['divergence_alpha'] = f'--divergence={FLAGS.divergence}'
  if FLAGS.reference_sync_steps is None:
    idle['reference_sync_mix'] = 'no --reference_sync_steps'
  return idle


def _value(text: str) -> Any:
  """true, false, a number, or the text itself."""
  if text in ('true', 'false'):
    return text == 'true'
  try:
    return float(text)
  except ValueError:
    return text


def _weights() -> dict[str, float]:
  """Loss -> weight, in the order given."""
  weights: dict[str, float] = {}
  for item in FLAGS.loss:
    name, has_weight, text = item.partition(':')
    weight = _value(text) if has_weight else 1.0
    if not isinstance(weight, float) or not weight > 0:
      raise InputError('the weight of a loss is no positive number', where='--loss',
                       expected='name or name:weight', found=item)
    if name in weights:
      raise InputError('a loss is named twice', where='--loss', expected='each once', found=name)
    weights[name] = weight
  if not weights:
    raise InputError('no loss is named', where='--loss', expected='at least one', found='none')
  if len(weights) == 1 and next(iter(weights.values())) != 1:
    raise InputError('the weight of a single loss only scales the learning rate', where='--loss',
                     expected='its name alone', found=FLAGS.loss[0])
  return weights


def _options(names: list[str]) -> dict[str, dict[str, Any]]:
  """Loss -> its options."""
  options: dict[str, dict[str, Any]] = {name: {} for name in names}
  for item in FLAGS.loss_options:
    key, equals, text = item.partition('=')
    loss, dot, option = key.rpartition('.')
    loss = loss if dot else names[0]
    if not equals or (len(names) > 1 and not dot) or loss not in options or option in options[loss]:
      raise InputError('the option cannot be read', where='--loss_options',
                       expected='name=value, each once' if len(names) == 1 else
                                f'loss.name=value for one of {", ".join(names)}, each once',
                       found=item)
    options[loss][option] = _value(text)
  return options


def check() -> LossConfig:
  """The loss that the flags describe.

  Raises:
    InputError: an unknown loss, an option out of range, or one that does not apply.
  """
  weights = _weights()
  options = _options(list(weights))
  try:
    pair_options = PairOptions(
        FLAGS.reference_free, FLAGS.ld_alpha, FLAGS.divergence, FLAGS.divergence_alpha, FLAGS.wpo)
    moving = None
    if FLAGS.reference_sync_steps is not None:
      moving = MovingReference(FLAGS.reference_sync_steps, FLAGS.reference_sync_mix)
    if 'kto' in weights:
      if len(weights) > 1 or pair_options != PairOptions() or moving is not None:
        raise ValueError('kto works on single responses: it mixes with no other loss and has no '
                         'variants of pairs')
      return LossConfig({}, pair_options, None, options['kto'])
    parts = {name: (weight, options[name]) for name, weight in weights.items()}
    check_mixture(parts, pair_options, moving)
  except ValueError as error:
    raise InputError('the loss cannot be used', where='--loss', found=str(error)) from error
  return LossConfig(parts, pair_options, moving, None)
