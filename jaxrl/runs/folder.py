"""Opening a run folder: its lock, its flags (the same on every start) and its versions."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import platform
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from etils import epath

from jaxrl import objects
from jaxrl.errors import InputError
from jaxrl.runs import durable, manifest
from jaxrl.runs.lease import hold_lease
from jaxrl.runs.lock import hold_lock
from jaxrl.runs.stages import Run, Team, await_file
from jaxrl.runs.working_copy import working_folder

FLAGS, VERSIONS, LOCK = 'flags.flags', 'versions.json', 'lock'
# Where the run is does not change what it does; the flags of a flag file are listed themselves.
_NOT_RECORDED = ('run_dir', 'flagfile')
# What a process killed before flags.flags was written may have left.
_BEFORE_FLAGS = {LOCK, VERSIONS, f'.{VERSIONS}.tmp', f'.{FLAGS}.tmp'}


@contextlib.contextmanager
def open_run(
    run_dir: epath.PathLike,
    *,
    flags: Mapping[str, str],
    versions: Mapping[str, Any],
    free_flags: Iterable[str] = (),
) -> Iterator[Run]:
  """Creates or reopens a run folder and holds its lock while the block runs.

  Args:
    run_dir: a folder that is new, empty or a run; on a file system with locks and renames, or
      gs://BUCKET/NAME, for which `Run.folder` is a working copy on this machine.
    flags: every effective flag as the text a flag file holds; --run_dir is left out.
    versions: see `current_versions`. When a run goes on under other versions, versions.json
      keeps those it had before, newest first, under 'earlier'.
    free_flags: names of flags that do not affect results and may differ when a run is reopened.

  Of several processes that are one run all open it, and process 0 alone holds the lock and writes.

  Raises:
    InputError: the folder is in use, is not a run, or was started with other flags; or processes
      of the run have other flags or see another folder.
  """
  text = encode_flags(flags)
  team = _team()
  with contextlib.ExitStack() as stack:
    folder = stack.enter_context(working_folder(run_dir))
    if not team.writes:
      _join(folder, team, text)
      yield Run(folder, team)
      return
    _check_is_run_or_empty(folder)
    try:
      os.makedirs(folder, exist_ok=True)
      stack.enter_context(hold_run(folder))
    except OSError as error:
      raise InputError(
          f'the run folder cannot be written ({error.strerror})', where=folder
      ) from error
    _check_is_run_or_empty(folder)   # again: another process may have filled it before the lock
    if (folder / FLAGS).exists() and _has_work(folder):
      _check_flags(folder, decode_flags(folder / FLAGS), flags, set(free_flags))
    _write_versions(folder / VERSIONS, versions)
    if not ((folder / FLAGS).exists() and _has_work(folder)):
      # Last: this file is what makes the folder a run.
      durable.write_file(folder / FLAGS, text.encode())
    lock = folder / LOCK
    team.tell([str(durable.shared(folder)), text, lock.read_text() if lock.exists() else None])
    yield Run(folder, team)


def _team() -> Team:
  """The processes that this one is joined with."""
  # Where nothing has imported what joins them there are none, and jax need not be imported.
  hosts = sys.modules.get('jaxrl.parallel.hosts')
  if hosts is None or hosts.alone():
    return Team()
  from jaxrl.parallel.mesh import on_own_device

  return Team(hosts.is_writer(), hosts.broadcast, on_own_device)


@contextlib.contextmanager
def hold_run(folder: epath.Path) -> Iterator[None]:
  """Holds the lock of a run; what its bucket has is then here, but for the weights of models.

  Raises:
    InputError: another process holds it.
  """
  lock = durable.shared(folder / LOCK)
  if not objects.is_url(lock):
    with hold_lock(lock):
      yield
    return
  with hold_lease(os.fspath(lock)) as check:
    durable.before_change(folder, check)
    durable.refresh_small(folder)
    yield


@contextlib.contextmanager
def read_run(run_dir: epath.PathLike) -> Iterator[epath.Path]:
  """A run folder of this machine to look into, without its lock; of one on gs:// a copy."""
  with working_folder(run_dir) as folder:
    durable.refresh_small(folder)
    yield folder


def _join(folder: epath.Path, team: Team, text: str) -> None:
  """Waits for the process that writes, and checks that it has these flags and this folder."""
  theirs, flags, owner = team.tell(None)
  ours = str(durable.shared(folder))
  if (theirs, flags) != (ours, text):
    pairs = zip([theirs, *flags.splitlines()], [ours, *text.splitlines()], strict=False)
    expected, found = next(((a, b) for a, b in pairs if a != b), ('as many flags', 'others'))
    raise InputError('the processes of the run were started with different flags', where=folder,
                     expected=f'{expected}, as process 0', found=found)
  if owner is not None:       # a bucket is the same for all
    await_file(folder / LOCK, owner)


