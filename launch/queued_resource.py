"""A queued resource of Cloud TPU: the commands of gcloud for it, and what its states ask for.

States: cloud.google.com/tpu/docs/queued-resources and the enum QueuedResourceState.State of
tpu.googleapis.com v2. Commands: gcloud/reference/compute/tpus/queued-resources of
cloud.google.com/sdk.
"""

from __future__ import annotations

import dataclasses
import enum
import json
import re
import shlex
import time
from pathlib import Path

from jaxrl.errors import InputError
from jaxrl.parallel.hosts import COORDINATOR, EXIT_LOST
from launch.commands import (
    ToolError,
    capture,
    clean_up,
    must,
    say,
    shown,
    stream,
    unstoppable,
)
from launch.naming import bucket_of
from launch.shipping import Source, archive_command
from launch.slices import Slice


class Next(enum.Enum):
  WAIT = 'wait'
  RUN = 'run'
  RECREATE = 'recreate'
  GIVE_UP = 'give up'


_WAITING = ('CREATING', 'ACCEPTED', 'WAITING_FOR_RESOURCES', 'PROVISIONING', 'DELETING',
            'SUSPENDING', 'STATE_UNSPECIFIED')
_ENDED = ('SUSPENDED', 'FAILED')
_SSH_LOST = 255
_TERMINATED = 143        # saved itself, because its machine was told to stop
_KILLED = 137            # was not given the time to
_MAYBE_PREEMPTED = (EXIT_LOST, _SSH_LOST, _TERMINATED, _KILLED)
_DESCRIBE_TRIES = 5
_END_OF_HOST = re.compile(r'\[(\d+)\] on_host: ended with status (\d+)')


def next_step(state: str | None, *, spot: bool, was_active: bool) -> Next:
  """What a state asks for; None is a queued resource that is gone.

  A request that was never active and FAILED would fail again: its quota, zone or service account
  is wrong, or its time is over. Once it has been active, the same request was good, and has lost
  its machines.
  """
  if state == 'ACTIVE':
    return Next.RUN
  if state in _WAITING:
    return Next.WAIT
  if state in _ENDED or state is None:
    return Next.RECREATE if spot and was_active else Next.GIVE_UP
  raise ToolError(f'gcloud names a state that is not known, {state}.')


@dataclasses.dataclass(frozen=True)
class TpuConfig:
  name: str
  project: str
  zone: str
  slice: Slice
  slices: int
  spot: bool
  reserved: bool
  service_account: str | None
  network: str | None
  subnetwork: str | None
  internal_ips: bool           # hosts have no external address; ssh goes through IAP
  runtime: str
  valid_until: str | None      # how long to wait for capacity, as in 6h
  python: str                  # version that uv installs
  keep: bool                   # leave the queued resource at the end, and use one that is there
  poll: float                  # seconds between looks at the state
  max_restarts: int            # preemptions and lost connections after which to give up
  source: Source
  command: tuple[str, ...]     # what Python is given
  run_dir: str

  @property
  def hosts(self) -> int:
    return self.slice.hosts * self.slices

  @property
  def folder(self) -> str:
    """Of the code, in the home folder of each host."""
    return f'jaxrl-{self.source.name}'


def _verb(config: TpuConfig, verb: str) -> list[str]:
  return ['gcloud', 'compute', 'tpus', 'queued-resources', verb, config.name,
          f'--project={config.project}', f'--zone={config.zone}']


def create_command(config: TpuConfig) -> list[str]:
  assert config.slice.accelerator_type is not None
  words = [*_verb(config, 'create'), f'--accelerator-type={config.slice.accelerator_type}',
           f'--runtime-version={config.runtime}']
  if config.slices == 1:
    words.append(f'--node-id={config.name}')
  else:
    words += [f'--node-count={config.slices}', f'--node-prefix={config.name}']
  words += [flag for flag, given in (('--spot', config.spot), ('--reserved', config.reserved),
                                     ('--internal-ips', config.internal_ips)) if given]
  words += [f'--{flag}={value}' for flag, value in (
      ('service-account', config.service_account), ('network', config.network),
      ('subnetwork', config.subnetwork), ('valid-until-duration', config.valid_until)) if value]
  # The default scopes of a machine can read buckets and not write them.
  return [*words, '--scopes=https://www.googleapis.com/auth/cloud-platform',
          f'--labels=jaxrl-commit={config.source.name}', '--quiet']


def describe_command(config: TpuConfig) -> list[str]:
  return [*_verb(config, 'describe'), '--format=json']


def delete_command(config: TpuConfig) -> list[str]:
  return [*_verb(config, 'delete'), '--force', '--quiet']


