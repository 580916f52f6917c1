"""Rows of the embedding table, whatever splits the table and the tokens."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxrl.parallel.sharding import (
    ACTIVATION,
    STORED,
    current_spec,
    explicit_mesh,
    manual_axis,
    shard,
)
from kernels import varying


def look_up(
    table: jax.Array,         # [V, D], as it is stored
    ids: jax.Array,           # [B, T] int32
    size: int,                # V of the whole table
) -> jax.Array:               # [B, T, D]
  """table[ids], rows and length split as activations are.

  Where devices share the features of the table each looks up its features of the tokens of all of
  them, and they are exchanged: what travels is as large as the activations, not as the table, and
  the gradient of the table is nowhere whole. That gradient is added up in float32: a common token
  occurs thousands of times in a batch, and sums of bfloat16 stop growing at a few hundred.
  """
  if explicit_mesh():
    return _on_each_device(table, ids)
  if table.shape[0] == size:
    return _rows(table, ids)
  axis = manual_axis('vocab')
  assert axis is not None, (table.shape, size)
  local = ids - table.shape[0] * jax.lax.axis_index(axis)
  mine = (local >= 0) & (local < table.shape[0])
  rows = table[jnp.where(mine, local, 0)]
  return jax.lax.psum(jnp.where(mine[..., None], rows, jnp.zeros((), rows.dtype)), axis)


def _on_each_device(table: jax.Array, ids: jax.Array) -> jax.Array:
  features = current_spec(('embed',), STORED)[0]
  tokens = current_spec(('batch', 'length'), ACTIVATION)

  def part(table, ids):
    if features is None:
      return _rows(*varying.alike((table, ids)))
    every = jax.lax.all_gather(ids, features, axis=0)                    # [n, B, T]
    rows = _rows(*varying.alike((table, every)))                         # [n, B, T, D / n]
    return jax.lax.all_to_all(rows, features, split_axis=0, concat_axis=3, tiled=True)[0]

  return jax.shard_map(
      part, in_specs=(current_spec((None, 'embed'), STORED), tokens),
      out_specs=current_spec(('batch', 'length', None), ACTIVATION),
  )(shard(table, None, 'embed', rules=STORED), shard(ids, 'batch', 'length'))


@jax.custom_vjp
def _rows(table: jax.Array, ids: jax.Array) -> jax.Array:
  return table[ids]


def _rows_forward(table, ids):
  return table[ids], (ids, table)


def _rows_backward(saved, cotangent):
  ids, table = saved
  total = jnp.zeros_like(table, jnp.float32).at[ids].add(cotangent.astype(jnp.float32))
  return total.astype(table.dtype), None


_rows.defvjp(_rows_forward, _rows_backward)
