"""Rows of JSONL, gzipped JSONL and Parquet files; every bad input is one InputError.

The message names file, row (1-based line of a text file, 1-based record of a Parquet file), field,
what was expected, what was found and what to do.
"""

from __future__ import annotations

import dataclasses
import gzip
import json
import math
import os
import typing
import zlib
from collections.abc import Iterator, Mapping
from typing import Any, NoReturn

from etils import epath

from jaxrl.errors import InputError

JSON_SUFFIXES = ('.jsonl', '.ndjson', '.json')
FORMATS = 'a .jsonl, .jsonl.gz, .json.gz or .parquet file'
GZIP_MAGIC, PARQUET_MAGIC = b'\x1f\x8b', b'PAR1'
UTF8_BOM, UTF16_BOMS = b'\xef\xbb\xbf', (b'\xff\xfe', b'\xfe\xff')


@dataclasses.dataclass(frozen=True)
class Row:
  """One record of a file; `number` is the line of a text file, the rank in a Parquet file."""

  file: str
  number: int
  fields: Mapping[str, Any]

  @property
  def where(self) -> str:
    return f'{self.file}, row {self.number}'


def read_rows(path: os.PathLike[str] | str) -> Iterator[Row]:
  """Yields the rows of a JSONL (plain or gzip) or Parquet file in order, without blank lines.

  Args:
    path: local or gs:// path. Gzip is told by the first bytes, the format by the name.

  Raises:
    InputError: no readable file of a known format, a damaged file, a bad row, or no rows at all.
  """
  name = os.fspath(path)
  source = _existing_file(name)
  stem, is_named_gzip = (name[:-3], True) if name.lower().endswith('.gz') else (name, False)
  suffix = os.path.splitext(stem)[1].lower()
  try:
    with source.open('rb') as handle:
      magic = handle.read(4)
  except OSError as error:
    _unreadable(name, error)
  if not magic:
    raise InputError('the file is empty', where=name, expected='at least one row', found='0 bytes',
                     fix='Write the file again or give another path')
  if suffix == '.parquet' and not is_named_gzip:
    rows = _parquet_rows(name, source, magic)
  elif suffix in JSON_SUFFIXES:
    rows = _json_rows(name, source, magic, is_named_gzip)
  else:
    raise InputError('the format cannot be told from the name', where=name, expected=FORMATS,
                     found=f'the extension {os.path.splitext(name)[1] or "(none)"!r}',
                     fix='Rename or convert the file')
  row = None
  for row in rows:
    yield row
  if row is None:
    raise InputError('the file has no rows', where=name, expected='at least one row',
                     found='0 rows',
                     fix='Write the file again or give another path')


def _existing_file(name: str) -> epath.Path:
  """The path, once it is known to be a regular file."""
  try:
    path = epath.Path(name)
    exists, is_dir = path.exists(), path.is_dir()
    # epath calls all but folders files; opening a pipe would wait for ever.
    is_file = os.path.isfile(path) if '://' not in name else not is_dir
  except ImportError as error:  # gs:// and s3:// need a file system package
    raise InputError('this kind of path needs a package that is not installed', where=name,
                     expected='a local path, or the package', found=str(error),
                     fix='Install the package or copy the file here') from error
  except OSError as error:
    _unreadable(name, error)
  if not name or not exists:
    raise InputError('no such file', where=name or "''", expected=FORMATS, found='nothing',
                     fix='Check the path')
  if is_dir or not is_file:
    raise InputError('this is not a regular file', where=name, expected=FORMATS,
                     found='a directory' if is_dir else 'a pipe or device',
                     fix='Give the path of one file')
  return path


def _unreadable(name: str, error: Exception) -> NoReturn:
  found = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
  raise InputError('the file cannot be read', where=name, expected='a readable file', found=found,
                   fix='Check its permissions and the disk') from error


# JSON lines