def check_commands(config: TpuConfig) -> dict[str, list[str]]:
  """By flag, what reads only and shows that the zone has such slices and the bucket is there."""
  return {
      '--topology': ['gcloud', 'compute', 'tpus', 'accelerator-types', 'describe',
                     str(config.slice.accelerator_type), f'--project={config.project}',
                     f'--zone={config.zone}', '--format=value(name)'],
      '--run_dir': ['gcloud', 'storage', 'buckets', 'describe', bucket_of(config.run_dir),
                    '--format=value(location)'],
  }


def _everywhere(config: TpuConfig) -> list[str]:
  words = ['--node=all', '--worker=all', '--batch-size=all']
  return [*words, '--tunnel-through-iap'] if config.internal_ips else words


def copy_command(config: TpuConfig, archive: Path) -> list[str]:
  *tool, _, project, zone = _verb(config, 'scp')
  return [*tool, str(archive), f'{config.name}:{config.folder}.tar.gz', project, zone,
          *_everywhere(config)]


def on_hosts(config: TpuConfig, script: str) -> list[str]:
  """Runs a script of the shell, whose data is quoted, on all hosts."""
  # Without signs of life, ssh waits for hours for a machine that is gone.
  return [*_verb(config, 'ssh'), *_everywhere(config), '--ssh-flag=-oServerAliveInterval=15',
          '--ssh-flag=-oServerAliveCountMax=8', f'--command={script}']


def setup_script(config: TpuConfig) -> str:
  folder, python = config.folder, 'jaxrl-python'
  steps = [
      ['rm', '-rf', folder], ['mkdir', folder],
      ['tar', '-xzf', f'{folder}.tar.gz', '-C', folder],
      # The system's Python is older than what the project needs; uv brings one.
      ['python3', '-m', 'pip', 'install', '--quiet', '--user', 'uv'],
      ['python3', '-m', 'uv', 'venv', '--quiet', '--clear', f'--python={config.python}', python],
      ['python3', '-m', 'uv', 'pip', 'install', '--quiet', f'--python={python}/bin/python',
       '--editable', f'./{folder}[tpu]', 'gcsfs'],
  ]
  return ' && '.join(map(shlex.join, steps))


def run_script(config: TpuConfig) -> str:
  meet = [f'{COORDINATOR}=auto'] if config.hosts > 1 else []
  words = ['env', 'PYTHONUNBUFFERED=1', *meet, 'python3', 'launch/on_host.py',
           f'--hosts_per_slice={config.slice.hosts}', '--lock=../jaxrl.lock', '--',
           '../jaxrl-python/bin/python', *config.command]
  return f'{shlex.join(["cd", config.folder])} && exec {shlex.join(words)}'


def stop_script(config: TpuConfig) -> str:
  return shlex.join(['python3', f'{config.folder}/launch/on_host.py', '--lock=jaxrl.lock',
                     '--stop'])


def described(config: TpuConfig) -> str:
  """The commands in their order, as a shell would take them."""
  archive = Path(f'/tmp/{config.folder}.tar.gz')
  lines = ['# checks that change nothing', *map(shown, check_commands(config).values()),
           shown(describe_command(config)),
           '# the code', shown(archive_command(config.source, archive)),
           '# the machines', shown(create_command(config)),
           f'# until the state is ACTIVE, every {config.poll:g} s', shown(describe_command(config)),
           '# the run', shown(copy_command(config, archive)),
           shown(on_hosts(config, setup_script(config))),
           shown(on_hosts(config, run_script(config)))]
  if config.spot:
    lines.append(f'# when preempted, at most {config.max_restarts} times: delete, and from '
                 'create on again')
  if config.keep:
    return '\n'.join([*lines, '# after Ctrl-C', shown(on_hosts(config, stop_script(config)))])
  return '\n'.join([*lines, '# at the end, also of a failure or after Ctrl-C',
                    shown(delete_command(config))])


def state_of(config: TpuConfig) -> tuple[str | None, str]:
  """The state, None where there is no such queued resource, and what Google says of a failure.

  Raises:
    ToolError: gcloud failed otherwise, several times.
  """
  for tried in range(_DESCRIBE_TRIES):
    if tried:
      time.sleep(config.poll)
    done = capture(describe_command(config))
    if not done.status:
      state = json.loads(done.out)['state']
      return state['state'], state.get('failedData', {}).get('error', {}).get('message', '')
    if 'NOT_FOUND' in done.error or 'not found' in done.error.lower():
      return None, ''
  raise ToolError(f'{shown(describe_command(config)[:5])} failed {_DESCRIBE_TRIES} times: '
                  f'{done.reason}.')


