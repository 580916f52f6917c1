"""Kernels for Hopper GPUs without one."""

import contextlib

import jax
from jax import export
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, use_abstract_mesh

from kernels import compat

KERNEL = 'mosaic_gpu_v2'      # the custom call that a kernel is in a lowered program


@contextlib.contextmanager
def interpreted():
  """Kernels run on the CPU here, and two accesses in no order to one place are an error."""
  from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call as interpreter
  interpreter.reset_gpu_interpret_mode_state()
  with compat.gpu_interpreter(detect_races=True):
    yield
  assert not interpreter.get_races().races_found


def lowered(function, *arguments, **axes):
  """The text of a program for H200s, one or a mesh with these axes; too large a kernel raises."""
  mesh = AbstractMesh(
      tuple(axes.values()), tuple(axes), axis_types=(AxisType.Auto,) * len(axes),
      abstract_device=AbstractDevice('NVIDIA H200', 132, 'gpu'))
  with use_abstract_mesh(mesh):
    exported = export.export(
        jax.jit(function), platforms=['cuda'],
        disabled_checks=[export.DisabledSafetyCheck.custom_call(KERNEL)])(*arguments)
  return exported.mlir_module()
