"""Any experiment on Cloud TPU: machines, code, run, and everything removed again.

  python -m launch.tpu --name=irpo-70b --project=P --zone=us-east5-a --topology=v5p:4x4x4 --spot \\
    -- -m experiments.irpo --flagfile=experiments/flags/irpo_gsm8k.flags \\
       --run_dir=gs://BUCKET/irpo-70b --model=gs://BUCKET/llama

--dry_run prints every command and runs none. A spot slice that is preempted is asked for again, and
the same command goes on from --run_dir. Ends with the status of the host that failed.
"""

from __future__ import annotations

import re
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from absl import app, flags

from jaxrl.errors import InputError
from launch import queued_resource
from launch.commands import ends_with_sentence, parse, require, stoppable
from launch.naming import check_name, check_project, check_zone
from launch.queued_resource import TpuConfig
from launch.shipping import define_flags as define_shipping_flags
from launch.shipping import define_slice_flags, required, run_dir_of, source_from_flags
from launch.slices import find_slice

FLAGS = flags.FLAGS


def define_flags() -> None:
  define_shipping_flags(poll=30.0)
  define_slice_flags()
  flags.DEFINE_string('project', None, 'Id of the Google Cloud project.')
  flags.DEFINE_string('zone', None, 'Zone of the machines.')
  flags.DEFINE_bool('reserved', False, 'Machines of a reservation of the project.')
  flags.DEFINE_string('service_account', None, 'Email of the account that the machines act as.')
  flags.DEFINE_string('network', None, 'Network of the machines.')
  flags.DEFINE_string('subnetwork', None, 'Its part for the region.')
  flags.DEFINE_bool('internal_ips', False, 'No external addresses; ssh goes through IAP.')
  flags.DEFINE_string('runtime', None, 'Software of the machines; default: by generation.')
  flags.DEFINE_string('valid_until', None, 'How long to wait for machines, as in 6h.')
  flags.DEFINE_string('python_version', '3.12', 'Python that is installed on the hosts.')


def config_from_flags(command: Sequence[str]) -> TpuConfig:
  """What the flags say, all of it checked that can be without asking a cloud.

  Raises:
    InputError: a name, size or path cannot be used, or the command cannot run.
  """
  slice_ = find_slice(required('topology', 'a slice such as v5p:4x4x4'))
  if slice_.accelerator_type is None:
    raise InputError('only GKE makes this shape', where='--topology', found=slice_.topology,
                     expected='a shape that has an accelerator type', fix='See launch.gke')
  if FLAGS.spot and FLAGS.reserved:
    raise InputError('the machines are either spot or reserved', where='--spot',
                     found='--reserved as well')
  # Nodes of several slices are called NAME-0, NAME-1, ...
  longest = 63 if FLAGS.slices == 1 else 62 - len(str(FLAGS.slices - 1))
  for flag, pattern, expected in (
      ('valid_until', r'[1-9]\d*[smhd]', 'a duration such as 6h'),
      ('python_version', r'3\.\d+', 'a version such as 3.12'),
      ('runtime', r'[a-z0-9][a-z0-9.-]*', 'a version such as v2-alpha-tpuv5'),
      ('service_account', r'[\w.-]+@[\w.-]+', 'an email address'),
      ('network', r'[\w./-]+', 'the name of a network'),
      ('subnetwork', r'[\w./-]+', 'the name of a subnetwork')):
    value = FLAGS[flag].value
    if value is not None and not re.fullmatch(pattern, value):
      raise InputError('the value cannot be used', where=f'--{flag}', expected=expected,
                       found=value or 'nothing')
  return TpuConfig(
      name=check_name(required('name', 'a name'), where='--name', longest=longest),
      project=check_project(required('project', 'the id of a project')),
      zone=check_zone(required('zone', 'a zone such as us-east5-a')),
      slice=slice_, slices=FLAGS.slices, spot=FLAGS.spot, reserved=FLAGS.reserved,
      service_account=FLAGS.service_account, network=FLAGS.network, subnetwork=FLAGS.subnetwork,
      internal_ips=FLAGS.internal_ips, runtime=FLAGS.runtime or slice_.runtime,
      valid_until=FLAGS.valid_until, python=FLAGS.python_version, keep=FLAGS.keep,
      poll=FLAGS.poll, max_restarts=FLAGS.max_restarts,
      source=source_from_flags(command, buckets=True), command=tuple(command),
      run_dir=run_dir_of(command))


def summary(config: TpuConfig) -> str:
  """What it is in machines: the number that a quota counts is that of chips."""
  one, many = config.slice, config.slices
  kind = 'spot' if config.spot else 'reserved' if config.reserved else 'on demand'
  return (f'# {config.name}: {many} x {one.accelerator_type} ({one.generation}:{one.topology}), '
          f'{one.chips * many} chips, {config.hosts} hosts of {one.chips_per_host}, {kind}, in '
          f'{config.zone} of {config.project}\n'
          f'# code: {config.source.name}; run folder: {config.run_dir}')


def main(argv: Sequence[str]) -> None:
  config = config_from_flags(argv[1:])
  print(summary(config), flush=True)
  if FLAGS.dry_run:
    print(queued_resource.described(config))
    return
  require('gcloud')
  with stoppable(), tempfile.TemporaryDirectory() as scratch:
    status = queued_resource.run(config, Path(scratch) / f'{config.folder}.tar.gz')
  sys.exit(status)


if __name__ == '__main__':
  define_flags()
  app.run(ends_with_sentence(main), flags_parser=ends_with_sentence(parse))
