"""Checkpoints inside a training stage: written whole or not at all, verified before use.

An Orbax checkpoint is written to a temporary folder, every file is hashed into `files.json`, and
the folder is renamed to `step_00000123`. A checkpoint whose files do not match is named and the one
before it is used.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from typing import TypeVar

import jax
import orbax.checkpoint as ocp
from etils import epath

from jaxrl.errors import InputError

State = TypeVar('State')


def _file_hashes(folder: epath.Path) -> dict[str, str]:
  hashes: dict[str, str] = {}
  for path in sorted(folder.iterdir()):
    if path.is_dir():
      hashes |= {f'{path.name}/{name}': value for name, value in _file_hashes(path).items()}
    elif path.name != 'files.json':
      with path.open('rb') as file:
        hashes[path.name] = hashlib.file_digest(file, 'sha256').hexdigest()
  return hashes


def save(folder: epath.Path, step: int, state, *, keep: int = 2) -> None:
  """Writes the state of `step` and removes all but the newest `keep` checkpoints.

  Raises:
    InputError: the disk refused (full, read-only); older checkpoints are left as they were.
  """
  target = folder / f'step_{step:08d}'
  partial = folder / f'.{target.name}.partial'
  try:
    folder.mkdir(parents=True, exist_ok=True)
    if partial.exists():
      partial.rmtree()
    with ocp.StandardCheckpointer() as checkpointer:
      checkpointer.save(partial / 'state', state)
    (partial / 'files.json').write_text(json.dumps(_file_hashes(partial), indent=1))
    if target.exists():
      target.rmtree()
    partial.rename(target)
    for old in checkpoints(folder)[:-keep]:
      old.rmtree()
  except (OSError, ValueError) as error:
    # The array writer reports what the system refused as ValueError, with the system's code in it.
    if isinstance(error, ValueError) and 'os_error_code' not in str(error):
      raise
    raise InputError(
        'the checkpoint could not be written', where=target, found=error,
        fix='Free space or fix permissions, then run the same command again') from error


def checkpoints(folder: epath.Path) -> list[epath.Path]:
  """Finished checkpoints, oldest first."""
  if not folder.exists():
    return []
  return sorted(path for path in folder.iterdir() if path.name.startswith('step_'))


def damage(checkpoint: epath.Path) -> str | None:
  """What is wrong with a checkpoint, in a phrase; None when every file is as it was written."""
  try:
    expected = json.loads((checkpoint / 'files.json').read_text())
  except (OSError, ValueError):
    return 'files.json is missing or unreadable'
  if not isinstance(expected, dict):
    return 'files.json is not a table of hashes'
  found = _file_hashes(checkpoint)
  changed = [name for name in sorted(expected | found) if expected.get(name) != found.get(name)]
  return f'{changed[0]} is missing or changed' if changed else None


def restore_latest(
    folder: epath.Path, like: State, *, warn: Callable[[str], None]
) -> tuple[int, State] | None:
  """(step, state) of the newest sound checkpoint, laid out as `like`; None if there is none.

  `like` is a tree of arrays or `jax.ShapeDtypeStruct`. Damaged checkpoints are named to `warn`.
  """
  abstract = jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), like)
  for checkpoint in reversed(checkpoints(folder)):
    wrong = damage(checkpoint)
    if wrong:
      warn(f'{checkpoint}: the checkpoint is damaged ({wrong}); using the one before it')
      continue
    with ocp.StandardCheckpointer() as checkpointer:
      return int(checkpoint.name.removeprefix('step_')), checkpointer.restore(
          checkpoint / 'state', abstract)
  return None
