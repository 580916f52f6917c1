"""Are two LaTeX answers equivalent? math-verify decides, in processes that can be killed.

Symbolic comparison of hostile text can take any time and any memory, inside C code that no
signal or exception interrupts. So it runs in worker processes: started when first needed, reused
between calls, killed at the wall-clock limit and replaced. They are plain child programs, not
forks, so they share nothing with the threads of JAX and never import it.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import selectors
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from jaxrl.errors import InputError

# A longer answer is no answer to a MATH problem (the longest gold has about 160 characters); the
# limit also keeps a request, escaped, inside one pipe buffer, so that writing it never blocks.
MAX_CHARACTERS = 2000
MEMORY_BYTES = 2 * 2**30
START_SECONDS = 120.0
# sympy's caches only grow; a worker is replaced before they reach the memory limit.
COMPARISONS_PER_WORKER = 2000

_PROGRAM = Path(__file__).with_name('math_worker.py')
_idle: list[_Worker] = []
_idle_lock = threading.Lock()


def are_equivalent(
    pairs: Sequence[tuple[str, str]], *, seconds: float, workers: int = 1
) -> list[bool | None]:
  """For each (gold, answer) in LaTeX: equivalent, not equivalent, or None when undecided.

  None means that the comparison ran past `seconds` of wall clock, and was killed, or that it took
  its worker down with it; the other pairs are unaffected. A text longer than `MAX_CHARACTERS` is
  equivalent to nothing, and neither is one that math-verify gives up on within its memory.

  Raises InputError where math-verify cannot be started.
  """
  results: list[bool | None] = [False] * len(pairs)
  asked = [i for i, pair in enumerate(pairs) if max(map(len, pair)) <= MAX_CHARACTERS]
  if not asked:
    return results
  todo, todo_lock = iter(asked), threading.Lock()

  def work() -> None:
    with _Lease() as lease:
      while True:
        with todo_lock:
          i = next(todo, None)
        if i is None:
          return
        results[i] = lease.compare(*pairs[i], seconds)

  threads = min(workers, len(asked))
  with ThreadPoolExecutor(threads, 'math-check') as executor:
    try:
      for future in [executor.submit(work) for _ in range(threads)]:
        future.result()
    except BaseException:   # Ctrl-C, or no worker: the threads must not go on with the rest
      with todo_lock:
        todo = iter(())
      raise
  return results


@atexit.register
def close_workers() -> None:
  """Ends the idle worker processes; the next comparison starts new ones."""
  with _idle_lock:
    closing = [worker for worker in _idle if worker.owner == os.getpid()]
    _idle.clear()
  for worker in closing:
    worker.kill()


class _WorkerLost(Exception):
  """The worker died (memory, crash) or did not answer in time (`late`)."""

  def __init__(self, late: bool):
    super().__init__(late)
    self.late = late


class _Lease:
  """One worker at a time for one thread, replaced whenever it is lost."""

  def __init__(self) -> None:
    self._worker: _Worker | None = None

  def __enter__(self) -> _Lease:
    return self

  def __exit__(self, *_: object) -> None:
    if self._worker is not None:
      with _idle_lock:
        _idle.append(self._worker)

  def compare(self, gold: str, answer: str, seconds: float) -> bool | None:
    while True:
      worker = self._worker or _take_worker()
      self._worker = None
      is_fresh = worker.comparisons == 0
      try:
        equivalent = worker.compare(gold, answer, seconds)
      except _WorkerLost as lost:
        worker.kill()
        # A worker that died with a history may have died of it (memory filled by earlier answers,
        # an outside kill); only a fresh one puts the blame on this answer.
        if lost.late or is_fresh:
          return None
        continue
      except BaseException:   # interrupted between request and reply: its next reply is not ours
        worker.kill()
        raise
      if worker.comparisons < COMPARISONS_PER_WORKER:
        self._worker = worker
      else:
        worker.kill()
      return equivalent


def _take_worker() -> _Worker:
  with _idle_lock:
    # After a fork the list still names the parent's workers, whose pipes are not ours to use.
    _idle[:] = [worker for worker in _idle if worker.owner == os.getpid()]
    if _idle:
      return _idle.pop()
  return _Worker()


class _Worker:
  """One running math_worker.py; any failure raises _WorkerLost, after which only kill() is left."""

  def __init__(self) -> None:
    self.owner = os.getpid()
    self.comparisons = 0
    self._buffer = b''
    # -P keeps this folder off the worker's import path; a session of its own keeps Ctrl-C away.
    self._process = subprocess.Popen(
        [sys.executable, '-P', str(_PROGRAM), str(MEMORY_BYTES)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        bufsize=0,
        start_new_session=True,
    )
    assert self._process.stdin is not None and self._process.stdout is not None
    self._requests, self._replies = self._process.stdin, self._process.stdout
    try:
      greeting = json.loads(self._read_line(START_SECONDS))
    except _WorkerLost as lost:
      greeting = {'error': 'no reply' if lost.late else 'an early end'}
    except BaseException:
      self.kill()
      raise
    if greeting != 'ready':
      self.kill()
      raise InputError(
          'the symbolic checker of MATH answers cannot start',
          expected='a Python with the package math-verify',
          found=f'{greeting["error"]} from {sys.executable}',
          fix='Install it (pip install math-verify) or set symbolic=False in the AnswerRule',
      )

  def compare(self, gold: str, answer: str, seconds: float) -> bool:
    request = json.dumps([gold, answer, seconds]).encode('ascii') + b'\n'
    try:
      self._requests.write(request)
    except OSError as error:
      raise _WorkerLost(late=False) from error
    equivalent = json.loads(self._read_line(seconds))
    self.comparisons += 1
    return equivalent

  def kill(self) -> None:
    self._process.kill()
    self._process.wait()
    for pipe in (self._requests, self._replies):
      with contextlib.suppress(OSError):
        pipe.close()

  def _read_line(self, seconds: float) -> bytes:
    for chunk in self._chunks(time.monotonic() + seconds):
      self._buffer += chunk
      if b'\n' in chunk:
        line, _, self._buffer = self._buffer.partition(b'\n')
        return line
    raise _WorkerLost(late=False)

  def _chunks(self, deadline: float) -> Iterator[bytes]:
    with selectors.DefaultSelector() as selector:
      selector.register(self._replies, selectors.EVENT_READ)
      while True:
        if not selector.select(max(0.0, deadline - time.monotonic())):
          raise _WorkerLost(late=True)
        chunk = os.read(self._replies.fileno(), 4096)
        if not chunk:   # the worker closed its end: it is gone
          return
        yield chunk