def run(config: TpuConfig, archive: Path) -> int:
  """Creates the machines, runs the command to its end on them, and removes them.

  Returns:
    The status of the command, as the first host that failed by itself has it.

  Raises:
    InputError: there already is one of this name, which is not touched.
    ToolError: there are no machines, or gcloud does not work.
  """
  for flag, words in check_commands(config).items():
    done = capture(words)
    if done.status:
      raise InputError(f'it cannot be used, for gcloud says: {done.reason}', where=flag,
                       fix=f'Try {shown(words)}')
  must(archive_command(config.source, archive))
  state, _ = state_of(config)
  if state is not None and not config.keep:
    raise InputError('there already is a queued resource of this name', where='--name',
                     found=f'{config.name}, {state}',
                     fix=f'Use another name, or --keep to run on it, or: '
                         f'{shown(delete_command(config))}')
  try:
    return _run_to_the_end(config, archive, exists=state is not None)
  finally:
    with unstoppable():
      if not config.keep:
        clean_up(delete_command(config))


def _run_to_the_end(config: TpuConfig, archive: Path, *, exists: bool) -> int:
  restarts, was_active, ready = 0, False, False
  if not exists:
    must(create_command(config))
  while True:
    state, why = _settled(config)
    step = next_step(state, spot=config.spot, was_active=was_active)
    if step is Next.GIVE_UP:
      raise ToolError(f'the queued resource {config.name} is {state or "gone"}'
                      f'{f": {why}" if why else ""}.')
    if step is Next.RUN:
      was_active = True
      status = 0 if ready else _prepare(config, archive)
      if not status:
        ready = True
        status = _run_once(config)
      if not status:
        return 0
      say(f'the run ended with status {status}; are the machines still there?')
      # Somebody may have ended it (143), perhaps to run something else, and memory may be full.
      if _still_active(config, status) and status not in (EXIT_LOST, _SSH_LOST):
        return status
    restarts += 1
    if restarts > config.max_restarts:
      raise ToolError(f'the run was interrupted {restarts} times, more than --max_restarts.')
    if next_step(state_of(config)[0], spot=config.spot, was_active=True) is Next.RECREATE:
      say(f'preempted; restart {restarts} of at most {config.max_restarts}, which goes on from '
          f'{config.run_dir}')
      ready = False
      capture(delete_command(config))
      must(create_command(config))


def _settled(config: TpuConfig) -> tuple[str | None, str]:
  """The first state that asks for something to be done; every change of it is told."""
  last = None
  while True:
    state, why = state_of(config)
    if state != last:
      say(f'{config.name} is {state or "gone"}')
    last = state
    if next_step(state, spot=False, was_active=False) is not Next.WAIT:
      return state, why
    time.sleep(config.poll)


def _still_active(config: TpuConfig, status: int) -> bool:
  """Whether the machines are there: the run may lose hosts minutes before the state says so."""
  for _ in range(4 if status in _MAYBE_PREEMPTED else 1):
    if state_of(config)[0] != 'ACTIVE':
      return False
    time.sleep(config.poll)
  return True


def _prepare(config: TpuConfig, archive: Path) -> int:
  """Ships the code to all hosts and installs it; a status."""
  for words in (copy_command(config, archive), on_hosts(config, setup_script(config))):
    status = stream(words, lambda line: print(line, flush=True))
    if status:
      say(f'{words[4]} failed with status {status}')
      # What an install says is in the lines above; ssh itself fails where hosts are gone.
      return _SSH_LOST if words[4] == 'scp' else status
  return 0


def _run_once(config: TpuConfig) -> int:
  """Runs the command on all hosts; the status of the run."""
  ends: dict[int, int] = {}

  def on_line(line: str) -> None:
    print(line, flush=True)
    if found := _END_OF_HOST.fullmatch(line):
      ends[int(found[1])] = int(found[2])

  try:
    status = stream(on_hosts(config, run_script(config)), on_line)
  except BaseException:
    if config.keep:
      with unstoppable():
        clean_up(on_hosts(config, stop_script(config)))
    raise
  return verdict(status, ends, config.hosts)


def verdict(status: int, ends: dict[int, int], hosts: int) -> int:
  """One status for all hosts; `status` is that of gcloud, `ends` what each of them said.

  A host that failed by itself comes before those that then lost it; a host that said nothing was
  lost, whatever gcloud makes of it.
  """
  own = [ends[host] for host in sorted(ends) if ends[host] not in (0, EXIT_LOST, _TERMINATED)]
  if own:
    return own[0]
  if not status or not ends:
    return status
  return _SSH_LOST if len(ends) < hosts else max(ends.values())

