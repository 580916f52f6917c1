"""Flags of offline preference training, checked together before anything runs."""

from __future__ import annotations

import sys

import jax
from absl import flags

from experiments import (
    common_flags,
    data_flags,
    lora_flags,
    loss_flags,
    rounds_flags,
    sft_flags,
    training_flags,
)
from jaxrl.errors import InputError
from jaxrl.models.frozen import STORAGES

FLAGS = flags.FLAGS
LENDERS = (data_flags, rounds_flags, sft_flags)
# What is used of the flags that belong to problems, to sampling methods and to fine-tuning.
BORROWED = ('train', 'test', 'train_limit', 'test_limit', 'over_length', 'score_batch',
            'max_length')
MODULES = (common_flags, lora_flags, loss_flags, training_flags, *LENDERS, sys.modules[__name__])

flags.DEFINE_string('reference', None, 'Model folder of the reference; default: --model.')
flags.DEFINE_enum('reference_storage', 'float32', STORAGES, 'Type that the weights of --reference '
                  'are kept in while it scores; see docs/storage.md for the error of int8.')


for key in BORROWED:
  flags.declare_key_flag(key)


def without_effect() -> dict[str, str]:
  """Flags that the values of the others leave without effect, and why."""
  idle = (lora_flags.without_effect() | loss_flags.without_effect()
          | training_flags.without_effect())
  for lender in LENDERS:
    idle |= {flag.name: 'it belongs to another experiment'
             for flag in FLAGS.get_flags_for_module(lender) if flag.name not in BORROWED}
  if FLAGS.test is None:
    idle['test_limit'] = 'no --test'
  if FLAGS.reference is None:
    idle['reference_storage'] = 'no --reference: the reference is the model in training'
  return idle


def check() -> loss_flags.LossConfig:
  """The loss.

  Raises:
    InputError: a value out of range, or a flag that the others leave without effect.
  """
  for name, why in without_effect().items():
    common_flags.refuse(FLAGS[name].present > 0, name, why)
  common_flags.check_finite(*MODULES)
  for name, what in (('model', 'a Hugging Face folder'), ('train', 'a preference file')):
    if FLAGS[name].value is None:
      raise InputError('nothing to start from', where=f'--{name}', expected=what, found='none')
  if FLAGS.epochs <= 0:
    raise InputError('there is nothing to train', where='--epochs', expected='a number > 0',
                     found=FLAGS.epochs)
  common_flags.optimizer_config()
  lora_flags.check()
  loss = loss_flags.check()
  if FLAGS.reference is not None and not loss.needs_reference:
    common_flags.refuse(True, 'reference', f'--loss={",".join(FLAGS.loss)} reads no reference')
  if loss.moving is not None:
    common_flags.refuse(FLAGS.reference is not None, 'reference',
                        'with --reference_sync_steps the reference starts as the model')
    if FLAGS.lora_rank is not None:
      raise InputError('an adapter cannot move its reference', where='--reference_sync_steps',
                       expected='no --lora_rank: the reference would need a copy of the model',
                       found=FLAGS.lora_rank)
  if loss.kto_options is not None and FLAGS.batch_size < 2:
    raise InputError('the mismatched response would be the matched one', where='--batch_size',
                     expected='at least 2 for kto', found=FLAGS.batch_size)
  return loss


def check_devices(mesh: jax.sharding.Mesh) -> None:
  """Raises InputError where rows do not divide over the devices of the mesh."""
  training_flags.check_devices(mesh)
  common_flags.check_multiple('score_batch', mesh)


def effective() -> dict[str, str]:
  """Flags for the run folder: all that have an effect."""
  idle = without_effect()
  return {
      name: text for name, text in common_flags.effective_flags(*MODULES).items()
      if name not in idle
  }
