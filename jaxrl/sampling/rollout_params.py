"""Parameters as the engine reads them: in the compute dtype, laid out for sampling.

Masters stay where they are. The copy is filled block by block, cast before it travels, so that
beyond masters and copy no more than `2 * block_bytes` are held, or twice the largest matrix outside
the layers where that is more; there is no second copy in float32.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxrl.models.config import ModelConfig
from jaxrl.models.lora import lora_specs
from jaxrl.models.params import Params, ParamSpec, decoder_specs, is_spec
from jaxrl.models.storage import Int8
from jaxrl.parallel.sharding import rollout_spec

BLOCK_BYTES = 256 * 2**20


def rollout_specs(params: Params, c: ModelConfig, mesh: Mesh) -> Any:
  """How each array of `params` is split over `mesh` while sampling."""
  specs = decoder_specs(c) | ({'lora': lora_specs(c)} if 'lora' in params else {})

  def one(s: ParamSpec, x) -> Any:
    whole = rollout_spec(mesh, s.axes, s.shape)
    if not isinstance(x, Int8):
      return whole
    kept = PartitionSpec(*(
        None if n - len(whole) in s.summed else axis for n, axis in enumerate(whole)))
    return Int8(whole, kept)    # type: ignore[arg-type]

  return jax.tree.map(one, specs, params, is_leaf=is_spec)


def rollout_params(
    params: Params, c: ModelConfig, mesh: Mesh, dtype: str, *, block_bytes: int = BLOCK_BYTES
) -> Params:
  """`params` for an engine on `mesh`, which is `rollout_mesh` of the mesh that they lie on.

  Weights stored as int8 stay so. An array that already is what is asked for is not copied.
  """
  def one(x, spec):
    if isinstance(x, Int8):
      return Int8(_moved(x.values, NamedSharding(mesh, spec.values), x.values.dtype, block_bytes),
                  _moved(x.scale, NamedSharding(mesh, spec.scale), x.scale.dtype, block_bytes))
    return _moved(x, NamedSharding(mesh, spec), jnp.dtype(dtype), block_bytes)

  return jax.tree.map(one, params, rollout_specs(params, c, mesh),
                      is_leaf=lambda x: isinstance(x, Int8))


def _moved(x: jax.Array, to: NamedSharding, dtype, block_bytes: int) -> jax.Array:
  x = jnp.asarray(x)
  if x.dtype == dtype and x.sharding.is_equivalent_to(to, x.ndim):
    return x
  blocks = _blocks(x, to, dtype, block_bytes)
  if blocks == 1:
    return jax.device_put(x if x.dtype == dtype else _cast(x, dtype), to)
  with jax.set_mesh(to.mesh):
    made = _zeros(x.shape, dtype, to)
  rows = x.shape[0] // blocks
  for n in range(blocks):
    block = jax.device_put(_cast_rows(x, n * rows, rows, dtype), to)
    with jax.set_mesh(to.mesh):
      made = _put(made, block, n * rows)
  return made


def _blocks(x: jax.Array, to: NamedSharding, dtype, block_bytes: int) -> int:
  """Into how many equal blocks of rows an array is cut: the fewest that are small enough."""
  held = getattr(x.sharding, 'spec', ())
  if x.ndim < 2 or any(spec and spec[0] is not None for spec in (held, to.spec)):
    return 1                  # the rows are split over devices
  wanted = math.ceil(x.size * jnp.dtype(dtype).itemsize / block_bytes)
  return next(n for n in range(1, x.shape[0] + 1)
              if x.shape[0] % n == 0 and (n >= wanted or n == x.shape[0]))


@functools.partial(jax.jit, static_argnums=1)
def _cast(x, dtype):
  return x.astype(dtype)


@functools.partial(jax.jit, static_argnums=(2, 3))
def _cast_rows(x, start, rows, dtype):
  return jax.lax.dynamic_slice_in_dim(x, start, rows).astype(dtype)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _zeros(shape, dtype, to):
  return jax.lax.with_sharding_constraint(jnp.zeros(shape, dtype), to)


@functools.partial(jax.jit, donate_argnums=0)
def _put(whole, block, start):
  return jax.lax.dynamic_update_slice_in_dim(whole, block, start, 0)
