"""Tables: schemas, equal bytes for equal content, and what is refused."""

import errno
import os
import subprocess

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxrl.errors import InputError
from jaxrl.runs import durable
from jaxrl.runs.tables import (
    EVALUATION,
    PAIRS,
    REFERENCE,
    SAMPLES,
    SCORES,
    read_table,
    write_table,
)

SCHEMAS = (SAMPLES, SCORES, PAIRS, REFERENCE, EVALUATION)

int32 = st.integers(-(2**31), 2**31 - 1)
text = st.text(st.characters(exclude_categories=('Cs',)), max_size=5)


def values(field):
  kinds = {pa.string(): text, pa.int32(): int32, pa.float32(): st.floats(width=32)}
  if pa.types.is_list(field.type):
    return st.lists(kinds[field.type.value_type], max_size=4)
  return st.none() | kinds[field.type] if field.nullable else kinds[field.type]


def rows_of(schema):
  row = st.fixed_dictionaries({field.name: values(field) for field in schema})
  return st.lists(row, max_size=6)


def score(i=0, **changes):
  row = dict(prompt_id=f'p{i}', sample_index=i, gold=None, answer='3', verdict='wrong', votes=1)
  return row | changes


def pair():
  ids = dict(prompt_ids=np.arange(3), chosen_ids=[], rejected_ids=(1, 2))
  why = dict(chosen_why='a', rejected_why='b', method='irpo')
  return ids | why | dict(
      prompt_id='p', pair_index=0, chosen_index=None, rejected_index=1, weight=1, iteration=1
  )


@settings(deadline=None, max_examples=25)
@given(st.sampled_from(SCHEMAS).flatmap(lambda s: st.tuples(st.just(s), rows_of(s))), st.data())
def test_rows_come_back_and_equal_content_gives_equal_bytes(tmp_path_factory, drawn, data):
  schema, rows = drawn
  folder = tmp_path_factory.mktemp('tables')
  write_table(folder / 'a', rows, schema, {'identity': 'x', 'b': 'é'})
  found = read_table(folder / 'a', schema)
  assert repr(found.to_pylist()) == repr(
      [{name: row[name] for name in schema.names} for row in rows]   # repr: NaN is NaN
  )
  assert found.schema.equals(schema)
  assert found.schema.metadata == {b'identity': b'x', b'b': 'é'.encode()}
  # The same rows in other pieces, columns in another order, metadata in another order.
  cut = data.draw(st.integers(0, len(rows)))
  table = pa.Table.from_pylist(rows + rows, schema=schema)
  table = pa.concat_tables([table[:cut], table[len(rows) + cut:]]).select(schema.names[::-1])
  write_table(folder / 'b', table, schema, {'b': 'é', 'identity': 'x'})
  assert (folder / 'a').read_bytes() == (folder / 'b').read_bytes()


def test_pieces_of_a_large_table_do_not_show_in_its_bytes(tmp_path):
  rows = [score(i, answer=os.urandom(1500).hex()) for i in range(3000)]
  table = pa.Table.from_pylist(rows, schema=SCORES)
  write_table(tmp_path / 'a', table, SCORES)
  write_table(tmp_path / 'b', pa.concat_tables([table[:777], table[777:]]), SCORES)
  assert (tmp_path / 'a').read_bytes() == (tmp_path / 'b').read_bytes()


def test_the_schemas_are_those_of_the_architecture_page():
  page = open(os.path.join(os.path.dirname(__file__), '../../../docs/architecture.md')).read()
  for name, schema in [('samples', SAMPLES), ('scores', SCORES), ('pairs', PAIRS)]:
    section = page.split(f'\n`{name}.parquet`')[1].split('parquet`, ')[0].split('\n## ')[0]
    table = [line for line in section.splitlines() if line.startswith('| `')]
    columns = []
    for line in table:
      names, kind = (part.strip() for part in line.split('|')[1:3])
      columns += [(column.strip(' `'), kind) for column in names.split(',')]
    assert [column for column, _ in columns] == schema.names
    for column, kind in columns:
      kind = kind.removesuffix(' or null').replace('float32', 'float').replace('&lt;', '<')
      found = str(schema.field(column).type).replace('item: ', '')
      assert kind in ('', 'list<float>' if found.startswith('list<f') else found) or (
          kind.replace('&gt;', '>') == found
      ), (column, kind, found)


@pytest.mark.parametrize(
    ('row', 'message'),
    [
        ({'votes': 'x'}, r'scores row 2: column votes cannot hold .*expected int32; found \'x\''),
        ({'votes': 1.5}, 'row 2: column votes cannot hold this value; expected int32; found 1.5'),
        ({'votes': True}, 'row 2: column votes cannot hold this value; expected int32; found True'),
        ({'votes': 2**40}, 'row 2: column votes cannot hold this value'),
        ({'answer': 3}, 'row 2: column answer cannot hold this value; expected string; found 3'),
        ({'answer': '\ud800'}, 'row 2: column answer cannot hold this value'),
        ({'verdict': None}, 'row 2: column verdict is null'),
        ({'vote': 1}, 'row 2: the row has other columns than its table.*unknown vote'),
    ],
)
def test_a_row_that_does_not_fit_is_named(tmp_path, row, message):
  with pytest.raises(InputError, match=message):
    write_table(tmp_path / 'scores', [score(0), score(1), score(2, **row)], SCORES)
  assert os.listdir(tmp_path) == []


