"""One process owns a run folder: an flock that the system frees when that process ends."""

from __future__ import annotations

import contextlib
import datetime
import errno
import fcntl
import json
import os
import socket
from collections.abc import Iterator, Mapping
from typing import Any

from jaxrl.errors import InputError

# A forked child shares its parent's flock and would keep it after the parent is killed.
_held: set[int] = set()


def _close_in_child() -> None:
  for descriptor in _held:
    os.close(descriptor)
  _held.clear()


os.register_at_fork(after_in_child=_close_in_child)


@contextlib.contextmanager
def hold_lock(path: str | os.PathLike[str]) -> Iterator[None]:
  """Holds an exclusive lock on `path` and writes there who holds it.

  Raises InputError naming the process, host and start time of the owner when it is taken. The
  file itself stays: removing it would let two processes lock two files of one name.
  """
  descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
  _held.add(descriptor)
  try:
    try:
      fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
      if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
        raise InputError(
            f'the file system gives no locks ({error.strerror})',
            where=os.fspath(path),
            fix='Put the run folder on one that does',
        ) from error
      raise InputError(
          f'the run folder is in use by {_owner_in(os.pread(descriptor, 4096, 0))}',
          where=os.path.dirname(os.fspath(path)),
          fix='Wait for it to end, stop it, or give another --run_dir',
      ) from None
    started = datetime.datetime.now(datetime.UTC).isoformat(timespec='seconds')
    owner = {'pid': os.getpid(), 'host': socket.gethostname(), 'start': started}
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, json.dumps(owner).encode() + b'\n', 0)
    yield
  finally:
    if descriptor in _held:   # not in a forked child that ends by unwinding
      _held.remove(descriptor)
      os.close(descriptor)


def describe_owner(owner: Mapping[str, Any]) -> str:
  """The owner as a person reads it."""
  return f'process {owner["pid"]} on host {owner["host"]}, started {owner["start"]}'


def _owner_in(content: bytes) -> str:
  """`describe_owner` of what a lock file holds; it may not have written its name yet."""
  try:
    return describe_owner(json.loads(content))
  except (ValueError, KeyError, TypeError):
    return 'another process, which has just started'
