"""Hugging Face folders in and out.

A family of models is one row in `hugging_face_tensors.TENSORS` and one in
`hugging_face_config.FAMILIES`; nothing in this file knows families apart.
"""

from __future__ import annotations

import errno
import json
import math
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
from flax import traverse_util
from jax.experimental import multihost_utils

from jaxrl.errors import InputError
from jaxrl.models.config import ModelConfig
from jaxrl.models.hugging_face_config import CONFIG, read_config, write_config
from jaxrl.models.hugging_face_tensors import TENSORS, named_tensors, read_slice, tensor_shapes
from jaxrl.models.model_folder import (
    INDEX,
    SINGLE,
    ReadTensor,
    StoredTensor,
    existing_folder,
    find_tensors,
    local_path,
    open_tensors,
    read_object,
)
from jaxrl.models.params import Params, ParamSpec, decoder_specs
from jaxrl.parallel import sharding

__all__ = ['load_params', 'read_config', 'save_model', 'write_config']

# Tables of rotary frequencies that old checkpoints carry; they follow from the configuration.
DERIVED = re.compile(r'.*\.rotary_emb\.inv_freq')
FLOATS = ('F32', 'BF16', 'F16')
SAVED_TYPES = ('float32', 'bfloat16', 'float16')
GENERATION = 'generation_config.json'
TOKENIZER_FILES = (
    'tokenizer.json', 'tokenizer_config.json', 'tokenizer.model', 'special_tokens_map.json',
    'added_tokens.json', 'vocab.json', 'merges.txt', 'chat_template.jinja', 'chat_template.json',
)
TOKENIZER_VOCABULARIES = ('tokenizer.json', 'tokenizer.model', 'vocab.json')


def load_params(
    folder: str | os.PathLike,
    c: ModelConfig,
    *,
    mesh: jax.sharding.Mesh | None = None,
    dtype=jnp.float32,
) -> Params:
  """The parameters stored in `folder`, as `dtype`, each in its resting place on `mesh`.

  Every device is given its own slice, read from the file as that slice and, for stacked layers,
  gathered layer by layer in a buffer of the slice's size: the host never holds more than one
  slice of one parameter, and no initialised model exists at any time.

  Raises:
    InputError: see `model_folder.find_tensors`; or a tensor is missing, unexpected, of the wrong
      shape or type, or holds NaN or inf; or the mesh does not divide a dimension.
  """
  folder = existing_folder(folder)
  stored = find_tensors(folder)
  _check_tensors(folder, stored, c)
  specs = traverse_util.flatten_dict(decoder_specs(c), sep='/')
  if mesh is not None:
    for path, spec in specs.items():
      _check_divisible(path, spec, mesh)
  with open_tensors(stored) as read:
    if c.tie_embeddings:
      _check_tied_head(stored, read, c)
    flat = {path: _load(read, stored, path, spec, c, mesh, dtype) for path, spec in specs.items()}
  return traverse_util.unflatten_dict(flat, sep='/')


def save_model(
    folder: str | os.PathLike,
    params: Params,
    c: ModelConfig,
    *,
    tokenizer_from: str | os.PathLike | None,
    dtype=jnp.float32,
    max_shard_bytes: int = 5_000_000_000,
) -> None:
  """Writes a folder that transformers loads: config.json, weights, tokenizer and chat template.

  The same arguments always give the same bytes. The files are written beside `folder` and renamed
  into place at the end, so a folder of that name is always whole. The host holds one shard at a
  time. Where parameters are spread over several hosts every host has to call this; the first one
  writes.

  Args:
    folder: must not exist yet.
    tokenizer_from: the folder whose tokenizer, chat template, generation settings and special
      token ids are copied; None writes none.
    dtype: float32, bfloat16 or float16.
    max_shard_bytes: a file of weights exceeds this only for a single tensor that does.

  Raises:
    InputError: the folder exists, the tokenizer does not fit, a weight is not finite as `dtype`,
      or the disk is full or cannot be written.
  """
  folder = local_path(folder)
  if np.dtype(dtype).name not in SAVED_TYPES:
    raise InputError('models cannot be saved in this type', where=folder,
                     expected=' or '.join(SAVED_TYPES), found=np.dtype(dtype).name)
  if os.path.lexists(folder):
    raise InputError('the folder to save the model in already exists', where=folder,
                     expected='a new name', fix='Choose another name, or remove the folder first')
  source = None if tokenizer_from is None else _tokenizer_folder(tokenizer_from)
  ids = _token_ids(source, c)
  config = write_config(c) | ids | {'torch_dtype': np.dtype(dtype).name}
  temporary = folder.with_name(folder.name + '.saving')
  is_writer = jax.process_index() == 0
  try:
    if is_writer:
      shutil.rmtree(temporary, ignore_errors=True)   # left by a run that was killed
      temporary.mkdir(parents=True)
      _write_object(temporary / CONFIG, config)
      _copy_tokenizer(source, temporary, ids)
    _write_weights(temporary, params, c, np.dtype(dtype), max_shard_bytes, is_writer)
    if is_writer:
      temporary.rename(folder)
  except (OSError, safetensors.SafetensorError) as e:
    is_full = getattr(e, 'errno', None) == errno.ENOSPC or 'No space left' in str(e)
    raise InputError(
        'the disk is full' if is_full else 'the model cannot be written', where=folder,
        expected=f'room for {_total_bytes(c, dtype):,} bytes of weights', found=str(e),
        fix='Free some space or choose another folder') from e
  finally:
    if is_writer:
      shutil.rmtree(temporary, ignore_errors=True)   # gone already where all went well
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices(f'saved {folder}')


