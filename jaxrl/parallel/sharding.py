"""Logical axis names and the tables that map them to mesh axes.

Model code names what a dimension is ('batch', 'heads', ...); only this file knows mesh axes.
Parameters rest in the STORED layout (split over fsdp) and are gathered, one layer at a time inside
the scan, into the GATHERED layout; the transpose of that gather is the reduce-scatter of gradients.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

Rules = Mapping[str, str | tuple[str, ...] | None]
ROLLOUT_AXES = ('data', 'tensor')

STORED: Rules = {
    'layers': None,
    'embed': ('fsdp', 'sequence'),
    'heads': 'tensor',
    'kv': 'tensor',
    'mlp': 'tensor',
    'experts': None,
    'vocab': None,
}
GATHERED: Rules = {**STORED, 'embed': None, 'vocab': 'tensor'}
# Of the output matrix, which log-probs gather block by block.
OUTPUT: Rules = {**STORED, 'vocab': 'tensor'}
ACTIVATION: Rules = {
    'batch': ('data', 'fsdp'),
    'length': 'sequence',
    'embed': None,
    'heads': 'tensor',
    'kv': 'tensor',
    'mlp': 'tensor',
    'vocab': None,
}
COMPUTE: Rules = {**GATHERED, **ACTIVATION}      # of activations and weights side by side
# The layout while sampling, on a mesh of its own over the same devices (`mesh.rollout_mesh`): rows
# of parameters are whole, heads and columns are split, and each of the `data` parts has its slots.
ROLLOUT: Rules = {
    'layers': None,
    'embed': None,
    'heads': 'tensor',
    'kv': 'tensor',
    'mlp': 'tensor',
    'experts': None,
    'vocab': 'tensor',
}


def spec(
    names: tuple[str | None, ...], rules: Rules, sizes: Mapping[str, int]
) -> PartitionSpec:
  """The partition of an array whose dimensions have these logical names, on a mesh of `sizes`.

  Mesh axes of size 1 are left out: splitting over one device is no split, but the type system
  counts it as one, and a reshape of heads into groups could then leave the same axis on two
  dimensions of one product.
  """

  def live(name: str | None) -> tuple[str, ...] | None:
    axes = rules[name] if name else None
    kept = tuple(a for a in ((axes,) if isinstance(axes, str) else axes or ()) if sizes[a] > 1)
    return kept or None

  return PartitionSpec(*(live(name) for name in names))


def current_spec(names: tuple[str | None, ...], rules: Rules) -> PartitionSpec:
  return spec(names, rules, jax.sharding.get_abstract_mesh().shape)


def explicit_mesh() -> bool:
  """True inside `jax.set_mesh` with Explicit axes; False without a mesh and inside shard_map."""
  mesh = jax.sharding.get_abstract_mesh()
  return not mesh.empty and all(t == jax.sharding.AxisType.Explicit for t in mesh.axis_types)


def shard(x: jax.Array, *names: str | None, rules: Rules = ACTIVATION) -> jax.Array:
  """Lays `x` out by logical axis names; does nothing when no mesh is set."""
  assert x.ndim == len(names), (x.shape, names)
  if not explicit_mesh():
    return x
  return jax.sharding.reshard(x, current_spec(names, rules))


def contract(pattern: str, x: jax.Array, w: jax.Array, *names: str | None) -> jax.Array:
  """einsum whose result is laid out by `names`; sums over a split dimension are reduced here."""
  return _product(pattern, current_spec(names, ACTIVATION) if explicit_mesh() else None, x, w)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _product(pattern: str, out: PartitionSpec | None, x: jax.Array, w: jax.Array) -> jax.Array:
  return _einsum(pattern, x, w, out)


def _einsum(pattern: str, a: jax.Array, b: jax.Array, out: PartitionSpec | None) -> jax.Array:
  """einsum whose result has the type of `b`, on CPU rounded after the product.

  With a bfloat16 result XLA on CPU takes a routine that is 1.2 times slower. Elsewhere float32
  would travel between devices: partial sums are added before they are rounded.
  """
  def plain(a, b):
    return jnp.einsum(pattern, a, b, out_sharding=out)

  def rounded(a, b):
    wide = jnp.einsum(pattern, a, b, out_sharding=out, preferred_element_type=jnp.float32)
    return wide.astype(b.dtype)

  if b.dtype != jnp.bfloat16:
    return plain(a, b)
  return jax.lax.platform_dependent(a, b, cpu=rounded, default=plain)


def _product_forward(pattern, out, x, w):
  return _product(pattern, out, x, w), (x, w)


def _product_backward(pattern, out, saved, g):
  """Both gradients, each product written as its result is laid out, of operands that exist.

  What differentiation writes by itself is the transpose of a product [out, in], and XLA on CPU then
  computes the cotangent, with all elementwise gradients before it, into a transposed copy.
  """
  (left, right), result = pattern.split('->')[0].split(','), pattern.split('->')[1]
  (x, w), g = jax.lax.optimization_barrier((saved, g))

  def laid_out(like):
    return jax.typeof(like).sharding.spec if explicit_mesh() else None

  return (_einsum(f'{result},{right}->{left}', g, w, laid_out(x)),
          _einsum(f'{left},{result}->{right}', x, g, laid_out(w)))


_product.defvjp(_product_forward, _product_backward)


def manual_axis(name: str) -> str | None:
  """The mesh axis that splits `name` while sampling; None elsewhere and where nothing is split."""
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty or mesh.axis_names != ROLLOUT_AXES or explicit_mesh():
    return None
  axis = ROLLOUT[name]
  return axis if isinstance(axis, str) and mesh.shape[axis] > 1 else None


def with_other_parts(x: jax.Array, summed: str) -> jax.Array:
  """A product summed over the devices that split its dimension `summed`, inside a rollout.

  Elsewhere `contract` has done it, or nothing is split.
  """
  axis = manual_axis(summed)
  return x if axis is None else jax.lax.psum(x, axis)


def mean_with_other_parts(x: jax.Array, split: str) -> jax.Array:
  """The mean of equal parts' means over the devices that split `split`, inside a rollout."""
  axis = manual_axis(split)
  return x if axis is None else jax.lax.pmean(x, axis)


