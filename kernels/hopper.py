"""What the kernels for Hopper GPUs share: tiles in shared memory, products, rings of buffers.

A kernel is written for warpgroups of 128 threads. Products (`product`, `added`) take 64 rows by one
warpgroup; their results, and what is computed from them, lie in the registers in one layout, whose
rows and columns have vectors of their own (`row_vector`, `column_vector`).

The interpreter (`compat.gpu_interpreter`) runs kernels on a CPU. It knows no layouts, and of
products none of registers, with a transposed tile or added to something: for it the functions here
name no layout and multiply what they read. The rest of a kernel is the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels import compat

ROWS = 64                     # of one product by one warpgroup
SHARED_MEMORY = 227 * 1024    # bytes that one block of threads can have
SMALL = 8 * 1024              # of them for what is small: bounds, sums, barriers, alignment
LOG2_E = math.log2(math.e)
LOW = -1e30                   # finite: exp2(-inf - LOW) is 0 for a query that has seen nothing


def _nothing() -> None:
  pass


def tile(shape: tuple[int, ...], dtype: jax.typing.DTypeLike) -> Any:
  """Shared memory for operands of products, [..., rows, lanes], in the order these read it in."""
  bits = jnp.dtype(dtype).itemsize * 8
  swizzle = plgpu.find_swizzle(shape[-1] * bits, 'the lanes of a tile')
  return plgpu.SMEM(shape, dtype, transforms=(
      plgpu.TilingTransform((8, 8 * swizzle // bits)), plgpu.SwizzleTransform(swizzle)))


def stages(fixed: int, each: int, most: int) -> int:
  """How many buffers of `each` bytes fit beside `fixed` bytes, at most `most`."""
  found = min(most, (SHARED_MEMORY - SMALL - fixed) // each)
  if found < 1:
    raise ValueError(f'{fixed} + {each} bytes of shared memory; a block has {SHARED_MEMORY}')
  return found


def product(
    a: Any, b: Any, *, transposed: bool = False, meanwhile: Callable = _nothing
) -> jax.Array:               # [64, columns] float32
  """a @ b, or a @ b.T where `transposed`: `a` a tile [64, n] or registers, `b` a tile.

  `meanwhile` runs when the tensor cores have been given the work.
  """
  if compat.gpu_interpreted():
    out = _interpreted_product(a, b, transposed)
    meanwhile()
    return out

  def compute(accumulator):
    plgpu.wgmma(accumulator, a, compat.gpu_transposed(b) if transposed else b)
    meanwhile()
    return accumulator[...]
  return pl.run_scoped(compute, plgpu.ACC((ROWS, b.shape[0 if transposed else 1]), jnp.float32))


def added(
    total: jax.Array, a: Any, b: Any, *, meanwhile: Callable = _nothing
) -> jax.Array:
  """total + a @ b, summed in the registers that hold `total`."""
  if compat.gpu_interpreted():
    return total + product(a, b, meanwhile=meanwhile)

  def compute(accumulator):
    plgpu.wgmma(accumulator, a, b)
    meanwhile()
  return pl.run_state(compute)(plgpu.ACC.init(total))


def wait_for_buffer(done: Any, step: jax.Array, depth: int) -> None:
  """Until all have left the buffer of a ring that this step fills."""
  @pl.when(step >= depth)
  def _():
    plgpu.barrier_wait(done.at[step % depth])


def wait_for_last(barriers: tuple[Any, ...], steps: jax.Array, depth: int) -> None:
  """Until all have left all buffers: a block of threads ends with no arrival unseen."""
  for slot in range(depth):
    @pl.when(slot < steps)
    def _(slot=slot):
      for done in barriers:
        plgpu.barrier_wait(done.at[slot])


def matrix(columns: int, value: float) -> jax.Array:
  """[64, columns] float32 of one value, laid out as products are."""
  return _laid_out(jnp.full((ROWS, columns), value, jnp.float32), plgpu.Layout.WGMMA)


def matrix_of(ref: Any) -> jax.Array:
  """What a tile [64, columns] holds, in registers."""
  return _loaded(ref, plgpu.Layout.WGMMA)


def row_values(value: float) -> jax.Array:
  """[64] float32 of one value, one for each row of a product."""
  return _laid_out(jnp.full((ROWS,), value, jnp.float32), plgpu.Layout.WGMMA.reduce(1))


def row_vector(ref: Any) -> jax.Array:
  """What shared memory [64] holds for the rows of a product."""
  return _loaded(ref, plgpu.Layout.WGMMA.reduce(1))


def column_vector(ref: Any) -> jax.Array:
  """What shared memory [columns] holds for the columns of a product."""
  return _loaded(ref, plgpu.Layout.WGMMA.reduce(0))


def index(columns: int, axis: int) -> jax.Array:
  """Int32 [64, columns]: each element's row (axis 0) or column."""
  if compat.gpu_interpreted():
    return jax.lax.broadcasted_iota(jnp.int32, (ROWS, columns), axis)
  return plgpu.broadcasted_iota(jnp.int32, (ROWS, columns), axis, layout=plgpu.Layout.WGMMA)


def down(rows: jax.Array, columns: int) -> jax.Array:
  """[64] -> [64, columns], the value of its row everywhere."""
  return jax.lax.broadcast_in_dim(rows, (ROWS, columns), (0,))


def across(columns: jax.Array) -> jax.Array:
  """[columns] -> [64, columns], the value of its column everywhere."""
  return jax.lax.broadcast_in_dim(columns, (ROWS, columns.shape[0]), (1,))


def tanh(x: jax.Array) -> jax.Array:
  """1 - 2 / (1 + exp(2 x)), the quotient as a square of rsqrt, which is one instruction.

  The GPU's own tanh is off by 2^-11, and soft-capping multiplies by 50.
  """
  root = jax.lax.rsqrt(1.0 + jnp.exp2(x * (2 * LOG2_E)))
  return 1.0 - 2.0 * (root * root)


def _interpreted_product(a: Any, b: Any, transposed: bool) -> jax.Array:
  a, b = a if isinstance(a, jax.Array) else a[...], b[...]
  # Tensor cores read by the way that copies write: no fence is needed between them, as it would be
  # after these reads.
  plgpu.commit_smem()
  return jax.lax.dot_general(
      a, b, (((1,), (1 if transposed else 0,)), ((), ())), preferred_element_type=jnp.float32)


def _laid_out(x: jax.Array, layout: Any) -> jax.Array:
  return x if compat.gpu_interpreted() else plgpu.layout_cast(x, layout)


def _loaded(ref: Any, layout: Any) -> jax.Array:
  return ref[...] if compat.gpu_interpreted() else compat.gpu_load(ref, layout)
