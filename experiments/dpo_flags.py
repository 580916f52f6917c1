"""Flags of offline preference training, checked together before anything runs."""

from __future__ import annotations

import sys

import jax
from absl import flags

from experiments import common_flags, lora_flags, loss_flags
from jaxrl.errors import InputError
from jaxrl.training.loop import LoopConfig, check_loop

FLAGS = flags.FLAGS
MODULES = (common_flags, lora_flags, loss_flags, sys.modules[__name__])

flags.DEFINE_string('train', None, 'Preference file: JSONL or Parquet.')
flags.DEFINE_string('test', None, 'Preference file to measure on before and after; optional.')
flags.DEFINE_integer('train_limit', None, 'Rows of --train to read; default: all.', lower_bound=1)
flags.DEFINE_integer('test_limit', None, 'Rows of --test to read; default: all.', lower_bound=1)
flags.DEFINE_integer('max_length', 1024, 'Most ids of prompt and response together.',
                     lower_bound=2)
flags.DEFINE_enum('over_length', 'error', ['error', 'drop', 'truncate'],
                  'What becomes of rows over --max_length; truncate cuts responses.')
flags.DEFINE_integer('score_batch', 32, 'Responses per batch of the reference stage.',
                     lower_bound=1)
flags.DEFINE_string('reference', None, 'Model folder of the reference; default: --model.')


def without_effect() -> dict[str, str]:
  """Flags that the values of the others leave without effect, and why."""
  idle = lora_flags.without_effect() | loss_flags.without_effect()
  if FLAGS.test is None:
    idle['test_limit'] = 'no --test'
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
  check_loop(LoopConfig(1, FLAGS.log_every, FLAGS.save_every), batch_size=FLAGS.batch_size,
             micro_batches=FLAGS.micro_batches, mesh=mesh)
  common_flags.check_multiple('score_batch', mesh)


def effective() -> dict[str, str]:
  """Flags for the run folder: all that have an effect."""
  idle = without_effect()
  return {
      name: text for name, text in common_flags.effective_flags(*MODULES).items()
      if name not in idle
  }
