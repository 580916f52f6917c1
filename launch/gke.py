"""Any experiment on GKE: a JobSet on TPU slices of a cluster.

  python -m launch.gke --name=irpo --topology=v6e:4x4 --slices=2 --image=IMAGE \\
    --code_dir=gs://BUCKET/code -- -m experiments.irpo --run_dir=gs://BUCKET/irpo ...

--dry_run prints every command and the manifest; --output writes the manifest only. The JobSet
starts all Pods again when a host is lost; a failure of the run itself ends it. Ctrl-C removes it.
"""

from __future__ import annotations

import json
import re
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from absl import app, flags

from jaxrl.errors import InputError
from launch import jobset
from launch.commands import (
  clean_up,
  ends_with_sentence,
  must,
  parse,
  require,
  say,
  shown,
  stoppable,
  stream,
  unstoppable,
)
from launch.jobset import GkeConfig, manifest
from launch.naming import check_bucket_path, check_image, check_name
from launch.shipping import (
  archive_command,
  define_slice_flags,
  required,
  run_dir_of,
  source_from_flags,
)
from launch.shipping import define_flags as define_shipping_flags
from launch.slices import find_slice

FLAGS = flags.FLAGS
_END_OF_HOST = re.compile(r'\[\d+\] on_host: ended with status (\d+)')


def define_flags() -> None:
  define_shipping_flags(poll=10.0)
  define_slice_flags()
  flags.DEFINE_string('namespace', 'default', 'Namespace of the JobSet.')
  flags.DEFINE_string('context', None, 'Context of kubectl; default: the one that is chosen.')
  flags.DEFINE_string('image', None, 'Container image with Python and the dependencies.')
  flags.DEFINE_string('service_account', None, 'Kubernetes account that may use the bucket.')
  flags.DEFINE_string('code_dir', None, 'gs:// folder that the code is copied through.')
  flags.DEFINE_string('output', None, 'File to write the manifest to, instead of running it.')


def config_from_flags(command: Sequence[str]) -> GkeConfig:
  """What the flags say, all of it checked that can be without asking a cluster.

  Raises:
    InputError: a name, size or path cannot be used, or the command cannot run.
  """
  slice_ = find_slice(required('topology', 'a slice such as v6e:4x4'))
  if FLAGS.slices > 1 and slice_.hosts == 1:
    raise InputError('GKE joins only slices of several hosts', where='--slices',
                     expected='1 for a slice of one host', found=FLAGS.slices)
  for flag, pattern in (('context', r'[\w.@:/-]+'), ('service_account', r'[a-z0-9][a-z0-9.-]*')):
    value = FLAGS[flag].value
    if value is not None and not re.fullmatch(pattern, value):
      raise InputError('the value cannot be used', where=f'--{flag}', expected='a name',
                       found=value or 'nothing')
  return GkeConfig(
      name=check_name(required('name', 'a name'), where='--name',
                      longest=jobset.longest_name(FLAGS.slices, slice_.hosts)),
      namespace=check_name(FLAGS.namespace, where='--namespace'), context=FLAGS.context,
      slice=slice_, slices=FLAGS.slices, spot=FLAGS.spot,
      image=check_image(required('image', 'a container image')),
      service_account=FLAGS.service_account, max_restarts=FLAGS.max_restarts, keep=FLAGS.keep,
      poll=FLAGS.poll,
      code=check_bucket_path(required('code_dir', 'gs://BUCKET/FOLDER'), where='--code_dir'),
      source=source_from_flags(command, buckets=True), command=tuple(command),
      run_dir=run_dir_of(command))


def _kubectl(config: GkeConfig, *words: str) -> list[str]:
  context = [f'--context={config.context}'] if config.context else []
  return ['kubectl', *context, f'--namespace={config.namespace}', *words]


def upload_command(config: GkeConfig, archive: Path) -> list[str]:
  return ['gcloud', 'storage', 'cp', str(archive), config.archive]


def create_command(config: GkeConfig) -> list[str]:
  """Takes the manifest on its standard input."""
  return _kubectl(config, 'create', '--filename=-')


def exists_command(config: GkeConfig) -> list[str]:
  return _kubectl(config, 'get', 'jobset', config.name, '--ignore-not-found', '--output=name')


def state_command(config: GkeConfig) -> list[str]:
  return _kubectl(config, 'get', 'jobset', config.name, '--output=json')


def logs_command(config: GkeConfig, since: str | None = None) -> list[str]:
  """Lines of all hosts, each with its number, until all Pods have ended."""
  return _kubectl(
      config, 'logs', '--follow', f'--selector=jobset.sigs.k8s.io/jobset-name={config.name}',
      f'--container={jobset.CONTAINER}', f'--max-log-requests={config.hosts}',
      f'--since-time={since}' if since else '--tail=-1')


