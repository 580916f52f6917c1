"""Runs a script of tests/processes in several processes by `launch.local`, as a user would."""

import os
import re
import subprocess
import sys
import time
from pathlib import Path

from jaxrl.parallel.hosts import COORDINATOR

ROOT = Path(__file__).resolve().parents[1]
# Two are enough on a quiet machine; a busy one must not make a process count as lost.
LOST_AFTER = 8.0


class Launched:
  """status, output of the launcher itself, lines of each process, and seconds it took."""

  def __init__(self, processes, *command, devices_per_process=1, lost_after=LOST_AFTER, grace=60):
    assert COORDINATOR not in os.environ
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, '-m', 'launch.local', f'--processes={processes}',
         f'--devices_per_process={devices_per_process}', f'--lost_after={lost_after}',
         f'--grace={grace}', '--', *map(str, command)],
        env={**os.environ, 'PYTHONPATH': str(ROOT)}, cwd=ROOT, capture_output=True, text=True,
        timeout=300, check=False)
    self.seconds = time.monotonic() - began
    self.status, self.said = done.returncode, done.stderr.splitlines()
    self.all = done.stdout
    self.lines = [
        [line.removeprefix(f'[{n}] ') for line in done.stdout.splitlines()
         if line.startswith(f'[{n}] ')] for n in range(processes)]

  def errors(self, process):
    """The sentences that begin with `error: process`."""
    return [line.removeprefix('error: ') for line in self.lines[process]
            if re.match(r'error: process \d', line)]

  def statuses(self):
    """{process: how it ended}, in the launcher's words, of those that failed."""
    found = (re.fullmatch(r'launch\.local: process (\d+) (.*)', line) for line in self.said)
    return {int(m[1]): m[2] for m in found if m}
