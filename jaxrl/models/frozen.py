"""Models that are only read: a reference, a judge, whatever scores and is never trained."""

from __future__ import annotations

import functools
import os

import jax
import jax.numpy as jnp

from jaxrl.models.config import ModelConfig
from jaxrl.models.hugging_face_tensors import flat_specs
from jaxrl.models.load import load_params
from jaxrl.models.params import Params
from jaxrl.models.storage import is_quantised, quantise_weight

STORAGES = ('float32', 'bfloat16', 'int8')


def load_frozen(
    folder: str | os.PathLike, c: ModelConfig, *, mesh: jax.sharding.Mesh | None, storage: str
) -> Params:
  """`load_params` in one of STORAGES; int8 holds one weight at a time in float32.

  Raises:
    InputError: see `load_params`.
    ValueError: an unknown storage.
  """
  if storage not in STORAGES:
    raise ValueError(f'storage must be one of {list(STORAGES)}; found {storage!r}')
  if storage != 'int8':
    return load_params(folder, c, mesh=mesh, dtype=jnp.dtype(storage))
  specs = flat_specs(c)

  def pack(path: str, weight: jax.Array):
    if not is_quantised(path.rsplit('/', 1)[-1], specs[path]):
      return weight
    return _packed(weight, specs[path].summed)

  return load_params(folder, c, mesh=mesh, finish=pack)


@functools.partial(jax.jit, static_argnums=1, donate_argnums=0)
def _packed(weight: jax.Array, summed: tuple[int, ...]):
  return quantise_weight(weight, summed)
