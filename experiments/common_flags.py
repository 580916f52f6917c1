"""Flags that mean the same in every experiment, and how they become library objects."""

from __future__ import annotations

import functools
import itertools
import math
import os
import signal
import sys
from collections.abc import Callable, Sequence
from types import ModuleType

import jax
from absl import app, flags, logging

from jaxrl.errors import InputError
from jaxrl.models.decoder import REMAT
from jaxrl.parallel import hosts
from jaxrl.parallel.mesh import make_mesh
from jaxrl.training.logps import ComputePolicy
from jaxrl.training.loop import NonFiniteError
from jaxrl.training.optimizer import MOMENT_DTYPES, OPTIMIZERS, SCHEDULES, OptimizerConfig
from jaxrl.training.preemption import Preempted

FLAGS = flags.FLAGS

flags.DEFINE_string('run_dir', None,
                    'Folder of the run; the same command goes on where it stopped.')
flags.DEFINE_string('model', None, 'Hugging Face folder to start from. Without it: the embedded '
                    'world (irpo), a new model (sft).')
flags.DEFINE_integer('seed', 0, 'Seed of every random draw.', lower_bound=0,
                     upper_bound=2**32 - 1)
flags.DEFINE_list('mesh', None, 'Devices as data,fsdp,tensor, and sequence where rows are '
                  'split; default: all on fsdp.')
flags.DEFINE_enum('compute_dtype', 'bfloat16', ['bfloat16', 'float32'],
                  'Type of matrix products; see --param_dtype for the parameters.')
flags.DEFINE_enum('param_dtype', 'float32', ['float32', 'bfloat16'],
                  'Type that parameters are kept in between steps. bfloat16 halves their memory; '
                  'small updates are then lost to rounding. Moments of Adam stay float32.')
flags.DEFINE_enum('remat', 'attn', list(REMAT), 'What of each layer is kept for the backward pass; '
                  'the rest is computed again: all keeps everything, nothing the least.')
flags.DEFINE_integer('logp_chunk', 512, 'Tokens per device whose logits exist at one time.',
                     lower_bound=1)
flags.DEFINE_float('learning_rate', 7e-7, 'Peak learning rate.', lower_bound=0.0)
flags.DEFINE_enum('schedule', 'constant', SCHEDULES, 'Learning rate after the warm-up.')
flags.DEFINE_integer('warmup_steps', 0, 'Steps of linear warm-up.', lower_bound=0)
flags.DEFINE_float('weight_decay', 0.0, 'AdamW weight decay on matrices.', lower_bound=0.0)
flags.DEFINE_float('clip_norm', 1.0, 'Largest global gradient norm.', lower_bound=0.0)
flags.DEFINE_enum('optimizer', 'adamw', OPTIMIZERS, 'adamw8bit keeps moments in 8 bits, adafactor '
                  'only rows and columns of them; see docs/optimizers.md.')
flags.DEFINE_enum('moment_dtype', 'float32', MOMENT_DTYPES, 'Type of the first moment of adamw.')
flags.DEFINE_integer('moment_block', 256, 'Values that share a scale, of adamw8bit.',
                     lower_bound=1)
flags.DEFINE_float('adam_b1', 0.9, 'Adam decay of the mean.', lower_bound=0.0, upper_bound=1.0)
flags.DEFINE_float('adam_b2', 0.95, 'Adam decay of the square.', lower_bound=0.0, upper_bound=1.0)
flags.DEFINE_integer('batch_size', 16, 'Rows (pairs, or examples) per optimizer step.',
                     lower_bound=1)
flags.DEFINE_integer('micro_batches', 1, 'Parts of a batch computed one after another.',
                     lower_bound=1)
flags.DEFINE_float('epochs', 1.0, 'Passes over the rows or pairs, unless --max_steps ends earlier.',
                   lower_bound=0.0)
flags.DEFINE_integer('max_steps', None, 'Most training steps, per iteration where there are '
                     'several.', lower_bound=1)
flags.DEFINE_list('length_buckets', None,
                  'Padded lengths in ids, each one compiled program; default: doubling from 128.')
