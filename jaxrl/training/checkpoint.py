"""Checkpoints inside a training stage: written whole or not at all, verified before use.

While training goes on, Orbax writes the arrays to a temporary folder, every file is hashed into
`files.json`, and the folder is renamed to `step_00000123`. A checkpoint whose files do not match is
named and the one before it is used. With several processes each one writes its own shards to the
same folder, and process 0 hashes and renames when all have done so.

On gs:// nothing can be renamed: the objects of a step have their final names at once, and it counts
when `files.json` is there, which is put last and deleted first. What is in it there are sizes and
the generations that the bucket gives: no two contents of an object have the same.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import logging
import os
import threading
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax
import orbax.checkpoint as ocp
from etils import epath

from jaxrl import objects
from jaxrl.errors import InputError
from jaxrl.parallel import hosts
from jaxrl.training.agreement import OtherFailed, Together

State = TypeVar('State')

_FILES = 'files.json'
# A save: a folder made for it; then, in the background, shards written and arrays committed (both
# Orbax's), and the folder published.
PHASES = ('made', 'written', 'committed', 'published')
_ORBAX_PHASES = {'async_write_complete': 'written', 'async_commit_complete': 'committed'}
# What Orbax could not write is raised here; it would also print two hundred lines about it.
logging.getLogger('absl').addFilter(
    lambda record: record.levelno != logging.ERROR or '/orbax/' not in record.pathname)
_uses = itertools.count()   # every process makes and uses its checkpoints in the same order


class Checkpoints:
  """The checkpoints of one training stage; a context that waits for the last save when it ends.

  The newest `keep` stay, and those of every step that is a multiple of `keep_every`. With several
  processes all of them call every method, in the same order; what one cannot do all refuse.
  `seconds` is how long one process waits for another.
  """

  def __init__(
      self, folder: epath.PathLike, *, keep: int = 2, keep_every: int | None = None,
      warn: Callable[[str], None] = print, seconds: float = 1800.0,
  ):
    self._folder = epath.Path(folder)
    if _in_bucket(self._folder):
      objects.check(folder)
    self._keep, self._keep_every = keep, keep_every
    self._warn, self._seconds = warn, seconds
    self._thread: threading.Thread | None = None
    self._error: BaseException | None = None

  def restore(self, like: State) -> tuple[int, State] | None:
    """(step, state) of the newest sound checkpoint, laid out as `like`; None if there is none.

    `like` is a tree of arrays or `jax.ShapeDtypeStruct`, on any mesh. Process 0 reads every file
    and says which checkpoint it is; damaged ones are named. What a killed save left is removed.
    """
    self.wait()
    step = hosts.broadcast(self._newest_sound() if hosts.is_writer() else None)
    if step is None:
      return None
    abstract = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), like)
    with ocp.Checkpointer(_handler(), **_options(f'restore {next(_uses)}')) as checkpointer:
      return step, checkpointer.restore(
          self._target(step) / 'state', args=ocp.args.StandardRestore(abstract))

  def notes(self, step: int) -> dict[str, Any]:
    """What was saved beside the state of `step`."""
    return json.loads((self._target(step) / 'notes.json').read_text())

  def save(self, step: int, state, notes: Mapping[str, Any] | None = None) -> None:
    """Copies the state to the host and writes it, with JSON `notes`, in the background.

    Returns when the copy is made: the state may be donated. Waits for the save before it.

    Raises:
      InputError: the disk refused this save or the one before; older checkpoints are as they were.
    """
    self.wait()
    together = Together(f'save {next(_uses)} of step {step}', PHASES, self._seconds)
    target = self._target(step)
    checkpointer = ocp.AsyncCheckpointer(
        _handler(), timeout_secs=int(self._seconds), **_options(together.name),
        async_options=ocp.options.AsyncOptions(
            barrier_sync_fn=lambda *, key, timeout_ms: together.reach(_phase(key))))
    try:
      if hosts.is_writer():
        _remove(self._partial(step))
        if not _in_bucket(self._folder):
          self._partial(step).mkdir(parents=True)
      together.reach('made')
      checkpointer.save(self._partial(step) / 'state', args=ocp.args.StandardSave(state))
    except BaseException as error:
      together.fail(error)
      with contextlib.suppress(BaseException):   # says once more what was said above
        checkpointer.close()
      explained = _explained(error, target)
      if explained is error:
        raise
      raise explained from error
    self._thread = threading.Thread(
        target=self._finish, args=(checkpointer, together, step, dict(notes or {})),
        name=f'checkpoint of step {step}')
    self._thread.start()

  def wait(self) -> None:
    """Returns when the last save is published in all processes.

    Raises:
      InputError: the disk refused it.
    """
    if self._thread is not None:
      with hosts.waiting(f'the {self._thread.name}'):
        self._thread.join()
      self._thread = None
    error, self._error = self._error, None
    if error is not None:
      raise error

  def __enter__(self) -> Checkpoints:
    return self

  def __exit__(self, kind, error, trace) -> None:
    if error is None:
      self.wait()
      return
    try:
      self.wait()
    except Exception as second:   # the first error is why this ends
      self._warn(str(second))

  def _target(self, step: int) -> epath.Path:
    return self._folder / f'step_{step:08d}'

  def _partial(self, step: int) -> epath.Path:
    return self._target(step) if _in_bucket(self._folder) else (
        self._folder / f'.step_{step:08d}.partial')

  def _newest_sound(self) -> int | None:
    for left in _unfinished(self._folder):
      _remove(left)
    for checkpoint in reversed(checkpoints(self._folder)):
      wrong = damage(checkpoint)
      if not wrong:
        return _step(checkpoint)
      self._warn(f'{checkpoint}: the checkpoint is damaged ({wrong}); using the one before it')
    return None

  def _finish(
      self, checkpointer: ocp.AsyncCheckpointer, together: Together, step: int,
      notes: dict,
  ) -> None:
    """In the background: waits for the arrays, then hashes and publishes."""
    try:
      checkpointer.wait_until_finished()
      if hosts.is_writer():
        self._publish(step, notes)
      together.reach('published')
    except BaseException as error:   # whatever it was, the thread that trains must hear of it
      together.fail(error)
      self._error = _explained(error, self._target(step))
    finally:
      with contextlib.suppress(BaseException):   # says once more what was said above
        checkpointer.close()

  def _publish(self, step: int, notes: dict) -> None:
    partial, target = self._partial(step), self._target(step)
    (partial / 'notes.json').write_text(json.dumps(notes))
    (partial / _FILES).write_text(json.dumps(_fingerprints(partial), indent=1))
    if partial != target:
      _remove(target)
      partial.rename(target)
    for old in checkpoints(self._folder)[:-self._keep]:
      if self._keep_every is None or _step(old) % self._keep_every:
        _remove(old)


def checkpoints(folder: epath.Path) -> list[epath.Path]:
  """Finished checkpoints, oldest first."""
  if _in_bucket(folder):
    return sorted(folder / step for step, names in _steps_in(folder).items() if _FILES in names)
  if not folder.exists():
    return []
  return sorted(path for path in folder.iterdir() if path.name.startswith('step_'))


def _unfinished(folder: epath.Path) -> list[epath.Path]:
  """What saves have left that were killed."""
  if _in_bucket(folder):
    return [folder / step for step, names in _steps_in(folder).items() if _FILES not in names]
  return list(folder.glob('.step_*.partial'))


def _steps_in(folder: epath.Path) -> dict[str, set[str]]:
  """{folder of a step: names in it} of a folder on gs://."""
  steps: dict[str, set[str]] = {}
  for name in objects.stored(folder):
    step, _, inner = name.partition('/')
    steps.setdefault(step, set()).add(inner)
  return steps


