"""Records of the decoding cache: a private region per slot, and regions that slots share."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Quantised:
  """Keys or values in int8, each with its own scale; stands for values * scale."""

  values: jax.Array           # [..., H] int8
  scale: jax.Array            # [...] float32


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Own:
  """What each slot wrote itself: its n-th key is place n % B of block n // B.

  Blocks lie outside slots, so that a block of all slots is one stretch of memory: on CPUs that
  halves the time of reading it. Where a key lies depends on its slot alone, and so does the order
  in which a slot's attention is summed. Slot r sees its first live[r] keys; the last of them is at
  positions[r], the one before at positions[r] - 1, and so on.
  """

  k: jax.Array | Quantised    # [L, C, R, K, B, H]
  v: jax.Array | Quantised    # [L, C, R, K, B, H]
  live: jax.Array             # [R] int32, 0 .. C B


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Shared:
  """Keys and values stored once for all slots of a group: prompts, or a header of all prompts.

  `group` and `member` say where a slot is found in `members`, and `members` says the same from the
  other side; the two must agree.
  """

  k: jax.Array | Quantised    # [L, G, K, P, H]
  v: jax.Array | Quantised    # [L, G, K, P, H]
  length: jax.Array           # [G] int32, keys that are live
  first: jax.Array            # [G] int32, position of key 0; key j is at first + j
  members: jax.Array          # [G, m] int32, slots that read the group; R where there is none
  group: jax.Array            # [R] int32, group of the slot, or -1
  member: jax.Array           # [R] int32, its place in members[group]; anything where group is -1


def quantise(x: jax.Array) -> Quantised:
  """Symmetric int8 of x [..., H]: scale = max|x| / 127 of each vector; the error is scale / 2."""
  x = x.astype(jnp.float32)
  scale = jnp.max(jnp.abs(x), axis=-1) / 127
  divisor = jnp.where(scale > 0, scale, 1.0)[..., None]
  return Quantised(jnp.round(x / divisor).astype(jnp.int8), scale)


def widen(x: jax.Array | Quantised) -> jax.Array:
  """The float32 array that x stands for."""
  if isinstance(x, Quantised):
    return x.values.astype(jnp.float32) * x.scale[..., None]
  return x.astype(jnp.float32)
