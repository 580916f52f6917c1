"""Running the tools that do the work: gcloud, kubectl, sbatch, git. Lists of words, no shell."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import flags

from jaxrl.errors import InputError


@dataclasses.dataclass(frozen=True)
class Done:
  status: int
  out: str
  error: str

  @property
  def reason(self) -> str:
    """The last thing the tool said, on one line."""
    lines = [line for line in (self.error or self.out).splitlines() if line.strip()]
    return ' '.join(lines[-1].split()).rstrip('.') if lines else f'status {self.status}'


class ToolError(RuntimeError):
  """A tool did not do what was asked of it, through no fault of the flags."""


def require(*tools: str) -> None:
  """Raises InputError for the first tool that is not installed."""
  for tool in tools:
    if shutil.which(tool) is None:
      raise InputError('the program is not installed', where=tool, expected='it on PATH',
                       fix='Install it, or see what would be run with --dry_run')


def shown(words: Sequence[str]) -> str:
  return shlex.join(words)


def capture(
    words: Sequence[str], *, given: str | None = None, cwd: Path | None = None,
    extra: Mapping[str, str] | None = None
) -> Done:
  """Runs a tool to its end; `given` is its standard input, `extra` is added to its environment."""
  with _started(words, stdin=subprocess.DEVNULL if given is None else subprocess.PIPE,
                stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=cwd,
                env={**os.environ, **(extra or {})}) as child:
    out, error = child.communicate(None if given is None else given.encode())
  return Done(child.returncode, out.decode(errors='replace'), error.decode(errors='replace'))


def must(words: Sequence[str], *, given: str | None = None) -> str:
  """What a tool wrote; ToolError with its last sentence where it failed."""
  done = capture(words, given=given)
  if done.status:
    raise ToolError(f'{shown(words[:5])} ... failed with status {done.status}: {done.reason}.')
  return done.out


def stream(words: Sequence[str], on_line: Callable[[str], None]) -> int:
  """Runs a tool, gives every line of its output to `on_line`, and returns its status."""
  with _started(words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT) as child:
    assert child.stdout is not None
    for line in child.stdout:
      on_line(line.decode(errors='replace').rstrip('\r\n'))
  return child.returncode


@contextlib.contextmanager
def _started(words: Sequence[str], **pipes) -> Iterator[subprocess.Popen]:
  """A child that gets no Ctrl-C of the terminal, and does not outlive the block."""
  with subprocess.Popen(list(words), start_new_session=True, **pipes) as child:
    try:
      yield child
    except BaseException:
      with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGTERM)
      try:
        child.wait(timeout=5)
      except subprocess.TimeoutExpired:
        os.killpg(child.pid, signal.SIGKILL)
      raise


class Stopped(BaseException):
  """The user, or the system, asked this program to end; no `except Exception` keeps it."""

  def __init__(self, signum: int):
    super().__init__(signal.Signals(signum).name)
    self.status = 128 + signum


@contextlib.contextmanager
def _handled(handler: Callable[[int, Any], None]) -> Iterator[None]:
  """SIGINT, SIGTERM and SIGHUP go to the handler inside the block."""
  before = {signum: signal.signal(signum, handler)
            for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
  try:
    yield
  finally:
    for signum, old in before.items():
      signal.signal(signum, old)


def stoppable() -> contextlib.AbstractContextManager[None]:
  """SIGINT, SIGTERM and SIGHUP raise Stopped inside the block."""

  def stop(signum, _):
    raise Stopped(signum)

  return _handled(stop)


def unstoppable() -> contextlib.AbstractContextManager[None]:
  """The same signals only say that cleaning up goes on."""

  def insist(signum, _):
    say(f'{signal.Signals(signum).name} came while cleaning up, which goes on')

  return _handled(insist)


def say(text: str) -> None:
  """A line of the launcher, which is not one of the run."""
  print(f'launch: {text}', file=sys.stderr, flush=True)


def clean_up(words: Sequence[str]) -> bool:
  """Removes something that costs money; says how to do it by hand where that fails."""
  say(f'cleaning up: {shown(words)}')
  done = capture(words)
  if done.status:
    say(f'NOT CLEANED UP, {done.reason}; run it by hand: {shown(words)}')
  return not done.status


def parse(argv: list[str]) -> list[str]:
  """Ours stand before `--`; a word that is no flag there is an error, not a command."""
  ours, theirs = (argv[:argv.index('--')], argv[argv.index('--') + 1:]) if '--' in argv else (
      argv, [])
  left = flags.FLAGS(ours)
  if len(left) > 1:
    raise InputError('this is not a flag', where=repr(left[1]), expected='--name=value',
                     fix='What Python is to run stands after --')
  return [left[0], *theirs]


def ends_with_sentence(function: Callable) -> Callable:
  """The function, ending the process with one line: status 2 for what the user can mend."""

  @functools.wraps(function)
  def guarded(argv):
    try:
      return function(argv)
    except (flags.Error, InputError) as error:
      sentence, status = ' '.join(str(error).split()), 2
    except ToolError as error:
      sentence, status = ' '.join(str(error).split()), 1
    except Stopped as stopped:
      sentence, status = f'ended by {stopped}.', stopped.status
    print(f'error: {sentence}', file=sys.stderr)
    sys.exit(status)

  return guarded
