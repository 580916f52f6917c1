"""What is derived from the parameter descriptions: initial values, counts, shapes, identity."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl.models import params as params_lib
from jaxrl.models.config import ModelConfig
from jaxrl.models.identity import identity
from jaxrl.parallel.mesh import make_mesh

CONFIG = ModelConfig(
    family='llama', vocab_size=96, d_model=64, n_layers=3, n_heads=4, n_kv=2, d_head=16, d_mlp=80,
    max_length=64)


@pytest.fixture(scope='module')
def params():
  return params_lib.init_params(jax.random.key(0), CONFIG)


def test_initial_values_have_the_stated_spread(params):
  layers = params['layers']
  assert (np.asarray(layers['mlp_norm']) == 1).all()
  assert (np.asarray(params['final_norm']) == 1).all()
  for x in (params['embedding'], params['head'], layers['q'], layers['gate']):
    assert np.std(x) == pytest.approx(0.02, rel=0.05)
  for x in (layers['o'], layers['down']):
    assert np.std(x) == pytest.approx(0.02 / math.sqrt(6), rel=0.05)
  assert np.std(layers['q'][0] - layers['q'][1]) > 0.02       # layers are drawn apart


def test_count_is_the_number_of_values(params):
  assert params_lib.count_params(CONFIG) == sum(x.size for x in jax.tree.leaves(params))
  tied = dataclasses.replace(CONFIG, tie_embeddings=True)
  assert params_lib.count_params(CONFIG) - params_lib.count_params(tied) == 96 * 64


def test_llama_3_8b_is_counted_right():
  """8,030,261,248 parameters, as published."""
  c = ModelConfig('llama', 128256, 4096, 32, 32, 8, 128, 14336, 8192)
  assert params_lib.count_params(c) == 8_030_261_248


def test_abstract_params_describe_the_real_ones(params):
  mesh = make_mesh(fsdp=4, tensor=2)
  abstract = params_lib.abstract_params(CONFIG, mesh, jnp.float32)
  shardings = params_lib.param_shardings(CONFIG, mesh)
  jax.tree.map(lambda a, x: (a.shape, a.dtype) == (x.shape, x.dtype) or pytest.fail(), abstract,
               params)
  assert jax.tree.map(lambda a: a.sharding, abstract) == shardings


def test_identity_follows_the_values_only(params):
  name = identity(params)
  assert name == identity(jax.tree.map(np.asarray, params))
  mesh = make_mesh(fsdp=8)
  spread = jax.device_put(params, params_lib.param_shardings(CONFIG, mesh))
  assert name == identity(spread)
  changed = dict(params, final_norm=params['final_norm'].at[5].set(np.nextafter(
      np.float32(1), np.float32(2))))
  assert name != identity(changed)
  assert name != identity(jax.tree.map(lambda x: x.astype(jnp.bfloat16), params))
