"""Arrays parked in the memory of the host, so that devices have room for something else meanwhile.

For state that must outlive a phase which does not read it: moments of an optimizer while a loop
looks at samples of the parameters in training.
"""

from __future__ import annotations

from typing import TypeVar

import jax

Tree = TypeVar('Tree')


def to_host(tree: Tree) -> Tree:
  """The arrays of `tree`, split as they were, in pinned memory of the host.

  The given arrays are deleted when their copies are there; no program takes the copies but
  `to_device`.
  """
  return _moved(tree, jax.tree.map(lambda x: x.sharding.with_memory_kind('pinned_host'), tree))


def to_device(tree: Tree, like: Tree) -> Tree:
  """The arrays of `tree` where those of `like` are or were; the given ones are deleted.

  like: what `to_host` was given, deleted arrays included, or `jax.ShapeDtypeStruct` with shardings.
  """
  return _moved(tree, jax.tree.map(lambda x: x.sharding, like))


def _moved(tree: Tree, shardings: Tree) -> Tree:
  # Backends cannot donate from one kind of memory to another: copied, awaited and deleted.
  moved = jax.block_until_ready(jax.device_put(tree, shardings))
  kept = {id(x) for x in jax.tree.leaves(moved)}
  for x in jax.tree.leaves(tree):
    if id(x) not in kept:     # what already lay there is not moved
      x.delete()
  return moved
