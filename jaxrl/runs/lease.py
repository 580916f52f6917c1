"""One process owns a run on gs://, where nothing can be locked: an object that it keeps renewing.

The objects under `lock/` have numbers. The one with the highest says who owns the run, and only
its creation decides: of all who try to create the next number one succeeds, and that is done once
the last owner has released the run, is known to be dead, or has not renewed for `take_over`
seconds. An owner that could not renew for `end` seconds ends itself, before another may follow; so
there are never two that write. Only time that passes on one machine is measured.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import json
import os
import socket
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from jaxrl import objects
from jaxrl.errors import InputError
from jaxrl.runs.lock import describe_owner

_EXIT_LOST = 75               # "try again later" in sysexits.h, as hosts.EXIT_LOST


@dataclasses.dataclass(frozen=True)
class Times:
  """Seconds."""

  renew: float = 15.0         # between two renewals
  end: float = 60.0           # without one, after which the owner ends itself
  take_over: float = 120.0    # of silence, after which the run is another's


def end_process(sentence: str) -> None:
  """Ends this process at once, whatever it is doing."""
  print(f'error: {sentence}', file=sys.stderr, flush=True)
  os._exit(_EXIT_LOST)


@contextlib.contextmanager
def hold_lease(
    url: str, *, times: Times | None = None, say: Callable[[str], None] = print,
    on_lost: Callable[[str], None] = end_process,
) -> Iterator[Callable[[], None]]:
  """Owns what `url` (gs://.../lock) stands for while the block runs.

  The result is to be called before each change: it raises InputError once the run is no longer
  this process's, which `on_lost` may be about to be told.

  Args:
    say: told when the end of an owner that is silent has to be waited for.
    on_lost: called, from another thread, when the run must not be written any more.

  Raises:
    InputError: another process owns it.
  """
  lease = _Lease(url, times or Times(), on_lost)
  lease.take(say)
  lease.start()
  try:
    yield lease.check
  finally:
    lease.release()


class _Lease:

  def __init__(self, url: str, times: Times, on_lost: Callable[[str], None]):
    self.url, self.times, self.on_lost = url, times, on_lost
    self.number = 0
    self.owner: dict[str, Any] = _this_process()
    self.renewed = 0.0          # when the last renewal that succeeded was begun
    self.ended = threading.Event()
    self.threads = [threading.Thread(target=target, name=f'lease: {target.__name__}', daemon=True)
                    for target in (self.keep_renewing, self.watch)]

  def take(self, say: Callable[[str], None]) -> None:
    while True:
      newest = self.newest()
      if newest:
        self.wait_until_free(newest, say)
      self.renewed = _now()
      self.number = newest + 1
      made = objects.create(self.url_of(self.number), self.content())
      # The answer to a creation may be lost, and a second one is then refused. An owner of before
      # may have been followed, and its number deleted, since it was looked at.
      made = made or self.read(self.number).get('id') == self.owner['id']
      if made and self.newest() == self.number:
        break
    for name in objects.stored(self.url):
      if int(name) < self.number:
        objects.delete(f'{self.url}/{name}')

  def wait_until_free(self, number: int, say: Callable[[str], None]) -> None:
    """Returns when the owner has gone, or there is a later one; InputError where it is alive."""
    first, since, said = self.read(number), _now(), False
    while not (first.get('released') or _is_dead(first)):
      if _is_here(first) or self.read(number).get('renewals') != first.get('renewals'):
        raise InputError(
            f'the run folder is in use by {describe_owner(first)}',
            where=self.url.rpartition('/')[0],
            fix='Wait for it to end, stop it, or give another --run_dir')
      left = self.times.take_over - (_now() - since)
      if left <= 0 or self.newest() != number:
        return
      if not said:
        say(f'{self.url}: {describe_owner(first)}, had the run last; it goes on in {left:.0f} s '
            'if nothing is heard of that')
        said = True
      time.sleep(min(self.times.renew / 3, left))

  def start(self) -> None:
    for thread in self.threads:
      thread.start()

  def keep_renewing(self) -> None:
    while not self.ended.wait(self.times.renew):
      begun = _now()
      with contextlib.suppress(InputError):   # the bucket cannot be reached: `watch` counts
        if self.newest() > self.number:
          return self.lose('another process has taken the run over')
        self.owner['renewals'] += 1
        objects.write(self.url_of(self.number), self.content())
        self.renewed = begun

  def watch(self) -> None:
    while not self.ended.wait(self.times.renew / 10):
      if self.is_late():
        return self.lose(f'it could not say for {self.times.end:g} s that it is alive')

  def check(self) -> None:
    if self.ended.is_set() or self.is_late():
      raise InputError('the run is no longer of this process', where=self.url.rpartition('/')[0],
                       fix='Give the same command again')

  def is_late(self) -> bool:
    return _now() - self.renewed > self.times.end

  def lose(self, why: str) -> None:
    if not self.ended.is_set():
      self.ended.set()
      self.on_lost(f'{self.url.rpartition("/")[0]}: the run stopped here, because {why}; '
                   'the same command goes on')

  def release(self) -> None:
    if self.ended.is_set():
      return
    self.ended.set()
    for thread in self.threads:
      thread.join(self.times.renew)
    with contextlib.suppress(InputError):     # then it is taken over for being silent
      objects.write(self.url_of(self.number), self.content(released=True))

  def newest(self) -> int:
    return max(map(int, objects.stored(self.url)), default=0)

  def url_of(self, number: int) -> str:
    return f'{self.url}/{number:08d}'

  def content(self, **more: object) -> bytes:
    return json.dumps(self.owner | more).encode()

  def read(self, number: int) -> dict[str, Any]:
    try:
      return json.loads(objects.read(self.url_of(number)))
    except FileNotFoundError:       # deleted by the next owner
      return {'released': True}


def _now() -> float:
  """Seconds that also count while the machine is suspended."""
  return time.clock_gettime(getattr(time, 'CLOCK_BOOTTIME', time.CLOCK_MONOTONIC))


def _this_process() -> dict[str, Any]:
  started = datetime.datetime.now(datetime.UTC).isoformat(timespec='seconds')
  return {'id': uuid.uuid4().hex, 'renewals': 0, 'pid': os.getpid(), 'host': socket.gethostname(),
          'start': started, 'machine': _machine(), 'born': _born(os.getpid())}


def _machine() -> str | None:
  """Tells where process numbers mean the same; None where that cannot be known."""
  try:
    boot = Path('/proc/sys/kernel/random/boot_id').read_text().strip()
    return f'{socket.gethostname()} {boot} {os.stat("/proc/self/ns/pid").st_ino}'
  except OSError:
    return None


def _born(pid: int) -> str | None:
  """When a process was started, in ticks since this machine was; None where there is none."""
  try:
    after_name = Path(f'/proc/{pid}/stat').read_text().rpartition(') ')[2].split()
  except OSError:
    return None
  return None if after_name[0] in 'ZX' else after_name[19]


def _is_here(owner: dict[str, Any]) -> bool:
  return owner.get('machine') is not None and owner['machine'] == _machine()


def _is_dead(owner: dict[str, Any]) -> bool:
  return _is_here(owner) and _born(owner['pid']) != owner['born']