def _load(
    read: ReadTensor,
    stored: dict[str, StoredTensor],
    path: str,
    spec: ParamSpec,
    c: ModelConfig,
    mesh: jax.sharding.Mesh | None,
    dtype,
) -> jax.Array:
  """One parameter, on its devices."""
  row = TENSORS[c.family][path]

  def one(name, shape, index):
    with np.errstate(over='ignore'):   # overflow to inf is reported below
      x = read_slice(read, name, row.layout, shape, index).astype(dtype)
    if not np.isfinite(x).all():
      raise InputError(
          f'tensor {name!r} holds NaN or inf', where=stored[name].file,
          expected=f'numbers that are finite as {np.dtype(dtype).name}',
          found=f'{int((~np.isfinite(x)).sum())} that are not',
          fix='Use an undamaged checkpoint')
    return x

  def piece(index):
    if spec.axes[0] != 'layers':
      return one(row.name, spec.shape, index)
    layers = range(*index[0].indices(spec.shape[0]))
    out = None
    for n, layer in enumerate(layers):
      x = one(row.name.format(layer=layer), spec.shape[1:], index[1:])
      out = np.zeros((len(layers), *x.shape), dtype) if out is None else out
      out[n] = x
    return out

  if mesh is None:
    return jnp.asarray(piece((slice(None),) * len(spec.shape)))
  place = sharding.stored(mesh, spec.axes)
  devices_of: dict[tuple, list[jax.Device]] = {}
  for device, index in place.addressable_devices_indices_map(spec.shape).items():
    bounds = tuple((s.start, s.stop) for s in index or ())
    devices_of.setdefault(bounds, []).append(device)
  shards = []
  for bounds, devices in devices_of.items():
    part = piece(tuple(slice(*b) for b in bounds))
    # Waiting keeps one slice alive on the host; make_array_from_callback would hold them all.
    shards += jax.block_until_ready([jax.device_put(part, device) for device in devices])
  return jax.make_array_from_single_device_arrays(spec.shape, place, shards)


def _check_tensors(folder: Path, stored: dict[str, StoredTensor], c: ModelConfig) -> None:
  """Every tensor of the model is there, in shape and type, and no other."""
  expected = tensor_shapes(c)
  missing = [name for name in expected if name not in stored]
  if missing:
    raise InputError(
        f'tensor {missing[0]!r} is missing', where=folder, expected=f'{len(expected)} tensors',
        found=f'{len(missing)} of them missing',
        fix='Set "tie_word_embeddings": true in config.json if the output matrix is the embedding'
        if missing == [TENSORS[c.family]['head'].name]
        else 'Copy all weight files again, or correct config.json')
  tied_head = {TENSORS[c.family]['head'].name} if c.tie_embeddings else set()
  extra = [
      name for name in sorted(stored)
      if name not in expected and name not in tied_head and not DERIVED.fullmatch(name)]
  if extra:
    raise InputError(
        f'tensor {extra[0]!r} is not part of the model that config.json describes',
        where=stored[extra[0]].file, expected=f'{len(expected)} tensors of {c.family!r}',
        found=f'{len(extra)} more', fix='Correct config.json, or use a supported checkpoint')
  for name, shape in expected.items():
    found = stored[name]
    if found.shape != shape:
      raise InputError(
          f'tensor {name!r} has the wrong shape', where=found.file, expected=list(shape),
          found=list(found.shape), fix='Use the config.json that belongs to these weights')
    if found.dtype not in FLOATS:
      raise InputError(
          f'tensor {name!r} has an unsupported type', where=found.file,
          expected=' or '.join(FLOATS), found=found.dtype,
          fix='Use a checkpoint with unquantised weights')


def _check_tied_head(stored: dict[str, StoredTensor], read: ReadTensor, c: ModelConfig) -> None:
  """A tied model may carry its output matrix as well, if it is the embedding."""
  table = TENSORS[c.family]
  head, embedding = table['head'].name, table['embedding'].name
  if head not in stored:
    return
  whole = (slice(None), slice(None))
  same = stored[head].shape == stored[embedding].shape and np.array_equal(
      read(head, whole), read(embedding, whole))
  if not same:
    raise InputError(
        f'{CONFIG} ties the output matrix to the embedding, but {head!r} differs from it',
        where=stored[head].file, expected=f'no {head!r}, or a copy of {embedding!r}',
        found='other values', fix='Set "tie_word_embeddings": false in config.json')


