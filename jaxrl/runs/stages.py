"""Stages of a run: produced in a scratch folder, published whole, skipped once finished.

Where several processes are one run, process 0 alone writes; all call the same stages in the same
order and are told what it found and made.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shlex
import time
from collections.abc import Callable, Mapping
from typing import Any

from etils import epath

from jaxrl.errors import InputError
from jaxrl.runs import durable, manifest
from jaxrl.runs.manifest import Entry, Output

# Names at the top of a run folder that are not outputs of a stage.
RESERVED = (
    'flags.flags', 'versions.json', manifest.NAME, 'metrics.jsonl', 'events', 'report.html', 'lock'
)
_SCRATCH = '.partial'
# In the scratch folder: the entry that is about to be published. Once it is there the outputs are
# whole and on the disk, and a restart moves them into place instead of producing them again.
_JOURNAL = '.finished.json'

# Seconds within which a process sees what another one has written; network file systems keep what
# they know of a folder for up to a minute.
_SEEN_WITHIN = 90.0

Produce = Callable[..., Mapping[str, Any]]
Together = Callable[[epath.Path], Any]


@dataclasses.dataclass(frozen=True)
class Team:
  """The processes of a run: one writes, and tells the others."""

  writes: bool = True         # this one does
  tell: Callable[[Any], Any] = lambda value: value   # in all what the writer passed, a JSON value
  # Around what one process does while the others wait: its programs must not take their devices.
  by_itself: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext


class Run:
  """An open run folder; `open_run` makes one and holds its lock."""

  def __init__(self, folder: epath.Path, team: Team | None = None):
    self.folder = folder
    self._team = team or Team()
    self._verified: set[str] = set()
    entries = manifest.read_manifest(folder) if self._team.writes else {}
    told = self._team.tell({name: manifest.encode_entry(e) for name, e in entries.items()})
    self._entries = {name: manifest.decode_entry(entry) for name, entry in told.items()}

  @property
  def entries(self) -> dict[str, Entry]:
    """Finished stages by name, in the order they finished."""
    return dict(self._entries)

  @property
  def writes(self) -> bool:
    """Whether this process writes in the folder."""
    return self._team.writes

  def stage(
      self, name: str, outputs: tuple[str, ...], produce: Produce, together: Together | None = None
  ) -> Entry:
    """Runs one stage unless it is finished, publishes its outputs and returns its entry.

    Args:
      name: as 'iteration_01/samples'; names the scratch folder 'iteration_01/samples.partial'.
      outputs: files or folders to publish, relative to the run folder.
      produce: called with the scratch folder; writes each output there under the last part of its
        path ('samples.parquet') and returns counts that JSON can hold. The folder is kept until
        the stage is published, so `produce` finds there what a killed attempt left: it goes on
        from it, and writes again what it did not write by an atomic rename. Whatever in it is no
        output is removed when the stage is published. Of several processes only the one that
        writes calls it.
      together: what takes the devices of all processes. All call it with the scratch folder, before
        `produce`, which is given what it returned as a second argument.

    Raises:
      InputError: for outputs outside the run folder or missing after `produce`, a full disk, a
        finished stage with other outputs.
    """
    scratch = self.folder / f'{name}{_SCRATCH}'
    entry = self._told(lambda: self._finished(name, scratch, outputs))
    if entry is None:
      start = time.monotonic()
      with durable.naming_full_disk(scratch):
        made = () if together is None else (together(scratch),)
      entry = self._told(lambda: self._produce(name, scratch, outputs, produce, made, start))
      assert entry is not None
    self._entries[name] = entry
    return entry

  def _told(self, find: Callable[[], Entry | None]) -> Entry | None:
    """What the process that writes has found, in all of them."""
    entry = find() if self._team.writes else None
    encoded = self._team.tell(None if entry is None else manifest.encode_entry(entry))
    return None if encoded is None else manifest.decode_entry(encoded)

  def path(self, stage: str, output: str) -> epath.Path:
    """Where an output of a finished stage is, after its content was checked (once per process).

    Raises InputError when the stage is not finished, has no such output, or the output is
    missing, was changed, or is reached over a symbolic link.
    """
    entry = self._entries.get(stage)
    if entry is None:
      raise InputError(
          f'stage {stage} has not finished',
          where=self.folder,
          found='finished: ' + (', '.join(self._entries) or 'none'),
      )
    for recorded in entry.outputs:
      if recorded.path == output:
        break
    else:
      raise InputError(
          f'stage {stage} has no output {output}',
          where=self.folder,
          expected='one of ' + ', '.join(recorded.path for recorded in entry.outputs),
      )
    if output not in self._verified:
      durable.refresh(self.folder / output)
      if self._team.writes:
        self._verify(stage, recorded)
      else:
        await_file(self.folder / output)
      self._verified.add(output)
    return self.folder / output

  def forget(self, name: str) -> tuple[str, ...]:
    """Takes a stage, and those finished after it, out of the manifest; returns their names.

    Later stages may have read what this one wrote. Files stay until they are written again.
    """
    names = list(self._entries)
    if name not in names:
      raise InputError(
          f'stage {name} is not finished, so there is nothing to forget',
          where=self.folder,
          expected='one of ' + (', '.join(names) or 'none'),
      )
    forgotten = tuple(names[names.index(name):])
    for each in forgotten:   # first: a journal left there would publish the stage again
      durable.remove(self.folder / f'{each}{_SCRATCH}')
    self._set_entries({k: v for k, v in self._entries.items() if k not in forgotten})
    self._verified.clear()
    return forgotten

  def _check_names(self, name: str, outputs: tuple[str, ...]) -> None:
    if not outputs:
      raise InputError(f'stage {name} names no outputs', where=self.folder)
    manifest.check_inside(self.folder, f'{name}{_SCRATCH}')
    taken = {o.path: k for k, entry in self._entries.items() if k != name for o in entry.outputs}
    for output in outputs:
      manifest.check_inside(self.folder, output)
      last = output.rsplit('/', 1)[-1]
      if output.split('/')[0] in RESERVED or last == _JOURNAL or last.endswith(_SCRATCH):
        raise InputError(
            f'stage {name} may not write this; the run folder uses the name itself',
            where=self.folder / output,
        )
      if output in taken:
        raise InputError(f'stage {taken[output]} has written this', where=self.folder / output)
    if len({output.rsplit('/', 1)[-1] for output in outputs}) < len(outputs):
      raise InputError(f'two outputs of stage {name} have one name: {outputs}', where=self.folder)

  def _finished(self, name: str, scratch: epath.Path, outputs: tuple[str, ...]) -> Entry | None:
    """The entry of a finished stage; None where it is to be produced, in a folder that is there."""
    self._check_names(name, outputs)
    entry = self._entries.get(name)
    if entry is not None:
      if tuple(output.path for output in entry.outputs) != outputs:
        raise InputError(
            f'stage {name} is finished with other outputs',
            where=self.folder / manifest.NAME,
            expected=', '.join(outputs),
            found=', '.join(output.path for output in entry.outputs),
            fix=self._redo(name),
        )
      durable.remove(scratch)   # a kill after the manifest was written leaves it
      return entry
    entry = self._recover(scratch, outputs)
    if entry is not None:
      self._publish(name, scratch, entry)
      return entry
    for output in outputs:   # left by a manifest that was deleted, or by `forget`
      durable.remove(self.folder / output)
    with durable.naming_full_disk(scratch):
      os.makedirs(scratch, exist_ok=True)
    return None

  def _produce(
      self, name: str, scratch: epath.Path, outputs: tuple[str, ...], produce: Produce,
      made: tuple[Any, ...], start: float,
  ) -> Entry:
    """Writes outputs and journal in the scratch folder, and publishes them."""
    with durable.naming_full_disk(scratch), self._team.by_itself():
      counts = dict(produce(scratch, *made))
      seconds = round(time.monotonic() - start, 3)
    json.dumps(counts, allow_nan=False)   # a count that JSON cannot hold fails before publishing
    described = []
    for output in outputs:
      source = scratch / output.rsplit('/', 1)[-1]
      if not os.path.lexists(source):
        raise InputError(f'stage {name} did not write this output', where=source)
      manifest.check_inside(scratch, source.name)
      durable.sync_tree(source)
      described.append(manifest.describe(source, output))
    entry = Entry(tuple(described), seconds, counts)
    durable.write_file(scratch / _JOURNAL, json.dumps(manifest.encode_entry(entry)).encode())
    self._publish(name, scratch, entry)
    return entry

  def _recover(self, scratch: epath.Path, outputs: tuple[str, ...]) -> Entry | None:
    """The entry of a stage killed while it was published; None when it has to be produced."""
    journal = scratch / _JOURNAL
    if not os.path.exists(journal):
      return None
    with contextlib.suppress(ValueError, KeyError, TypeError):
      entry = manifest.decode_entry(json.loads(journal.read_bytes()))
      if tuple(output.path for output in entry.outputs) == outputs:
        if all(self._is_whole(scratch, output) for output in entry.outputs):
          return entry
    durable.remove(journal)
    return None

  def _is_whole(self, scratch: epath.Path, output: Output) -> bool:
    """Whether the output is as recorded, in the scratch folder or, if not there, in place."""
    source, target = scratch / output.path.rsplit('/', 1)[-1], self.folder / output.path
    found = source if os.path.exists(source) else target
    with contextlib.suppress(OSError, InputError):
      return manifest.describe(found, output.path) == output
    return False

  def _publish(self, name: str, scratch: epath.Path, entry: Entry) -> None:
    for output in entry.outputs:
      source = scratch / output.path.rsplit('/', 1)[-1]
      if os.path.exists(source):   # otherwise moved before a kill, and checked by _recover
        with durable.naming_full_disk(self.folder / output.path):
          durable.move(source, self.folder / output.path)
    self._set_entries({**self._entries, name: entry})
    self._verified.update(output.path for output in entry.outputs)
    durable.remove(scratch)

  def _set_entries(self, entries: dict[str, Entry]) -> None:
    manifest.write_manifest(self.folder, entries)
    self._entries = entries

  def _verify(self, stage: str, recorded: Output) -> None:
    manifest.check_inside(self.folder, recorded.path)
    full = self.folder / recorded.path
    if not os.path.exists(full):
      raise InputError(
          f'this output of the finished stage {stage} is missing', where=full, fix=self._redo(stage)
      )
    try:
      found = manifest.describe(full, recorded.path)
    except InputError as error:
      raise InputError(
          f'this output of the finished stage {stage} is damaged ({str(error).rstrip(".")})',
          where=full,
          fix=self._redo(stage),
      ) from error
    if found != recorded:
      raise InputError(
          f'this output was changed after stage {stage} finished',
          where=full,
          expected=f'{recorded.bytes} bytes, sha256 {recorded.sha256}',
          found=f'{found.bytes} bytes, sha256 {found.sha256}',
          fix=self._redo(stage),
      )

  def _redo(self, stage: str) -> str:
    command = f'python -m jaxrl.runs.forget {shlex.quote(str(self.folder))} {shlex.quote(stage)}'
    return (
        f'Put the original back, or run `{command}` and start the run again: '
        'this stage and those finished after it are then redone'
    )


def await_file(path: epath.Path, content: str | None = None) -> None:
  """Returns once this process sees what another one has written, by name or with this content.

  Raises:
    InputError: it does not in time.
  """
  deadline = time.monotonic() + _SEEN_WITHIN
  while True:
    durable.refresh(path)
    if path.exists() and (content is None or path.read_text() == content):
      return
    if time.monotonic() > deadline:
      raise InputError(
          'this process does not see what another one of the run has written', where=path,
          expected='a file system that all processes see',
          found='another file' if path.exists() else 'no such file', fix='Give a --run_dir on one',
      )
    time.sleep(0.2)
