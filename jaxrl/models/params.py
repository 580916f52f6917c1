"""The tree of parameter descriptions; everything else about parameters is derived from it.

Initialisation, shardings, abstract shapes for restore and checkpoint names all read
`decoder_specs`, so a weight is described once.
"""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jaxrl.models.config import ModelConfig
from jaxrl.parallel import sharding

Params = dict  # nested dict of arrays


@dataclasses.dataclass(frozen=True)
class ParamSpec:
  """One weight: its shape, the logical name of each dimension, and how it starts."""

  shape: tuple[int, ...]
  axes: tuple[str | None, ...]         # logical names, one per dimension
  init: str = 'normal'                 # 'normal' (std of the config), 'ones' or 'zeros'
  summed: tuple[int, ...] = ()         # matrices: the dimensions a product sums over, from the end


def is_spec(x) -> bool:
  return isinstance(x, ParamSpec)


def layer_specs(c: ModelConfig) -> dict[str, ParamSpec]:
  """Weights of one layer, without the leading layer axis."""
  norm = ParamSpec((c.d_model,), ('embed',), 'zeros' if c.norm_offset else 'ones')
  specs = {}
  if c.norm_placement != 'after':
    specs['attention_norm'] = norm
  specs |= {
      'q': ParamSpec((c.d_model, c.n_heads, c.d_head), ('embed', 'heads', None), summed=(-3,)),
      'k': ParamSpec((c.d_model, c.n_kv, c.d_head), ('embed', 'kv', None), summed=(-3,)),
      'v': ParamSpec((c.d_model, c.n_kv, c.d_head), ('embed', 'kv', None), summed=(-3,)),
  }
  if c.qkv_bias:
    specs |= {
        'q_bias': ParamSpec((c.n_heads, c.d_head), ('heads', None), 'zeros'),
        'k_bias': ParamSpec((c.n_kv, c.d_head), ('kv', None), 'zeros'),
        'v_bias': ParamSpec((c.n_kv, c.d_head), ('kv', None), 'zeros'),
    }
  if c.qk_norm == 'head':
    one_head = ParamSpec((c.d_head,), (None,), norm.init)
    specs |= {'q_norm': one_head, 'k_norm': one_head}
  elif c.qk_norm == 'width':
    specs |= {
        'q_norm': ParamSpec((c.n_heads, c.d_head), ('heads', None), norm.init),
        'k_norm': ParamSpec((c.n_kv, c.d_head), ('kv', None), norm.init),
    }
  specs['o'] = ParamSpec(
      (c.n_heads, c.d_head, c.d_model), ('heads', None, 'embed'), summed=(-3, -2))
  if c.o_bias:
    specs['o_bias'] = ParamSpec((c.d_model,), ('embed',), 'zeros')
  if c.norm_placement != 'before':
    specs['attention_out_norm'] = norm
  if c.norm_placement != 'after':
    specs['mlp_norm'] = norm
  if c.experts is None:
    specs |= {
        'gate': ParamSpec((c.d_model, c.d_mlp), ('embed', 'mlp'), summed=(-2,)),
        'up': ParamSpec((c.d_model, c.d_mlp), ('embed', 'mlp'), summed=(-2,)),
        'down': ParamSpec((c.d_mlp, c.d_model), ('mlp', 'embed'), summed=(-2,)),
    }
  else:
    into = ParamSpec(
        (c.experts.count, c.d_model, c.d_mlp), ('experts', 'embed', 'mlp'), summed=(-2,))
    specs |= {
        'router': ParamSpec((c.d_model, c.experts.count), ('embed', None), summed=(-2,)),
        'expert_gate': into,
        'expert_up': into,
        'expert_down': ParamSpec(
            (c.experts.count, c.d_mlp, c.d_model), ('experts', 'mlp', 'embed'), summed=(-2,)),
    }
  if c.norm_placement != 'before':
    specs['mlp_out_norm'] = norm
  return specs


def decoder_specs(c: ModelConfig) -> dict:
  """The whole model; layers are stacked on a leading axis."""
  stacked = {
      name: dataclasses.replace(s, shape=(c.n_layers, *s.shape), axes=('layers', *s.axes))
      for name, s in layer_specs(c).items()
  }
  specs = {
      'embedding': ParamSpec((c.vocab_size, c.d_model), ('vocab', 'embed'), summed=(-1,)),
      'layers': stacked,
      'final_norm': ParamSpec((c.d_model,), ('embed',), 'zeros' if c.norm_offset else 'ones'),
  }
  if not c.tie_embeddings:
    specs['head'] = ParamSpec((c.d_model, c.vocab_size), ('embed', 'vocab'), summed=(-2,))
  return specs


def axes_of(specs: dict) -> dict:
  """The logical names alone, as a tree with tuples at the leaves' places."""
  return jax.tree.map(lambda s: s.axes, specs, is_leaf=is_spec)


def init_params(key: jax.Array, c: ModelConfig, dtype=jnp.float32) -> Params:
  """Random parameters; the projections into the residual stream start smaller by sqrt(2 L)."""
  specs = decoder_specs(c)
  paths, treedef = jax.tree.flatten_with_path(specs, is_leaf=is_spec)
  leaves = []
  for n, (path, s) in enumerate(paths):
    if s.init != 'normal':
      leaves.append(jnp.full(s.shape, s.init == 'ones', dtype))
      continue
    into_residual = path[-1].key in ('o', 'down', 'expert_down')
    std = c.init_std / math.sqrt(2 * c.n_layers) if into_residual else c.init_std
    leaves.append(std * jax.random.normal(jax.random.fold_in(key, n), s.shape, dtype))
  return jax.tree.unflatten(treedef, leaves)


def param_shardings(c: ModelConfig, mesh: Mesh) -> dict:
  """Where each parameter rests on `mesh`."""
  return jax.tree.map(lambda s: sharding.stored(mesh, s.axes), decoder_specs(c), is_leaf=is_spec)


def abstract_params(c: ModelConfig, mesh: Mesh, dtype=jnp.float32) -> dict:
  """Shapes, dtype and shardings, for restoring without an initialised model."""
  return jax.tree.map(
      lambda s: jax.ShapeDtypeStruct(s.shape, dtype, sharding=sharding.stored(mesh, s.axes)),
      decoder_specs(c), is_leaf=is_spec)


def count_params(c: ModelConfig) -> int:
  leaves = jax.tree.leaves(decoder_specs(c), is_leaf=is_spec)
  return sum(math.prod(s.shape) for s in leaves)
