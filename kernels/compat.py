"""Where the versions of jax that are supported differ: here and nowhere else in `kernels`.

Importing Mosaic GPU takes 1.5 s, so only functions that need it do.
"""

from __future__ import annotations

import contextlib
from typing import Any

import jax
from jax._src import config as _config


def gpu_load(ref: Any, layout: Any) -> jax.Array:
  """What a reference in shared or global memory of a GPU holds, in a layout of registers."""
  from jax.experimental.pallas import mosaic_gpu as plgpu
  load: Any = plgpu.load
  if jax.__version_info__ < (0, 11):
    return load(ref, (), layout=layout)
  return load(ref, layout=layout)


def gpu_transposed(ref: Any) -> Any:
  """A tile in shared memory of a GPU with rows and columns exchanged; nothing moves."""
  from jax.experimental.pallas import mosaic_gpu as plgpu
  return ref.transpose((1, 0)) if hasattr(ref, 'transpose') else plgpu.transpose_ref(ref, (1, 0))


def gpu_interpreter(**options: Any) -> contextlib.AbstractContextManager[None]:
  """Inside of this, kernels for GPUs are traced for the interpreter, which runs them on a CPU."""
  from jax._src.pallas.mosaic_gpu.interpret import params  # public in jax 0.12
  return params.force_gpu_interpret_mode(params.InterpretGPUParams(**options))


def gpu_interpreted() -> bool:
  """Whether this is traced inside of `gpu_interpreter`."""
  from jax._src.pallas.mosaic_gpu.interpret import params
  on = _config.pallas_tpu_interpret_mode_context_manager.value
  return isinstance(on, params.InterpretGPUParams)
