"""Low-rank adapters (Hu et al. 2021) as additive trees: y = x W + scale * (x A) B.

A model with an adapter is its own parameters and a subtree 'lora'. The adapter is described once,
in `lora_specs`; the decoder adds it to a projection wherever that subtree is present. A starts
random and B at zero, as in PEFT, so that a fresh adapter leaves every output as it was.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jaxrl.errors import InputError
from jaxrl.models.config import ModelConfig
from jaxrl.models.params import Params, ParamSpec, is_spec, layer_specs
from jaxrl.parallel import sharding

Adapter = dict   # {'layers': {projection: {'a': [L, *summed, r], 'b': [L, r, *outputs]}}}

ATTENTION_TARGETS = ('q', 'k', 'v', 'o')
MLP_TARGETS = ('gate', 'up', 'down')
TARGETS = ATTENTION_TARGETS + MLP_TARGETS


def possible_targets(c: ModelConfig) -> tuple[str, ...]:
  """The projections of this model that an adapter can be added to."""
  return TARGETS if c.experts is None else ATTENTION_TARGETS


def check_lora(c: ModelConfig) -> None:
  """Refuses an adapter that the model has no place for.

  Raises:
    InputError: no or repeated targets, a projection that the model does not have, a rank or alpha
      that is not positive.
  """
  assert c.lora is not None
  if c.lora.rank < 1:
    raise InputError('the rank of the adapter is out of range', where='lora rank',
                     expected='at least 1', found=c.lora.rank)
  if not (math.isfinite(c.lora.alpha) and c.lora.alpha > 0):
    raise InputError('alpha of the adapter is out of range', where='lora alpha',
                     expected='a number > 0', found=c.lora.alpha)
  possible = possible_targets(c)
  if not c.lora.targets or len({*c.lora.targets}) < len(c.lora.targets):
    raise InputError('the adapter needs projections, each once', where='lora targets',
                     expected=f'some of {", ".join(possible)}',
                     found=', '.join(c.lora.targets) or 'none')
  for name in c.lora.targets:
    if name in MLP_TARGETS and c.experts is not None:
      raise InputError('adapters on the matrices of experts are not supported',
                       where='lora targets', expected=f'some of {", ".join(possible)}', found=name,
                       fix='Leave it out for a mixture of experts')
    if name not in possible:
      raise InputError('the model has no such projection', where='lora targets',
                       expected=f'some of {", ".join(possible)}', found=name)


def split_dimensions(spec: ParamSpec) -> tuple[tuple[int, ...], tuple[int, ...]]:
  """(inputs, outputs): which dimensions of a layer's matrix a product sums over, and the others."""
  inputs = tuple(sorted(d % len(spec.shape) for d in spec.summed))
  return inputs, tuple(d for d in range(len(spec.shape)) if d not in inputs)


def lora_specs(c: ModelConfig) -> dict:
  """The adapter of `c.lora`: A rests as the inputs of its matrix do, B as the outputs.

  Raises:
    InputError: see `check_lora`.
  """
  check_lora(c)
  assert c.lora is not None
  layer = layer_specs(c)
  specs = {}
  for name in c.lora.targets:
    inputs, outputs = split_dimensions(layer[name])
    shape, axes = layer[name].shape, layer[name].axes
    specs[name] = {
        'a': ParamSpec(
            (c.n_layers, *(shape[d] for d in inputs), c.lora.rank),
            ('layers', *(axes[d] for d in inputs), None),
            summed=tuple(range(-1 - len(inputs), -1))),
        'b': ParamSpec(
            (c.n_layers, c.lora.rank, *(shape[d] for d in outputs)),
            ('layers', None, *(axes[d] for d in outputs)), 'zeros',
            summed=(-1 - len(outputs),)),
    }
  return {'layers': specs}


def init_adapter(key: jax.Array, c: ModelConfig) -> Adapter:
  """A uniform in +-1/sqrt(inputs) (PEFT: Kaiming uniform, a = sqrt 5) and B zero, float32."""
  paths, treedef = jax.tree.flatten_with_path(lora_specs(c), is_leaf=is_spec)
  leaves = []
  for n, (path, s) in enumerate(paths):
    if path[-1].key == 'b':
      leaves.append(jnp.zeros(s.shape, jnp.float32))
      continue
    bound = 1 / math.sqrt(math.prod(s.shape[1:-1]))
    leaves.append(jax.random.uniform(
        jax.random.fold_in(key, n), s.shape, jnp.float32, -bound, bound))
  return jax.tree.unflatten(treedef, leaves)


def adapter_shardings(c: ModelConfig, mesh: Mesh) -> dict:
  """Where each factor rests on `mesh`."""
  return jax.tree.map(lambda s: sharding.stored(mesh, s.axes), lora_specs(c), is_leaf=is_spec)


def attach(base: Params, adapter: Adapter) -> Params:
  """The model with its adapter; the arrays of both are shared, not copied."""
  return {**base, 'lora': adapter}


def detach(params: Params) -> tuple[Params, Adapter]:
  """(base, adapter) of what `attach` put together."""
  return {name: x for name, x in params.items() if name != 'lora'}, params['lora']


def merge(params: Params, c: ModelConfig) -> Params:
  """The base with W + scale * A B in place of every W that has an adapter; traceable.

  Products are float32 whatever the matrices are stored as; each sum is rounded once, to the type
  of W. Weights without an adapter are the same arrays.
  """
  assert c.lora is not None
  base, adapter = detach(params)
  layers = dict(base['layers'])
  for name, factors in adapter['layers'].items():
    layers[name] = _merged(layers[name], factors['a'], factors['b'], c.lora.scale)
  return {**base, 'layers': layers}


def _merged(w: jax.Array, a: jax.Array, b: jax.Array, scale: float) -> jax.Array:
  """w [L, *inputs, *outputs] + scale * a [L, *inputs, r] b [L, r, *outputs]."""
  inputs, outputs = 'ijk'[:a.ndim - 2], 'xyz'[:b.ndim - 2]
  # Matrices keep inputs before outputs, so the product has the dimensions of W in their order.
  product = jnp.einsum(
      f'l{inputs}r,lr{outputs}->l{inputs}{outputs}', a.astype(jnp.float32), b.astype(jnp.float32),
      precision=jax.lax.Precision.HIGHEST, preferred_element_type=jnp.float32)
  return (w.astype(jnp.float32) + scale * product).astype(w.dtype)