def _check_divisible(path: str, spec: ParamSpec, mesh: jax.sharding.Mesh) -> None:
  try:
    sharding.stored(mesh, spec.axes).shard_shape(spec.shape)
  except ValueError as e:
    raise InputError(
        f'the mesh does not divide parameter {path!r}', where='mesh',
        expected=f'sizes that divide {dict(zip(spec.axes, spec.shape, strict=True))}',
        found=dict(mesh.shape), fix='Change --mesh') from e


def _write_weights(
    folder: Path, params: Params, c: ModelConfig, dtype: np.dtype, max_bytes: int, is_writer: bool,
) -> None:
  """One file, or shards with an index, named as transformers names them."""
  shapes = tensor_shapes(c)
  shards: list[list[str]] = [[]]
  room = max_bytes
  for name, shape in shapes.items():
    size = math.prod(shape) * dtype.itemsize
    if size > room and shards[-1]:
      shards.append([])
      room = max_bytes
    shards[-1].append(name)
    room -= size
  files = [SINGLE] if len(shards) == 1 else [
      f'model-{n:05d}-of-{len(shards):05d}.safetensors' for n in range(1, len(shards) + 1)]
  tensors = _cast_tensors(params, c, dtype, folder)
  for file, names in zip(files, shards, strict=True):
    # A host that does not write still takes part in gathering each tensor.
    shard = {}
    for name in names:
      value = next(tensors)
      if is_writer:
        shard[name] = value
    if is_writer:
      safetensors.numpy.save_file(shard, folder / file, metadata={'format': 'pt'})
  if is_writer and len(shards) > 1:
    _write_object(folder / INDEX, {
        'metadata': {
            'total_parameters': sum(map(math.prod, shapes.values())),
            'total_size': _total_bytes(c, dtype),
        },
        'weight_map': {
            name: file for file, names in zip(files, shards, strict=True) for name in names},
    })


def _cast_tensors(
    params: Params, c: ModelConfig, dtype: np.dtype, folder: Path) -> Iterator[np.ndarray]:
  for name, value in named_tensors(params, c):
    with np.errstate(over='ignore'):   # overflow to inf is reported below
      value = np.ascontiguousarray(value.astype(dtype))
    if not np.isfinite(value).all():
      raise InputError(
          f'tensor {name!r} holds NaN or inf', where=folder,
          expected=f'numbers that are finite as {dtype.name}',
          fix='Training diverged, or the type is too narrow; save as float32 to tell which')
    yield value


def _total_bytes(c: ModelConfig, dtype) -> int:
  return sum(map(math.prod, tensor_shapes(c).values())) * np.dtype(dtype).itemsize


def _tokenizer_folder(folder: str | os.PathLike) -> Path:
  path = existing_folder(folder)
  if not any((path / file).is_file() for file in TOKENIZER_VOCABULARIES):
    raise InputError('the folder has no tokenizer to copy', where=path,
                     expected=' or '.join(TOKENIZER_VOCABULARIES),
                     fix='Give the folder of the model that training started from')
  return path


def _copy_tokenizer(source: Path | None, folder: Path, ids: dict[str, Any]) -> None:
  if source is not None:
    for file in (*TOKENIZER_FILES, GENERATION):
      if (source / file).is_file():
        shutil.copyfile(source / file, folder / file)
  if not (folder / GENERATION).exists():
    _write_object(folder / GENERATION, ids)


def _token_ids(source: Path | None, c: ModelConfig) -> dict[str, Any]:
  """`bos_token_id` and its like, from the source's config.json or else from its tokenizer."""
  keys = ('bos_token_id', 'eos_token_id', 'pad_token_id')
  config = read_object(source / CONFIG) if source and (source / CONFIG).is_file() else {}
  ids = {key: config.get(key) for key in keys}
  if all(value is None for value in ids.values()) and source is not None:
    settings, vocabulary = (
        read_object(source / file) if (source / file).is_file() else {}
        for file in ('tokenizer_config.json', 'tokenizer.json'))
    added = {token['content']: token['id'] for token in vocabulary.get('added_tokens') or ()}
    for key in keys:
      token = settings.get(key.removesuffix('_id'))
      ids[key] = added.get(token['content'] if isinstance(token, dict) else token)
  for key, value in ids.items():
    for one in value if isinstance(value, list) else [value]:
      if one is not None and one >= c.vocab_size:
        raise InputError(
            f'{key} of the tokenizer does not fit the model', where=source,
            expected=f'an id below vocab_size {c.vocab_size}', found=one,
            fix='Give the folder of the model that training started from')
  return ids


def _write_object(path: Path, value: dict[str, Any]) -> None:
  path.write_text(json.dumps(value, indent=2, sort_keys=True) + '\n', encoding='utf-8')
