"""From parameters on their devices to a Hugging Face folder, a tensor at a time."""

from __future__ import annotations

import errno
import math
import os
import shutil
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils

from jaxrl.errors import InputError
from jaxrl.models.companion_files import (
    config_of,
    copy_tokenizer,
    token_ids,
    tokenizer_folder,
    write_object,
)
from jaxrl.models.config import ModelConfig
from jaxrl.models.finite import count_not_finite
from jaxrl.models.hugging_face_config import CONFIG
from jaxrl.models.hugging_face_tensors import Tensor, check_params, tensors_of, to_host
from jaxrl.models.load import FLOATS
from jaxrl.models.model_folder import INDEX, SINGLE, existing_folder, find_tensors, local_path
from jaxrl.models.params import Params
from jaxrl.models.safetensors_file import SPELLING, file_order, write_file


def save_model(
    folder: str | os.PathLike,
    params: Params,
    c: ModelConfig,
    *,
    tokenizer_from: str | os.PathLike | None,
    dtype=None,
    like: str | os.PathLike | None = None,
    max_shard_bytes: int = 5_000_000_000,
) -> None:
  """Writes a folder that transformers loads: config.json, weights, tokenizer and chat template.

  The same arguments always give the same bytes. The files are written beside `folder` and renamed
  into place at the end, so a folder of that name is always whole. The host holds one tensor at a
  time. Where parameters are spread over several hosts every host has to call this; the first one
  writes.

  Args:
    folder: must not exist yet.
    tokenizer_from: the folder whose tokenizer, chat template, generation settings and special
      token ids are copied; None writes none.
    dtype: float32, bfloat16 or float16; None: each tensor as in `like`, or float32 without one.
    like: the folder that the parameters were loaded from.
    max_shard_bytes: a file of weights exceeds this only for a single tensor that does (or, as
      transformers has it, for all experts of one layer's projection).

  Raises:
    InputError: the folder exists, the tokenizer does not fit, a weight is not finite as `dtype`,
      `like` lacks a tensor, or the disk is full or cannot be written.
  """
  folder = local_path(folder)
  if dtype is not None and np.dtype(dtype).name not in SPELLING:
    raise InputError('models cannot be saved in this type', where=folder,
                     expected=' or '.join(SPELLING), found=np.dtype(dtype).name)
  is_writer = jax.process_index() == 0
  if is_writer and os.path.lexists(folder):
    raise InputError('the folder to save the model in already exists', where=folder,
                     expected='a new name', fix='Choose another name, or remove the folder first')
  tokenizer = None if tokenizer_from is None else tokenizer_folder(tokenizer_from)
  origin = tokenizer if like is None else existing_folder(like)
  ids = token_ids(tokenizer or origin, c)
  types = _types(c, dtype, like)
  sizes = {x.name: math.prod(x.shape) * types[x.name].itemsize for x in tensors_of(c)}
  # The type of most of the model, where tensors differ.
  main = max(SPELLING, key=lambda kind: sum(
      size for name, size in sizes.items() if types[name].name == kind))
  config = config_of(c, origin, ids, main)
  temporary = folder.with_name(folder.name + '.saving')
  try:
    if is_writer:
      shutil.rmtree(temporary, ignore_errors=True)   # left by a run that was killed
      temporary.mkdir(parents=True)
      write_object(temporary / CONFIG, config)
      copy_tokenizer(tokenizer, temporary, ids)
    _write_weights(temporary, params, c, types, max_shard_bytes, is_writer)
    if is_writer:
      temporary.rename(folder)
  except OSError as e:
    raise InputError(
        'the disk is full' if e.errno == errno.ENOSPC else 'the model cannot be written',
        where=folder, expected=f'room for {sum(sizes.values()):,} bytes of weights', found=str(e),
        fix='Free some space or choose another folder') from e
  finally:
    if is_writer:
      shutil.rmtree(temporary, ignore_errors=True)   # gone already where all went well
  if _is_spread(params):
    multihost_utils.sync_global_devices(f'saved {folder.name}')


def _is_spread(params: Params) -> bool:
  """Whether parameters lie on devices of several hosts."""
  return any(
      isinstance(x, jax.Array) and not x.is_fully_addressable for x in jax.tree.leaves(params))


def _types(c: ModelConfig, dtype, like: str | os.PathLike | None) -> dict[str, np.dtype]:
  """The type each tensor is written in."""
  names = [x.name for x in tensors_of(c)]
  if dtype is not None or like is None:
    return dict.fromkeys(names, np.dtype(np.float32 if dtype is None else dtype))
  stored = find_tensors(existing_folder(like))
  for name in names:
    if name not in stored or stored[name].dtype not in FLOATS:
      raise InputError(
          f'tensor {name!r} has no type to keep', where=like, expected=' or '.join(FLOATS),
          found=stored[name].dtype if name in stored else 'no such tensor',
          fix='Give the folder that the parameters were loaded from, or a dtype')
  return {name: FLOATS[stored[name].dtype] for name in names}


def _shards(c: ModelConfig, types: dict[str, np.dtype], max_bytes: int) -> list[list[Tensor]]:
  """Which tensors share a file, by the rule of `split_torch_state_dict_into_shards`.

  The experts of one projection are one block of memory in transformers and so go into one file.
  """
  units: dict[tuple, list[Tensor]] = {}
  for x in tensors_of(c):
    units.setdefault((x.paths, x.place[:1]), []).append(x)
  shards: list[list[Tensor]] = []
  current: list[Tensor] = []
  taken = 0
  for unit in units.values():
    size = sum(math.prod(x.shape) * types[x.name].itemsize for x in unit)
    if size > max_bytes:
      shards.append(unit)
      continue
    if taken + size > max_bytes:
      shards.append(current)
      current, taken = [], 0
    current = current + unit
    taken += size
  return shards + [current] if current else shards


def _write_weights(
    folder: Path, params: Params, c: ModelConfig, types: dict[str, np.dtype], max_bytes: int,
    is_writer: bool,
) -> None:
  """One file, or shards with an index, named as transformers names them."""
  flat = check_params(params, c)
  shards = _shards(c, types, max_bytes)
  files = [SINGLE] if len(shards) == 1 else [
      f'model-{n:05d}-of-{len(shards):05d}.safetensors' for n in range(1, len(shards) + 1)]
  for file, shard in zip(files, shards, strict=True):
    tensors = {x.name: x for x in shard}
    header = {x.name: (x.shape, types[x.name]) for x in shard}

    def value(name, tensors=tensors):
      x = to_host(flat, tensors[name], c)
      bad = count_not_finite(x, types[name])
      if bad:
        raise InputError(
            f'tensor {name!r} holds NaN or inf', where=folder,
            expected=f'numbers that are finite as {types[name].name}', found=f'{bad} that are not',
            fix='Training diverged, or the type is too narrow; save as float32 to tell which')
      return x.astype(types[name], copy=False)

    if is_writer:
      write_file(folder / file, header, value)
    else:                              # gathering a tensor takes every host
      for name in file_order(header):
        value(name)
  if is_writer and len(shards) > 1:
    numbers = [math.prod(x.shape) for shard in shards for x in shard]
    sizes = [types[x.name].itemsize for shard in shards for x in shard]
    write_object(folder / INDEX, {
        'metadata': {
            'total_parameters': sum(numbers),
            'total_size': sum(n * size for n, size in zip(numbers, sizes, strict=True)),
        },
        'weight_map': {
            x.name: file for file, shard in zip(files, shards, strict=True) for x in shard},
    })
