"""The device mesh: made in one place, with its axis types stated."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import numpy as np
from jax.experimental import mesh_utils

from jaxrl.errors import InputError
from jaxrl.parallel.sharding import ROLLOUT_AXES

AXES = ('data', 'fsdp', 'sequence', 'tensor')


def make_mesh(
    *,
    data: int = 1,
    fsdp: int | None = None,
    tensor: int = 1,
    sequence: int = 1,
    devices: Sequence[jax.Device] | None = None,
) -> jax.sharding.Mesh:
  """A mesh with axes ('data', 'fsdp', 'sequence', 'tensor'), all Explicit.

  Args:
    data: replicas of the parameters.
    fsdp: devices that share one copy of the parameters; None takes all that remain.
    tensor: devices that share each matrix product by heads and mlp columns.
    sequence: devices that share each row, for rows too long for one; also split the parameters.
    devices: defaults to `jax.devices()`.

  Raises:
    InputError: the sizes do not multiply to the number of devices.
  """
  devices = list(jax.devices() if devices is None else devices)
  if data < 1 or tensor < 1 or sequence < 1 or (fsdp is not None and fsdp < 1):
    raise InputError(
        'mesh sizes must be positive', where='mesh',
        found=f'data={data}, fsdp={fsdp}, tensor={tensor}, sequence={sequence}',
        fix='Use --mesh=data,fsdp,tensor,sequence with positive whole numbers')
  if fsdp is None:
    fsdp = max(len(devices) // (data * tensor * sequence), 1)
  product = data * fsdp * tensor * sequence
  if product != len(devices):
    raise InputError(
        'the mesh does not use every device once', where='mesh',
        expected=f'data * fsdp * tensor * sequence = {len(devices)} devices',
        found=f'{data} * {fsdp} * {tensor} * {sequence} = {product}',
        fix='Change --mesh, or leave it out to put all devices on fsdp')
  explicit = (jax.sharding.AxisType.Explicit,) * len(AXES)
  # Sizes that are no product of the sides of a torus split one of its sides.
  placed = mesh_utils.create_device_mesh(
      (data, fsdp, sequence, tensor), devices, allow_split_physical_axes=True)
  return jax.sharding.Mesh(placed, AXES, axis_types=explicit)


def ways(mesh: jax.sharding.Mesh) -> int:
  """How many parts the rows of a batch are split into."""
  return mesh.shape['data'] * mesh.shape['fsdp']


def rollout_mesh(mesh: jax.sharding.Mesh, tensor: int | None = None) -> jax.sharding.Mesh:
  """The same devices in the same order, as ('data', 'tensor') for sampling.

  Args:
    mesh: that of training.
    tensor: devices that share one copy of the parameters; None takes the tensor axis of `mesh`.

  Raises:
    InputError: the devices do not divide by `tensor`.
  """
  tensor = mesh.shape['tensor'] if tensor is None else tensor
  if tensor < 1 or mesh.size % tensor:
    raise InputError('the devices cannot be shared so', where='--rollout_tensor',
                     expected=f'a divisor of {mesh.size} devices', found=tensor)
  # Auto: all that runs on it is manual (`shard_map`), but for copies between layouts.
  auto = (jax.sharding.AxisType.Auto,) * len(ROLLOUT_AXES)
  return jax.sharding.Mesh(
      np.asarray(mesh.devices).reshape(-1, tensor), ROLLOUT_AXES, axis_types=auto)
