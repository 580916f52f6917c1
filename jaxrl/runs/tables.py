"""The tables of a run: their schemas, and writing and reading them as Parquet."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from jaxrl.errors import InputError
from jaxrl.runs import durable


def _schema(**columns: pa.DataType | pa.Field) -> pa.Schema:
  return pa.schema([
      column.with_name(name) if isinstance(column, pa.Field) else pa.field(name, column, False)
      for name, column in columns.items()
  ])


def _or_null(column: pa.DataType) -> pa.Field:
  return pa.field('', column, nullable=True)


_IDS, _LOGPS = pa.list_(pa.int32()), pa.list_(pa.float32())

# One row per (prompt, draw).
SAMPLES: pa.Schema = _schema(
    prompt_id=pa.string(),
    sample_index=pa.int32(),   # 0..N-1
    prompt=pa.string(),   # as rendered by the chat template
    response=pa.string(),   # special tokens removed
    prompt_ids=_IDS,
    response_ids=_IDS,   # EOS included iff it was sampled
    logprobs=_LOGPS,   # of each response id, temperature 1, untruncated
    finish_reason=pa.string(),   # eos, stop or length
    temperature=pa.float32(),
    top_p=pa.float32(),
    iteration=pa.int32(),
    source_model=pa.string(),   # identity hash of the sampling parameters
)

# Row-aligned with SAMPLES.
SCORES: pa.Schema = _schema(
    prompt_id=pa.string(),
    sample_index=pa.int32(),
    gold=_or_null(pa.string()),   # canonical; null when it cannot be parsed
    answer=_or_null(pa.string()),   # canonical extracted answer
    verdict=pa.string(),   # correct, wrong, unparseable_answer, unparseable_gold or timeout
    votes=pa.int32(),   # samples of this prompt with the same answer, 0 when unparsed
)

# One row per preference pair.
PAIRS: pa.Schema = _schema(
    prompt_id=pa.string(),
    pair_index=pa.int32(),   # 0..K-1 within the prompt
    chosen_index=_or_null(pa.int32()),   # sample_index; null means the gold solution
    rejected_index=_or_null(pa.int32()),
    prompt_ids=_IDS,
    chosen_ids=_IDS,
    rejected_ids=_IDS,
    weight=pa.float32(),
    chosen_why=pa.string(),
    rejected_why=pa.string(),
    method=pa.string(),
    iteration=pa.int32(),
)

# Row-aligned with PAIRS; log-probs of each response id under the reference. The metadata key
# `identity` is the hash of (reference parameters, ids, dtype policy).
REFERENCE: pa.Schema = _schema(chosen_logps=_LOGPS, rejected_logps=_LOGPS)

# One row per (test prompt, draw).
EVALUATION: pa.Schema = _schema(
    prompt_id=pa.string(),
    kind=pa.string(),   # greedy or vote
    sample_index=pa.int32(),
    prompt=pa.string(),
    response=pa.string(),
    gold=_or_null(pa.string()),
    answer=_or_null(pa.string()),
    verdict=pa.string(),
    finish_reason=pa.string(),
    length=pa.int32(),   # response ids
)


def write_table(
    path: str | os.PathLike[str],
    rows: Sequence[Mapping[str, Any]] | pa.Table,
    schema: pa.Schema,
    metadata: Mapping[str, str] | None = None,
) -> None:
  """Writes rows as Parquet by an atomic rename; equal content gives equal bytes.

  Raises InputError naming the row and the column of a value that does not fit, and for a full disk.
  """
  where = os.fspath(path)
  if isinstance(rows, pa.Table):
    table = rows
    _check_columns(where, table.schema, schema)
  else:
    table = _from_rows(where, rows, schema)
  _check_nulls(where, table, schema)
  # One chunk, own metadata: how the table was put together must not show in the bytes.
  table = table.select(schema.names).cast(schema).combine_chunks()
  encoded = {name: value.encode() for name, value in sorted((metadata or {}).items())}
  table = table.replace_schema_metadata(encoded or None)
  with durable.open_atomic(path) as file:
    pq.write_table(
        table, file, compression='zstd', row_group_size=8192, write_page_checksum=True
    )


def read_table(path: str | os.PathLike[str], schema: pa.Schema) -> pa.Table:
  """Reads a table and checks that it is one of `schema`; `write_table`'s metadata is in its schema.

  Raises InputError for a missing or damaged file and for missing, unknown or wrong columns.
  """
  where = os.fspath(path)
  try:
    with pq.ParquetFile(where, page_checksum_verification=True) as file:
      _check_columns(where, file.schema_arrow, schema)
      table = file.read()
  except FileNotFoundError:
    raise InputError('there is no such table', where=where) from None
  except (pa.ArrowException, OSError) as error:
    raise InputError(
        'the table is damaged', where=where, expected='a Parquet file', found=str(error).strip()
    ) from error
  _check_nulls(where, table, schema)
  return table.select(schema.names).cast(schema.with_metadata(table.schema.metadata))


def _from_rows(where: str, rows: Sequence[Mapping[str, Any]], schema: pa.Schema) -> pa.Table:
  names = set(schema.names)
  for number, row in enumerate(rows):
    if row.keys() != names:
      raise InputError(
          'the row has other columns than its table',
          where=f'{where} row {number}',
          expected=', '.join(schema.names),
          found=_differences(row.keys(), names),
      )
  columns = []
  for field in schema:
    values = [row[field.name] for row in rows]
    try:
      columns.append(_to_array(values, field.type))
    except (pa.ArrowException, OverflowError, TypeError, ValueError):
      _name_bad_value(where, field, values)
      raise
  return pa.table(columns, names=schema.names)


def _to_array(values: list[Any], kind: pa.DataType) -> pa.Array | pa.ChunkedArray:
  item = kind.value_type if pa.types.is_list(kind) else kind
  if not pa.types.is_integer(item):
    return pa.array(values, kind)
  # pa.array(values, int32) cuts 1.5 to 1; a cast of what it finds by itself does not.
  found = pa.array(values)
  found_item = found.type.value_type if pa.types.is_list(found.type) else found.type
  if not (pa.types.is_integer(found_item) or pa.types.is_null(found_item)):
    raise TypeError(f'{found_item} is not {item}')
  return found.cast(kind)


def _name_bad_value(where: str, field: pa.Field, values: list[Any]) -> None:
  for number, value in enumerate(values):
    try:
      _to_array([value], field.type)
    except (pa.ArrowException, OverflowError, TypeError, ValueError) as error:
      raise InputError(
          f'column {field.name} cannot hold this value',
          where=f'{where} row {number}',
          expected=field.type,
          found=f'{value!r:.100}',
      ) from error


def _check_columns(where: str, found: pa.Schema, expected: pa.Schema) -> None:
  if set(found.names) != set(expected.names) or len(found.names) != len(expected.names):
    raise InputError(
        'the table has other columns',
        where=where,
        expected=', '.join(expected.names),
        found=_differences(found.names, set(expected.names)),
    )
  for field in expected:
    kind = found.field(field.name).type
    if not _is_same(kind, field.type):
      raise InputError(
          f'column {field.name} has another type', where=where, expected=field.type, found=kind
      )


def _differences(found: Any, expected: set[str]) -> str:
  missing, unknown = sorted(expected - set(found)), sorted(set(found) - expected)
  parts = []
  if missing:
    parts.append('no ' + ', '.join(missing))
  if unknown:
    parts.append('unknown ' + ', '.join(unknown))
  return ' and '.join(parts) or 'a column twice'


def _is_same(a: pa.DataType, b: pa.DataType) -> bool:
  if pa.types.is_list(a) and pa.types.is_list(b):
    return a.value_type == b.value_type   # Parquet and Arrow name the items of a list differently
  return a == b


def _check_nulls(where: str, table: pa.Table, schema: pa.Schema) -> None:
  for field in schema:
    column = table[field.name]
    if not field.nullable and column.null_count:
      number = pc.index(column.is_null(), True).as_py()
      raise InputError(
          f'column {field.name} is null', where=f'{where} row {number}', expected=field.type
      )
    if pa.types.is_list(field.type) and pc.list_flatten(column).null_count:
      bad = pc.list_parent_indices(column).filter(pc.list_flatten(column).is_null())
      raise InputError(
          f'column {field.name} has a null in its list',
          where=f'{where} row {bad[0].as_py()}',
          expected=field.type,
      )
