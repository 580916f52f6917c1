"""Parameters as the engine reads them: in the compute dtype, laid out for sampling.

Masters stay where they are. The copy is filled block by block over the links between the devices,
cast before it travels; there is no second copy in float32.
"""

from __future__ import annotations

import contextlib
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

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
    kept = (None if n - len(whole) in s.summed else axis for n, axis in enumerate(whole))
    two: Any = (whole, PartitionSpec(*kept))
    return Int8(*two)

  return jax.tree.map(one, specs, params, is_leaf=is_spec)


def rollout_params(
    params: Params, c: ModelConfig, mesh: Mesh, dtype: str, *, block_bytes: int = BLOCK_BYTES
) -> Params:
  """`params` for an engine on `mesh`, which is `rollout_mesh` of the mesh that they lie on.

  Where they are spread over several processes all have to call this; blocks then come whole to
  every device of the mesh of training, and each process keeps what its own mesh wants of them.

  Weights stored as int8 stay so. An array that already is what is asked for is not copied. Beyond
  masters and copy a device holds no more than `2 * block_bytes` at any time, or twice the largest
  of what cannot be cut where that is more: one layer of a stack, an embedding or output matrix
  whose rows and columns are both split. Arrays that lie elsewhere (on the host) are first laid out
  whole, one at a time.
  """
  def one(x, spec):
    if isinstance(x, Int8):
      return Int8(_moved(x.values, NamedSharding(mesh, spec.values), x.values.dtype, block_bytes),
                  _moved(x.scale, NamedSharding(mesh, spec.scale), x.scale.dtype, block_bytes))
    return _moved(x, NamedSharding(mesh, spec), jnp.dtype(dtype), block_bytes)

  # Blocks go from one mesh to another: the mesh of training, if it is set, is not theirs.
  with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), ())):
    return jax.tree.map(one, params, rollout_specs(params, c, mesh),
                        is_leaf=lambda x: isinstance(x, Int8))


def _moved(x: jax.Array | np.ndarray, to: NamedSharding, dtype, block_bytes: int) -> jax.Array:
  held = _sharding_on(to, x)
  if held is None:
    x, held = jax.device_put(x, to), to
  assert isinstance(x, jax.Array)
  if held.is_equivalent_to(to, x.ndim):
    # The same buffers where nothing is cast, so that all parameters are on one mesh.
    return jax.device_put(x if x.dtype == dtype else _cast(x, dtype), to)
  axis, size = _cut(x.shape, jnp.dtype(dtype).itemsize, held.spec, to.spec, block_bytes)
  # Blocks of `beside` may stand next to `to` in one program.
  beside, mesh, spread = _beside(held), to.mesh, not x.is_fully_addressable
  assert isinstance(mesh, Mesh)

  def brought(bits):
    return _own_copies(bits, beside, to) if spread else jax.device_put(bits, beside)

  def on_target() -> contextlib.AbstractContextManager:
    # Of several processes the mesh of training, if it is set, has devices that are not here.
    return jax.set_mesh(mesh) if spread else contextlib.nullcontext()

  if size == x.shape[axis]:
    bits = brought(_as_bits(x, dtype))
    with on_target():
      return jax.device_put(_exchanged(bits, dtype, to), to)
  with on_target():
    made = _zeros(x.shape, dtype, to)
  for start in range(0, x.shape[axis], size):
    # The last block may reach back over the one before: slices and updates are clamped alike.
    block = brought(_block(x, start, size, axis, dtype))
    with on_target():
      # One at a time, however far the devices are behind.
      made = jax.block_until_ready(_fill(made, block, start, axis, to))
    del block
  return jax.device_put(made, to)     # the same buffers, their layout spelled as asked


def _beside(held: NamedSharding) -> NamedSharding:
  """The same layout on a mesh without Explicit axes."""
  axes = held.mesh.axis_names
  mesh = Mesh(held.mesh.devices, axes, axis_types=(AxisType.Auto,) * len(axes))
  return NamedSharding(mesh, held.spec)


def _own_copies(bits: jax.Array, here: NamedSharding, to: NamedSharding) -> jax.Array:
  """Bits that lie on devices of several processes, whole on every device of the mesh of `to`."""
  whole = _whole(jax.device_put(bits, here), NamedSharding(here.mesh, PartitionSpec()))
  return jax.make_array_from_single_device_arrays(
      bits.shape, NamedSharding(to.mesh, PartitionSpec()),
      [shard.data for shard in whole.addressable_shards])


def _sharding_on(to: NamedSharding, x: jax.Array | np.ndarray) -> NamedSharding | None:
  """The sharding of an array that lies on the devices of `to`, in the order of its mesh.

  Or of one that lies on those of other processes as well.
  """
  held = x.sharding if isinstance(x, jax.Array) else None
  if not isinstance(held, NamedSharding):
    return None
  if isinstance(x, jax.Array) and not x.is_fully_addressable:
    return held
  return held if (*held.mesh.devices.flat,) == (*to.mesh.devices.flat,) else None


def _cut(
    shape: tuple[int, ...], itemsize: int, held: PartitionSpec, to: PartitionSpec, block_bytes: int
) -> tuple[int, int]:
  """(axis, size) of the blocks of an array: along a dimension that no layout splits."""
  wanted = math.ceil(math.prod(shape) * itemsize / block_bytes)
  whole = [d for d in range(len(shape))
           if all(d >= len(spec) or spec[d] is None for spec in (held, to))]
  if wanted == 1 or not whole:
    return 0, shape[0]
  axis = next((d for d in whole if shape[d] >= wanted), max(whole, key=lambda d: shape[d]))
  return axis, max(shape[axis] // wanted, 1)


@functools.partial(jax.jit, static_argnums=1)
def _cast(x, dtype):
  return x.astype(dtype)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _zeros(shape, dtype, to):
  return jax.lax.with_sharding_constraint(jnp.zeros(shape, dtype), to)


# Blocks travel as bits: of floating numbers a compiler may move the cast behind the exchange, and
# then float32 travels.
@functools.partial(jax.jit, static_argnums=1)
def _as_bits(x, dtype):
  bits = jnp.dtype(f'uint{8 * jnp.dtype(dtype).itemsize}')
  return jax.lax.bitcast_convert_type(x.astype(dtype), bits)


@functools.partial(jax.jit, static_argnums=1)
def _whole(bits, place):
  return jax.lax.with_sharding_constraint(bits, place)


@functools.partial(jax.jit, static_argnums=(2, 3, 4))
def _block(x, start, size, axis, dtype):
  return _as_bits(jax.lax.dynamic_slice_in_dim(x, start, size, axis), dtype)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _exchanged(bits, dtype, to):
  bits = jax.lax.with_sharding_constraint(bits, to)
  return jax.lax.with_sharding_constraint(jax.lax.bitcast_convert_type(bits, dtype), to)


@functools.partial(jax.jit, static_argnums=(3, 4), donate_argnums=0)
def _fill(made, bits, start, axis, to):
  block = _exchanged(bits, made.dtype, to)
  made = jax.lax.dynamic_update_slice_in_dim(made, block, start, axis)
  return jax.lax.with_sharding_constraint(made, to)
