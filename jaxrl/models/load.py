"""From a Hugging Face folder to parameters on their devices, a block of rows at a time.

Every weight is allocated on its devices, and each stored tensor is read, sent there as it is stored
and put in its place by a small program: what the host holds at any moment is a few blocks, whatever
the size of the model, of a layer or of a tensor.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import math
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from flax import traverse_util
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxrl.errors import InputError
from jaxrl.models.config import ModelConfig
from jaxrl.models.finite import count_not_finite
from jaxrl.models.hugging_face_config import CONFIG
from jaxrl.models.hugging_face_names import TENSORS
from jaxrl.models.hugging_face_tensors import (
    first_row,
    flat_specs,
    groups,
    leading_shape,
    place_name,
    tensor_shapes,
)
from jaxrl.models.model_folder import (
    ReadTensor,
    StoredTensor,
    existing_folder,
    find_tensors,
    open_files,
)
from jaxrl.models.params import Params, ParamSpec
from jaxrl.parallel import sharding

FLOATS: Mapping[str, np.dtype] = {
    'F32': np.dtype(np.float32),
    'BF16': np.dtype(ml_dtypes.bfloat16),
    'F16': np.dtype(np.float16),
}
# Tables of rotary frequencies that old checkpoints carry; they follow from the configuration.
DERIVED = re.compile(r'.*\.rotary_emb\.inv_freq')
# Read by a host at a time, in the bytes of float32; a row (of all dimensions of a head) is never
# split. Larger blocks are slower: fresh memory costs more than the calls it saves.
BLOCK_BYTES = 16 * 2**20
ALIGNMENT = 64                         # bytes; what JAX takes over on a CPU without a copy
# Columns of a row are read by themselves from here on; below it the disk reads the page anyway.
PAGE_BYTES = 4096


def load_params(
    folder: str | os.PathLike,
    c: ModelConfig,
    *,
    mesh: Mesh | None = None,
    dtype=jnp.float32,
    finish: Callable[[str, jax.Array], Any] = lambda path, weight: weight,
) -> Params:
  """The parameters stored in `folder`, as `dtype`, each in its resting place on `mesh`.

  Every device is given its own slice and a host reads what its devices need. The host holds a few
  blocks of BLOCK_BYTES, and no initialised model exists at any time. `finish(path, weight)` says
  what stands for each weight in the tree, before the next one is read.

  Raises:
    InputError: see `model_folder.find_tensors`; or a tensor is missing, unexpected, of the wrong
      shape or type, or holds NaN or inf; or the mesh does not divide a dimension.
  """
  folder = existing_folder(folder)
  stored = find_tensors(folder)
  check_tensors(folder, stored, c)
  specs = flat_specs(c)
  if mesh is not None:
    for path, spec in specs.items():
      _check_divisible(path, spec, mesh)
  with open_files(stored) as read:
    if c.tie_embeddings:
      _check_tied_head(stored, read, c)
    flat = {
        path: finish(path, _load(read, stored, path, c, mesh, np.dtype(dtype))) for path in specs}
  return traverse_util.unflatten_dict(flat, sep='/')


Bounds = tuple[tuple[int, int], ...]   # (begin, stop) of a slice, in each of our dimensions


@dataclasses.dataclass(frozen=True)
class Piece:
  """What one device needs of one stored tensor in one step."""

  device: jax.Device | None            # None: wherever JAX puts arrays
  name: str
  rows: tuple[int, int]
  columns: tuple[int, int]


@dataclasses.dataclass(frozen=True)
class Layout:
  """How one weight lies in its stored tensors, and how the mesh cuts it.

  A stored tensor is a matrix (a vector has one column). Its rows and its columns are each made of
  some of our dimensions, of which only the slowest is ever cut, so a slice is a range of both.
  """

  shape: tuple[int, ...]               # ours
  local: tuple[int, ...]               # ours on one device
  leading: int                         # dimensions that a checkpoint spreads over tensors
  rows: tuple[int, ...]                # our dimensions in the rows, slowest first
  columns: tuple[int, ...]             # in the columns; () for a vector

  @property
  def order(self) -> tuple[int, ...]:
    """Our dimensions as a stored block has them."""
    return (*range(self.leading), *self.rows, *self.columns)

  def size(self, dims: tuple[int, ...]) -> int:
    return math.prod(self.shape[d] for d in dims)

  def block(self, steps: int) -> tuple[int, ...]:
    """The shape, in `order`, of one device's block of `steps` of the slowest row dimension."""
    sizes = dict.fromkeys(range(self.leading), 1) | {self.rows[0]: steps}
    return tuple(sizes.get(d, self.local[d]) for d in self.order)

  def column_range(self, bounds: Bounds) -> tuple[int, int]:
    if not self.columns:
      return 0, 1
    inner = self.size(self.columns[1:])
    begin, stop = bounds[self.columns[0]]
    return begin * inner, stop * inner


