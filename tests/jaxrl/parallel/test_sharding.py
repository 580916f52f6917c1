"""Sharded results equal unsharded ones, and parameters rest where the STORED table says."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from jaxrl.models import decoder
from jaxrl.models import params as params_lib
from jaxrl.models.config import ModelConfig
from jaxrl.parallel import sharding
from jaxrl.parallel.look_up import look_up
from jaxrl.parallel.mesh import make_mesh
from kernels.token_logp import token_logp

CONFIG = ModelConfig(
    family='llama', vocab_size=101, d_model=32, n_layers=2, n_heads=4, n_kv=2, d_head=10, d_mlp=48,
    max_length=64)
TIED = ModelConfig(
    family='llama', vocab_size=101, d_model=16, n_layers=2, n_heads=8, n_kv=4, d_head=4, d_mlp=24,
    max_length=64, tie_embeddings=True)
FACTORISATIONS = [(8, 1, 1), (1, 8, 1), (2, 2, 2), (1, 4, 2)]      # data, fsdp, tensor


def loss(params, tokens, mask, c):
  """(mean of log-probs that a ragged mask keeps, all log-probs); three ragged chunks of time."""
  hidden = decoder.forward(params, tokens[:, :-1], c, remat='nothing')
  logp = token_logp(hidden, decoder.output_matrix(params, c), tokens[:, 1:], chunk=8)
  return -jnp.sum(jnp.where(mask, logp, 0.0)) / jnp.sum(mask, dtype=jnp.float32), logp


def value_and_grads(params, tokens, mask, c):
  step = jax.jit(jax.value_and_grad(functools.partial(loss, c=c), has_aux=True))
  return step(params, tokens, mask)


def draw(c):
  rng = np.random.default_rng(0)
  params = jax.tree.map(
      lambda s: np.asarray(rng.normal(size=s.shape) * (0.2 if len(s.shape) > 2 else 1), np.float32),
      params_lib.decoder_specs(c), is_leaf=params_lib.is_spec)
  tokens = rng.integers(0, c.vocab_size, (8, 21)).astype(np.int32)
  mask = np.arange(20)[None] < rng.integers(1, 21, 8)[:, None]
  return params, tokens, mask


@functools.cache
def unsharded(c):
  return jax.tree.map(np.asarray, value_and_grads(*draw(c), c))


@pytest.mark.parametrize('sizes', FACTORISATIONS)
@pytest.mark.parametrize('c', [CONFIG, TIED], ids=['untied', 'tied'])
def test_loss_and_gradients_equal_the_unsharded_ones(c, sizes):
  data, fsdp, tensor = sizes
  params, tokens, mask = draw(c)
  mesh = make_mesh(data=data, fsdp=fsdp, tensor=tensor)
  shardings = params_lib.param_shardings(c, mesh)
  with jax.set_mesh(mesh), jax.numpy_dtype_promotion('strict'):
    rows = sharding.batch_sharding(mesh, 2)
    (value, logp), grads = value_and_grads(
        jax.device_put(params, shardings), *jax.device_put((tokens, mask), rows), c)
  (expected_value, expected_logp), expected_grads = unsharded(c)
  np.testing.assert_allclose(value, expected_value, rtol=1e-5)
  np.testing.assert_allclose(logp, expected_logp, rtol=1e-5, atol=1e-5)
  for (path, g), e in zip(
      jax.tree.leaves_with_path(grads), jax.tree.leaves(expected_grads), strict=True):
    np.testing.assert_allclose(
        g, e, rtol=1e-5, atol=1e-5 * np.abs(e).max(), err_msg=jax.tree_util.keystr(path))
  # Gradients come back as the parameters rest, so the update moves nothing between devices.
  for g, s in zip(jax.tree.leaves(grads), jax.tree.leaves(shardings), strict=True):
    assert g.sharding.is_equivalent_to(s, g.ndim)


def test_no_device_holds_a_whole_table_or_its_gradient():
  c = dataclasses.replace(CONFIG, vocab_size=384)
  params, tokens, mask = draw(c)
  mesh = make_mesh(fsdp=4, sequence=2)
  with jax.set_mesh(mesh):
    arguments = jax.device_put(
        (params, tokens[:, :21], mask),
        (params_lib.param_shardings(c, mesh), *[sharding.batch_sharding(mesh, 2)] * 2))
    compiled = jax.jit(jax.grad(lambda *a: loss(*a, c)[0])).lower(*arguments).compile().as_text()
  shapes = {tuple(map(int, x.split(','))) for x in re.findall(r'f32\[([\d,]+)\]', compiled)}
  assert (384, 4) in shapes and (4, 384) in shapes      # a device's part of either
  assert not {(384, 32), (32, 384)} & shapes


def test_a_common_token_has_its_gradient_added_in_float32():
  table = jnp.ones((3, 2), jnp.bfloat16)
  ids = jnp.zeros((4, 1000), jnp.int32)
  found = jax.grad(lambda t: jnp.sum(look_up(t, ids, 3).astype(jnp.float32)))(table)
  np.testing.assert_array_equal(np.asarray(found, np.float32)[:, 0], [4000, 0, 0])


def test_parameters_rest_where_the_table_says():
  mesh = make_mesh(data=2, fsdp=2, tensor=2)
  found = jax.tree.map(lambda s: s.spec, params_lib.param_shardings(CONFIG, mesh))
  assert found == {
      'embedding': P(None, 'fsdp'),
      'layers': {
          'attention_norm': P(None, 'fsdp'),
          'q': P(None, 'fsdp', 'tensor', None),
          'k': P(None, 'fsdp', 'tensor', None),
          'v': P(None, 'fsdp', 'tensor', None),
          'o': P(None, 'tensor', None, 'fsdp'),
          'mlp_norm': P(None, 'fsdp'),
          'gate': P(None, 'fsdp', 'tensor'),
          'up': P(None, 'fsdp', 'tensor'),
          'down': P(None, 'tensor', 'fsdp'),
      },
      'final_norm': P('fsdp'),
      'head': P('fsdp', None),
  }
  q = jax.device_put(draw(CONFIG)[0], params_lib.param_shardings(CONFIG, mesh))['layers']['q']
  assert {s.data.shape for s in q.addressable_shards} == {(2, 16, 2, 10)}


def test_every_logical_name_is_in_every_table_it_is_used_with():
  named = {n for s in jax.tree.leaves(params_lib.decoder_specs(CONFIG), is_leaf=params_lib.is_spec)
           for n in s.axes if n}
  assert named <= set(sharding.STORED) and named <= set(sharding.GATHERED)
  assert set(sharding.GATHERED) == set(sharding.STORED) == set(sharding.OUTPUT)
  assert set(sharding.STORED) <= set(sharding.ROLLOUT)


def test_rows_are_spread_over_data_and_fsdp():
  mesh = make_mesh(data=2, fsdp=2, tensor=2)
  assert sharding.batch_sharding(mesh, 3).spec == P(('data', 'fsdp'), None, None)


def test_without_a_mesh_nothing_is_laid_out():
  x = jnp.ones((4, 3))
  assert sharding.shard(x, 'batch', 'embed') is x
  with pytest.raises(AssertionError):
    sharding.shard(x, 'batch')
