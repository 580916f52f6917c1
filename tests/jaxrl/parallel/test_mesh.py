"""Meshes: sizes, axis types, and what is refused."""

import jax
import pytest

from jaxrl.errors import InputError
from jaxrl.parallel.mesh import AXES, make_mesh


@pytest.mark.parametrize('sizes, shape', [
    ({}, (1, 8, 1, 1)),
    ({'data': 2}, (2, 4, 1, 1)),
    ({'data': 2, 'tensor': 2}, (2, 2, 1, 2)),
    ({'data': 8, 'fsdp': 1, 'tensor': 1}, (8, 1, 1, 1)),
    ({'tensor': 8}, (1, 1, 1, 8)),
    ({'sequence': 4, 'tensor': 2}, (1, 1, 4, 2)),
])
def test_sizes(sizes, shape):
  mesh = make_mesh(**sizes)
  assert tuple(mesh.shape[axis] for axis in AXES) == shape
  assert mesh.axis_names == AXES
  assert set(mesh.axis_types) == {jax.sharding.AxisType.Explicit}


def test_some_of_the_devices():
  devices = jax.devices()[2:6]
  mesh = make_mesh(data=2, devices=devices)
  assert mesh.shape['fsdp'] == 2 and set(mesh.devices.flat) == set(devices)


@pytest.mark.parametrize('sizes, message', [
    ({'data': 3}, 'every device once; expected .* = 8 devices; found 3 . 2 . 1 . 1 = 6'),
    ({'data': 4, 'fsdp': 4}, 'found 4 . 4 . 1 . 1 = 16'),
    ({'fsdp': 2, 'tensor': 2}, 'found 1 . 2 . 2 . 1 = 4'),
    ({'data': 16}, 'found 16 . 1 . 1 . 1 = 16'),
    ({'data': 0}, 'must be positive; found data=0'),
    ({'fsdp': -1}, 'must be positive; found data=1, fsdp=-1'),
    ({'tensor': 0}, 'must be positive'),
    ({'sequence': 0}, 'must be positive; found .*sequence=0'),
    ({'devices': []}, '= 0 devices'),
])
def test_sizes_that_do_not_fit_are_errors(sizes, message):
  with pytest.raises(InputError, match=f'^mesh: .*{message}'):
    make_mesh(**sizes)