flags.DEFINE_integer('log_every', 10, 'Steps between log lines.', lower_bound=1)
flags.DEFINE_integer('save_every', 100, 'Steps between checkpoints.', lower_bound=1)

# Where a run lies and how it looks do not change its results.
FREE_FLAGS = ('run_dir',)


def mesh_sizes() -> dict[str, int] | None:
  """The sizes of --mesh by axis; None without it."""
  if FLAGS.mesh is None:
    return None
  try:
    data, fsdp, tensor, *rest = (int(size) for size in FLAGS.mesh)
    (sequence,) = rest or (1,)
  except ValueError:
    raise InputError('the mesh cannot be read', where='--mesh',
                     expected='whole numbers data,fsdp,tensor or data,fsdp,tensor,sequence',
                     found=','.join(FLAGS.mesh)) from None
  return {'data': data, 'fsdp': fsdp, 'tensor': tensor, 'sequence': sequence}


def mesh_from_flags() -> jax.sharding.Mesh:
  """The mesh of --mesh over all devices."""
  sizes = mesh_sizes()
  return make_mesh() if sizes is None else make_mesh(
      data=sizes['data'], fsdp=sizes['fsdp'], tensor=sizes['tensor'], sequence=sizes['sequence'])


def compute_policy() -> ComputePolicy:
  return ComputePolicy(FLAGS.compute_dtype, FLAGS.logp_chunk, FLAGS.remat)


def optimizer_config() -> OptimizerConfig:
  if FLAGS.learning_rate == 0:
    raise InputError('nothing would be learned', where='--learning_rate',
                     expected='a number > 0', found=0)
  for name in ('adam_b1', 'adam_b2'):
    if FLAGS[name].value == 1:
      raise InputError('the average would never move', where=f'--{name}',
                       expected='a number below 1', found=1)
  return OptimizerConfig(
      learning_rate=FLAGS.learning_rate, schedule=FLAGS.schedule, warmup_steps=FLAGS.warmup_steps,
      b1=FLAGS.adam_b1, b2=FLAGS.adam_b2, weight_decay=FLAGS.weight_decay,
      clip_norm=FLAGS.clip_norm or None, optimizer=FLAGS.optimizer,
      moment_dtype=FLAGS.moment_dtype, moment_block=FLAGS.moment_block)


