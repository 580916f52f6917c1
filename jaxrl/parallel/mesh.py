"""The device mesh: made in one place, with its axis types stated."""

from __future__ import annotations

from collections.abc import Sequence

import jax

from jaxrl.errors import InputError

AXES = ('data', 'fsdp', 'tensor')


def make_mesh(
    *,
    data: int = 1,
    fsdp: int | None = None,
    tensor: int = 1,
    devices: Sequence[jax.Device] | None = None,
) -> jax.sharding.Mesh:
  """A mesh with axes ('data', 'fsdp', 'tensor'), all Explicit.

  Args:
    data: replicas of the parameters.
    fsdp: devices that share one copy of the parameters; None takes all that remain.
    tensor: devices that share each matrix product by heads and mlp columns.
    devices: defaults to `jax.devices()`.

  Raises:
    InputError: the sizes do not multiply to the number of devices.
  """
  devices = list(jax.devices() if devices is None else devices)
  if data < 1 or tensor < 1 or (fsdp is not None and fsdp < 1):
    raise InputError(
        'mesh sizes must be positive', where='mesh',
        found=f'data={data}, fsdp={fsdp}, tensor={tensor}',
        fix='Use --mesh=data,fsdp,tensor with positive whole numbers')
  if fsdp is None:
    fsdp = max(len(devices) // (data * tensor), 1)
  if data * fsdp * tensor != len(devices):
    raise InputError(
        'the mesh does not use every device once', where='mesh',
        expected=f'data * fsdp * tensor = {len(devices)} devices',
        found=f'{data} * {fsdp} * {tensor} = {data * fsdp * tensor}',
        fix='Change --mesh, or leave it out to put all devices on fsdp')
  explicit = (jax.sharding.AxisType.Explicit,) * len(AXES)
  return jax.make_mesh((data, fsdp, tensor), AXES, axis_types=explicit, devices=devices)
