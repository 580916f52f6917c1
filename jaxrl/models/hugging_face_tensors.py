"""From the table of names to tensors: which of our weights each one of a checkpoint is made of."""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from collections.abc import Iterator

import jax
import numpy as np
from flax import traverse_util

from jaxrl.models.config import ModelConfig
from jaxrl.models.gather import gather_place
from jaxrl.models.hugging_face_names import TENSORS
from jaxrl.models.params import Params, ParamSpec, decoder_specs


@dataclasses.dataclass(frozen=True)
class Tensor:
  """One tensor of a checkpoint: some of our weights, one after the other along its dimension 0."""

  name: str
  shape: tuple[int, ...]
  paths: tuple[str, ...]               # ours that it holds; one, except where it is fused
  place: tuple[int, ...]               # where in their leading axes: (), (layer,), (layer, expert)


def tensors_of(c: ModelConfig) -> list[Tensor]:
  """Every tensor of a checkpoint, in the order of the model, layer by layer."""
  specs = flat_specs(c)
  table = {path: row for path, row in TENSORS[c.family].items() if path in specs}
  if table.keys() != specs.keys():
    raise ValueError(f'{c.family!r} has no name for {sorted(specs.keys() - table.keys())}')
  layers = [path for path in table if specs[path].axes[0] == 'layers']
  order = list(table)
  before, after = order[:order.index(layers[0])], order[order.index(layers[-1]) + 1:]

  def rows(path: str, layer: int | None) -> Iterator[Tensor]:
    row = table[path]
    paths = row.fused or (path,)
    if path != paths[0]:
      return                           # written with the first of them
    shape = stored_shape(specs[path], row.layout)
    shape = (sum(stored_shape(specs[p], table[p].layout)[0] for p in paths), *shape[1:])
    leading = leading_shape(specs[path], row.layout)
    for index in itertools.product(*map(range, leading[1:])):
      place = (() if layer is None else (layer,)) + index
      yield Tensor(place_name(row.name, place), shape, paths, place)

  return [
      *(x for path in before for x in rows(path, None)),
      *(x for layer in range(c.n_layers) for path in layers for x in rows(path, layer)),
      *(x for path in after for x in rows(path, None)),
  ]


def tensor_shapes(c: ModelConfig) -> dict[str, tuple[int, ...]]:
  """Name and shape of every tensor of a checkpoint, in the order of the model."""
  return {x.name: x.shape for x in tensors_of(c)}


def named_tensors(params: Params, c: ModelConfig) -> Iterator[tuple[str, np.ndarray]]:
  """(name, array on the host) of every tensor of a checkpoint, one at a time.

  Where parameters are spread over several hosts, every host has to walk through it.
  """
  flat = check_params(params, c)
  for x in tensors_of(c):
    yield x.name, to_host(flat, x, c)


def check_params(params: Params, c: ModelConfig) -> dict[str, jax.Array]:
  """The parameters by path; ValueError where they are not those of the configuration."""
  flat = traverse_util.flatten_dict(params, sep='/')
  shapes = {path: leaf.shape for path, leaf in flat.items()}
  expected = {path: spec.shape for path, spec in flat_specs(c).items()}
  if shapes != expected:
    raise ValueError(f'parameters do not fit the configuration: {shapes} instead of {expected}')
  return flat


def to_host(flat: dict[str, jax.Array], x: Tensor, c: ModelConfig) -> np.ndarray:
  """One tensor of the checkpoint, gathered from all devices; every host has to take part."""
  table = TENSORS[c.family]
  parts = [_to_stored(gather_place(flat[path], x.place), table[path].layout) for path in x.paths]
  return parts[0] if len(parts) == 1 else np.concatenate(parts)


def flat_specs(c: ModelConfig) -> dict[str, ParamSpec]:
  """Our parameters by path: 'embedding', 'layers/q', ..."""
  return traverse_util.flatten_dict(decoder_specs(c), sep='/')


def first_row(c: ModelConfig, path: str) -> int:
  """Where in its stored tensor our parameter begins; 0 except where it is fused."""
  table, specs = TENSORS[c.family], flat_specs(c)
  fused = table[path].fused
  before = fused[:fused.index(path)] if fused else ()
  return sum(stored_shape(specs[p], table[p].layout)[0] for p in before)


def place_name(name: str, place: tuple[int, ...]) -> str:
  """The name of the tensor at this place of the leading axes."""
  return name.format(**dict(zip(('layer', 'expert'), place)))


def leading_shape(spec: ParamSpec, layout: str) -> tuple[int, ...]:
  """Sizes of the axes that a checkpoint spreads over tensors: (), (L,) or (L, E)."""
  return spec.shape[:len(spec.shape) - layout.index('->')]


def groups(layout: str) -> list[list[int]]:
  """For each stored dimension, those of ours that it is made of, slowest first."""
  ours, theirs = layout.split('->')
  return [[ours.index(x) for x in group.strip('()')] for group in re.findall(r'\(\w+\)|\w', theirs)]


def stored_shape(spec: ParamSpec, layout: str) -> tuple[int, ...]:
  """The shape of one weight as a checkpoint holds it, without the leading axes."""
  shape = spec.shape[len(leading_shape(spec, layout)):]
  return tuple(math.prod(shape[d] for d in group) for group in groups(layout))


def _to_stored(x: np.ndarray, layout: str) -> np.ndarray:
  order = [d for group in groups(layout) for d in group]
  shape = tuple(math.prod(x.shape[d] for d in group) for group in groups(layout))
  return np.ascontiguousarray(x.transpose(order)).reshape(shape)