def length_buckets(longest: int) -> tuple[int, ...]:
  """Padded lengths that cover rows of `longest` ids.

  Raises:
    InputError: the given buckets are not whole numbers, or too short.
  """
  needed = longest - 1          # inputs are one shorter than the ids
  if FLAGS.length_buckets is None:
    lengths = [128]
    while lengths[-1] < needed:
      lengths.append(min(2 * lengths[-1], -(-needed // 16) * 16))
    return tuple(lengths)
  try:
    given = tuple(sorted(int(length) for length in FLAGS.length_buckets))
  except ValueError:
    raise InputError('the lengths cannot be read', where='--length_buckets',
                     expected='whole numbers', found=','.join(FLAGS.length_buckets)) from None
  if not given or given[0] < 1 or given[-1] < needed:
    raise InputError('the padded lengths do not cover the longest row', where='--length_buckets',
                     expected=f'a largest length of at least {needed}', found=given)
  unused = [b for a, b in itertools.pairwise(given) if a >= needed or a == b]
  if unused:
    raise InputError('a padded length would never be used', where='--length_buckets',
                     expected=f'different ones, of which one is at least {needed}', found=given)
  return given


def numbers(name: str, count: int) -> list[float]:
  """A list flag as one number per iteration; the last one repeats.

  Raises:
    InputError: not numbers, none, or more than there are iterations (the rest would do nothing).
  """
  texts: list[str] = FLAGS[name].value or []
  try:
    values = [float(text) for text in texts]
  except ValueError:
    raise InputError('not a list of numbers', where=f'--{name}', found=','.join(texts)) from None
  if not all(map(math.isfinite, values)):
    raise InputError('not a list of finite numbers', where=f'--{name}', found=','.join(texts))
  if not values or len(values) > count:
    raise InputError('the list does not fit the number of iterations', where=f'--{name}',
                     expected=f'1 to {count} numbers', found=len(values))
  return values + [values[-1]] * (count - len(values))


def check_finite(*modules: ModuleType) -> None:
  """Raises InputError for NaN and infinities, which pass every bound that absl checks."""
  for module in modules:
    for flag in FLAGS.get_flags_for_module(module):
      if isinstance(flag.value, float) and not math.isfinite(flag.value):
        raise InputError('the value is no number', where=f'--{flag.name}',
                         expected='a finite number', found=flag.value)


def check_multiple(name: str, mesh: jax.sharding.Mesh) -> None:
  """Raises InputError where a flag's number of rows does not divide over the devices."""
  ways = mesh.shape['data'] * mesh.shape['fsdp']
  if FLAGS[name].value % ways:
    raise InputError('the rows do not divide over the devices', where=f'--{name}',
                     expected=f'a multiple of {ways} (data * fsdp devices)',
                     found=FLAGS[name].value)


def effective_flags(*modules: ModuleType) -> dict[str, str]:
  """Every flag of these modules as the text a flag file holds; unset ones are left out."""
  effective = {}
  for module in modules:
    for flag in FLAGS.get_flags_for_module(module):
      if flag.value is not None:
        text = str(flag.value).lower() if flag.boolean else flag.serialize().partition('=')[2]
        effective[flag.name] = text
  return effective


def refuse(condition: bool, flag: str, why: str) -> None:
  """Raises InputError for a flag that the others leave without effect."""
  if condition:
    raise InputError('the flag would have no effect', where=f'--{flag}', found=why,
                     fix='Leave it out')


def set_defaults(path: str | os.PathLike[str]) -> None:
  """Makes the values of a flag file the defaults, which no flag that was given loses to.

  `FLAGS[name].present` goes on to say whether the user gave the flag.
  """
  for line in FLAGS.read_flags_from_files([f'--flagfile={os.fspath(path)}']):
    name, has_value, text = line.removeprefix('--').partition('=')
    if not has_value:
      name, text = (name, 'true') if name in FLAGS else (name.removeprefix('no'), 'false')
    FLAGS.set_default(name, text)


def run(
    main: Callable[[Sequence[str]], None], parser: Callable | None = None, *, several: bool = False
) -> None:
  """`app.run`, but what the user can mend is one sentence on stderr and exit status 2.

  `several`: the command may be several processes that are one run.
  """

  def quiet(argv):
    if not (several or hosts.alone()):
      raise InputError('this command does not run in several processes', where=hosts.COORDINATOR,
                       expected='1 process', found=jax.process_count(),
                       fix='Start it on one host, with all its devices')
    if not FLAGS['verbosity'].present:
      logging.set_verbosity(logging.WARNING)   # libraries log every file they touch at INFO
    main(argv)

  def in_processes(argv):
    with hosts.start(hosts.config_from_environment()):
      ends_with_sentence(quiet)(argv)

  app.run(ends_with_sentence(in_processes), flags_parser=ends_with_sentence(
      lambda argv: only_flags((parser or FLAGS)(argv))))


def ends_with_sentence(function: Callable) -> Callable:
  """The function, ending the process with status 2 on errors of the user's flags and files.

  A training that saved itself because it was asked to end leaves with status 143, as SIGTERM does.
  """

  @functools.wraps(function)
  def guarded(*args):
    try:
      return function(*args)
    except (flags.Error, InputError, NonFiniteError) as error:
      text, status = ' '.join(str(error).split()).removeprefix('ERROR:: '), 2
    except Preempted as ended:
      text, status = str(ended), 128 + signal.SIGTERM
    print(f'error: {text}', file=sys.stderr)
    sys.exit(status)

  return guarded


def only_flags(argv: list[str]) -> list[str]:
  """What a parser left over; InputError where that is more than the program's name."""
  if len(argv) > 1:
    raise InputError('this is not a flag', where=repr(argv[1]), expected='--name=value',
                     fix='A flag that is on or off is written --name or --noname')
  return argv