def _json_rows(name: str, path: epath.Path, magic: bytes, is_named_gzip: bool) -> Iterator[Row]:
  is_gzip = magic.startswith(GZIP_MAGIC)
  if is_named_gzip and not is_gzip:
    raise InputError('the file is named .gz but is not gzip', where=name,
                     expected=f'the first bytes {GZIP_MAGIC.hex(" ")}', found=magic[:2].hex(' '),
                     fix='Drop .gz from the name or compress the file')
  number = 0
  try:
    with path.open('rb') as plain:
      # GzipFile checks length and CRC when the stream ends, so a cut or changed file is found.
      lines = gzip.GzipFile(fileobj=typing.cast(Any, plain)) if is_gzip else plain
      for number, line in enumerate(lines, 1):
        if number == 1:
          line = line.removeprefix(UTF8_BOM)
        if line.strip():
          yield Row(name, number, parse_object(line, f'{name}, row {number}'))
  except (EOFError, gzip.BadGzipFile, zlib.error) as error:
    raise InputError(f'the gzip stream is damaged after row {number}', where=name,
                     expected='a whole gzip file', found=str(error) or type(error).__name__,
                     fix='Copy or compress the file again') from error
  except OSError as error:
    _unreadable(f'{name}, after row {number}', error)


def parse_object(line: bytes, where: str) -> dict[str, Any]:
  """One JSON object from one line; stricter than `json.loads`: no NaN, overflow or repeated keys.

  Raises:
    InputError: the line is not UTF-8, not JSON, or not one object.
  """
  try:
    text = line.decode('utf-8')
  except UnicodeDecodeError as error:
    hint = 'UTF-16 text' if line.startswith(UTF16_BOMS) else f'byte 0x{line[error.start]:02x}'
    raise InputError('the row is not UTF-8', where=where, expected='UTF-8 text',
                     found=f'{hint} at byte {error.start + 1} of the row',
                     fix='Save the file as UTF-8') from error
  try:
    value = json.loads(text, object_pairs_hook=_unique, parse_constant=_constant,
                       parse_float=_finite)
  except _BadJson as error:
    raise InputError(str(error), where=where, expected=error.expected, found=error.found,
                     fix=error.fix) from None
  except json.JSONDecodeError as error:
    if text.lstrip().startswith('['):
      raise _array_error(where) from error
    raise InputError(f'invalid JSON at column {error.colno}', where=where,
                     expected='one JSON object on one line',
                     found=f'{error.msg} near {text[max(error.pos - 10, 0):error.pos + 20]!r}',
                     fix='Correct the row, or write one object per line') from error
  except RecursionError as error:
    raise InputError('the JSON is nested too deeply', where=where, expected='a flat object',
                     found='more levels than the parser allows', fix='Flatten the row') from error
  except ValueError as error:  # an integer of thousands of digits
    raise InputError('invalid JSON', where=where, expected='numbers of usual size',
                     found=str(error).split(';')[0], fix='Correct the row') from error
  if isinstance(value, list):
    raise _array_error(where)
  if not isinstance(value, dict):
    raise InputError('the row is not an object', where=where, expected='a JSON object {...}',
                     found=describe(value), fix='Write one object per line')
  return value


class _BadJson(Exception):
  """Raised inside the JSON parser, whose hooks cannot know the row."""

  def __init__(self, what: str, expected: str, found: str, fix: str):
    super().__init__(what)
    self.expected, self.found, self.fix = expected, found, fix


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
  fields: dict[str, Any] = {}
  for key, value in pairs:
    if key in fields:
      raise _BadJson(f'field {key!r} occurs twice in one object', 'each field once',
                     f'{shorten(fields[key])} and {shorten(value)}', 'Remove one of them')
    fields[key] = value
  return fields


def _constant(text: str) -> NoReturn:
  raise _BadJson(f'{text} is not JSON', 'a finite number or null', text, 'Replace the value')


def _finite(text: str) -> float:
  value = float(text)
  if not math.isfinite(value):
    raise _BadJson('a number is out of range', 'a finite number', text, 'Replace the value')
  return value


def _array_error(where: str) -> InputError:
  return InputError('the file holds a JSON array', where=where, expected='one JSON object per line',
                    found="a line that starts with '['",
                    fix="Write each element on its own line (jq -c '.[]')")


# Parquet


