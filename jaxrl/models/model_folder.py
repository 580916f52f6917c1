"""What lies in a Hugging Face folder: JSON objects and safetensors files, checked before use.

The header of a safetensors file is read and checked here, before any byte of a tensor is: a
truncated copy or a header that points outside its file is refused with the name of the tensor.
Format: https://huggingface.co/docs/safetensors/index#format.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from jaxrl import objects
from jaxrl.errors import InputError
from jaxrl.models.local_copy import PICKLE_SUFFIXES, fetch_weights, local_copy

SINGLE = 'model.safetensors'
INDEX = 'model.safetensors.index.json'
MAX_HEADER_BYTES = 100_000_000         # the format's own limit
# Bytes per element of every type of the format whose elements are whole bytes.
ITEM_BYTES = {
    'F64': 8, 'F32': 4, 'F16': 2, 'BF16': 2, 'F8_E4M3': 1, 'F8_E5M2': 1, 'F8_E8M0': 1,
    'I64': 8, 'I32': 4, 'I16': 2, 'I8': 1, 'U64': 8, 'U32': 4, 'U16': 2, 'U8': 1, 'BOOL': 1,
    'C64': 8,
}

# read(name, offset, out) fills `out` with the tensor's bytes from byte `offset` of it on.
ReadTensor = Callable[[str, int, memoryview], None]


@dataclasses.dataclass(frozen=True)
class StoredTensor:
  """A tensor that a checked header describes."""

  file: Path
  dtype: str                           # as the format spells it: 'F32', 'BF16', ...
  shape: tuple[int, ...]
  offset: int                          # of its first byte in the file
  size: int                            # bytes


def local_path(folder: str | os.PathLike) -> Path:
  """A path of this machine; InputError for 'gs://...' and the like, which cannot be written."""
  if objects.is_url(folder):
    raise InputError(
        'model folders are written on a local disk', where=os.fspath(folder),
        expected='a path without "://"', fix='Give a local path and copy the folder afterwards')
  return Path(folder)


def existing_folder(folder: str | os.PathLike) -> Path:
  """The folder as a path of this machine, see `local_copy`; InputError where there is none."""
  path = local_copy(folder) if objects.is_url(folder) else Path(folder)
  if path.is_dir():
    return path
  raise InputError(
      'this is not a model folder', where=path,
      expected='a Hugging Face folder with config.json and *.safetensors',
      found='a file' if path.exists() else 'nothing there',
      fix='Give the path of the folder that holds config.json')


def read_object(path: Path) -> dict:
  """The JSON object in a file; InputError where it cannot be read, parsed or is no object."""
  try:
    value = json.loads(path.read_text(encoding='utf-8'))
  except OSError as e:
    raise InputError(
        'the file cannot be read', where=path, found=e.strerror,
        fix='Check the path, or copy the model folder again') from e
  except ValueError as e:              # JSON and UTF-8 errors alike
    raise InputError(
        'the file is not valid JSON', where=path, found=str(e),
        fix='Copy the file again; it may have been cut short') from e
  if not isinstance(value, dict):
    raise InputError(
        'the file does not hold a JSON object', where=path, expected='{...}',
        found=type(value).__name__, fix='Copy the file again')
  return value


def read_header(path: Path) -> dict[str, StoredTensor]:
  """The tensors of one safetensors file, from a header that is checked against the file's size.

  Raises:
    InputError: the file is truncated, or its header is not JSON, names a tensor twice, or gives
      sizes that disagree with the shape, leave the file, overlap or leave holes.
  """
  def refuse(what, *, expected=None, found=None):
    return InputError(
        what, where=path, expected=expected, found=found,
        fix='Download or save the file again; it is damaged')

  try:
    size = path.stat().st_size
    with path.open('rb') as f:
      header_size = int.from_bytes(f.read(8), 'little')
      if size < 8 or header_size > min(size - 8, MAX_HEADER_BYTES):
        raise refuse('the header does not fit in the file',
                     expected=f'at most {max(size - 8, 0)} bytes', found=f'{header_size} bytes')
      text = f.read(header_size)
  except OSError as e:
    raise InputError('the file cannot be read', where=path, found=e.strerror,
                     fix='Check that the file is there and readable') from e

  def no_duplicates(pairs):
    if len({k for k, _ in pairs}) != len(pairs):
      raise ValueError('a name occurs twice')
    return dict(pairs)

  try:
    header = json.loads(text, object_pairs_hook=no_duplicates)
  except (ValueError, RecursionError) as e:
    raise refuse('the header is not valid JSON', found=str(e)) from e
  if not isinstance(header, dict):
    raise refuse('the header is not a JSON object', found=type(header).__name__)

  tensors, spans = {}, []
  for name, entry in header.items():
    if name == '__metadata__':
      continue
    if not _is_entry(entry):
      raise refuse(f'the header entry of tensor {name!r} is malformed',
                   expected='dtype, shape and two data_offsets', found=str(entry)[:120])
    dtype, shape = entry['dtype'], tuple(entry['shape'])
    if dtype not in ITEM_BYTES:
      raise InputError(
          f'tensor {name!r} has an unsupported type', where=path, expected='F32, BF16 or F16',
          found=dtype, fix='Use a checkpoint with unquantised weights')
    begin, end = entry['data_offsets']
    needed = math.prod(shape) * ITEM_BYTES[dtype]
    if end - begin != needed:
      raise refuse(
          f'the header lies about the size of tensor {name!r}',
          expected=f'{needed} bytes for {dtype} {list(shape)}', found=f'{end - begin} bytes')
    if 8 + header_size + end > size:
      raise refuse(f'the file ends before tensor {name!r} does',
                   expected=f'at least {8 + header_size + end} bytes', found=f'{size} bytes')
    tensors[name] = StoredTensor(path, dtype, shape, 8 + header_size + begin, needed)
    spans.append((begin, end, name))

  position = 0
  for begin, end, name in sorted(spans):
    if begin != position:
      raise refuse(f'tensor {name!r} overlaps another or follows a hole',
                   expected=f'its data at {position}', found=begin)
    position = end
  if 8 + header_size + position != size:
    raise refuse('the file is longer than its tensors',
                 expected=f'{8 + header_size + position} bytes', found=f'{size} bytes')
  return tensors


def _is_entry(entry) -> bool:
  def is_size(x):
    return type(x) is int and x >= 0

  return (
      isinstance(entry, dict) and isinstance(entry.get('dtype'), str)
      and all(isinstance(entry.get(key), list) and all(map(is_size, entry[key]))
              for key in ('shape', 'data_offsets'))
      and len(entry['data_offsets']) == 2)


def find_tensors(folder: Path) -> dict[str, StoredTensor]:
  """Every tensor of `model.safetensors`, or of the shards that the index names.

  Raises:
    InputError: there are no safetensors weights (pickle files are never opened), both layouts are
      present, or the index and its shards disagree.
  """
  fetch_weights(folder)
  single, index = folder / SINGLE, folder / INDEX
  if single.exists() and index.exists():
    raise InputError(
        'the folder holds two sets of weights', where=folder, expected=f'{SINGLE} or {INDEX}',
        found='both', fix='Move the one that is not wanted out of the folder')
  if single.exists():
    return read_header(single)
  if index.exists():
    return _find_sharded(folder, index)
  pickles = sorted(p.name for p in folder.iterdir() if p.suffix in PICKLE_SUFFIXES)
  if pickles:
    raise InputError(
        'the weights are pickle files, which can run any code when opened and are never loaded',
        where=folder, expected=f'{SINGLE} or {INDEX}', found=', '.join(pickles[:3]),
        fix='Convert them where you trust them: model.save_pretrained(folder, '
            'safe_serialization=True) in transformers')
  raise InputError(
      'the folder has no weights', where=folder, expected=f'{SINGLE} or {INDEX}',
      found=', '.join(sorted(p.name for p in folder.iterdir())[:8]) or 'an empty folder',
      fix='Copy the *.safetensors files into the folder')


def _find_sharded(folder: Path, index: Path) -> dict[str, StoredTensor]:
  weight_map = read_object(index).get('weight_map')
  if not isinstance(weight_map, dict) or not weight_map:
    raise InputError('the index has no weight_map', where=index,
                     expected='"weight_map": {tensor name: file name}',
                     fix='Copy the index file again')
  shards = sorted({str(x) for x in weight_map.values()})
  for shard in shards:
    # A plain name cannot leave the folder. Links are followed: the hub's cache is made of them.
    if shard in ('', '.', '..') or '/' in shard or '\\' in shard or '\0' in shard:
      raise InputError(
          'the index names a file outside the folder', where=index,
          expected='plain file names', found=repr(shard), fix='Do not use this checkpoint')
    if not (folder / shard).is_file():
      raise InputError(
          'the index names a shard that is missing', where=index, expected=shard,
          found='no such file', fix='Copy the missing file into the folder')
  tensors: dict[str, StoredTensor] = {}
  for shard in shards:
    stored = read_header(folder / shard)
    named = {name for name, file in weight_map.items() if file == shard}
    for name in sorted(named ^ stored.keys()):
      here = 'the index alone' if name in named else 'the shard alone'
      raise InputError(
          f'the index and the shard disagree about tensor {name!r}', where=folder / shard,
          expected='it in both', found=f'it in {here}',
          fix='Copy the index and all shards again, from one version of the model')
    tensors.update(stored)
  return tensors


@contextlib.contextmanager
def open_files(tensors: dict[str, StoredTensor]) -> Iterator[ReadTensor]:
  """Yields `read(name, offset, out)`; files are opened once, when they are first needed.

  Files are read, not mapped: the pages of a mapping count as memory of the process for as long as
  the system likes.
  """
  with contextlib.ExitStack() as stack:
    files: dict[Path, int] = {}

    def read(name: str, offset: int, out: memoryview) -> None:
      x = tensors[name]
      assert offset + len(out) <= x.size, (name, offset, len(out), x.size)
      try:
        if x.file not in files:
          files[x.file] = os.open(x.file, os.O_RDONLY)
          stack.callback(os.close, files[x.file])
        done = 0
        while done < len(out):         # one call returns 2 GiB at most
          n = os.preadv(files[x.file], [out[done:]], x.offset + offset + done)
          if n == 0:
            raise InputError(f'the file ends before tensor {name!r} does', where=x.file,
                             fix='Copy the file again; it changed while it was read')
          done += n
      except OSError as e:
        raise InputError(f'tensor {name!r} cannot be read', where=x.file, found=e.strerror,
                         fix='Copy the file again') from e

    yield read