def delete_commands(config: GkeConfig) -> list[list[str]]:
  return [_kubectl(config, 'delete', 'jobset', config.name, '--ignore-not-found'),
          ['gcloud', 'storage', 'rm', config.archive]]


def summary(config: GkeConfig) -> str:
  one, many = config.slice, config.slices
  return (f'# {config.name}: {many} x {one.generation}:{one.topology} ({one.gke_accelerator}, '
          f'{one.machine}), {one.chips * many} chips, {config.hosts} hosts of '
          f'{one.chips_per_host}{", spot" if config.spot else ""}, in namespace '
          f'{config.namespace} of {config.context or "the chosen context"}\n'
          f'# code: {config.source.name}; run folder: {config.run_dir}')


def described(config: GkeConfig) -> str:
  archive = Path(f'/tmp/jaxrl-{config.source.name}.tar.gz')
  lines = ['# a check that changes nothing', shown(exists_command(config)),
           '# the code', shown(archive_command(config.source, archive)),
           shown(upload_command(config, archive)),
           '# the run', f'{shown(create_command(config))} <<EOF', _text(config) + 'EOF',
           f'# until it has ended, every {config.poll:g} s', shown(state_command(config)),
           shown(logs_command(config))]
  if not config.keep:
    lines += ['# at the end, also of a failure or after Ctrl-C',
              *map(shown, delete_commands(config))]
  return '\n'.join(lines)


def _text(config: GkeConfig) -> str:
  return json.dumps(manifest(config), indent=2) + '\n'


def run(config: GkeConfig, archive: Path) -> int:
  """Applies the manifest, shows what all hosts write, and removes it; the status of the run.

  Raises:
    InputError: there already is a JobSet of this name, which is not touched.
    ToolError: kubectl or gcloud failed.
  """
  delete_job, delete_code = delete_commands(config)
  if must(exists_command(config)).strip():
    raise InputError('there already is a JobSet of this name', where='--name', found=config.name,
                     fix=f'Use another name, or: {shown(delete_job)}')
  must(archive_command(config.source, archive))
  made = []      # noted before it is made, for a signal may come in between
  try:
    made.append(delete_code)
    must(upload_command(config, archive))
    made.append(delete_job)
    must(create_command(config), given=_text(config))
    return _follow(config)
  finally:
    with unstoppable():
      if not config.keep:
        for words in reversed(made):
          clean_up(words)


def _follow(config: GkeConfig) -> int:
  """Copies the lines of all hosts until the JobSet has ended."""
  since, restarts = None, 0
  statuses: list[int] = []

  def on_line(line: str) -> None:
    nonlocal since
    since = time.strftime('%Y-%m-%dT%H:%M:%SZ', time.gmtime())
    print(line, flush=True)
    if found := _END_OF_HOST.fullmatch(line):
      statuses.append(int(found[1]))

  while True:
    state = json.loads(must(state_command(config))).get('status', {})
    if state.get('restarts', 0) > restarts:
      restarts = state['restarts']
      say(f'restart {restarts}, which goes on from {config.run_dir}')
    end = state.get('terminalState')
    # Before all Pods have started, their lines cannot be followed.
    started = any(jobs.get('ready', 0) >= config.slices or jobs.get('failed', 0)
                  or jobs.get('succeeded', 0) for jobs in state.get('replicatedJobsStatus', []))
    if started or end:
      status = stream(logs_command(config, since), on_line)
      if status:
        say(f'kubectl logs ended with status {status}')
    if end:
      say(f'{config.name}: {end}')
      own = [status for status in statuses if status not in jobset.NOT_ITS_OWN]
      return 0 if end == 'Completed' else own[-1] if own else 1
    time.sleep(config.poll)


def main(argv: Sequence[str]) -> None:
  config = config_from_flags(argv[1:])
  print(summary(config), flush=True)
  if FLAGS.output is not None:
    Path(FLAGS.output).write_text(_text(config))
    print(f'# wrote {FLAGS.output}; it reads {config.archive}')
    return
  if FLAGS.dry_run:
    print(described(config))
    return
  require('gcloud', 'kubectl')
  with stoppable(), tempfile.TemporaryDirectory() as scratch:
    status = run(config, Path(scratch) / 'code.tar.gz')
  sys.exit(status)


if __name__ == '__main__':
  define_flags()
  app.run(ends_with_sentence(main), flags_parser=ends_with_sentence(parse))
