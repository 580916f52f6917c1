"""Flags of scoring, checked together before anything is read."""

from __future__ import annotations

import os

import jax
from absl import flags
from etils import epath

from experiments import common_flags, data_flags, lora_flags, output_flag
from jaxrl.errors import InputError
from jaxrl.models.frozen import STORAGES
from jaxrl.training.logps import ComputePolicy

FLAGS = flags.FLAGS

flags.DEFINE_string('data', None, 'Rows with prompt or messages, and response: JSONL (also gzip) '
                    'or Parquet.')
flags.DEFINE_bool('end_of_response', True, 'Append the id that ends a turn to every response, as '
                  'training does; without it responses count as cut.')
flags.DEFINE_enum('storage', 'float32', STORAGES, 'Type that the weights are kept in; int8 takes a '
                  'quarter of the memory, see docs/storage.md for its error.')
flags.DEFINE_bool('system_in_user', False, 'Put system messages in front of the first user '
                  'message, for chat templates without a system role.')

# The shared flags that act here; the others belong to training.
USED = ('model', 'adapter', 'mesh', 'compute_dtype', 'logp_chunk', 'batch_size', 'length_buckets',
        'over_length')
flags.adopt_module_key_flags(output_flag)
for key in USED:
  flags.declare_key_flag(key)


def check() -> epath.Path:
  """The path to write.

  Raises:
    InputError: a flag is missing or has no effect, or the output exists or has nowhere to go.
  """
  for module in (common_flags, data_flags, lora_flags):
    for flag in FLAGS.get_flags_for_module(module):
      common_flags.refuse(
          flag.name not in USED and flag.present > 0, flag.name, 'nothing is trained')
  if FLAGS.over_length == 'truncate':
    raise InputError('responses are scored whole', where='--over_length', expected='error or drop',
                     found='truncate')
  for name, expected in (('model', 'a Hugging Face folder'), ('data', 'a file of rows'),
                         ('output', 'a file to write')):
    if not FLAGS[name].value:
      raise InputError('scoring needs this flag', where=f'--{name}', expected=expected,
                       found='none')
  if FLAGS.adapter and FLAGS.storage == 'int8':
    raise InputError('an adapter goes on weights as they are', where='--storage',
                     expected='float32 or bfloat16 with --adapter', found='int8')
  output = epath.Path(FLAGS.output)
  if '://' in FLAGS.output or output.suffix != '.jsonl':
    raise InputError('scores are written as JSON lines on a local disk', where='--output',
                     expected='a path that ends in .jsonl', found=FLAGS.output)
  if os.path.lexists(output):
    raise InputError('the output already exists', where=f'--output={output}',
                     expected='a new name', fix='Choose another name, or remove the file first')
  if not os.path.isdir(output.parent):
    raise InputError('the folder of the output does not exist', where=f'--output={output}',
                     expected='a path in a folder that exists', fix='Make the folder first')
  return output


def check_devices(mesh: jax.sharding.Mesh) -> None:
  """Raises InputError where a batch does not divide over the devices of the mesh."""
  common_flags.check_multiple('batch_size', mesh)


def compute_policy() -> ComputePolicy:
  """No backward pass, so nothing is recomputed."""
  return ComputePolicy(FLAGS.compute_dtype, FLAGS.logp_chunk, remat='all')
