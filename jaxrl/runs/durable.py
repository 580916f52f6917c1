"""Writing so that neither a kill nor a full disk leaves half a file under its final name.

Where the folder is the working copy of one on gs:// (`working_copy`), what is on the disk when a
verb returns is in the bucket as well, and `refresh` brings here what others have put there.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Callable, Iterator
from typing import BinaryIO

from etils import epath

from jaxrl.errors import InputError
from jaxrl.runs import working_copy

Path = str | os.PathLike[str]


@contextlib.contextmanager
def naming_full_disk(path: Path) -> Iterator[None]:
  """Turns the system's 'no space left' inside the block into an InputError that names `path`."""
  try:
    yield
  except OSError as error:
    if error.errno not in (errno.ENOSPC, errno.EDQUOT):
      raise
    raise InputError(
        'there is no space left on the disk to write this',
        where=os.fspath(path),
        fix='Free some space and start the run again: it goes on from what is already written',
    ) from error


@contextlib.contextmanager
def open_atomic(path: Path) -> Iterator[BinaryIO]:
  """A file to write; it appears as `path`, whole and on the disk, when the block ends well.

  The temporary name is fixed, so that what a killed process left is overwritten by the next one.
  Raises InputError when the disk is full.
  """
  target = os.fspath(path)
  folder, name = os.path.split(target)
  partial = os.path.join(folder, f'.{name}.tmp')
  with naming_full_disk(target):
    try:
      with open(partial, 'wb') as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
      os.replace(partial, target)
    except BaseException:
      with contextlib.suppress(OSError):
        os.unlink(partial)
      raise
    sync(folder or '.')
  _put(target)


def write_file(path: Path, content: bytes) -> None:
  """Writes `path` whole or not at all."""
  with open_atomic(path) as file:
    file.write(content)


def sync(path: Path) -> None:
  """Waits until one file's content, or one folder's names, are on the disk."""
  descriptor = os.open(path, os.O_RDONLY)
  try:
    os.fsync(descriptor)
  finally:
    os.close(descriptor)


def list_files(folder: Path) -> list[str]:
  """Paths of all files under `folder`, relative to it, with '/', sorted; links are refused."""
  found = []
  for root, folders, files in os.walk(folder):
    for name in folders + files:
      full = os.path.join(root, name)
      if os.path.islink(full):
        raise InputError(
            'this is a symbolic link',
            where=full,
            expected='a file or a folder of the run itself',
            found=f'a link to {os.readlink(full)}',
            fix='Put the file itself in its place',
        )
    found += [os.path.relpath(os.path.join(root, name), folder) for name in files]
  return sorted(name.replace(os.sep, '/') for name in found)


def sync_tree(path: Path) -> None:
  """`sync` for a file, or for a folder and everything under it."""
  with naming_full_disk(path):   # delayed allocation may find the disk full only here
    for root, _, files in os.walk(path):
      for name in files:
        sync(os.path.join(root, name))
      sync(root)
    if not os.path.isdir(path):
      sync(path)


def move(source: Path, target: Path) -> None:
  """Renames a file or a folder over whatever has the name `target`, on one file system."""
  os.makedirs(os.path.dirname(os.fspath(target)), exist_ok=True)
  if os.path.isdir(target):   # a rename replaces files, but no folder that has something in it
    shutil.rmtree(target)
  elif os.path.isdir(source):
    remove(target)
  os.replace(source, target)
  sync(os.path.dirname(os.fspath(target)))
  _put(target)


def remove(path: Path) -> None:
  """Removes a file or a folder; does nothing where there is none."""
  if place := working_copy.find(path):
    place[0].delete(place[1])
  if os.path.isdir(path) and not os.path.islink(path):
    shutil.rmtree(path)
  else:
    with contextlib.suppress(FileNotFoundError):
      os.unlink(path)


def sync_log(path: Path, descriptor: int) -> None:
  """Waits until the lines that were added to an open log are on the disk."""
  with naming_full_disk(path):
    os.fsync(descriptor)
  if place := working_copy.find(path):
    place[0].extend(place[1])


def sync_seconds(path: Path) -> float:
  """How often a log that grows all the time is to be waited for."""
  return 1.0 if working_copy.find(path) is None else working_copy.LOG_SECONDS


def end_log(path: Path) -> None:
  """Says that a log is complete for now: a bucket then has it as one object."""
  if place := working_copy.find(path):
    place[0].end_log(place[1])


def put_folder(path: Path) -> None:
  """Puts a folder that was not written by the verbs above into the bucket, if there is one."""
  _put(path)


def refresh(path: Path) -> None:
  """Brings a file, a log or a folder here that another process, or another machine, has put."""
  if place := working_copy.find(path):
    place[0].get(place[1])


def before_change(folder: Path, check: Callable[[], None]) -> None:
  """Has `check` called, which may raise, before anything in the bucket changes."""
  if place := working_copy.find(folder):
    place[0].before_change = check


def refresh_small(folder: Path) -> None:
  """Brings all of a folder on gs:// here that is published, but for the weights of models."""
  if place := working_copy.find(folder):
    place[0].get_small()


def names(folder: Path) -> list[str]:
  """Sorted names of what is in a folder, those included that `refresh` would bring."""
  found = set(os.listdir(folder)) if os.path.isdir(folder) else set()
  if place := working_copy.find(folder):
    found |= place[0].names(place[1])
  return sorted(found)


def shared(path: Path) -> epath.Path:
  """The path by which all machines know it: gs://... in a working copy, otherwise the same."""
  place = working_copy.find(path)
  return epath.Path(path if place is None else place[0].url_of(place[1]))


def _put(path: Path) -> None:
  if place := working_copy.find(path):
    place[0].put(place[1])
