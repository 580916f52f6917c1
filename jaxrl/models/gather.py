"""Parts of an array that lies on many devices, on the host: on every host where there are several.

One program serves all parts of an array; what the devices hold besides is the part.
"""

from __future__ import annotations

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec


def gather_place(x: jax.Array | np.ndarray, place: tuple[int, ...]) -> np.ndarray:
  """x[place]; every host has to take part."""
  if not isinstance(x, jax.Array) or (not place and x.is_fully_addressable):
    return np.asarray(x)[place]
  one = _slice(x, np.asarray(place, np.int32), (1,) * len(place), _sharding(x))
  return np.asarray(one).reshape(x.shape[len(place):])


def gather_rows(x: jax.Array | np.ndarray, first: int, steps: int) -> np.ndarray:
  """x[first:first + steps]; every host has to take part."""
  if not isinstance(x, jax.Array) or (steps == x.shape[0] and x.is_fully_addressable):
    return np.asarray(x)[first:first + steps]
  return np.asarray(_slice(x, np.array([first], np.int32), (steps,), _sharding(x)))


def _sharding(x: jax.Array) -> NamedSharding | None:
  return x.sharding if isinstance(x.sharding, NamedSharding) else None


@jax.jit(static_argnums=(2, 3))
def _slice(x, begin, sizes, sharding):
  """x[begin:begin + sizes] over the leading dimensions, whole on every device."""

  def lay_out(x, spec):
    if sharding is None:
      return x
    place = NamedSharding(sharding.mesh, spec)
    is_explicit = any(t == AxisType.Explicit for t in sharding.mesh.axis_types)
    return jax.sharding.reshard(x, place) if is_explicit else (
        jax.lax.with_sharding_constraint(x, place))

  if sharding is not None:
    # A slice of a dimension that is split over devices is not defined: those come together first.
    x = lay_out(x, PartitionSpec(*[None] * len(sizes), *sharding.spec[len(sizes):]))
  for d, size in enumerate(sizes):
    x = jax.lax.dynamic_slice_in_dim(x, begin[d], size, d)
  return lay_out(x, PartitionSpec())
