"""Where log-probs run: on each device's part, whatever splits tokens and vocabulary."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

AxisName = str | tuple[str, ...]


def on_each_device(
    function: Callable[..., Any],
    hidden: jax.Array,        # [B, T, D]
    head: jax.Array,          # [D, V]
    *per_token: jax.Array,    # [B, T] each
    axis_name: AxisName | None,
) -> Any:
  """function(hidden, head, *per_token, axis_name=..., rows_over=...) with results all [B, T].

  Without a mesh, on one with Auto axes and inside shard_map it is the plain call; on a mesh with
  Explicit axes a shard_map over the layout of the arguments. `rows_over` are the axes that split
  the rows of `head`, None where each device holds all of them.

  Raises:
    ValueError: the features of hidden are split, or one axis splits both tokens and vocabulary.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty or any(kind != AxisType.Explicit for kind in mesh.axis_types):
    return function(*_vary_alike(hidden, head, *per_token, axes=axis_name), axis_name=axis_name,
                    rows_over=None)
  if axis_name is not None:
    raise ValueError(f'axis_name={axis_name!r} is for shard_map; on a mesh with Explicit axes the '
                     'layout of head says it')
  *rows, features = jax.typeof(hidden).sharding.spec
  head_rows, vocabulary = jax.typeof(head).sharding.spec
  split = {axis for entry in rows for axis in _names(entry)}
  if features or split & set(_names(vocabulary)):
    raise ValueError(
        'hidden [B, T, D] may be split by B and T, head [D, V] by D, and by V over axes that split '
        f'no tokens; got {jax.typeof(hidden).sharding.spec} and {jax.typeof(head).sharding.spec}')
  tokens = P(*rows)

  def part(*arrays):
    alike = _vary_alike(*arrays, axes=vocabulary)
    return function(*alike, axis_name=vocabulary, rows_over=head_rows)

  return jax.shard_map(
      part, in_specs=(P(*rows, None), P(head_rows, vocabulary), *(tokens for _ in per_token)),
      out_specs=tokens)(hidden, head, *(jax.sharding.reshard(x, tokens) for x in per_token))


def _names(axes: AxisName | None) -> tuple[str, ...]:
  return () if axes is None else (axes,) if isinstance(axes, str) else axes


def _vary_alike(*arrays: jax.Array, axes: AxisName | None) -> list[jax.Array]:
  """The arrays, typed as different on every device where any of them is, and along `axes`.

  Values stay. What it adds is the transpose: the gradient of an array that devices share is summed
  over them, which a custom gradient does not do by itself. Where shard_map checks no types
  (check_vma=False) it does nothing, and shard_map sums the gradients of what it replicated.
  """
  varying = frozenset(_names(axes)).union(*(jax.typeof(x).mat.varying for x in arrays))
  missing = [tuple(sorted(varying - jax.typeof(x).mat.varying)) for x in arrays]
  return [jax.lax.pcast(x, names, to='varying') if names else x
          for x, names in zip(arrays, missing, strict=True)]