def _layout(path: str, c: ModelConfig, place: NamedSharding | None) -> Layout:
  row, spec = TENSORS[c.family][path], flat_specs(c)[path]
  local = spec.shape if place is None else place.shard_shape(spec.shape)
  leading = len(leading_shape(spec, row.layout))
  rows, *columns = (tuple(leading + d for d in group) for group in groups(row.layout))
  assert len(columns) <= 1, (path, row.layout)
  layout = Layout(spec.shape, local, leading, rows, columns[0] if columns else ())
  faster = layout.rows[1:] + layout.columns[1:]
  assert all(local[d] == spec.shape[d] for d in faster), (path, local)
  return layout


def _load(
    read: ReadTensor, stored: Mapping[str, StoredTensor], path: str, c: ModelConfig,
    mesh: Mesh | None, dtype: np.dtype,
) -> jax.Array:
  """One parameter, on its devices."""
  name = TENSORS[c.family][path].name
  place = None if mesh is None else sharding.stored(mesh, flat_specs(c)[path].axes)
  layout = _layout(path, c, place)
  slices = _local_slices(layout.shape, place)
  slow, unit, base = layout.rows[0], layout.size(layout.rows[1:]), first_row(c, path)
  steps = _steps_of_a_block(layout, place)
  out = _zeros(layout.shape, _placed_dtype(dtype), place)
  for index in np.ndindex(layout.local[:layout.leading]):
    for begin in range(0, layout.local[slow], steps):
      n = min(steps, layout.local[slow] - begin)
      pieces = []
      for device, bounds in slices:
        at = tuple(bounds[d][0] + i for d, i in enumerate(index))
        first = base + (bounds[slow][0] + begin) * unit
        rows = (first, first + n * unit)
        pieces.append(Piece(device, place_name(name, at), rows, layout.column_range(bounds)))
      blocks = _read_pieces(read, stored, pieces, layout.size(layout.columns), dtype)
      starts = np.zeros(len(layout.shape), np.int32)
      starts[[*range(layout.leading), slow]] = *index, begin
      # The block before was put in place while this one was read; two are alive at most.
      jax.block_until_ready(out)
      out = _put(out, pieces, blocks, starts, layout.block(n), layout, place, dtype)
  return _as_dtype(out, dtype)


def _local_slices(
    shape: tuple[int, ...], place: NamedSharding | None) -> list[tuple[jax.Device | None, Bounds]]:
  """This host's devices, each with (begin, stop) of its slice in every dimension."""
  if place is None:
    return [(None, tuple((0, n) for n in shape))]
  return [
      (device, tuple(s.indices(n)[:2] for s, n in zip(index or (), shape, strict=True)))
      for device, index in place.addressable_devices_indices_map(shape).items()]


