"""Where a run on gs:// works: a temporary folder, and what of it has to be in the bucket when.

All code of a run works on files of this machine. The verbs of `durable` then do to the bucket what
they did to the folder: a file that was written, or moved to its final name, is put as one object;
what was removed is deleted; and lines added to a log are put as a further part of it. Scratch
folders (NAME.partial) stay here but for their logs: what else is in them can be made again. So a
machine that is lost loses what a kill loses, and a fresh one goes on from the bucket.

A log `X` is the objects `X.parts/GENERATION.OFFSET`: the parts of the highest generation, in order,
are its content. A rewritten log begins a new generation by one object that holds all of it, and a
log that is complete for now is the object `X`. The part at offset 0 is the first to be made and
the first to be deleted: without it the others are what a kill left.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

from etils import epath

from jaxrl import objects
from jaxrl.errors import InputError
from jaxrl.runs.lock import hold_lock

PathLike = str | os.PathLike[str]
LOCK = 'lock'                 # objects of `lease`, which is not for files
LOG_SECONDS = 10.0            # between the parts of a log that grows all the time
_SCRATCH, _PARTS = '.partial', '.parts'
_MOST_PARTS = 256             # then a log is put as one again
_LOOKS = 9                    # at what another process is changing
_LARGE = '.safetensors'       # files that wait until they are asked for
_open: list[WorkingCopy] = []


@dataclasses.dataclass
class _Log:
  """What of a log is in the bucket."""

  generation: int = 0
  size: int = 0               # bytes
  parts: int = 0


class WorkingCopy:
  """A folder of this machine and the objects it stands for; names are relative to both."""

  def __init__(self, folder: str, url: str):
    self.folder, self.url = folder, url
    self.before_change: Callable[[], None] = lambda: None   # raises where there is to be none
    self._own: set[str] = set()          # what this process has written
    self._versions: dict[str, str] = {}  # of the objects that were got
    self._logs: dict[str, _Log] = {}

  def path_of(self, name: str) -> str:
    return os.path.join(self.folder, name) if name else self.folder

  def url_of(self, name: str) -> str:
    return f'{self.url}/{name}' if name else self.url

  def put(self, name: str) -> None:
    """Puts a file, or a folder in place of the one before; not what is scratch."""
    self.before_change()
    if name in self._logs:
      self._put_whole_log(name)
    elif not _is_scratch(name):
      if os.path.isdir(self.path_of(name)):
        objects.delete(self.url_of(name))
      objects.upload(self.path_of(name), self.url_of(name))
    self._own.add(name)

  def delete(self, name: str) -> None:
    """Deletes a file, a log, or a folder with all that is in it."""
    self.before_change()
    kept: tuple[dict[str, Any], ...] = (self._logs, self._versions)
    for known in kept:
      for inner in [inner for inner in known if _is_in(name, inner)]:
        del known[inner]
    self._own = {inner for inner in self._own if not _is_in(name, inner)}
    objects.delete(self.url_of(name))
    objects.delete(self.url_of(name) + _PARTS)

  def extend(self, name: str) -> None:
    """Puts what was added to a log since the last time."""
    self.before_change()
    log = self._logs.setdefault(name, _Log())
    size = os.path.getsize(self.path_of(name))
    self._own.add(name)
    if log.parts in (0, _MOST_PARTS) or size < log.size:
      self._put_whole_log(name)
    elif size > log.size:
      with open(self.path_of(name), 'rb') as file:
        file.seek(log.size)
        content = file.read(size - log.size)
      objects.write(f'{self.url_of(name)}{_PARTS}/{_part(log.generation, log.size)}', content)
      log.size, log.parts = size, log.parts + 1

  def end_log(self, name: str) -> None:
    """Puts a log as the one object of its name, in place of its parts."""
    self.before_change()
    if name in self._logs:
      objects.upload(self.path_of(name), self.url_of(name))
      first = _part(self._logs.pop(name).generation, 0)
      objects.delete(f'{self.url_of(name)}{_PARTS}/{first}')
    objects.delete(self.url_of(name) + _PARTS)

  def get(self, name: str) -> None:
    """Brings a file, a log or a folder here, unless this process wrote it or has it already."""
    if any(_is_in(own, name) for own in self._own):
      return
    for _ in range(_LOOKS):
      # What is listed may be replaced by the process that writes before it is got.
      with contextlib.suppress(FileNotFoundError):
        return self._get_as_listed(name)
    self._get_as_listed(name)

  def _get_as_listed(self, name: str) -> None:
    parts = objects.stored(self.url_of(name) + _PARTS)
    generation = max((int(part.partition('.')[0]) for part in parts), default=0)
    if _part(generation, 0) in parts:
      self._get_log(name, generation, set(parts))
    else:
      self._get_objects(name, objects.stored(self.url_of(name)))

  def get_small(self) -> None:
    """Brings what is published here, but for the weights of models, and empty scratch folders."""
    found = objects.stored(self.url)
    self._get_objects('', {name: about for name, about in found.items()
                           if not (_is_scratch(name) or name.endswith(_LARGE))})
    for folder in {name.rpartition('/')[0] for name in found}:
      if _is_scratch(f'{folder}/'):
        os.makedirs(self.path_of(folder[:folder.index(_SCRATCH) + len(_SCRATCH)]), exist_ok=True)
      elif folder.endswith(_PARTS):
        self.get(folder.removesuffix(_PARTS))

  def names(self, folder: str) -> set[str]:
    """Names of files, logs and folders in one folder of the bucket."""
    inner = {name.partition('/')[0] for name in objects.stored(self.url_of(folder)) if name}
    return {name.removesuffix(_PARTS) for name in inner}

  def _put_whole_log(self, name: str) -> None:
    url = self.url_of(name) + _PARTS
    before = sorted(objects.stored(url))     # the first part of each generation ahead of its others
    log = _Log(1 + (int(before[-1].partition('.')[0]) if before else 0), parts=1)
    with open(self.path_of(name), 'rb') as file:
      content = file.read()
    objects.write(f'{url}/{_part(log.generation, 0)}', content)
    log.size = len(content)
    self._logs[name] = log
    for part in before:
      objects.delete(f'{url}/{part}')

  def _get_log(self, name: str, generation: int, parts: set[str]) -> None:
    content, count = b'', 0
    while _part(generation, len(content)) in parts:
      content += objects.read(f'{self.url_of(name)}{_PARTS}/{_part(generation, len(content))}')
      count += 1
    os.makedirs(os.path.dirname(self.path_of(name)), exist_ok=True)
    with open(self.path_of(name), 'wb') as file:
      file.write(content)
    self._logs[name] = _Log(generation, len(content), count)

  def _get_objects(self, name: str, found: dict[str, tuple[int, str]]) -> None:
    new = {}
    for inner, (_, version) in found.items():
      full = f'{name}/{inner}'.strip('/')
      is_file = not any(part.endswith(_PARTS) for part in full.split('/')[:-1])
      if is_file and full.split('/')[0] != LOCK and self._versions.get(full) != version:
        new[inner] = full, version
    objects.download(self.url_of(name), self.path_of(name), list(new))
    self._versions |= dict(new.values())


def _part(generation: int, offset: int) -> str:
  return f'{generation:06d}.{offset:015d}'


def _is_in(folder: str, name: str) -> bool:
  return name == folder or name.startswith(f'{folder}/')


def _is_scratch(name: str) -> bool:
  return any(part.endswith(_SCRATCH) for part in name.split('/')[:-1])


def find(path: PathLike) -> tuple[WorkingCopy, str] | None:
  """The working copy that has a path of this machine in it, and the name there; else None."""
  full = os.fspath(path)
  for copy in _open:
    if full == copy.folder or full.startswith(copy.folder + os.sep):
      return copy, full[len(copy.folder):].strip(os.sep).replace(os.sep, '/')
  return None


@contextlib.contextmanager
def working_folder(run_dir: PathLike) -> Iterator[epath.Path]:
  """The folder of this machine to work in: `run_dir` itself, or an empty one that stands for it.

  That of a gs:// folder lies where the system has temporary files (TMPDIR) and goes when the block
  ends; what killed processes left there goes as well. Paths in errors are those of the bucket.
  """
  if not objects.is_url(run_dir):
    yield epath.Path(os.path.abspath(epath.Path(run_dir).expanduser()))
    return
  url = os.fspath(run_dir).rstrip('/')
  mark = f'jaxrl-{hashlib.sha256(url.encode()).hexdigest()[:12]}-'
  _remove_left(mark)
  around = tempfile.mkdtemp(prefix=mark)
  try:
    with hold_lock(os.path.join(around, LOCK)):
      copy = WorkingCopy(os.path.join(around, url.rsplit('/', 1)[-1]), url)
      os.mkdir(copy.folder)
      _open.append(copy)
      try:
        yield epath.Path(copy.folder)
      except InputError as error:
        error.args = tuple(str(text).replace(copy.folder, url) for text in error.args)
        raise
      finally:
        _open.remove(copy)
  finally:
    shutil.rmtree(around, ignore_errors=True)


def _remove_left(mark: str) -> None:
  base = tempfile.gettempdir()
  for name in os.listdir(base):
    lock = os.path.join(base, name, LOCK)
    if name.startswith(mark) and os.path.exists(lock):
      with contextlib.suppress(InputError), hold_lock(lock):    # refused: it is in use
        shutil.rmtree(os.path.join(base, name), ignore_errors=True)
