"""Work lists of ragged rows: one entry per stretch of keys that a row of queries has to see.

A kernel that walks such a list does as many steps as there is work, whatever the longest row, and
reads which row and keys a step is about from the chip's scalar memory.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Work:
  """Units of `size` keys each, row by row, in two parts of about equal length.

  The parts are for chips of two cores; a row is never in both. Unit u is of row `row[u]`, and its
  keys are those from (u - begin[row]) * size on.
  """

  row: jax.Array              # [U] int32; entries from total on are not used
  begin: jax.Array            # [A] int32
  low: jax.Array              # [A] int32, first key that is seen
  high: jax.Array             # [A] int32, end of those that are seen
  border: jax.Array           # [] int32, units of the first part
  total: jax.Array            # [] int32
  longest: jax.Array          # [] int32, units of the longer part
  size: int = dataclasses.field(metadata={'static': True})


def work_list(
    low: jax.Array,           # [A] int32
    high: jax.Array,          # [A] int32, at most `keys`
    *,
    keys: int,
    size: int,
) -> Work:
  """Units for the keys low .. high - 1 of every row; none where low >= high."""
  first = low // size
  units = jnp.where(low < high, -(-high // size) - first, 0)
  end = jnp.cumsum(units, dtype=jnp.int32)
  total = end[-1]
  number = jnp.arange(low.shape[0] * -(-keys // size), dtype=jnp.int32)
  row = jnp.sum(number[:, None] >= end[None], axis=1, dtype=jnp.int32)
  border = end[jnp.argmin(jnp.abs(2 * end - total))]
  return Work(
      jnp.minimum(row, low.shape[0] - 1), end - units - first, low, high, border, total,
      jnp.maximum(border, total - border), size)