def current_versions() -> dict[str, Any]:
  """Versions and devices of this process, for versions.json; starts jax."""
  import jax  # here, so that reading a run folder does not start a device
  import jaxlib

  try:
    jaxrl = importlib.metadata.version('jaxrl')
  except importlib.metadata.PackageNotFoundError:
    jaxrl = 'not installed'
  devices = jax.devices()
  return {
      'python': platform.python_version(),
      'jax': jax.__version__,
      'jaxlib': jaxlib.__version__,
      'jaxrl': jaxrl,
      'platform': f'{devices[0].platform} on {platform.platform()}',
      'devices': f'{len(devices)} x {devices[0].device_kind}',
  }


def encode_flags(flags: Mapping[str, str]) -> str:
  """The text of a flag file that absl reads back as the same values.

  Raises InputError for a value that no flag file can hold: absl reads one flag per line and strips
  the end of each line.
  """
  lines = []
  for name, value in sorted(flags.items()):
    if name in _NOT_RECORDED:
      continue
    if not re.fullmatch(r'\w+', name):
      raise InputError(f'{name!r} is not the name of a flag', where=f'--{name}')
    fix = 'Put the text in a file and give the path of the file'
    if '\n' in value or '\r' in value:
      raise InputError('a flag file cannot hold a line break', where=f'--{name}', fix=fix)
    if value != value.rstrip():
      raise InputError(
          'a flag file cannot hold a value that ends with white space',
          where=f'--{name}',
          found=repr(value),
          fix=fix,
      )
    if any('\ud800' <= character <= '\udfff' for character in value):
      raise InputError('the value is not valid UTF-8', where=f'--{name}', found=repr(value))
    lines.append(f'--{name}={value}\n')
  return ''.join(lines)


def decode_flags(path: str | os.PathLike[str]) -> dict[str, str]:
  """The flags in a file that `encode_flags` wrote."""
  flags = {}
  with open(path, encoding='utf-8', errors='replace') as file:
    for number, line in enumerate(file, 1):
      name, equals, value = line.rstrip('\n').partition('=')
      if not (name.startswith('--') and equals and line.endswith('\n')):
        raise InputError(
            'the flags of the run are damaged',
            where=f'{os.fspath(path)} line {number}',
            expected='--name=value',
            found=repr(line),
            fix='Restore the file from a copy, or start with another --run_dir',
        )
      flags[name[2:]] = value
  return flags


def _check_is_run_or_empty(folder: epath.Path) -> None:
  if not os.path.lexists(folder):
    return
  if not os.path.isdir(folder):
    raise InputError('this is not a folder', where=folder, fix='Give another --run_dir')
  names = set(durable.names(folder))
  if FLAGS not in names and not names <= _BEFORE_FLAGS:
    raise InputError(
        'this folder has files in it, but is not a run',
        where=folder,
        expected=f'a new or empty folder, or one with {FLAGS}',
        found=', '.join(sorted(names - _BEFORE_FLAGS)[:5]),
        fix='Give another --run_dir',
    )


def _has_work(folder: epath.Path) -> bool:
  """Whether a stage was begun. A start that was refused before leaves flags that bind nothing."""
  if (folder / manifest.NAME).exists():
    return True
  return any(
      name.endswith('.partial') for _, names, _ in os.walk(folder) for name in names)


def _check_flags(
    folder: epath.Path, old: Mapping[str, str], flags: Mapping[str, str], free: set[str]
) -> None:
  new = {name: value for name, value in flags.items() if name not in _NOT_RECORDED}

  def show(value: str | None) -> str:
    return 'absent' if value is None else repr(value)

  changes = [
      f'--{name} was {show(old.get(name))} and is now {show(new.get(name))}'
      for name in sorted(old.keys() | new.keys())
      if old.get(name) != new.get(name) and name not in free
  ]
  if changes:
    raise InputError(
        'the run was started with other flags: ' + '; '.join(changes),
        where=folder,
        fix=f'Start with --flagfile={folder / FLAGS}, or give another --run_dir',
    )


def _write_versions(path: epath.Path, versions: Mapping[str, Any]) -> None:
  new, earlier = dict(versions), []
  if path.exists():
    try:
      old = json.loads(path.read_bytes())
      earlier = old.pop('earlier', [])
    except (ValueError, AttributeError, TypeError) as error:
      raise InputError(
          f'the file is damaged ({error})',
          where=path,
          expected='a JSON object',
          fix='Restore it from a copy, or delete it',
      ) from error
    if old == json.loads(json.dumps(new)):
      return
    earlier = [old, *earlier]
  content = json.dumps({**new, 'earlier': earlier} if earlier else new, indent=2)
  durable.write_file(path, content.encode() + b'\n')