def damage(checkpoint: epath.Path) -> str | None:
  """What is wrong with a checkpoint, in a phrase; None when every file is as it was written."""
  try:
    expected = json.loads((checkpoint / _FILES).read_text())
  except (OSError, ValueError):
    return 'files.json is missing or unreadable'
  if not isinstance(expected, dict):
    return 'files.json is not a table of hashes'
  found = _fingerprints(checkpoint)
  changed = [name for name in sorted(expected | found) if expected.get(name) != found.get(name)]
  return f'{changed[0]} is missing or changed' if changed else None


def _step(checkpoint: epath.Path) -> int:
  return int(checkpoint.name.removeprefix('step_'))


def _fingerprints(folder: epath.Path) -> dict[str, str]:
  """What tells one content from another, of every file but files.json."""
  if _in_bucket(folder):
    return {name: f'{size} bytes, generation {version}'
            for name, (size, version) in sorted(objects.stored(folder).items()) if name != _FILES}
  hashes: dict[str, str] = {}
  for path in sorted(folder.iterdir()):
    if path.is_dir():
      hashes |= {f'{path.name}/{name}': value for name, value in _fingerprints(path).items()}
    elif path.name != _FILES:
      with path.open('rb') as file:
        hashes[path.name] = hashlib.file_digest(file, 'sha256').hexdigest()
  return hashes


def _remove(folder: epath.Path) -> None:
  """Removes a checkpoint, or what a save that failed has left; on gs:// it stops counting first."""
  if _in_bucket(folder):
    objects.delete(folder / _FILES)
    objects.delete(folder)
  elif folder.exists():
    folder.rmtree()


def _in_bucket(folder: epath.Path) -> bool:
  return objects.is_url(folder)


def _handler() -> ocp.StandardCheckpointHandler:
  return ocp.StandardCheckpointHandler()


def _options(name: str) -> dict[str, Any]:
  # Naming the processes makes Orbax wait through the key-value store, not by a device program.
  return {'multiprocessing_options': ocp.options.MultiprocessingOptions(
      active_processes=set(range(jax.process_count())), barrier_sync_key_prefix=name)}


def _phase(key: str) -> str:
  (phase,) = (phase for name, phase in _ORBAX_PHASES.items() if name in key)
  return phase


def _explained(error: BaseException, target: epath.Path) -> BaseException:
  """The error, or what the user can do about it where the system refused to write."""
  refused = isinstance(error, (OSError, OtherFailed)) and not isinstance(
      error, TimeoutError)
  # The array writer reports what the system or the bucket refused as ValueError, with the code of
  # that in it.
  codes = ('os_error_code', 'http_response_code')
  if not refused and not (
      isinstance(error, ValueError) and any(code in str(error) for code in codes)):
    return error
  return InputError(
      'the checkpoint could not be written', where=os.fspath(target), found=error,
      fix='Free space or fix permissions, then run the same command again')
