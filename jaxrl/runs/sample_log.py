"""An append-only file of finished samples that survives a kill: JSON lines under one header.

The first line is `{"header": {...}}`, what the samples depend on; each further line is one sample
with `prompt_id` and `sample_index`. A line counts when its newline is there, so that a kill costs
no more than the lines it interrupts, and they are drawn again to the same bits.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from jaxrl.errors import InputError
from jaxrl.runs.durable import naming_full_disk, refresh, sync, sync_log, sync_seconds
from jaxrl.runs.lock import hold_lock

Path = str | os.PathLike[str]
Draw = tuple[str, int | None]          # prompt_id and sample_index
HEADER = 'header'


class SampleLog:
  """The open file of one writer, made by `open_log`."""

  def __init__(self, path: str, descriptor: int, finished: dict[Draw, int]):
    self.path = path
    self._synced = time.monotonic()
    self._descriptor = descriptor
    self._finished = finished          # and the line that has it

  def __contains__(self, draw: Draw) -> bool:
    return draw in self._finished

  def __len__(self) -> int:
    return len(self._finished)

  @property
  def finished(self) -> frozenset[Draw]:
    """(prompt_id, sample_index) of all samples in the file."""
    return frozenset(self._finished)

  def append(self, rows: Sequence[Mapping[str, Any]]) -> None:
    """Adds samples; they outlive this process when this returns, and the machine a second later.

    In a working copy of a folder on gs:// that is `working_copy.LOG_SECONDS` later.

    `sample_index` is None in a row about the prompt as a whole. Floats are written with all digits,
    so that they are read back as they are; np.float32 of what is read gives a float32 back.

    Raises:
      InputError: a row without the two fields, already in the file, or not JSON (NaN counts as
        that); the file is as before. The disk is full; it may then hold some of the rows.
    """
    lines, added = [], dict[Draw, int]()
    for row in rows:
      draw = _draw(row, f'{self.path}, a new row')
      if draw in self._finished or draw in added:
        raise InputError('the sample is already there', where=self.path,
                         expected='each prompt and draw once',
                         found=f'prompt {draw[0]!r}, draw {draw[1]} again')
      added[draw] = len(self._finished) + len(added) + 2    # the header is line 1
      lines.append(_encode(row, f'{self.path}, prompt {draw[0]!r}, draw {draw[1]}'))
    _write(self.path, self._descriptor, b''.join(lines))
    self._finished |= added
    if time.monotonic() - self._synced >= sync_seconds(self.path):
      self.sync()

  def sync(self) -> None:
    """Waits until all that was added is on the disk."""
    sync_log(self.path, self._descriptor)
    self._synced = time.monotonic()


@contextlib.contextmanager
def open_log(
    path: Path, header: Mapping[str, Any], *, say: Callable[[str], None] = lambda text: None
) -> Iterator[SampleLog]:
  """Opens the file for one writer, or makes it; what it holds already is `finished`.

  A last line that a kill has left without its end is cut off. The lock is `.NAME.lock` beside it.

  Args:
    path: on a local disk.
    header: what the samples depend on (model, seed, settings, prompts), as JSON values; the same
      as when the file was begun.
    say: told in a sentence what was cut off.

  Raises:
    InputError: another process has the file open; the file has another header, is damaged, or
      holds a sample twice.
  """
  name = os.fspath(path)
  with contextlib.ExitStack() as stack:
    stack.enter_context(_only_writer(name))
    refresh(name)
    is_new = not os.path.exists(name)
    descriptor = os.open(name, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
    stack.callback(os.close, descriptor)
    lines = _numbered_lines(name)
    whole, finished = 0, dict[Draw, int]()
    for number, line, end in lines:
      if number == 1:
        check_header(name, _parse(line, f'{name}, line 1').get(HEADER), header)
      else:
        draw = _draw(_parse(line, f'{name}, line {number}'), f'{name}, line {number}')
        if draw in finished:
          raise InputError('the sample is there twice', where=f'{name}, line {number}',
                           expected='each prompt and draw once',
                           found=f'prompt {draw[0]!r}, draw {draw[1]}, as in line {finished[draw]}',
                           fix='Remove one of the lines')
        finished[draw] = number
      whole = end
    torn = os.fstat(descriptor).st_size - whole
    if torn:
      os.ftruncate(descriptor, whole)
      say(f'{name}: the last line was cut short ({torn} bytes) and is left out')
    if whole == 0:
      _write(name, descriptor, _encode({HEADER: dict(header)}, f'{name}, header'))
    if is_new:
      sync(os.path.dirname(name) or '.')
    log = SampleLog(name, descriptor, finished)
    log.sync()
    stack.callback(log.sync)
    yield log


def read_header(path: Path) -> dict[str, Any]:
  """The header of a file; InputError where there is none."""
  refresh(path)
  for _, line, _ in _numbered_lines(os.fspath(path)):
    header = _parse(line, f'{os.fspath(path)}, line 1').get(HEADER)
    if isinstance(header, dict):
      return header
    break
  raise InputError('this is not a file of samples', where=os.fspath(path),
                   expected=f'a first line {{"{HEADER}": ...}}', found='none')


def read_log(path: Path) -> Iterator[dict[str, Any]]:
  """The samples of a file in the order in which they were finished; a torn last line is left out.

  Raises:
    InputError: the file is missing or damaged.
  """
  name = os.fspath(path)
  read_header(name)
  for number, line, _ in _numbered_lines(name):
    if number > 1:
      row = _parse(line, f'{name}, line {number}')
      _draw(row, f'{name}, line {number}')
      yield row


@contextlib.contextmanager
def _only_writer(name: str) -> Iterator[None]:
  folder, file = os.path.split(name)
  lock = os.path.join(folder, f'.{file}.lock')
  with contextlib.ExitStack() as stack:
    try:
      stack.enter_context(hold_lock(lock))
    except FileNotFoundError as error:
      raise InputError('the folder of the file does not exist', where=name, found=folder,
                       fix='Make the folder first') from error
    except InputError as error:
      # The lock speaks of run folders; only who holds it is said on.
      owner = str(error).partition(' in use by ')[2].partition('. Wait')[0]
      if not owner:
        raise
      raise InputError(f'the file is being written by {owner}', where=name,
                       fix='Wait for it to end, stop it, or write to another file') from None
    yield


def _numbered_lines(name: str) -> Iterator[tuple[int, bytes, int]]:
  """Line numbers from 1, whole lines, and the byte after each; what has no newline is left out."""
  end = 0
  try:
    with open(name, 'rb') as file:
      for number, line in enumerate(file, 1):
        if not line.endswith(b'\n'):
          return
        end += len(line)
        yield number, line, end
  except FileNotFoundError as error:
    raise InputError('no such file', where=name, expected='a file of samples') from error


def _parse(line: bytes, where: str) -> dict[str, Any]:
  try:
    row = json.loads(line)
    reason = 'no JSON object'
  except ValueError as error:
    row, reason = None, str(error)
  if not isinstance(row, dict):
    raise InputError('the line is damaged', where=where, expected='a JSON object',
                     found=f'{line.decode(errors="replace").rstrip()[:60]!r} ({reason})',
                     fix='Remove the line, and its samples are drawn again; or start a new file')
  return row


def _draw(row: Mapping[str, Any], where: str) -> Draw:
  prompt, index = row.get('prompt_id'), row.get('sample_index')
  is_index = index is None or (isinstance(index, int) and not isinstance(index, bool))
  if not isinstance(prompt, str) or 'sample_index' not in row or not is_index:
    raise InputError('the row is not a sample', where=where,
                     expected="'prompt_id' as text and 'sample_index' as a whole number",
                     found=f'{prompt!r} and {index!r}')
  return prompt, index


def check_header(name: str, found: Any, expected: Mapping[str, Any]) -> None:
  if not isinstance(found, dict):
    raise InputError('this is not a file of samples', where=f'{name}, line 1',
                     expected=f'a first line {{"{HEADER}": ...}}', found='another',
                     fix='Give the name of a new file')
  wanted = json.loads(_encode(expected, f'{name}, header'))
  for field in [*wanted, *(field for field in found if field not in wanted)]:
    there, asked = found.get(field), wanted.get(field)
    if there != asked or (field in found) != (field in wanted):
      raise InputError(f'the file was begun with another {field}', where=name, expected=asked,
                       found=there, fix='Give the settings it was begun with, or a new file')


def _encode(row: Mapping[str, Any], where: str) -> bytes:
  try:
    return json.dumps(row, allow_nan=False).encode() + b'\n'
  except (TypeError, ValueError) as error:
    raise InputError('the row cannot be written as JSON', where=where,
                     expected='text, whole and finite numbers, lists of them',
                     found=str(error)) from error


def _write(name: str, descriptor: int, content: bytes) -> None:
  """Appends all of it, or nothing and raises."""
  with naming_full_disk(name):
    size = os.fstat(descriptor).st_size
    try:
      view = memoryview(content)
      while view:                  # a disk that fills up takes part of it before it fails
        view = view[os.write(descriptor, view):]
    except OSError:
      os.ftruncate(descriptor, size)
      raise
