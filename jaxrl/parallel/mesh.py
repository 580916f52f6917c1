"""The device mesh: made in one place, with its axis types stated."""

from __future__ import annotations

import contextlib
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
    InputError: the sizes do not multiply to the number of devices, or would split parameters
      between slices.
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
  return jax.sharding.Mesh(
      _placed((data, fsdp, sequence, tensor), devices), AXES, axis_types=explicit)


def _placed(sizes: tuple[int, int, int, int], devices: Sequence[jax.Device]) -> np.ndarray:
  """The devices laid out by `sizes`; between slices, whose network is slow, lies `data` alone."""
  # Hosts of GPUs are slices too, but fast enough between each other to split parameters.
  slices = len({getattr(d, 'slice_index', None) or 0 for d in devices if d.platform == 'tpu'})
  data, *inner = sizes
  # Sizes that are no product of the sides of a torus split one of its sides.
  if slices <= 1:
    return mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
  if data % slices:
    raise InputError(
        'parameters would be split between slices, over the network', where='mesh',
        expected=f'data to be a multiple of the {slices} slices', found=f'data={data}',
        fix=f'Set the first number of --mesh to {slices}')
  return mesh_utils.create_hybrid_device_mesh(
      (data // slices, *inner), (slices, 1, 1, 1), devices, allow_split_physical_axes=True)


def on_own_device() -> contextlib.AbstractContextManager:
  """A context for programs of this process alone, whatever mesh of several processes is set."""
  return jax.set_mesh(make_mesh(devices=jax.local_devices()[:1]))


def ways(mesh: jax.sharding.Mesh) -> int:
  """How many parts the rows of a batch are split into."""
  return mesh.shape['data'] * mesh.shape['fsdp']


def rollout_mesh(mesh: jax.sharding.Mesh, tensor: int | None = None) -> jax.sharding.Mesh:
  """The same devices in the same order, as ('data', 'tensor') for sampling.

  Of several processes each has a mesh of its own devices alone, and samples by itself.

  Args:
    mesh: that of training.
    tensor: devices that share one copy of the parameters; None takes the tensor axis of `mesh`.

  Raises:
    InputError: the devices do not divide by `tensor`.
  """
  tensor = mesh.shape['tensor'] if tensor is None else tensor
  devices = np.asarray(mesh.devices).reshape(-1)
  of = ''
  if jax.process_count() > 1:
    devices = np.array([d for d in devices if d.process_index == jax.process_index()])
    of = ' of one process: parameters are not split over processes while sampling'
  if tensor < 1 or devices.size % tensor:
    raise InputError('the devices cannot be shared so', where='--rollout_tensor',
                     expected=f'a divisor of {devices.size} devices{of}', found=tensor)
  # Auto: all that runs on it is manual (`shard_map`), but for copies between layouts.
  auto = (jax.sharding.AxisType.Auto,) * len(ROLLOUT_AXES)
  return jax.sharding.Mesh(devices.reshape(-1, tensor), ROLLOUT_AXES, axis_types=auto)
