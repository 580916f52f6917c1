"""Adam with 8-bit moments (Dettmers et al. 2022): a quarter of the memory of float32 ones.

Each block of values along the last dimension is divided by its largest and rounded to the nearest
value of a dynamic code book: decades of 1, 2, 4, ... equal cells from 0.1 to 1, the finest for the
largest values (the paper's section 1.3). Of the second moment the root is kept, which is what
divides the update, and no root that is positive becomes 0: a small one would else turn a step into
m / eps. Where a leaf is small or has no even blocks it stays float32.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxrl.errors import InputError

SMALLEST_LEAF = 4096        # values; fewer save nothing worth their rounding (the paper's choice)
SMALLEST_BLOCK = 16         # one scale of 4 bytes per 16 codes is 2 bits a value


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Blocks:
  """Values as code book entries times the scale of their block; both lie as the values would."""

  codes: jax.Array            # [..., n] int8 (signed) or uint8
  scales: jax.Array           # [..., n / block] float32


class Adam8bitState(NamedTuple):
  steps: jax.Array            # [] int32
  mu: Any                     # per parameter `Blocks`, or float32 [...]
  nu: Any                     # the same, of roots where they are `Blocks`


def scale_by_adam8bit(
    b1: float, b2: float, eps: float = 1e-8, *, block: int = 256
) -> optax.GradientTransformation:
  """`optax.scale_by_adam` whose moments rest as `Blocks` between updates.

  Raises:
    InputError: when it starts on parameters that a mesh splits inside a block.
  """
  adam = optax.scale_by_adam(b1=b1, b2=b2, eps=eps)

  def init(params):
    for path, p in jax.tree.leaves_with_path(params):
      check_layout(jax.tree_util.keystr(path, simple=True, separator='/'), p, block)
    fresh = adam.init(params)

    def rest(moment, signed):
      size = block_of(moment.shape, block)
      return moment if size is None else encode(moment, size, signed=signed)

    mu, nu = (jax.tree.map(functools.partial(rest, signed=signed), moments)
              for moments, signed in ((fresh.mu, True), (fresh.nu, False)))
    return Adam8bitState(fresh.count, mu, nu)

  def update(grads, state, params=None):
    del params

    def one(g, mu, nu):
      direction, new = adam.update(
          g, optax.ScaleByAdamState(state.steps, _decoded(mu), _decoded(nu)))
      return direction, _rested_like(mu, new.mu), _rested_like(nu, new.nu)

    def leaf(g, mu, nu):
      if not isinstance(mu, Blocks) or g.ndim < 3:
        return one(g, mu, nu)
      # Stacked layers one after another: wide moments of one layer exist at a time.
      return jax.lax.map(lambda xs: one(*xs), (g, mu, nu))

    found = jax.tree.map(leaf, grads, state.mu, state.nu)
    directions, mu, nu = (
        jax.tree.map(lambda _, one, n=n: one[n], grads, found) for n in range(3))
    return directions, Adam8bitState(optax.safe_increment(state.steps), mu, nu)

  return optax.GradientTransformation(init, update)


def block_of(shape: tuple[int, ...], block: int) -> int | None:
  """Values per block: the largest divisor of the last dimension up to `block`; None: float32."""
  size = 1
  for n in shape:
    size *= n
  if size < SMALLEST_LEAF:
    return None
  largest = max(b for b in range(1, min(block, shape[-1]) + 1) if shape[-1] % b == 0)
  return largest if largest >= min(SMALLEST_BLOCK, block) else None


def check_layout(name: str, p: jax.Array, block: int) -> None:
  """Raises InputError where a mesh splits the last dimension inside a block.

  The block does not follow the mesh, so that any mesh takes the same steps and checkpoints fit all.
  """
  size, sharding = block_of(p.shape, block), jax.typeof(p).sharding
  if size is None or not sharding.spec:
    return
  axes = sharding.spec[-1]
  parts = 1
  for axis in (axes,) if isinstance(axes, str) else axes or ():
    parts *= sharding.mesh.shape[axis]
  if (p.shape[-1] // parts) % size:
    raise InputError(
        'the mesh splits blocks of 8-bit moments', where=f'--moment_block, {name}',
        expected=f'a divisor of the {p.shape[-1] // parts} values that each of {parts} devices '
                 'has of a row', found=size, fix='Choose a smaller one, such as 64')


def encode(
    x: jax.Array,             # [..., n] float32; not negative unless signed
    block: int,               # divides n
    *,
    signed: bool,
) -> Blocks:
  """Each value as the code of the cell it falls into, at most half a cell away."""
  bits = 7 if signed else 8
  parts = x.reshape(*x.shape[:-1], x.shape[-1] // block, block)
  # The largest of a block is the centre of the last cell, so that either sign of it is exact.
  scales = jnp.max(jnp.abs(parts), axis=-1) / _centre(2 ** bits - 1, bits)
  divisor = jnp.where(scales > 0, scales, 1.0)[..., None]
  size = jnp.abs(parts) / divisor
  cells, tens = jnp.ones_like(size), jnp.full_like(size, 10.0 ** (bits - 1))
  for decade in range(1, bits):
    above = size > 10.0 ** (decade - bits)
    cells = jnp.where(above, 2.0 ** decade, cells)
    tens = jnp.where(above, 10.0 ** (bits - 1 - decade), tens)
  cell = jnp.clip(jnp.floor((size * tens - 0.1) / 0.9 * cells), 0, cells - 1)
  vanishes = size < 0.5 * _centre(1, bits) if signed else size == 0
  codes = jnp.where(vanishes, 0.0, cells + cell)
  codes = (jnp.sign(parts) * codes).astype(jnp.int8) if signed else codes.astype(jnp.uint8)
  return Blocks(codes.reshape(x.shape), scales)


def decode(blocks: Blocks) -> jax.Array:   # [..., n] float32
  """The centre of each code's cell times the scale of its block."""
  codes, scales = blocks.codes, blocks.scales
  signed = codes.dtype == jnp.int8
  bits = 7 if signed else 8
  parts = codes.reshape(*scales.shape, codes.shape[-1] // scales.shape[-1]).astype(jnp.float32)
  n = jnp.abs(parts)
  cells, tens = jnp.ones_like(n), jnp.full_like(n, 10.0 ** (1 - bits))
  for decade in range(1, bits):
    cells = jnp.where(n >= 2 ** decade, 2.0 ** decade, cells)
    tens = jnp.where(n >= 2 ** decade, 10.0 ** (decade + 1 - bits), tens)
  size = tens * (0.1 + 0.9 * (n - cells + 0.5) / cells)
  return (jnp.sign(parts) * size * scales[..., None]).reshape(codes.shape)


def _centre(code: int, bits: int) -> float:
  """Value of a positive code: decade d has the 2^d codes from 2^d, up to 10^(d + 1 - bits)."""
  decade = code.bit_length() - 1
  return 10.0 ** (decade + 1 - bits) * (0.1 + 0.9 * (code - 2 ** decade + 0.5) / 2 ** decade)


def _rested_like(old: Blocks | jax.Array, moment: jax.Array) -> Blocks | jax.Array:
  if not isinstance(old, Blocks):
    return moment
  block, signed = old.codes.shape[-1] // old.scales.shape[-1], old.codes.dtype == jnp.int8
  return encode(moment if signed else jnp.sqrt(moment), block, signed=signed)


def _decoded(rested: Blocks | jax.Array) -> jax.Array:
  if not isinstance(rested, Blocks):
    return rested
  moment = decode(rested)
  return moment if rested.codes.dtype == jnp.int8 else moment * moment
