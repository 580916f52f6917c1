"""Sums and counts that travel separately until the whole batch has been seen."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Mean:
  """A mean not yet divided; adding two gives the mean of their union."""

  total: jax.Array | np.ndarray      # [] float32, of numpy where it has left the devices
  count: jax.Array | np.ndarray      # [] float32

  def __add__(self, other: Mean) -> Mean:
    return Mean(self.total + other.total, self.count + other.count)

  def value(self) -> jax.Array:
    """total / count; 0 when nothing was counted."""
    return jnp.where(self.count > 0, self.total / jnp.where(self.count > 0, self.count, 1), 0.0)


def mean_over(values: jax.Array, keep: jax.Array) -> Mean:
  """Mean of `values` where `keep`; what is not kept may be nan and leaks nowhere."""
  total = jnp.sum(jnp.where(keep, values, 0), dtype=jnp.float32)
  return Mean(total, jnp.sum(keep, dtype=jnp.float32))
