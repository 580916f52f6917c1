"""metrics.jsonl and TensorBoard events: the same numbers, the same after a kill and a restart."""

from __future__ import annotations

import json
import math
import numbers
import os
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from jaxrl.errors import InputError
from jaxrl.runs import durable

_KEYS = ('iteration', 'stage', 'step')
_NONFINITE = '/nonfinite'
_TIME = 'perf/time'


class MetricsLog:
  """Appends records to metrics.jsonl, and to event files in `events/` beside it.

  metrics.jsonl is the truth. Event files follow from it: those of an earlier process are
  written anew, so that no number appears twice and what a kill cut off is there.
  """

  def __init__(self, path: str | os.PathLike[str], *, clock: Callable[[], float] = time.time):
    self._path = os.fspath(path)
    self._clock = clock
    self._file: int | None = None
    self._events: _Events | None = None
    self._last: dict[tuple[int, str], int] = {}   # (iteration, stage) -> last step
    durable.refresh(self._path)
    self._rewrite(lambda record: True)   # drops a half-written last line
    if self._last:
      self._open_events()

  def write(self, iteration: int, stage: str, step: int, values: Mapping[str, Any]) -> None:
    """Appends one record and hands it to the system before it returns.

    Args:
      iteration: of the run.
      stage: 'train', 'sample', ...
      step: greater than the last one of this iteration and stage; `rewind` goes back.
      values: numbers by name. Those that depend on the clock or the machine have names that start
        with 'perf/'. NaN and infinities are written as null beside 'NAME/nonfinite'.
    """
    last = self._last.get((iteration, stage))
    if last is not None and step <= last:
      raise ValueError(
          f'step {step} of {stage} in iteration {iteration} is not after step {last}: rewind first'
      )
    record: dict[str, Any] = {'iteration': int(iteration), 'stage': stage, 'step': int(step)}
    for name, value in {**values, _TIME: round(self._clock(), 3)}.items():
      if name in _KEYS or name.endswith(_NONFINITE):
        raise ValueError(f'{name!r} cannot name a number')
      record |= _encode_number(name, value)
    self._append(json.dumps(record, allow_nan=False).encode() + b'\n')
    self._last[iteration, stage] = step
    if self._events is None:
      self._open_events()   # replays the file, with this record
    else:
      with durable.naming_full_disk(os.path.dirname(self._path) or '.'):
        self._events.write(_decode_record(record))

  def rewind(self, iteration: int, stage: str, step: int | None) -> None:
    """Drops the records of this iteration and stage after `step`, or all of them for None.

    A stage calls this when it starts or resumes. A checkpoint of step s belongs after the record
    of step s, and after `sync`.
    """

    def keep(record: dict[str, Any]) -> bool:
      if (record['iteration'], record['stage']) != (iteration, stage):
        return True
      return step is not None and record['step'] <= step

    self._rewrite(keep)

  def sync(self) -> None:
    """Waits until the records are on the disk."""
    if self._file is not None:
      durable.sync_log(self._path, self._file)

  def close(self) -> None:
    """Ends both; what is in a bucket is then there for those who only read."""
    if self._file is not None:
      self.sync()
    had_events = self._events is not None
    self._close_files()
    durable.end_log(self._path)
    if had_events:
      durable.put_folder(os.path.join(os.path.dirname(self._path), 'events'))

  def _close_files(self) -> None:
    if self._file is not None:
      os.close(self._file)
      self._file = None
    if self._events is not None:
      self._events.close()
      self._events = None

  def __enter__(self) -> MetricsLog:
    return self

  def __exit__(self, *unused: object) -> None:
    self.close()

  def _append(self, line: bytes) -> None:
    if self._file is None:
      self._file = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    size = os.fstat(self._file).st_size
    with durable.naming_full_disk(self._path):
      try:
        written = 0
        while written < len(line):   # a disk that fills up takes part of a line before it fails
          written += os.write(self._file, line[written:])
      except OSError:
        os.ftruncate(self._file, size)
        raise

  def _rewrite(self, keep: Callable[[dict[str, Any]], bool]) -> None:
    """Keeps whole records that satisfy `keep`; the file is touched only if any is dropped."""
    self._last = {}
    if not os.path.exists(self._path):
      return
    kept = []
    for line, record in _read_lines(self._path):
      if keep(record):
        kept.append(line)
        self._last[record['iteration'], record['stage']] = record['step']
    if sum(map(len, kept)) < os.path.getsize(self._path):
      had_events = self._events is not None
      self._close_files()
      durable.write_file(self._path, b''.join(kept))
      if had_events:
        self._open_events()

  def _open_events(self) -> None:
    folder = os.path.join(os.path.dirname(self._path), 'events')
    with durable.naming_full_disk(folder):
      os.makedirs(folder, exist_ok=True)
      old = [name for name in os.listdir(folder) if 'tfevents' in name]
      self._events = _Events(folder, old)
      for _, record in _read_lines(self._path):
        self._events.write(_decode_record(record))
      for name in old:
        os.unlink(os.path.join(folder, name))


