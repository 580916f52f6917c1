"""DPO and IRPO: closed-form and finite-difference gradients, splits, edges, bad input."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxrl.losses import preference
from jaxrl.losses.preference import divide, normalisers, pair_sums, pref_loss, totals
from tests.preference_batches import A, B, batches, pair_batch


@pytest.mark.parametrize(('name', 'options', 'value', 'chosen', 'rejected'), [
    ('dpo', {'beta': 0.1}, 0.683197, -0.049500, 0.049500),
    ('irpo', {'beta': 0.1, 'alpha': 1.0}, 1.349864, -0.382833, 0.049500),
    ('irpo', {'beta': 0.5, 'alpha': 1.0}, 1.311063, -0.570844, 0.237510),
])
def test_worked_gradients(name, options, value, chosen, rejected):
  (loss, _), grads = jax.value_and_grad(
      lambda batch: pref_loss(name, batch, **options), has_aux=True)(A)
  np.testing.assert_allclose(loss, value, rtol=1e-5)
  np.testing.assert_allclose(grads['policy_chosen'], [[chosen] * 3], atol=1e-6)
  np.testing.assert_allclose(grads['policy_rejected'], [[rejected, rejected, 0]], atol=1e-6)
  assert not np.any(grads['ref_chosen']) and not np.any(grads['ref_rejected'])


def _reference(batch, name, beta, alpha):
  """Float64 NumPy, row by row, straight from the formula."""
  losses = []
  for row in range(len(batch['chosen_mask'])):
    w = np.asarray(batch['chosen_mask'][row], bool)
    l = np.asarray(batch['rejected_mask'][row], bool)
    if not w.any() or not l.any():
      continue
    p_w, r_w = (np.asarray(batch[k][row], np.float64)[w].sum()
                for k in ('policy_chosen', 'ref_chosen'))
    p_l, r_l = (np.asarray(batch[k][row], np.float64)[l].sum()
                for k in ('policy_rejected', 'ref_rejected'))
    z = beta * ((p_w - r_w) - (p_l - r_l))
    loss = np.logaddexp(0, -z)
    losses.append(loss + (alpha * -p_w / w.sum() if name == 'irpo' else 0))
  return np.mean(losses) if losses else 0.0


BATCHES = batches(largest=0)


@settings(max_examples=40, deadline=None)
@given(BATCHES, st.floats(0.05, 2), st.floats(0, 3), st.sampled_from(['dpo', 'irpo']))
def test_equals_float64_numpy(batch, beta, alpha, name):
  options = {'beta': beta} | ({'alpha': alpha} if name == 'irpo' else {})
  loss, _ = pref_loss(name, batch, **options)
  np.testing.assert_allclose(loss, _reference(batch, name, beta, alpha), rtol=2e-5, atol=1e-5)


@settings(max_examples=30, deadline=None)
@given(BATCHES, st.sampled_from([np.nan, np.inf, -np.inf, -1e30]), st.sampled_from([0, 3]))
def test_padding_never_matters(batch, junk, extra):
  """Neither what padding holds nor how much there is changes value or gradient."""
  padded = {}
  for key, x in batch.items():
    is_mask = key.endswith('mask')
    side = key.removesuffix('_mask') if is_mask else key.rpartition('_')[2]
    if not is_mask:
      x = np.where(batch[f'{side}_mask'], x, junk)
    padded[key] = np.pad(x, [(0, 0), (0, extra)], constant_values=False if is_mask else junk)

  def loss(policy, rest):
    return pref_loss('irpo', rest | policy, beta=0.3, alpha=1.0)[0]

  grad = jax.value_and_grad(loss)
  names = ('policy_chosen', 'policy_rejected')
  value, g = grad({k: jnp.asarray(batch[k]) for k in names}, batch)
  value_p, g_p = grad({k: jnp.asarray(padded[k]) for k in names}, padded)
  np.testing.assert_array_equal(value, value_p)
  for name in names:
    t = batch[name].shape[1]
    np.testing.assert_array_equal(g[name], g_p[name][:, :t])
    assert not np.any(g_p[name][:, t:])


@settings(max_examples=30, deadline=None)
@given(BATCHES, st.sampled_from(['seq', 'token', 'sum']), st.randoms(use_true_random=False))
def test_any_split_into_micro_batches(batch, reduction, random):
  """Totals over parts, divided by the counts of the whole, give the loss of the whole."""
  options = {'beta': 0.2, 'alpha': 0.7, 'nll_reduction': reduction}
  whole, _ = pref_loss('irpo', batch, **options)
  rows = list(range(len(batch['chosen_mask'])))
  random.shuffle(rows)
  cut = 2
  summed: dict = {}
  for part in filter(len, (rows[:cut], rows[cut:])):
    s = pair_sums({key: x[np.asarray(part)] for key, x in batch.items()})
    for key, (total, kind) in totals('irpo', s, **options)[0].items():
      summed[key] = (summed.get(key, (0.0, kind))[0] + total, kind)
  counts = normalisers(pair_sums(batch))
  np.testing.assert_allclose(divide(summed, counts), whole, rtol=1e-5, atol=1e-6)


def test_identities_and_first_value():
  alpha_zero, _ = pref_loss('irpo', B, beta=0.1, alpha=0.0)
  np.testing.assert_allclose(alpha_zero, pref_loss('dpo', B, beta=0.1)[0], rtol=1e-6)
  same = B | {'ref_chosen': B['policy_chosen'], 'ref_rejected': B['policy_rejected']}
  np.testing.assert_allclose(pref_loss('dpo', same, beta=0.1)[0], np.log(2), rtol=1e-6)
  smoothed, _ = pref_loss('dpo', B, beta=0.1, label_smoothing=0.5)
  other = {'chosen': 'rejected', 'rejected': 'chosen'}
  swapped = {re.sub('chosen|rejected', lambda m: other[m[0]], key): x for key, x in B.items()}
  np.testing.assert_allclose(
      smoothed, pref_loss('dpo', swapped, beta=0.1, label_smoothing=0.5)[0], rtol=1e-6)
  _, aux = pref_loss('dpo', same, beta=0.1)
  assert aux['rewards/accuracies'] == 0     # ties count as wrong


def test_finite_differences_in_float64():
  with jax.enable_x64(True):
    batch = {key: jnp.asarray(np.asarray(x), jnp.float64) for key, x in B.items()}

    def loss(policy_chosen):
      # The sums are float32 by design; differences are taken wide enough for that.
      return pref_loss('irpo', batch | {'policy_chosen': policy_chosen}, beta=0.5, alpha=1.0)[0]

    grad = np.asarray(jax.grad(loss)(batch['policy_chosen']))
    for r in range(2):
      for t in range(4):
        step = np.zeros((2, 4)); step[r, t] = 0.02
        numeric = (loss(batch['policy_chosen'] + step) - loss(batch['policy_chosen'] - step)) / 0.04
        np.testing.assert_allclose(grad[r, t], numeric, atol=2e-4)


def test_edges():
  one = pair_batch([[60000.0]], [[0.0]], [[1]], [[0.0]], [[0.0]], [[1]])
  flipped = one | {'policy_chosen': jnp.asarray([[-60000.0]])}
  assert pref_loss('dpo', one, beta=0.1)[0] == 0
  np.testing.assert_allclose(pref_loss('dpo', flipped, beta=0.1)[0], 6000.0)
  grad = jax.grad(lambda x: pref_loss('dpo', flipped | {'policy_chosen': x}, beta=0.1)[0])(
      flipped['policy_chosen'])
  np.testing.assert_allclose(grad, [[-0.1]], rtol=1e-6)
  half = B | {'chosen_mask': B['chosen_mask'].at[1].set(0)}
  loss, aux = pref_loss('irpo', half, beta=0.1, alpha=1.0)
  np.testing.assert_allclose(loss, 0.995099, rtol=1e-5)
  assert aux['n_valid'] == 1
  none = B | {'chosen_mask': jnp.zeros((2, 4)), 'rejected_mask': jnp.zeros((2, 4))}
  value, grads = jax.value_and_grad(
      lambda x: pref_loss('irpo', none | {'policy_chosen': x}, beta=0.1, alpha=1.0)[0])(
          none['policy_chosen'])
  assert value == 0 and not np.any(grads)
  bad = A | {'policy_chosen': A['policy_chosen'].at[0, 0].set(np.nan)}
  assert np.isnan(pref_loss('dpo', bad, beta=0.1)[0])     # at a valid position it is not hidden


@pytest.mark.parametrize(('name', 'options', 'words'), [
    ('dpo', {'beta': 0.0}, 'beta'), ('dpo', {'beta': float('nan')}, 'beta'),
    ('dpo', {'beta': 'x'}, 'beta'),
    ('dpo', {'beta': 0.1, 'label_smoothing': 0.6}, 'label_smoothing'),
    ('irpo', {'alpha': -1.0}, 'alpha'), ('irpo', {'nll_reduction': 'mean'}, 'nll_reduction'),
    ('dpo', {'alpha': 1.0}, 'alpha'), ('nope', {}, 'unknown loss'),
])
def test_bad_options(name, options, words):
  with pytest.raises(ValueError, match=words):
    pref_loss(name, A, **options)


@pytest.mark.parametrize('change', [
    lambda b: b.pop('ref_chosen'),
    lambda b: b.update(policy_chosen=jnp.zeros((1, 4))),
    lambda b: b.update(weights=jnp.ones((2,))),
    lambda b: b.update({k: jnp.concatenate([b[k], b[k]]) for k in b if 'rejected' in k}),
])
def test_bad_batches(change):
  batch = dict(A)
  change(batch)
  with pytest.raises(ValueError):
    preference.pair_sums(batch)
