"""The manifest of a run: which stages are finished, and the exact bytes that each one left."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from jaxrl.errors import InputError
from jaxrl.runs import durable

NAME = 'manifest.json'
FORMAT = 1


@dataclasses.dataclass(frozen=True)
class Output:
  """One published file or folder."""

  path: str   # relative to the run folder, with '/'
  bytes: int   # of the file, or of all files in the folder
  sha256: str
  rows: int | None   # of a Parquet table, otherwise None


@dataclasses.dataclass(frozen=True)
class Entry:
  """One finished stage."""

  outputs: tuple[Output, ...]
  seconds: float   # of the attempt that finished it
  counts: dict[str, Any]


def encode_entry(entry: Entry) -> dict[str, Any]:
  outputs = [dataclasses.asdict(output) for output in entry.outputs]
  for output in outputs:
    if output['rows'] is None:
      del output['rows']
  return {'outputs': outputs, 'seconds': entry.seconds, 'counts': entry.counts}


def decode_entry(found: Any) -> Entry:
  """Inverse of encode_entry; raises KeyError, TypeError or ValueError on anything else."""
  outputs = []
  for output in found['outputs']:
    path, size, sha256, rows = (output.get(k) for k in ('path', 'bytes', 'sha256', 'rows'))
    if not (isinstance(path, str) and isinstance(size, int) and isinstance(sha256, str)):
      raise TypeError(f'output {output}')
    check_relative(path)
    outputs.append(Output(path, size, sha256, rows))
  return Entry(tuple(outputs), float(found['seconds']), dict(found['counts']))


def read_manifest(run_dir: str | os.PathLike[str]) -> dict[str, Entry]:
  """Finished stages by name, in the order they finished; {} before the first one."""
  path = os.path.join(run_dir, NAME)
  durable.refresh(path)
  try:
    with open(path, 'rb') as file:
      content = file.read()
  except FileNotFoundError:
    return {}
  fix = f'Restore {NAME} from a copy, or delete it to redo every stage of this run'
  try:
    found = json.loads(content)
  except ValueError as error:
    raise InputError(
        'the manifest is damaged',
        where=path,
        expected='the JSON object that a run writes',
        found=f'{len(content)} bytes that do not parse ({error})',
        fix=fix,
    ) from error
  try:
    if found['format'] != FORMAT:
      raise ValueError(f'format {found["format"]!r}')
    return {name: decode_entry(entry) for name, entry in found['stages'].items()}
  except InputError:
    raise
  except (KeyError, TypeError, ValueError, AttributeError) as error:
    raise InputError(
        'the manifest is not one that this version wrote',
        where=path,
        expected=f'format {FORMAT} with outputs, seconds and counts for each stage',
        found=repr(error),
        fix=fix,
    ) from error


def write_manifest(run_dir: str | os.PathLike[str], entries: Mapping[str, Entry]) -> None:
  """Replaces the manifest by one atomic rename."""
  stages = {name: encode_entry(entry) for name, entry in entries.items()}
  content = json.dumps({'format': FORMAT, 'stages': stages}, indent=2, allow_nan=False)
  durable.write_file(os.path.join(run_dir, NAME), content.encode() + b'\n')


def check_relative(path: str) -> None:
  """Raises InputError unless `path` is a plain relative path such as 'iteration_01/model'."""
  parts = path.split('/')
  if not path or path.startswith('/') or '\\' in path or any(p in ('', '.', '..') for p in parts):
    raise InputError(
        'this is not a path inside the run folder',
        where=repr(path),
        expected='a relative path without . or .., such as iteration_01/samples.parquet',
    )


def check_inside(run_dir: str | os.PathLike[str], path: str) -> None:
  """Raises InputError when a symbolic link on the way to `path` may lead out of the run folder."""
  check_relative(path)
  full = os.fspath(run_dir)
  for part in path.split('/'):
    full = os.path.join(full, part)
    if os.path.islink(full):
      raise InputError(
          'this is a symbolic link',
          where=full,
          expected='a file or a folder of the run itself',
          found=f'a link to {os.readlink(full)}',
          fix='Put the file itself in its place',
      )


def describe(full: str | os.PathLike[str], path: str) -> Output:
  """Reads the file or folder `full` and describes it as the output `path`.

  The hash of a folder is over its files in sorted order: each relative path with its length, then
  the hash of its content. Empty folders do not count. Raises InputError for a table that
  does not open and for symbolic links.
  """
  full = os.fspath(full)
  if not os.path.isdir(full):
    rows = _count_rows(full) if full.endswith('.parquet') else None
    return Output(path, os.path.getsize(full), _hash_file(full).hexdigest(), rows)
  total, size = hashlib.sha256(), 0
  for name in durable.list_files(full):
    member = os.path.join(full, name)
    encoded = os.fsencode(name)
    total.update(len(encoded).to_bytes(8, 'big') + encoded + _hash_file(member).digest())
    size += os.path.getsize(member)
  return Output(path, size, total.hexdigest(), None)


def _hash_file(path: str) -> Any:
  with open(path, 'rb') as file:
    return hashlib.file_digest(file, 'sha256')


def _count_rows(path: str) -> int:
  try:
    return pq.read_metadata(path).num_rows
  except (pa.ArrowInvalid, OSError) as error:
    raise InputError(
        'the table is damaged', where=path, expected='a Parquet file', found=str(error)
    ) from error
