"""int8 storage: its error bound, what it leaves alone, and that forward passes honour it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl.models import decoder, storage
from jaxrl.models.config import Experts, ModelConfig
from jaxrl.models.params import abstract_params, param_shardings
from jaxrl.parallel.mesh import make_mesh
from tests.tiny_model import CONFIG, random_params

TIED = ModelConfig(
    family='llama', vocab_size=37, d_model=32, n_layers=2, n_heads=4, n_kv=2, d_head=8, d_mlp=48,
    max_length=64, tie_embeddings=True)
MIXTURE = ModelConfig(
    family='mixtral', vocab_size=37, d_model=32, n_layers=2, n_heads=4, n_kv=2, d_head=8, d_mlp=24,
    max_length=64, experts=Experts(4, 2))


def widened(params):
  return jax.tree.map(
      lambda x: storage.dequantise(x, jnp.float32) if isinstance(x, storage.Int8) else x, params,
      is_leaf=lambda x: isinstance(x, storage.Int8))


@pytest.mark.parametrize('c', [CONFIG, TIED, MIXTURE], ids=['untied', 'tied', 'mixture'])
def test_every_weight_is_within_half_a_step_of_its_channel(c):
  params = random_params(c)
  packed = jax.jit(lambda p: storage.quantise(p, c))(params)
  q = packed['layers']['q']
  assert q.values.dtype == jnp.int8 and q.scale.shape == (2, 1, 4, 8)
  assert packed['layers']['o'].scale.shape == (2, 1, 1, 32)
  assert packed['embedding'].scale.shape == (c.vocab_size, 1)
  for (path, x), y in zip(
      jax.tree.leaves_with_path(params), jax.tree.leaves(widened(packed)), strict=True):
    name = jax.tree_util.keystr(path)
    if 'norm' in name or 'router' in name:
      np.testing.assert_array_equal(x, y)
    else:
      step = np.abs(x).max() / 127
      assert 0 < np.abs(x - y).max() <= step / 2 * 1.0001, name


def test_an_all_zero_channel_stays_zero():
  params = random_params()
  params['layers']['gate'][:, :, 3] = 0
  packed = storage.quantise(params, CONFIG)
  assert (storage.dequantise(packed['layers']['gate'], jnp.float32)[:, :, 3] == 0).all()


@pytest.mark.parametrize('c', [CONFIG, TIED, MIXTURE], ids=['untied', 'tied', 'mixture'])
def test_the_forward_pass_reads_the_stored_values(c):
  """The logits are those of the widened weights to rounding, and near those of the originals."""
  params = random_params(c)
  packed = storage.quantise(params, c)
  tokens = np.random.default_rng(0).integers(0, c.vocab_size, (2, 9)).astype(np.int32)

  @jax.jit
  def run(p):
    hidden = decoder.forward(decoder.cast(p, jnp.float32), tokens, c)
    return decoder.logits(p, hidden, c)

  exact, found, original = run(widened(packed)), run(packed), run(params)
  np.testing.assert_allclose(found, exact, rtol=1e-5, atol=1e-5)
  gap = np.abs(found - original).max() / np.abs(original).max()
  assert 0 < gap < 0.2   # large random weights amplify; the rounding itself is bounded above


def test_sharded_weights_stay_sharded_and_give_the_same_numbers():
  mesh = make_mesh(data=2, fsdp=2, tensor=2)
  params = random_params()
  tokens = np.random.default_rng(0).integers(0, 50, (8, 9)).astype(np.int32)

  def run(p, tokens):
    hidden = decoder.forward(p, tokens, CONFIG)
    return jnp.sum(decoder.logits(p, hidden, CONFIG) ** 2, axis=(1, 2))

  expected = jax.jit(run)(storage.quantise(params, CONFIG), tokens)
  with jax.set_mesh(mesh):
    placed = jax.device_put(params, param_shardings(CONFIG, mesh))
    packed = jax.jit(lambda p: storage.quantise(p, CONFIG), donate_argnums=0)(placed)
    gate = packed['layers']['gate'].values
    assert gate.sharding == abstract_params(CONFIG, mesh)['layers']['gate'].sharding
    found = jax.jit(run)(packed, jax.device_put(
        tokens, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(('data', 'fsdp')))))
  np.testing.assert_allclose(found, expected, rtol=1e-4)
