"""Adapters as additive trees: zero changes nothing, and merged is the same as beside the model."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl.errors import InputError
from jaxrl.models import decoder, lora
from jaxrl.models.config import Experts, Lora
from jaxrl.models.params import decoder_specs, is_spec, param_shardings
from jaxrl.parallel.mesh import make_mesh
from tests.tiny_model import CONFIG, QUICK, random_params

ADAPTED = dataclasses.replace(CONFIG, lora=Lora(3, 6.0, lora.TARGETS))
TOKENS = np.random.default_rng(0).integers(0, CONFIG.vocab_size, (2, 9)).astype(np.int32)


def random_adapter(c, seed=1):
  """Both factors far from zero."""
  rng = np.random.default_rng(seed)
  return jax.tree.map(
      lambda s: rng.normal(scale=0.2, size=s.shape).astype(np.float32), lora.lora_specs(c),
      is_leaf=is_spec)


@functools.partial(jax.jit, static_argnums=(2, 3), compiler_options=QUICK)
def logits(params, tokens, c, dtype='float32'):
  params = decoder.cast(params, dtype)
  return decoder.logits(params, decoder.forward(params, tokens, c), c)


merge = jax.jit(lora.merge, static_argnums=1, compiler_options=QUICK)


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_a_fresh_adapter_changes_no_bit(dtype):
  base = random_params()
  whole = lora.attach(base, lora.init_adapter(jax.random.key(0), ADAPTED))
  np.testing.assert_array_equal(
      logits(whole, TOKENS, ADAPTED, dtype), logits(base, TOKENS, CONFIG, dtype))
  merged = merge(whole, ADAPTED)
  for a, b in zip(jax.tree.leaves(merged), jax.tree.leaves(base), strict=True):
    np.testing.assert_array_equal(a, b)


def test_a_fresh_adapter_is_that_of_peft():
  """Kaiming uniform with a = sqrt(5): bounded by 1/sqrt(inputs), of variance 1/(3 inputs)."""
  c = dataclasses.replace(CONFIG, d_model=256, d_mlp=384, lora=Lora(64, 1.0, lora.TARGETS))
  layers = lora.init_adapter(jax.random.key(0), c)['layers']
  for name, inputs in {'q': 256, 'o': c.n_heads * c.d_head, 'down': 384}.items():
    a = np.asarray(layers[name]['a'])
    assert a.shape[-1] == 64 and np.abs(a).max() <= inputs ** -0.5
    np.testing.assert_allclose(a.std(), (3 * inputs) ** -0.5, rtol=0.02)
    assert not np.asarray(layers[name]['b']).any()
  assert not np.array_equal(layers['q']['a'], layers['k']['a'])


@pytest.mark.parametrize('rank_stabilised', [False, True])
def test_merged_is_the_same_as_beside_the_model(rank_stabilised):
  c = dataclasses.replace(ADAPTED, lora=Lora(3, 2.0, lora.TARGETS, rank_stabilised))
  whole = lora.attach(random_params(), random_adapter(c))
  expected = np.asarray(logits(whole, TOKENS, c))
  found = np.asarray(logits(merge(whole, c), TOKENS, CONFIG))
  np.testing.assert_allclose(found, expected, atol=2e-5 * np.abs(expected).max(), rtol=0)
  before = np.asarray(logits(random_params(), TOKENS, CONFIG))
  assert np.abs(found - before).max() > 0.1 * np.abs(before).max()


def test_merge_by_hand():
  c = dataclasses.replace(CONFIG, lora=Lora(3, 6.0, ('q', 'o', 'down')))
  base, adapter = random_params(), random_adapter(c)
  merged = merge(lora.attach(base, adapter), c)['layers']
  f = adapter['layers']
  scale = 6.0 / 3
  np.testing.assert_allclose(merged['q'][1], base['layers']['q'][1] + scale * np.tensordot(
      f['q']['a'][1], f['q']['b'][1], axes=(1, 0)), rtol=1e-5, atol=1e-6)
  np.testing.assert_allclose(merged['o'][0], base['layers']['o'][0] + scale * np.tensordot(
      f['o']['a'][0], f['o']['b'][0], axes=(2, 0)), rtol=1e-5, atol=1e-6)
  np.testing.assert_allclose(merged['down'][1], base['layers']['down'][1] + scale * (
      f['down']['a'][1] @ f['down']['b'][1]), rtol=1e-5, atol=1e-6)
  for name in base['layers'].keys() - {'q', 'o', 'down'}:
    np.testing.assert_array_equal(merged[name], base['layers'][name])


def test_merge_keeps_the_type_and_rounds_once():
  base = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), random_params())
  adapter = random_adapter(ADAPTED)
  merged = merge(lora.attach(base, adapter), ADAPTED)['layers']['up']
  wide = jax.tree.map(lambda x: x.astype(jnp.float32), base)
  expected = merge(lora.attach(wide, adapter), ADAPTED)['layers']['up'].astype(jnp.bfloat16)
  assert merged.dtype == jnp.bfloat16
  np.testing.assert_array_equal(merged, expected)


def test_attach_and_detach():
  base, adapter = random_params(), random_adapter(ADAPTED)
  again = lora.detach(lora.attach(base, adapter))
  assert again[0].keys() == base.keys() and again[1] is adapter
  assert all(a is b for a, b in zip(jax.tree.leaves(again[0]), jax.tree.leaves(base), strict=True))


@pytest.mark.parametrize('sizes', [(1, 8, 1), (2, 2, 2)])
def test_on_a_mesh(sizes):
  """Each factor lies as the matching dimensions of its matrix; results are those of one device."""
  mesh = make_mesh(data=sizes[0], fsdp=sizes[1], tensor=sizes[2])
  base, adapter = random_params(), random_adapter(ADAPTED)
  tokens = np.tile(TOKENS, (4, 1))
  expected = np.asarray(logits(lora.attach(base, adapter), tokens, ADAPTED))
  merged = merge(lora.attach(base, adapter), ADAPTED)
  whole = lora.attach(jax.device_put(base, param_shardings(CONFIG, mesh)),
                      jax.device_put(adapter, lora.adapter_shardings(ADAPTED, mesh)))
  up = whole['lora']['layers']['up']
  fsdp, tensor = ('fsdp' if sizes[1] > 1 else None), ('tensor' if sizes[2] > 1 else None)
  assert up['a'].sharding.spec == jax.P(None, fsdp, None)
  assert up['b'].sharding.spec == jax.P(None, None, tensor)
  with jax.set_mesh(mesh):
    found = np.asarray(logits(whole, tokens, ADAPTED))
    sharded = merge(whole, ADAPTED)
  np.testing.assert_allclose(found, expected, atol=2e-5 * np.abs(expected).max(), rtol=0)
  for a, b, rests in zip(jax.tree.leaves(sharded), jax.tree.leaves(merged),
                         jax.tree.leaves(param_shardings(CONFIG, mesh)), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    assert a.sharding.is_equivalent_to(rests, a.ndim)


MIXTURE = dataclasses.replace(CONFIG, family='mixtral', experts=Experts(4, 2))
REFUSED = [
    (CONFIG, Lora(0, 1.0, ('q',)), 'rank.*at least 1; found 0'),
    (CONFIG, Lora(2, float('nan'), ('q',)), 'alpha.*a number > 0; found nan'),
    (CONFIG, Lora(2, 1.0, ()), 'some of q, k, v, o, gate, up, down; found none'),
    (CONFIG, Lora(2, 1.0, ('q', 'q')), 'each once; expected'),
    (CONFIG, Lora(2, 1.0, ('embedding',)), 'no such projection.*found embedding'),
    (MIXTURE, Lora(2, 1.0, ('q', 'up')), 'experts are not supported.*q, k, v, o; found up'),
]


@pytest.mark.parametrize('c, wanted, message', REFUSED)
def test_adapters_without_a_place_are_refused(c, wanted, message):
  with pytest.raises(InputError, match=message):
    lora.lora_specs(dataclasses.replace(c, lora=wanted))


def test_a_mixture_takes_adapters_on_its_attention():
  c = dataclasses.replace(MIXTURE, lora=Lora(2, 1.0, lora.possible_targets(MIXTURE)))
  assert lora.lora_specs(c)['layers'].keys() == {'q', 'k', 'v', 'o'}
  assert 'lora' not in decoder_specs(c)      # the model itself is described without its adapter
