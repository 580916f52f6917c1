"""Pieces of the TPU kernels: products, soft-capped and hidden scores, loops over heads."""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from kernels.attention.saved import Options
from kernels.attention.tpu_work import LANES

LOG2_E = math.log2(math.e)
HIDDEN = -2e30                # a hidden score; 2 ** (HIDDEN - anything a maximum can be) is 0
VMEM_LIMIT = 56 * 2**20       # bytes; v5p has 64 MiB for each core, v5e and v6e 128
UNROLLED = 1

transposed_b = ((1,), (1,))   # contracted dimensions of a b^T
transposed_a = ((0,), (0,))   # and of a^T b


def precision(x: jax.Array) -> jax.lax.Precision | None:
  """float32 is multiplied as float32: the matrix unit would round it to bfloat16."""
  return jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None


def dot(
    a: jax.Array,
    b: jax.Array,
    contracted: tuple[tuple[int], tuple[int]],
    precision: jax.lax.Precision | None,
) -> jax.Array:               # float32
  return jax.lax.dot_general(
      a, b, (contracted, ((), ())), precision=precision, preferred_element_type=jnp.float32)


def capped(score: jax.Array, options: Options) -> jax.Array:
  """Scores scaled and soft-capped, in units of log2."""
  if options.softcap is None:
    return score * (options.scale * LOG2_E)
  return options.softcap * LOG2_E * jnp.tanh(score * (options.scale / options.softcap))


def masked(score: jax.Array, keep: jax.Array) -> jax.Array:
  return jnp.where(keep, score, HIDDEN)


def lanes(x: jax.Array, width: int) -> jax.Array:
  """[rows, 128] with equal lanes -> [rows, width]."""
  return jnp.tile(x, (1, -(-width // LANES)))[:, :width]


def each_head(heads: int, body: Callable[[int | jax.Array], None]) -> None:
  if heads <= UNROLLED:
    for g in range(heads):
      body(g)
  else:
    jax.lax.fori_loop(0, heads, lambda g, _: body(g), None)