class _Events:
  """One TensorBoard event file, written in this thread: SummaryWriter's own is asynchronous."""

  def __init__(self, folder: str, taken: list[str]):
    # Here, because it imports torch where that is installed, which readers of metrics do not need.
    from tensorboardX import event_file_writer
    from tensorboardX.proto import event_pb2, summary_pb2

    self._event, self._summary = event_pb2.Event, summary_pb2.Summary
    # The name starts with the second; readers go through a folder in the order of names.
    number = 0
    while any(name.endswith(f'.{os.getpid()}.{number}') for name in taken):
      number += 1
    prefix, suffix = os.path.join(folder, 'events'), f'.{os.getpid()}.{number}'
    self._writer = event_file_writer.EventsWriter(prefix, suffix)
    self._offsets: dict[tuple[str, int], int] = {}   # (stage, iteration) -> steps before it
    self._ends: dict[str, int] = {}   # stage -> last global step
    # A TensorBoard that has read the old files drops what it had: this file has all of it.
    start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
    self._writer.write_event(self._event(wall_time=time.time(), step=0, session_log=start))

  def write(self, record: dict[str, Any]) -> None:
    iteration, stage, step = (record[key] for key in _KEYS)
    if (stage, iteration) not in self._offsets:
      end = self._ends.get(stage)
      starts_at_zero = int(step == 0)
      self._offsets[stage, iteration] = 0 if end is None else end + starts_at_zero
    total = step + self._offsets[stage, iteration]
    self._ends[stage] = max(total, self._ends.get(stage, total))
    values = [
        self._summary.Value(tag=f'{stage}/{name}', simple_value=value)
        for name, value in record.items()
        if name not in _KEYS and name != _TIME
    ]
    wall_time, summary = record.get(_TIME, 0.0), self._summary(value=values)
    self._writer.write_event(self._event(wall_time=wall_time, step=total, summary=summary))
    self._writer.flush()

  def close(self) -> None:
    self._writer.close()


def read_metrics(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
  """All whole records in order, with NaN and infinities as floats again.

  A half-written last line, as a kill or a running process leaves it, is left out. Raises
  InputError for a missing file and naming any other line that is not a record.
  """
  durable.refresh(path)
  if not os.path.exists(path):
    raise InputError('there are no metrics', where=os.fspath(path))
  return [_decode_record(record) for _, record in _read_lines(os.fspath(path))]


def _read_lines(path: str) -> Iterator[tuple[bytes, dict[str, Any]]]:
  with open(path, 'rb') as file:
    for number, line in enumerate(file, 1):
      if not line.endswith(b'\n'):
        return
      try:
        record = json.loads(line)
        whole = isinstance(record['iteration'], int) and isinstance(record['step'], int)
        whole = whole and isinstance(record['stage'], str)
      except (ValueError, TypeError, KeyError):
        whole = False
      if not whole:
        raise InputError(
            'the line is damaged',
            where=f'{path} line {number}',
            expected='a JSON object with iteration, stage and step',
            found=f'{line.decode(errors="replace").rstrip()!r:.100}',
            fix='Restore the file from a copy, or delete the line',
        )
      yield line, record


def _encode_number(name: str, value: Any) -> dict[str, Any]:
  if isinstance(value, numbers.Integral):
    return {name: int(value)}
  number = float(value)
  if math.isfinite(number):
    return {name: number}
  return {name: None, f'{name}{_NONFINITE}': str(number)}


def _decode_record(record: Mapping[str, Any]) -> dict[str, Any]:
  decoded = {k: v for k, v in record.items() if not k.endswith(_NONFINITE)}
  for name, value in record.items():
    if name.endswith(_NONFINITE):
      decoded[name.removesuffix(_NONFINITE)] = float(value)
  return decoded
