"""Sizes of the rollout engine, for every command that samples; they change speed, not tokens."""

from __future__ import annotations

from absl import flags

from jaxrl.sampling.sizes import EngineConfig

FLAGS = flags.FLAGS
NAMES = ('slots', 'cadence', 'rollout_tensor', 'kv_cache', 'shrink_slots')

flags.DEFINE_integer('slots', None, 'Responses decoded together, over all devices; default: as '
                     'many as memory holds and help, which is printed.', lower_bound=1)
flags.DEFINE_integer('cadence', 16, 'Most decode steps between looks of the host.', lower_bound=1)
flags.DEFINE_integer('rollout_tensor', None, 'Devices that share one copy of the parameters while '
                     'sampling; default: as --mesh says for training.', lower_bound=1)
flags.DEFINE_enum('kv_cache', 'dtype', ['dtype', 'int8'], 'How keys and values are kept: as '
                  '--compute_dtype, or in int8 with a scale per key.')
flags.DEFINE_bool('shrink_slots', False, 'Go on with half the slots when few responses are left, '
                  'and again: faster on CPUs, at the price of a compilation each.')


def engine_config(dtype: str) -> EngineConfig:
  """What the flags say."""
  return EngineConfig(slots=FLAGS.slots, cadence=FLAGS.cadence, tensor=FLAGS.rollout_tensor,
                      dtype=dtype, shrink=FLAGS.shrink_slots, kv_cache=FLAGS.kv_cache)
