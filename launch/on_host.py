"""Runs a command on one host of several: its lines with the number of the host, and its end.

  python3 launch/on_host.py [--hosts_per_slice=4] [--grace=60] [--lock=FILE] [--failures=FILE] \
    -- COMMAND...
  python3 launch/on_host.py --lock=FILE --stop

Needs no package: it is what a fresh machine starts. The number is that of JAX's process: SLURM's
task, or the worker of the slice after all hosts of the slices before it. With --lock one command
runs at a time: one that a lost connection left behind is ended first, for it holds the chips.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import os
import re
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request

NOT_ITS_OWN = (0, 75, 143)   # ended well; lost another process (hosts.EXIT_LOST); asked to end


def host_number(hosts_per_slice: int, environ: dict[str, str]) -> int:
  """The number of this host among all, counted from 0."""
  if 'SLURM_PROCID' in environ:
    return int(environ['SLURM_PROCID'])
  if 'TPU_WORKER_ID' in environ:     # GKE
    return (int(environ.get('MEGASCALE_SLICE_ID') or 0) * hosts_per_slice
            + int(environ['TPU_WORKER_ID']))
  worker = _metadata('agent-worker-number', environ)
  if worker is None:
    return 0
  found = re.search(r"^MEGASCALE_SLICE_ID:\s*'?(\d+)", _metadata('tpu-env', environ) or '',
                    re.MULTILINE)
  return (int(found[1]) if found else 0) * hosts_per_slice + int(worker)


def _metadata(key: str, environ: dict[str, str]) -> str | None:
  """An attribute of this virtual machine; None where it is none of Google's."""
  server = environ.get('GCE_METADATA_IP', 'metadata.google.internal')
  request = urllib.request.Request(
      f'http://{server}/computeMetadata/v1/instance/attributes/{key}',
      headers={'Metadata-Flavor': 'Google'})
  opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
  try:
    with opener.open(request, timeout=10) as answer:
      return answer.read().decode()
  except (urllib.error.URLError, OSError):
    return None


@contextlib.contextmanager
def alone(path: str | None, grace: int):
  """The lock, once whoever had it has been ended."""
  if path is None:
    yield
    return
  descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
  deadline = time.monotonic() + grace + 10
  asked = None
  while True:
    try:
      fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
      break
    except BlockingIOError:
      pass
    holder = int(os.pread(descriptor, 20, 0) or 0)    # alive, for it holds the lock
    if holder and (asked != holder or time.monotonic() > deadline):
      late = asked == holder
      with contextlib.suppress(ProcessLookupError):
        os.kill(holder, signal.SIGKILL if late else signal.SIGTERM)
      asked = holder
    time.sleep(0.1)
  os.ftruncate(descriptor, 0)
  os.pwrite(descriptor, str(os.getpid()).encode(), 0)
  try:
    yield
  finally:
    os.ftruncate(descriptor, 0)
    os.close(descriptor)


def run(command: list[str], number: int, grace: int) -> int:
  """Runs the command, in a group of its own, to its end, and ends what it left behind."""
  child: subprocess.Popen | None = None
  asked = False

  def end(*_):
    nonlocal asked
    asked = True
    if child is not None:
      child.send_signal(signal.SIGTERM)
      signal.alarm(grace)

  def end_now(*_):
    if child is not None:
      with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)

  # Before there is a child, or a signal that comes now would leave it alone.
  for signum in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
    signal.signal(signum, end)
  signal.signal(signal.SIGALRM, end_now)
  child = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                           stderr=subprocess.STDOUT, start_new_session=True)
  if asked:
    end()
  assert child.stdout is not None
  for line in child.stdout:
    if not _write(number, line) and not asked:
      end()       # nobody reads any more: the connection is gone
  status = child.wait()
  end_now()
  return 128 - status if status < 0 else status


def _write(number: int, line: bytes) -> bool:
  try:
    sys.stdout.buffer.write(b'[%d] ' % number + line.rstrip(b'\r\n') + b'\n')
    sys.stdout.buffer.flush()
  except OSError:
    # Python would complain about it once more at the end.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return False
  return True


def main(argv: list[str]) -> int:
  parser = argparse.ArgumentParser(prog='on_host')
  parser.add_argument('--hosts_per_slice', type=int, default=1)
  parser.add_argument('--grace', type=int, default=60, help='seconds to save, once asked to end')
  parser.add_argument('--lock')
  parser.add_argument('--failures')
  parser.add_argument('--stop', action='store_true')
  parser.add_argument('command', nargs='*')
  given = parser.parse_args(argv)
  with alone(given.lock, given.grace):
    if given.stop:
      return 0
    number = host_number(given.hosts_per_slice, dict(os.environ))
    status = run(given.command, number, given.grace)
  if given.failures and status not in NOT_ITS_OWN:
    with open(given.failures, 'a') as file:
      file.write(f'{status}\n')
  _write(number, b'on_host: ended with status %d' % status)
  return status


if __name__ == '__main__':
  sys.exit(main(sys.argv[1:]))