def test_arrays_and_tuples_are_lists(tmp_path):
  write_table(tmp_path / 't', [pair()], PAIRS)
  (found,) = read_table(tmp_path / 't', PAIRS).to_pylist()
  assert found['prompt_ids'] == [0, 1, 2] and found['rejected_ids'] == [1, 2]
  assert found['chosen_ids'] == [] and found['chosen_index'] is None and found['weight'] == 1.0


def test_missing_columns_and_nulls_in_lists_are_named(tmp_path):
  row = score()
  del row['gold']
  with pytest.raises(InputError, match='row 0: .*found no gold'):
    write_table(tmp_path / 't', [row], SCORES)
  rows = [{'chosen_logps': [1.0], 'rejected_logps': [0.0, n]} for n in (1.0, None)]
  with pytest.raises(InputError, match='row 1: column rejected_logps has a null in its list'):
    write_table(tmp_path / 't', rows, REFERENCE)
  rows = [{**pair(), 'chosen_ids': [1, n]} for n in (1, np.int64(2), 2.5)]
  with pytest.raises(InputError, match=r'row 2: column chosen_ids .*found \[1, 2.5\]'):
    write_table(tmp_path / 't', rows, PAIRS)
  with pytest.raises(InputError, match='t: the table has other columns'):
    write_table(tmp_path / 't', pa.table({'chosen_logps': [[1.0]]}), REFERENCE)


def test_tables_of_another_kind_are_refused(tmp_path):
  path = tmp_path / 'scores.parquet'
  write_table(path, [score()], SCORES)
  with pytest.raises(InputError, match='scores.parquet: .* other columns.*no chosen_logps'):
    read_table(path, REFERENCE)
  table = read_table(path, SCORES)
  for other, message in [
      (table.drop_columns(['votes']), 'found no votes'),
      (table.append_column('x', table['votes']), 'found unknown x'),
      (table.set_column(5, 'votes', pa.array(['1'])), 'votes has another type; expected int32'),
      (table.set_column(4, 'verdict', pa.array([None], pa.string())), 'row 0: column verdict is'),
  ]:
    pq.write_table(other, path)
    with pytest.raises(InputError, match=message):
      read_table(path, SCORES)
  with pytest.raises(InputError, match='no such table'):
    read_table(tmp_path / 'missing', SCORES)


def test_every_damage_to_the_file_is_an_error_or_harmless(tmp_path):
  path = tmp_path / 'scores.parquet'
  rows = [score(i) for i in range(5)]
  write_table(path, rows, SCORES)
  whole = path.read_bytes()
  for size in range(0, len(whole), 97):
    path.write_bytes(whole[:size])
    with pytest.raises(InputError, match='scores.parquet: the table is damaged'):
      read_table(path, SCORES)
  wrong = 0
  for at in range(0, len(whole), 23):
    path.write_bytes(whole[:at] + bytes([whole[at] ^ 0x55]) + whole[at + 1:])
    try:
      found = read_table(path, SCORES).to_pylist()
    except InputError:
      continue
    wrong += found != rows
  assert wrong == 0


def test_a_full_disk_leaves_no_table(tmp_path, monkeypatch):
  path = tmp_path / 'scores.parquet'
  write_table(path, [score()], SCORES)
  before = path.read_bytes()

  def full(descriptor):
    raise OSError(errno.ENOSPC, 'No space left on device')

  monkeypatch.setattr(os, 'fsync', full)
  with pytest.raises(InputError, match='scores.parquet: there is no space left on the disk'):
    write_table(path, [score(1)], SCORES)
  assert os.listdir(tmp_path) == ['scores.parquet'] and path.read_bytes() == before

  def denied(descriptor):
    raise OSError(errno.EIO, 'Input/output error')

  monkeypatch.setattr(os, 'fsync', denied)   # not every error is a full disk
  with pytest.raises(OSError, match='Input/output'):
    durable.write_file(path, b'x')


@pytest.fixture
def small_disk(tmp_path):
  disk = tmp_path / 'disk'
  disk.mkdir()
  mount = ['mount', '-t', 'tmpfs', '-o', 'size=64k', 'tmpfs', disk]
  if subprocess.run(mount, capture_output=True, check=False).returncode:
    pytest.skip('mounting a small file system is not permitted here')
  yield disk
  subprocess.run(['umount', disk], check=True)


def test_a_disk_that_is_really_full(small_disk):
  path = small_disk / 'scores.parquet'
  noise = os.urandom(200_000).hex()
  with pytest.raises(InputError, match='scores.parquet: there is no space left on the disk'):
    write_table(path, [score(answer=noise)], SCORES)
  assert os.listdir(small_disk) == []
  write_table(path, [score()], SCORES)