def _parquet_rows(name: str, path: epath.Path, magic: bytes) -> Iterator[Row]:
  if magic != PARQUET_MAGIC:
    raise InputError('the file is named .parquet but is not Parquet', where=name,
                     expected=f'the first bytes {PARQUET_MAGIC.hex(" ")}', found=magic.hex(' '),
                     fix='Write the file again or rename it')
  import pyarrow as pa  # a quarter of a second, only for those who read Parquet
  import pyarrow.parquet as pq

  number = 0
  try:
    with path.open('rb') as handle:
      table = pq.ParquetFile(handle)
      columns = table.schema_arrow.names
      twice = sorted({column for column in columns if columns.count(column) > 1})
      if twice:
        raise InputError(f'field {twice[0]!r} occurs twice', where=name,
                         expected='each column once',
                         found=', '.join(columns), fix='Rename one of the columns')
      for batch in table.iter_batches(batch_size=1024):
        for fields in batch.to_pylist():
          number += 1
          yield Row(name, number, fields)
  except (pa.ArrowException, UnicodeDecodeError, EOFError) as error:
    _damaged_parquet(name, number, error)
  except OSError as error:
    if error.errno is not None:  # pyarrow also says OSError, without errno, for damaged pages
      _unreadable(name, error)
    _damaged_parquet(name, number, error)


def _damaged_parquet(name: str, number: int, error: Exception) -> NoReturn:
  raise InputError(f'the Parquet file is damaged after row {number}', where=name,
                   expected='a whole Parquet file', found=str(error).splitlines()[0].rstrip('.'),
                   fix='Copy or write the file again') from error


# Fields


def get_field(row: Row, field: str, expected: str) -> Any:
  """The value of a field that must be there and not be null."""
  if field not in row.fields:
    raise InputError(f'field {field!r} is missing', where=row.where, expected=expected,
                     found=', '.join(map(repr, row.fields)) or 'no fields',
                     fix='Name the field that holds it, or correct the row')
  value = row.fields[field]
  if value is None:
    raise InputError(f'field {field!r} is null', where=row.where, expected=expected, found='null',
                     fix='Fill in the value or remove the row')
  return value


def text_field(row: Row, field: str) -> str:
  """The text of a field, as it is in the file: not empty, no NUL, encodable as UTF-8."""
  return check_text(get_field(row, field, 'text'), row.where, f'field {field!r}')


def check_text(value: Any, where: str, what: str) -> str:
  """Returns `value` when it is text that a tokenizer can take; `what` names it in the message."""
  if not isinstance(value, str):
    raise InputError(f'{what} has the wrong type', where=where, expected='text',
                     found=describe(value), fix='Correct the row or name another field')
  if not value.strip():
    raise InputError(f'{what} is empty', where=where, expected='text',
                     found=f'{value[:20]!r}', fix='Fill in the text or remove the row')
  if '\0' in value:
    raise InputError(f'{what} holds a NUL character', where=where, expected='text without NUL',
                     found=f'NUL at character {value.index(chr(0)) + 1}',
                     fix='Remove the character')
  try:
    value.encode('utf-8')
  except UnicodeEncodeError as error:
    raise InputError(f'{what} holds half of a surrogate pair', where=where,
                     expected='text that can be written as UTF-8',
                     found=f'U+{ord(value[error.start]):04X} at character {error.start + 1}',
                     fix='Remove or repair the character') from error
  return value


def check_unique(seen: dict[str, int], row: Row, prompt_id: str, field: str) -> None:
  """Adds `prompt_id` to `seen` (id -> row number) or says which earlier row has it."""
  if prompt_id in seen:
    raise InputError(f'the id {shorten(prompt_id)} occurs twice',
                     where=f'{row.where}, field {field!r}',
                     expected='a different id in each row',
                     found=f'the same id in row {seen[prompt_id]}',
                     fix='Give the row another id or remove it')
  seen[prompt_id] = row.number


def row_id(row: Row, field: str, *, required: bool) -> str:
  """Text or integer id of the row; made from file name and row number where there is none."""
  if field not in row.fields and not required:
    return f'{os.path.basename(row.file).split(".")[0]}-{row.number}'
  value = get_field(row, field, 'a unique id')
  if isinstance(value, int) and not isinstance(value, bool):
    return str(value)
  return check_text(value, row.where, f'field {field!r}')


def describe(value: Any) -> str:
  """A value for a message: its JSON type and its start."""
  names = {dict: 'an object', list: 'a list', tuple: 'a list', str: 'text', bool: 'a boolean',
           int: 'a number', float: 'a number', type(None): 'null', bytes: 'bytes'}
  return f'{names.get(type(value), type(value).__name__)} {shorten(value)}'


def shorten(value: Any) -> str:
  shown = repr(value)
  return shown if len(shown) <= 60 else shown[:57] + '...'