def whole_vocabulary(logits: jax.Array, size: int) -> jax.Array:
  """Logits [..., V] out of the parts [..., V / devices] that each device of a rollout computes."""
  if logits.shape[-1] == size:
    return logits
  axis = manual_axis('vocab')
  assert axis is not None, (logits.shape, size)
  return jax.lax.all_gather(logits, axis, axis=logits.ndim - 1, tiled=True)


def over_devices(
    function: Callable[..., jax.Array],
    names: tuple[str | None, ...],
    x: jax.Array,
    *weights: tuple[jax.Array, tuple[str | None, ...]],
    summed: str,
) -> jax.Array:
  """function(x, *weights) on each device's part of `x`, laid out by `names` before and after.

  Every weight comes with its logical names. Partial results are added over the devices that split
  the dimension `summed`. Without a mesh it is the plain call, inside a rollout that and the sum.
  """
  axes = current_spec((summed,), COMPUTE)[0] if explicit_mesh() else None

  def part(x, *arrays):
    out = function(x, *arrays)
    return jax.lax.psum(out, axes) if axes else with_other_parts(out, summed)

  return on_parts(part, names, (x, names), *weights)


def on_parts(
    function: Callable[..., jax.Array], out: tuple[str | None, ...],
    *arrays: tuple[jax.Array, tuple[str | None, ...]],
) -> jax.Array:
  """function on each device's part of the arrays, each given with its logical names.

  Without a mesh it is the plain call.
  """
  values = [x for x, _ in arrays]
  if not explicit_mesh():
    return function(*values)
  specs = tuple(current_spec(names, COMPUTE) for _, names in arrays)
  values = [jax.sharding.reshard(x, s) for x, s in zip(values, specs, strict=True)]
  return jax.shard_map(
      function, in_specs=specs, out_specs=current_spec(out, COMPUTE))(*values)


def per_row(function: Callable[..., jax.Array], *arrays: jax.Array) -> jax.Array:
  """function on each device's rows of the arrays [B, ...]; all else is whole on every device."""
  rows = [(x, ('batch', *[None] * (x.ndim - 1))) for x in arrays]
  return on_parts(function, rows[0][1], *rows)


def gather_length(x: jax.Array) -> jax.Array:
  """The whole length [B, T, ...] of what the devices of the sequence axis hold parts of.

  For use inside `on_parts`; the gradient goes back to the device that holds the part.
  """
  if jax.sharding.get_abstract_mesh().shape.get('sequence', 1) == 1:
    return x
  return jax.lax.all_gather(x, 'sequence', axis=1, tiled=True)


def if_it_divides(name: str, size: int, rules: Rules) -> str | None:
  """The name, where a dimension of this size divides over its mesh axes; else None: not split."""
  if not explicit_mesh():
    return name
  axes, mesh = rules[name] or (), jax.sharding.get_abstract_mesh()
  axes = (axes,) if isinstance(axes, str) else axes
  return name if size % math.prod(mesh.shape[axis] for axis in axes) == 0 else None


def stored(mesh: jax.sharding.Mesh, names: tuple[str | None, ...]) -> NamedSharding:
  """Where a parameter rests between steps."""
  return NamedSharding(mesh, spec(names, STORED, mesh.shape))


def batch_sharding(mesh: jax.sharding.Mesh, ndim: int) -> NamedSharding:
  """Rows over every device of the data and fsdp axes."""
  return NamedSharding(mesh, spec(('batch', *([None] * (ndim - 1))), ACTIVATION, mesh.shape))


def rollout_spec(
    mesh: jax.sharding.Mesh, names: tuple[str | None, ...], shape: tuple[int, ...]
) -> PartitionSpec:
  """How an array is split while sampling; a vocabulary that does not divide stays whole."""
  found = spec(names, ROLLOUT, mesh.shape)
  parts = mesh.shape['tensor']
  return PartitionSpec(*(
      None if name == 'vocab' and size % parts else axis
      for name, size, axis in zip(names, shape, found, strict=True)))
