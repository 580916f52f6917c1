"""Inside `jax.shard_map` the type of an array names the mesh axes over which its values vary."""

from __future__ import annotations

from typing import TypeVar

import jax

Tree = TypeVar('Tree')


def axes(x: jax.Array) -> frozenset:
  """The manual mesh axes that x varies over."""
  return frozenset(jax.typeof(x).manual_axis_type.varying)


def varying(x: jax.Array, over: frozenset) -> jax.Array:
  """x, said to vary over these axes too."""
  missing = tuple(over - axes(x))
  return jax.lax.pcast(x, missing, to='varying') if missing else x


def alike(tree: Tree) -> Tree:
  """All arrays said to vary over every axis that one of them varies over."""
  over = frozenset().union(*(axes(x) for x in jax.tree.leaves(tree)))
  return jax.tree.map(lambda x: varying(x, over), tree)


def out_struct(
    shape: tuple[int, ...], dtype: jax.typing.DTypeLike, *, like: jax.Array
) -> jax.ShapeDtypeStruct:
  """What `pallas_call` is told of an output that varies over the axes of `like`."""
  return jax.ShapeDtypeStruct(
      shape, dtype, manual_axis_type=jax.sharding.ManualAxisType(varying=axes(like)))
