"""Names and layouts of the tensors of a checkpoint, one table per family.

A layout such as 'dnh->(nh)d' reads: our dimensions d, n, h are stored as a matrix with rows n * h
and columns d.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping

import jax
import numpy as np
from flax import traverse_util
from jax.experimental import multihost_utils

from jaxrl.models.config import ModelConfig
from jaxrl.models.model_folder import Index, ReadTensor
from jaxrl.models.params import Params, decoder_specs


@dataclasses.dataclass(frozen=True)
class Stored:
  """Where one parameter lies in a checkpoint; '{layer}' in the name is the leading axis."""

  name: str
  layout: str


LLAMA: Mapping[str, Stored] = {
    'embedding': Stored('model.embed_tokens.weight', 'vd->vd'),
    'layers/attention_norm': Stored('model.layers.{layer}.input_layernorm.weight', 'd->d'),
    'layers/q': Stored('model.layers.{layer}.self_attn.q_proj.weight', 'dnh->(nh)d'),
    'layers/k': Stored('model.layers.{layer}.self_attn.k_proj.weight', 'dkh->(kh)d'),
    'layers/v': Stored('model.layers.{layer}.self_attn.v_proj.weight', 'dkh->(kh)d'),
    'layers/o': Stored('model.layers.{layer}.self_attn.o_proj.weight', 'nhd->d(nh)'),
    'layers/mlp_norm': Stored('model.layers.{layer}.post_attention_layernorm.weight', 'd->d'),
    'layers/gate': Stored('model.layers.{layer}.mlp.gate_proj.weight', 'df->fd'),
    'layers/up': Stored('model.layers.{layer}.mlp.up_proj.weight', 'df->fd'),
    'layers/down': Stored('model.layers.{layer}.mlp.down_proj.weight', 'fd->df'),
    'final_norm': Stored('model.norm.weight', 'd->d'),
    'head': Stored('lm_head.weight', 'dv->vd'),
}
TENSORS: Mapping[str, Mapping[str, Stored]] = {'llama': LLAMA}


def tensor_shapes(c: ModelConfig) -> dict[str, tuple[int, ...]]:
  """Name and shape of every tensor of a checkpoint, in the order of the model."""
  return {name: shape for name, shape, _, _ in _tensors(c)}


def named_tensors(params: Params, c: ModelConfig) -> Iterator[tuple[str, np.ndarray]]:
  """(name, array on the host) of every tensor of a checkpoint, one at a time.

  Where parameters are spread over several hosts, every host has to walk through it.
  """
  flat = traverse_util.flatten_dict(params, sep='/')
  specs = traverse_util.flatten_dict(decoder_specs(c), sep='/')
  shapes = {path: leaf.shape for path, leaf in flat.items()}
  expected = {path: spec.shape for path, spec in specs.items()}
  if shapes != expected:
    raise ValueError(f'parameters do not fit the configuration: {shapes} instead of {expected}')
  for name, _, path, layer in _tensors(c):
    leaf = flat[path] if layer is None else flat[path][layer]
    yield name, _to_stored(_to_host(leaf), TENSORS[c.family][path].layout)


def _tensors(c: ModelConfig) -> list[tuple[str, tuple[int, ...], str, int | None]]:
  """(name, stored shape, our path, layer) of every tensor, layer by layer."""
  specs = traverse_util.flatten_dict(decoder_specs(c), sep='/')
  table = {path: row for path, row in TENSORS[c.family].items() if path in specs}

  def row(path, layer=None):
    shape = specs[path].shape[0 if layer is None else 1:]
    name = table[path].name.format(layer=layer)
    return name, _stored_shape(shape, table[path].layout), path, layer

  stacked = [path for path in table if specs[path].axes[0] == 'layers']
  rows = [row(path) for path in table if path not in stacked]
  rows[1:1] = [row(path, layer) for layer in range(c.n_layers) for path in stacked]
  return rows


def _groups(layout: str) -> list[list[int]]:
  """For each stored dimension, those of ours that it is made of, slowest first."""
  ours, theirs = layout.split('->')
  return [[ours.index(x) for x in group.strip('()')] for group in re.findall(r'\(\w+\)|\w', theirs)]


def _stored_shape(shape: tuple[int, ...], layout: str) -> tuple[int, ...]:
  return tuple(math.prod(shape[d] for d in group) for group in _groups(layout))


def _to_stored(x: np.ndarray, layout: str) -> np.ndarray:
  order = [d for group in _groups(layout) for d in group]
  return np.ascontiguousarray(x.transpose(order).reshape(_stored_shape(x.shape, layout)))


def read_slice(
    read: ReadTensor, name: str, layout: str, shape: tuple[int, ...], index: Index) -> np.ndarray:
  """Our slice `index` of a tensor whose whole shape, in our dimensions, is `shape`."""
  bounds = [s.indices(n)[:2] for s, n in zip(index, shape, strict=True)]
  rows, expanded, rest = [], [], [slice(None)] * len(shape)
  for slowest, *faster in _groups(layout):
    # Rows are contiguous in the slowest dimension of a group; the others are cut after reading.
    start, stop = bounds[slowest]
    inner = math.prod(shape[d] for d in faster)
    rows.append(slice(start * inner, stop * inner))
    expanded += [stop - start, *(shape[d] for d in faster)]
    for d in faster:
      rest[d] = slice(*bounds[d])
  order = [d for group in _groups(layout) for d in group]
  return read(name, tuple(rows)).reshape(expanded).transpose(np.argsort(order))[tuple(rest)]


def _to_host(x: jax.Array) -> np.ndarray:
  if isinstance(x, jax.Array) and not x.is_fully_addressable:
    x = multihost_utils.process_allgather(x, tiled=True)
  return np.asarray(x)
