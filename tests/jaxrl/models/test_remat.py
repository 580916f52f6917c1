"""Policies of recomputation change what is kept and nothing else."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl.models.decoder import REMAT
from jaxrl.training.logps import target_logps
from tests import tiny_training as tiny
from tests.tiny_model import CONFIG, QUICK, random_params


def gradients(remat):
  policy = dataclasses.replace(tiny.POLICY, remat=remat)
  rng = np.random.default_rng(0)
  inputs, targets = rng.integers(0, CONFIG.vocab_size, (2, 2, 12)).astype(np.int32)

  def loss(params):
    return -jnp.mean(target_logps(params, inputs, targets, CONFIG, policy))

  return jax.jit(jax.grad(loss), compiler_options=QUICK)(random_params())


@pytest.mark.parametrize('remat', [name for name in REMAT if name != 'all'])
def test_every_policy_gives_the_same_gradients(remat):
  for a, b in zip(jax.tree.leaves(gradients(remat)), jax.tree.leaves(gradients('all')),
                  strict=True):
    np.testing.assert_allclose(a, b, atol=1e-6, rtol=1e-5)
