"""Several processes of one run on this machine, as a pod would have them, over loopback.

  python -m launch.local --processes=4 --devices_per_process=2 -- -m experiments.irpo --seed=1

What follows `--` is what each process gives to Python. Each line of output is preceded by the
number of its process. The first process that fails gives its status to this command; the others
have --grace seconds to say what they waited for and are then ended, as they are on SIGTERM and
SIGINT, which all of them receive.
"""

from __future__ import annotations

import dataclasses
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence

from absl import app, flags

from jaxrl.errors import InputError
from jaxrl.parallel.hosts import COORDINATOR, EXIT_LOST, LOST_AFTER, PROCESS_ID, PROCESSES
from launch.commands import ends_with_sentence, parse

FLAGS = flags.FLAGS

_PROCESSES = flags.DEFINE_integer('processes', None, 'How many processes.', lower_bound=1)
_DEVICES = flags.DEFINE_integer('devices_per_process', 1, 'CPU devices of each process.',
                                lower_bound=1)
_LOST_AFTER = flags.DEFINE_float(
    'lost_after', None, 'Seconds of silence after which a process counts as lost.',
    lower_bound=1.0)
_GRACE = flags.DEFINE_float(
    'grace', 60.0, 'Seconds that processes have to end, once one failed or after a signal.',
    lower_bound=0.0)
_DRY_RUN = flags.DEFINE_bool('dry_run', False, 'Print what would be run, and stop.')


@dataclasses.dataclass(frozen=True)
class LocalConfig:
  processes: int
  devices_per_process: int
  grace: float                 # seconds
  lost_after: float | None     # seconds; None leaves it to the processes
  command: tuple[str, ...]     # what Python is given


def environment(
    config: LocalConfig, process: int, port: int, inherited: Mapping[str, str]
) -> dict[str, str]:
  """What process `process` finds in its environment beyond what all inherit; replaces theirs."""
  added = {
      'JAX_PLATFORMS': 'cpu',
      'JAX_NUM_CPU_DEVICES': str(config.devices_per_process),
      'PYTHONUNBUFFERED': '1',    # or lines would come when a process ends
      COORDINATOR: f'127.0.0.1:{port}',
      PROCESSES: str(config.processes),
      PROCESS_ID: str(process),
  }
  if config.lost_after is not None:
    added[LOST_AFTER] = f'{config.lost_after:g}'
  xla = inherited.get('XLA_FLAGS', '')
  # JAX refuses a number of devices that is given twice.
  without = re.sub(r'--xla_force_host_platform_device_count=\d+ ?', '', xla).strip()
  return added if without == xla else added | {'XLA_FLAGS': without}


def free_port() -> int:
  with socket.socket() as probe:
    probe.bind(('127.0.0.1', 0))
    return probe.getsockname()[1]


def described(config: LocalConfig, port: int, inherited: Mapping[str, str]) -> str:
  """The commands, one line for each process, as a shell would take them."""
  lines = []
  for process in range(config.processes):
    added = environment(config, process, port, inherited)
    words = [f'{name}={shlex.quote(value)}' for name, value in added.items()]
    lines.append(' '.join([*words, shlex.join([sys.executable, *config.command])]))
  return '\n'.join(lines)


def run(config: LocalConfig, port: int) -> int:
  """Runs all processes to their end; the status of the first one that failed, or 0."""
  running = [
      subprocess.Popen(
          [sys.executable, *config.command],
          env={**os.environ, **environment(config, process, port, os.environ)},
          stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
          # A Ctrl-C of the terminal reaches them through this process alone, and once.
          start_new_session=True)
      for process in range(config.processes)]
  writing = threading.Lock()
  readers = [
      threading.Thread(target=_copy_lines, args=(process, child.stdout, writing), daemon=True)
      for process, child in enumerate(running)]
  asked: list[int] = []

  def forward(signum, _):
    asked.append(signum)
    _send(running, signum)

  before = {signum: signal.signal(signum, forward) for signum in (signal.SIGTERM, signal.SIGINT)}
  try:
    for reader in readers:
      reader.start()
    status = _wait(running, asked, config.grace, writing)
  finally:
    for signum, handler in before.items():
      signal.signal(signum, handler)
    _send(running, signal.SIGKILL)
    for child in running:
      child.wait()
  for reader in readers:
    reader.join(timeout=5)    # longer only where a process left a child of its own behind
  return status


def _wait(
    running: Sequence[subprocess.Popen], asked: list[int], grace: float, writing: threading.Lock
) -> int:
  """Status of the first failure, once all have ended or the grace period is over."""
  status, deadline = 0, None
  ended: set[int] = set()
  while len(ended) < len(running):
    for process, child in enumerate(running):
      if process in ended or child.poll() is None:
        continue
      ended.add(process)
      if child.returncode:
        _say(f'process {process} {_fate(child.returncode)}', writing)
        if status in (0, EXIT_LOST):   # that one waited for a process that failed before it
          status = 128 - child.returncode if child.returncode < 0 else child.returncode
    if deadline is None and (status or asked):
      deadline = time.monotonic() + grace
    if deadline is not None and time.monotonic() > deadline:
      late = sorted(set(range(len(running))) - ended)
      if late:
        _say(f'ending {", ".join(f"process {n}" for n in late)} after {grace:g} s', writing)
        return status or 128 + asked[0]
    time.sleep(0.05)
  return status


def _send(running: Sequence[subprocess.Popen], signum: int) -> None:
  """To each process that still runs; SIGKILL to all that it started as well."""
  for child in running:
    if child.poll() is None:
      if signum == signal.SIGKILL:
        os.killpg(child.pid, signum)
      else:
        child.send_signal(signum)


def _fate(returncode: int) -> str:
  if returncode < 0:
    return f'was ended by {signal.Signals(-returncode).name}'
  return f'ended with status {returncode}'


def _copy_lines(process: int, pipe, writing: threading.Lock) -> None:
  for line in pipe:
    with writing:
      sys.stdout.buffer.write(b'[%d] ' % process + line.rstrip(b'\r\n') + b'\n')
      sys.stdout.buffer.flush()


def _say(text: str, writing: threading.Lock) -> None:
  with writing:
    print(f'launch.local: {text}', file=sys.stderr, flush=True)


def config_from_flags(command: Sequence[str]) -> LocalConfig:
  """What the flags say, and the command.

  Raises:
    InputError: no number of processes, or nothing to run.
  """
  if _PROCESSES.value is None:
    raise InputError('the flag is missing', where='--processes', expected='a whole number')
  if not command:
    raise InputError('there is nothing to run', where='launch.local',
                     expected='what Python is to run after --, as in -- -m experiments.irpo')
  return LocalConfig(_PROCESSES.value, _DEVICES.value, _GRACE.value, _LOST_AFTER.value,
                     tuple(command))


def main(argv: Sequence[str]) -> None:
  config = config_from_flags(argv[1:])
  port = free_port()
  if _DRY_RUN.value:
    print(described(config, port, os.environ))
    return
  sys.exit(run(config, port))


if __name__ == '__main__':
  app.run(ends_with_sentence(main), flags_parser=ends_with_sentence(parse))
