"""Identities between losses, and what must not change them: order, padding, parts, devices."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxrl.losses.pairs import PairOptions
from jaxrl.losses.preference import normalisers, pair_sums, pref_loss, survey, totals
from jaxrl.losses.terms import divide
from jaxrl.parallel.mesh import make_mesh
from jaxrl.parallel.sharding import batch_sharding
from tests.preference_batches import PAIRWISE, B, C, batches, value, with_rewards


def no_reference(batch):
  return batch | {key: np.zeros_like(batch[key]) for key in ('ref_chosen', 'ref_rejected')}


IDENTITIES = {
    'irpo(alpha 0) = dpo': lambda b: (
        value('irpo', b, beta=0.3, alpha=0.0), value('dpo', b, beta=0.3)),
    'scpo(w 1) = irpo': lambda b: (value('scpo', b), value('irpo', b, beta=0.5, alpha=1.0)),
    'robust(e 0) = dpo': lambda b: (
        value('robust', b, label_smoothing=0.0), value('dpo', b)),
    'rdpo_len(0) = dpo': lambda b: (value('rdpo_len', b, alpha_len=0.0), value('dpo', b)),
    'dpop(lam 0) = dpo': lambda b: (value('dpop', b, beta=0.1, lam=0.0), value('dpo', b)),
    'cpo(alpha 0) = dpo without reference': lambda b: (
        value('cpo', b, alpha=0.0), value('dpo', no_reference(b))),
    'simpo(gamma 0) = dpo_norm without reference': lambda b: (
        value('simpo', b, beta=2.0, gamma=0.0), value('dpo_norm', no_reference(b), beta=2.0)),
    'reference_free = zero reference': lambda b: (
        value('dpo', b, PairOptions(reference_free=True)), value('dpo', no_reference(b))),
    'ld_alpha 1 = dpo': lambda b: (value('dpo', b, PairOptions(ld_alpha=1.0)), value('dpo', b)),
    'reward_alpha -> 0 = simpo': lambda b: (
        value('simpo', b, reward_alpha=1e-4), value('simpo', b)),
}


@pytest.mark.parametrize('identity', IDENTITIES)
@settings(max_examples=15, deadline=None)
@given(batch=batches())
def test_identities(identity, batch):
  one, other = IDENTITIES[identity](batch)
  rtol = 5e-3 if '->' in identity else 1e-5
  np.testing.assert_allclose(one[0], other[0], rtol=rtol, atol=1e-6)


@settings(max_examples=15, deadline=None)
@given(batch=batches(), alpha=st.sampled_from([0.25, 0.5, 0.8]))
def test_dive_is_a_share_of_irpo(batch, alpha):
  dive = value('dive', batch, beta=0.4, alpha=alpha)[0]
  irpo = value('irpo', batch, beta=0.4, alpha=(1 - alpha) / alpha)[0]
  np.testing.assert_allclose(dive, alpha * irpo, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize('name', PAIRWISE)
@settings(max_examples=8, deadline=None)
@given(batch=batches(), seed=st.integers(0, 99))
def test_row_order_and_padding_change_nothing(name, batch, seed):
  batch = {key: np.asarray(x) for key, x in with_rewards(batch).items()}
  order = np.random.default_rng(seed).permutation(4)
  padded = {
      key: np.pad(x, [(0, 0), (0, 2)], constant_values=False if 'mask' in key else np.nan)
      if x.ndim == 2 else x for key, x in batch.items()}
  clean = value(name, batch)[0]
  for changed in ({key: x[order] for key, x in batch.items()}, padded):
    np.testing.assert_allclose(value(name, changed)[0], clean, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize('name', PAIRWISE)
def test_micro_batches_add_up_to_the_whole(name):
  """Totals and counts of unequal parts; losses of the whole batch after one survey of it."""
  batch = with_rewards({
      key: jnp.concatenate([jnp.pad(x, [(0, 0), (0, 4 - x.shape[1])]) for x in (B[key], C[key])])
      for key in B})

  def by_parts(policy):
    b = batch | {'policy_chosen': policy}
    whole, _ = survey(name, pair_sums(b))
    counts, sums = normalisers(whole), {}
    for part in (slice(0, 1), slice(1, 5)):
      s = pair_sums({key: x[part] for key, x in b.items()})
      s = dataclasses.replace(s, rows=s.rows | {
          key: x[part] for key, x in whole.rows.items() if key not in s.rows})
      for key, (total, kind) in totals(name, s)[0].items():
        sums[key] = (sums.get(key, (0.0,))[0] + total, kind)
    return divide(sums, counts)

  loss, grad = jax.jit(jax.value_and_grad(by_parts))(batch['policy_chosen'])
  expected = jax.value_and_grad(lambda x: value(
      name, batch | {'policy_chosen': x})[0])(batch['policy_chosen'])
  np.testing.assert_allclose(loss, expected[0], rtol=1e-6)
  np.testing.assert_allclose(grad, expected[1], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize('name', ['aot', 'aot_unpaired', 'bco'])
def test_whole_batch_losses_are_the_same_over_eight_devices(name):
  rng = np.random.default_rng(0)
  batch = {}
  for side in ('chosen', 'rejected'):
    batch[f'{side}_mask'] = np.arange(5)[None] < rng.integers(0, 6, 16)[:, None]
    for model in ('policy', 'ref'):
      batch[f'{model}_{side}'] = rng.normal(size=(16, 5)).astype(np.float32)
  expected = jax.value_and_grad(
      lambda b, x: value(name, b | {'policy_chosen': x})[0], argnums=1)(
          batch, batch['policy_chosen'])
  mesh = make_mesh(data=2, fsdp=4)
  with jax.set_mesh(mesh):
    placed = jax.device_put(batch, batch_sharding(mesh, 2))
    found = jax.jit(jax.value_and_grad(
        lambda b, x: pref_loss(name, b | {'policy_chosen': x})[0], argnums=1))(
            placed, placed['policy_chosen'])
  for one, other in zip(found, expected, strict=True):
    np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-7)


def test_swapping_sides_flips_the_margin():
  swapped = {
      key: B[key.replace('chosen', '@').replace('rejected', 'chosen').replace('@', 'rejected')]
      for key in B}
  one, other = value('dpo', B)[1], value('dpo', swapped)[1]
  np.testing.assert_allclose(one['rewards/margins'], -other['rewards/margins'], rtol=1e-6)
  np.testing.assert_allclose(value('dpo', B, label_smoothing=0.5)[0],
                             value('dpo', swapped, label_smoothing=0.5)[0], rtol=1e-6)