def _steps_of_a_block(layout: Layout, place: NamedSharding | None) -> int:
  """Steps of the slowest row dimension that are read for each device at once.

  The same number on every host: all of them run the same programs.
  """
  distinct: dict[int, set] = collections.defaultdict(set)
  if place is not None:
    device: Any
    for device, index in place.devices_indices_map(layout.shape).items():
      distinct[device.process_index].add(tuple(
          index[d].indices(layout.shape[d])[:2] for d in (*range(layout.leading), layout.rows[0])))
  at_once = max(map(len, distinct.values()), default=1)
  step_bytes = 4 * layout.size(layout.rows[1:] + layout.columns)
  most = max(1, BLOCK_BYTES // (at_once * step_bytes))
  local = layout.local[layout.rows[0]]
  return math.ceil(local / math.ceil(local / most))


def _read_pieces(
    read: ReadTensor, stored: Mapping[str, StoredTensor], pieces: list[Piece], width: int,
    dtype: np.dtype,
) -> list[np.ndarray]:
  """[rows, columns] for each piece; what several devices share is read once, and checked."""
  together: dict[tuple, list[Piece]] = collections.defaultdict(list)
  for piece in pieces:
    together[piece.name, piece.rows].append(piece)
  arrays = {}
  for (name, rows), members in together.items():
    ranges = {piece.columns for piece in members}
    begin, end = min(b for b, _ in ranges), max(e for _, e in ranges)
    block = _read_rows(read, name, FLOATS[stored[name].dtype], width, rows, (begin, end))
    bad = count_not_finite(block, dtype)
    if bad:
      raise InputError(
          f'tensor {name!r} holds NaN or inf', where=stored[name].file,
          expected=f'numbers that are finite as {dtype.name}',
          found=f'{bad} that are not in rows {rows[0]} to {rows[1] - 1}',
          fix='Use an undamaged checkpoint')
    for b, e in ranges:
      arrays[name, rows, (b, e)] = block[:, b - begin:e - begin]
  return [arrays[piece.name, piece.rows, piece.columns] for piece in pieces]


def _read_rows(
    read: ReadTensor, name: str, dtype: np.dtype, width: int, rows: tuple[int, int],
    columns: tuple[int, int],
) -> np.ndarray:
  """[rows, columns] of a stored matrix of `width` columns."""
  (first, stop), (begin, end) = rows, columns
  size = dtype.itemsize
  by_row = end - begin < width and (end - begin) * size >= PAGE_BYTES
  kept = (end - begin if by_row else width) * size
  memory = np.empty((stop - first) * kept + ALIGNMENT, np.uint8)
  skipped = -memory.ctypes.data % ALIGNMENT
  out = memory[skipped:skipped + (stop - first) * kept]
  if by_row:
    for row, line in enumerate(out.reshape(stop - first, kept), first):
      read(name, (row * width + begin) * size, line.data)
  else:
    read(name, first * width * size, out.data)
  matrix = out.view(dtype).reshape(stop - first, kept // size)
  return matrix if by_row else matrix[:, begin:end]


def _on_cpu() -> bool:
  return jax.default_backend() == 'cpu'


def _zeros(shape: tuple[int, ...], dtype: np.dtype, place: NamedSharding | None) -> jax.Array:
  return jax.jit(jnp.zeros, static_argnums=(0, 1), out_shardings=place)(shape, dtype)


def _placed_dtype(dtype: np.dtype) -> np.dtype:
  """XLA for CPUs rewrites a whole bfloat16 array where a part changes, so there it is its bits."""
  return np.dtype(np.uint16) if _on_cpu() and dtype == jnp.bfloat16 else dtype


def _as_dtype(x: jax.Array, dtype: np.dtype) -> jax.Array:
  """Undoes `_placed_dtype`, on the same memory, which a program would copy."""
  if x.dtype == dtype:
    return x

  def view(one: jax.Array) -> np.ndarray:
    return np.asarray(one).view(dtype)

  if not isinstance(x.sharding, NamedSharding):
    return jax.device_put(view(x))
  return jax.make_array_from_single_device_arrays(
      x.shape, x.sharding,
      [jax.device_put(view(shard.data), shard.device) for shard in x.addressable_shards])


def _put(
    out: jax.Array, pieces: list[Piece], blocks: list[np.ndarray], starts: np.ndarray,
    shape: tuple[int, ...], layout: Layout, place: NamedSharding | None, dtype: np.dtype,
) -> jax.Array:
  """`out`, which is donated, with a block of `shape` in place on each device."""
  arrays = [block.reshape(shape) for block in blocks]
  order = layout.order
  if _on_cpu():
    # Transposed on the way: XLA's own program for that is ten times slower on a CPU.
    arrays = [x.transpose(np.argsort(order)) for x in arrays]
    order = tuple(range(len(order)))
  sent = [jax.device_put(x, piece.device) for x, piece in zip(arrays, pieces, strict=True)]
  if place is None:
    return _put_on_one(out, sent[0], starts, order, dtype)
  spec = PartitionSpec(*(place.spec[d] for d in order))
  # Over the cut dimensions the blocks of all devices make up one array.
  whole = tuple(
      n * (layout.shape[d] // layout.local[d])
      for n, d in zip(sent[0].shape, order, strict=True))
  block = jax.make_array_from_single_device_arrays(whole, NamedSharding(place.mesh, spec), sent)
  return _put_on_mesh(place.mesh, place.spec, spec, order, dtype)(out, block, starts)


def _put_block(out, block, starts, order, dtype):
  x = block.transpose(np.argsort(order)).astype(dtype)
  if out.dtype != dtype:
    x = jax.lax.bitcast_convert_type(x, out.dtype)
  return jax.lax.dynamic_update_slice(out, x, list(starts))


_put_on_one = jax.jit(_put_block, static_argnums=(3, 4), donate_argnums=0)


@functools.cache
def _put_on_mesh(
    mesh: Mesh, out_spec: PartitionSpec, spec: PartitionSpec, order: tuple[int, ...],
    dtype: np.dtype,
):
  """`_put_block` on every device by itself: nothing is sent between them."""
  local = jax.shard_map(
      functools.partial(_put_block, order=order, dtype=dtype), mesh=mesh,
      in_specs=(out_spec, spec, PartitionSpec()), out_specs=out_spec, check_vma=False)
  return jax.jit(local, donate_argnums=0)


def check_tensors(folder: Path, stored: Mapping[str, StoredTensor], c: ModelConfig) -> None:
  """Every tensor of the model is there, in shape and type, and no other; else InputError."""
  expected = tensor_shapes(c)
  head = TENSORS[c.family]['head'].name
  missing = [name for name in expected if name not in stored]
  if missing:
    raise InputError(
        f'tensor {missing[0]!r} is missing', where=folder, expected=f'{len(expected)} tensors',
        found=f'{len(missing)} of them missing',
        fix='Set "tie_word_embeddings": true in config.json if the output matrix is the embedding'
        if missing == [head] else 'Copy all weight files again, or correct config.json')
  # Types before what is there besides: quantised weights come with scales.
  for name in expected:
    found = stored[name]
    if found.dtype not in FLOATS:
      raise InputError(
          f'tensor {name!r} has an unsupported type', where=found.file,
          expected=' or '.join(FLOATS), found=found.dtype,
          fix='Use a checkpoint with unquantised weights')
  extra = [
      name for name in sorted(stored)
      if name not in expected and not (c.tie_embeddings and name == head)
      and not DERIVED.fullmatch(name)]
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


def _check_tied_head(
    stored: Mapping[str, StoredTensor], read: ReadTensor, c: ModelConfig) -> None:
  """A tied model may carry its output matrix as well, if it is the embedding."""
  head, embedding = (TENSORS[c.family][path].name for path in ('head', 'embedding'))
  if head not in stored:
    return
  same = stored[head].shape == stored[embedding].shape and stored[head].dtype in FLOATS
  n, width = stored[embedding].shape
  steps = max(1, BLOCK_BYTES // (4 * width))
  for first in range(0, n if same else 0, steps):
    one, other = (
        _read_rows(read, name, FLOATS[stored[name].dtype], width,
                   (first, min(first + steps, n)), (0, width)) for name in (head, embedding))
    same = same and np.array_equal(one, other)
  if not same:
    raise InputError(
        f'{CONFIG} ties the output matrix to the embedding, but {head!r} differs from it',
        where=stored[head].file, expected=f'no {head!r}, or a copy of {embedding!r}',
        found='other values', fix='Set "tie_word_embeddings": false in config.json')


def _check_divisible(path: str, spec: ParamSpec, mesh: Mesh) -> None:
  try:
    sharding.stored(mesh, spec.axes).shard_shape(spec.shape)
  except ValueError as e:
    raise InputError(
        f'the mesh does not divide parameter {path!r}', where='mesh',
        expected=f'sizes that divide {dict(zip(spec.axes, spec.shape, strict=True))}',
        found=dict(mesh.shape), fix='Change --mesh') from e
