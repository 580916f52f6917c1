"""The loss family: worked values, edge cases, float64 values and gradients, variants, bad input."""


import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl.losses.pairs import PairOptions
from jaxrl.losses.preference import (
  check_loss,
  defaults,
  mixed_totals,
  normalisers,
  pair_sums,
  pref_loss,
  survey,
  totals,
)
from jaxrl.losses.terms import divide
from jaxrl.losses.whole_batch import initial_state
from tests.preference_batches import PAIRWISE, A, B, C, value, with_rewards

# Float64 values checked with a 40-digit implementation: loss on A, B, C; rows of B. A loss of the
# whole batch has no rows of its own.
WORKED = [
    ('dpo', {'beta': 0.1}, (0.683197, 0.681975, 0.679939), (0.632599, 0.731350)),
    ('dpo', {'beta': 0.5}, (0.644397, 0.663412, 0.629599), (0.428701, 0.898123)),
    ('dpo', {'beta': 0.1, 'label_smoothing': 0.1},
     (0.685197, 0.684475, 0.682606), (0.645099, 0.723850)),
    ('robust', {'beta': 0.1, 'label_smoothing': 0.1},
     (0.680697, 0.678850, 0.676606), (0.616974, 0.740725)),
    ('robust', {'beta': 0.5, 'label_smoothing': 0.2},
     (0.611063, 0.621745, 0.585154), (0.220367, 1.023123)),
    ('ipo', {'beta': 0.1, 'length_normalize': True},
     (24.502500, 24.372509, 22.428333), (21.313611, 27.431406)),
    ('ipo', {'beta': 0.1, 'length_normalize': False},
     (23.040000, 23.562500, 22.433333), (14.062500, 33.062500)),
    ('ipo', {'beta': 0.5, 'length_normalize': True},
     (0.902500, 0.955842, 0.561667), (0.380278, 1.531406)),
    ('hinge', {'beta': 0.5}, (0.900000, 0.875000, 0.866667), (0.375000, 1.375000)),
    ('hinge', {'beta': 1.0}, (0.800000, 0.875000, 0.733333), (0.000000, 1.750000)),
    ('slic', {'delta': 1.0, 'lam': 0.0}, (1.700000, 0.350000, 0.600000), (0.000000, 0.700000)),
    ('slic', {'delta': 1.0, 'lam': 0.1, 'nll_reduction': 'sum'},
     (1.900000, 0.510000, 0.690000), (0.145000, 0.875000)),
    ('dpo_norm', {'beta': 2.0}, (0.644397, 0.670072, 0.472894), (0.381554, 0.958589)),
    ('dpo_norm', {'beta': 5.0}, (0.575939, 0.795462, 0.287697), (0.137234, 1.453690)),
    ('rdpo_len', {'beta': 0.1, 'alpha_len': 0.02},
     (0.673347, 0.687786, 0.680022), (0.623273, 0.752299)),
    ('dpop', {'beta': 0.1, 'lam': 5.0}, (0.683197, 0.708535, 0.696939), (0.632599, 0.784470)),
    ('simpo', {'beta': 2.0, 'gamma': 0.5}, (0.994956, 0.947051, 0.730850), (0.411551, 1.482551)),
    ('simpo', {'beta': 2.5, 'gamma': 1.375}, (1.633809, 1.512945, 1.193819), (0.647370, 2.378519)),
    ('orpo', {'lam': 0.1, 'nll_reduction': 'token'}, (0.737724, 0.601903, 0.589566), None),
    ('orpo', {'lam': 0.1, 'nll_reduction': 'seq'},
     (0.737724, 0.687320, 0.549566), (0.386837, 0.987803)),
    ('orpo', {'lam': 1.0, 'nll_reduction': 'seq'},
     (1.377243, 1.304447, 0.995665), (0.605865, 2.003028)),
    ('cpo', {'beta': 0.1, 'alpha': 1.0, 'nll_reduction': 'token'},
     (1.395426, 1.185261, 1.213872), None),
    ('cpo', {'beta': 0.1, 'alpha': 1.0, 'nll_reduction': 'seq'},
     (1.395426, 1.270677, 1.173872), (0.988095, 1.553260)),
    ('cpo', {'beta': 0.1, 'alpha': 0.0, 'nll_reduction': 'seq'},
     (0.728760, 0.651927, 0.673872), (0.625595, 0.678260)),
    ('sppo', {'beta': 0.5}, (1.700000, 2.112500, 1.666667), (0.382500, 3.842500)),
    ('sppo', {'beta': 0.5, 'p_chosen': 0.8, 'p_rejected': 0.2},
     (0.580000, 1.032500, 0.600000), (0.102500, 1.962500)),
    ('sppo', {'beta': 0.001},
     (499800.100000, 499750.612500, 499733.533333), (498750.882500, 500750.342500)),
    ('exo', {'beta': 0.1, 'label_smoothing': 0.001},
     (2.726748, 2.719499, 2.715317), (2.547625, 2.891374)),
    ('exo', {'beta': 0.5, 'label_smoothing': 0.1},
     (0.457189, 0.478259, 0.440943), (0.224808, 0.731709)),
    ('nca', {'beta': 0.1}, (1.381469, 1.380552, 1.379890), (1.355796, 1.405308)),
    ('nca', {'beta': 0.5}, (1.365665, 1.367684, 1.359512), (1.248737, 1.486630)),
    ('bco', {'beta': 0.5, 'delta_mode': 'fixed', 'delta': 0.0},
     (1.339417, 1.342832, 1.325868), (1.101196, 1.584467)),
    ('bco', {'beta': 0.5, 'delta_mode': 'fixed', 'delta': 0.05},
     (1.337544, 1.343733, 1.326077), (1.104546, 1.582919)),
    ('apo_zero', {'beta': 0.5}, (0.975068, 0.969393, 0.966798), (0.845487, 1.093299)),
    ('apo_down', {'beta': 0.5}, (1.012451, 0.983083, 0.987508), (0.898479, 1.067687)),
    ('discopop', {'beta': 0.05, 'tau': 0.05}, (0.854149, 0.847212, 0.856225), (0.877719, 0.816705)),
    ('discopop', {'beta': 0.5, 'tau': 0.05}, (0.873792, 0.716846, 0.842139), (0.535261, 0.898431)),
    ('aot', {'beta': 0.5}, (0.644397, 0.632910, 0.629599), None),
    ('aot', {'beta': 0.5, 'label_smoothing': 0.1}, (0.654397, 0.645410, 0.642932), None),
    ('aot_unpaired', {'beta': 0.5}, (0.644397, 0.637571, 0.629599), None),
    ('irpo', {'beta': 0.1, 'alpha': 1.0}, (1.349864, 1.300725, 1.179939), (0.995099, 1.606350)),
    ('irpo', {'beta': 0.1, 'alpha': 0.5}, (1.016531, 0.991350, 0.929939), (0.813849, 1.168850)),
    ('irpo', {'beta': 0.1, 'alpha': 1.0, 'nll_reduction': 'token'},
     (1.349864, 1.215308, 1.219939), None),
    ('dive', {'beta': 0.4, 'alpha': 0.5}, (0.660307, 0.641483, 0.570906), (0.418288, 0.864678)),
    ('dive', {'beta': 0.4, 'alpha': 0.8}, (0.656491, 0.655123, 0.613449), (0.451762, 0.858484)),
]


def id_of(row):
  return f'{row[0]}-' + ','.join(f'{k}={v}' for k, v in row[1].items())


@pytest.mark.parametrize(('name', 'options', 'expected', 'rows'), WORKED, ids=map(id_of, WORKED))
def test_worked_values(name, options, expected, rows):
  for batch, number in zip((A, B, C), expected, strict=True):
    np.testing.assert_allclose(value(name, batch, **options)[0], number, rtol=1e-5, atol=1e-6)
  if rows is not None:
    found = value(name, B, **options)[1]['per_example']
    np.testing.assert_allclose(found, rows, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(('divergence', 'expected', 'rows'), [
    ('forward_kl', (0.684980, 0.669525, 0.680048), (0.613160, 0.725889)),
    ('js', (0.688655, 0.684765, 0.686633), (0.659105, 0.710426)),
])
def test_worked_divergences(divergence, expected, rows):
  options = PairOptions(divergence=divergence)
  for batch, number in zip((A, B, C), expected, strict=True):
    np.testing.assert_allclose(value('dpo', batch, options, beta=0.1)[0], number, rtol=1e-5)
  np.testing.assert_allclose(
      value('dpo', B, options, beta=0.1)[1]['per_example'], rows, rtol=1e-5)


def test_alpha_divergence_tends_to_the_forward_kl_and_is_its_formula():
  near = PairOptions(divergence='alpha', divergence_alpha=1e-4)
  forward = PairOptions(divergence='forward_kl')
  np.testing.assert_allclose(value('dpo', B, near)[0], value('dpo', B, forward)[0], rtol=1e-4)
  half = PairOptions(divergence='alpha', divergence_alpha=0.5)
  h_w, h_l = np.array([0.4, -0.2]), np.array([-0.85, 0.55])
  margin = np.exp(-0.5 * h_w) / -0.5 - np.exp(-0.5 * h_l) / -0.5
  np.testing.assert_allclose(
      value('dpo', B, half, beta=0.1)[1]['per_example'], np.logaddexp(0, -0.1 * margin), rtol=1e-5)


@pytest.mark.parametrize(('batch', 'weights', 'expected'), [
    (A, [0.5], 0.655532), (B, [0.75, 0.25], 0.518341), (B, [0.75, 0.0], 0.296700),
    (C, [1.0, 0.5, 0.125], 0.626073), (B, [0.0, 0.0], 0.0)])
def test_scpo_weights_both_terms_and_not_the_denominator(batch, weights, expected):
  loss, aux = value('scpo', batch | {'weights': jnp.asarray(weights, jnp.float32)})
  np.testing.assert_allclose(loss, expected, rtol=1e-5)
  assert aux['n_valid'] == len(weights)


def test_bco_running_mean_goes_on_from_batch_to_batch():
  first, aux = pref_loss('bco', C, beta=0.5)
  np.testing.assert_allclose(first, 1.325799, rtol=1e-5)
  np.testing.assert_allclose(aux['state']['mean'], 0.016667, atol=1e-6)
  assert aux['state']['count'] == 6
  second, aux = pref_loss('bco', B, beta=0.5, state=aux['state'])
  np.testing.assert_allclose(second, 1.342867, rtol=1e-5)
  np.testing.assert_allclose(aux['state']['mean'], 0.005, atol=1e-6)
  assert aux['state']['count'] == 10


def test_aot_sorts_margins():
  """Fixture C tells nothing (aot = dpo there by construction); fixture B does."""
  np.testing.assert_allclose(
      sorted(value('aot', C, beta=0.5)[1]['per_example'].tolist()),
      [0.575939, 0.644397, 0.668460], atol=2e-6)
  assert abs(value('aot', B, beta=0.5)[0] - value('dpo', B, beta=0.5)[0]) > 0.01


# Edges


@pytest.mark.parametrize(('name', 'options', 'expected'), [
    ('dpo', {}, 0.693147), ('robust', {}, 0.693147), ('ipo', {'beta': 0.5}, 1.0),
    ('hinge', {}, 1.0), ('exo', {'label_smoothing': 0.01}, 1.614463), ('discopop', {}, 0.846574),
    ('nca', {}, 1.386294), ('bco', {'delta_mode': 'none'}, 1.386294), ('apo_zero', {}, 1.0),
    ('apo_down', {}, 1.0), ('sppo', {}, 2 * 500.0**2), ('rdpo_len', {'alpha_len': 0.0}, 0.693147),
    ('dpop', {}, 0.693147), ('aot', {}, 0.693147), ('aot_unpaired', {}, 0.693147)])
def test_loss_where_the_policy_is_the_reference(name, options, expected):
  same = B | {'ref_chosen': B['policy_chosen'], 'ref_rejected': B['policy_rejected']}
  np.testing.assert_allclose(value(name, same, **options)[0], expected, rtol=1e-5)


def single(p_w, p_l, r_w=0.0, r_l=0.0):
  one = jnp.ones((1, 1), jnp.float32)
  return {'policy_chosen': p_w * one, 'policy_rejected': p_l * one, 'ref_chosen': r_w * one,
          'ref_rejected': r_l * one, 'chosen_mask': one, 'rejected_mask': one}


@pytest.mark.parametrize(('name', 'options', 'batch', 'expected'), [
    ('dpo', {'beta': 0.1}, single(60000.0, 0.0), 0.0),
    ('dpo', {'beta': 0.1}, single(0.0, 60000.0), 6000.0),
    ('discopop', {'beta': 0.1, 'tau': 0.05}, single(0.0, 60000.0), 6000.0),
    ('orpo', {'lam': 1.0}, single(0.0, -0.375), 2.2e-6),
    ('orpo', {'lam': 1.0}, single(0.0, 0.0), 0.693147)])
def test_huge_margins_and_certain_responses(name, options, batch, expected):
  loss, grads = jax.value_and_grad(lambda b: pref_loss(name, b, **options)[0])(batch)
  np.testing.assert_allclose(loss, expected, rtol=2e-2 if name == 'orpo' else 1e-5, atol=1e-7)
  assert all(np.isfinite(g).all() for g in jax.tree.leaves(grads))
  if name == 'dpo':
    assert abs(grads['policy_chosen']).max() <= 0.1 * 1.0001


@pytest.mark.parametrize('name', PAIRWISE)
def test_masked_values_and_invalid_rows_reach_nothing(name):
  batch = with_rewards(B)
  clean, aux = value(name, batch)
  dirty = {key: jnp.concatenate([x, jnp.ones_like(x[:1])]) for key, x in batch.items()}
  dirty['chosen_mask'] = dirty['chosen_mask'].at[2].set(0)      # an invalid row
  for side, rubbish in (('chosen', jnp.nan), ('rejected', -jnp.inf)):
    for model in ('policy', 'ref'):
      key = f'{model}_{side}'
      dirty[key] = jnp.where(dirty[f'{side}_mask'] > 0, dirty[key], rubbish)
  loss, grads = jax.value_and_grad(lambda b: value(name, b)[0])(dirty)
  np.testing.assert_allclose(loss, clean, rtol=1e-6)
  assert aux['n_valid'] == 2 and value(name, dirty)[1]['n_valid'] == 2
  for key in ('policy_chosen', 'policy_rejected'):
    side = key.split('_')[1]
    real = (dirty[f'{side}_mask'] > 0) & (jnp.arange(3) < 2)[:, None]
    assert np.isfinite(grads[key]).all() and (np.asarray(grads[key])[~np.asarray(real)] == 0).all()
  assert not np.any(grads['ref_chosen']) and not np.any(grads['ref_rejected'])
  empty = batch | {key: jnp.zeros_like(batch[key]) for key in ('chosen_mask', 'rejected_mask')}
  loss, grads = jax.value_and_grad(lambda b: value(name, b)[0])(empty)
  assert loss == 0 and not any(np.any(g) for g in jax.tree.leaves(grads))


@pytest.mark.parametrize('name', PAIRWISE)
def test_nan_at_a_real_token_is_never_hidden(name):
  broken = with_rewards(B)
  broken = broken | {'policy_chosen': broken['policy_chosen'].at[0, 1].set(jnp.nan)}
  assert np.isnan(value(name, broken)[0])


# Gradients


@pytest.mark.parametrize('name', PAIRWISE)
def test_gradients_match_float64_finite_differences(name):
  """Of the batch loss, sorts included, at a batch without ties or kinks."""
  rng = np.random.default_rng(3)
  batch = with_rewards({
      key: jnp.asarray(x if 'mask' in key else -rng.uniform(0.1, 1.5, x.shape), jnp.float32)
      for key, x in B.items()})
  # The running mean of BCO is detached by definition, so differences would see more.
  options = {'delta_mode': 'none'} if name == 'bco' else {}
  options |= {'beta': 0.4} if 'beta' in defaults(name) else {}
  wide = {key: np.asarray(x, np.float64) for key, x in batch.items()}
  grads = jax.grad(lambda b: value(name, b, **options)[0])(batch)
  for key in ('policy_chosen', 'policy_rejected'):
    expected = np.zeros_like(wide[key])
    for at in np.ndindex(*wide[key].shape):
      step = np.zeros_like(wide[key])
      step[at] = 1e-6
      expected[at] = (_loss64(name, wide | {key: wide[key] + step}, options)
                      - _loss64(name, wide | {key: wide[key] - step}, options)) / 2e-6
    np.testing.assert_allclose(grads[key], expected, rtol=1e-4, atol=1e-6)


def _loss64(name, batch, options):
  """The definition in float64 NumPy, written from the formulas, sorts as sorts."""
  o = defaults(name) | options
  mask = {side: batch[f'{side}_mask'] > 0 for side in ('chosen', 'rejected')}

  def total(model, side):
    return np.where(mask[side], batch[f'{model}_{side}'], 0).sum(1)

  n_w, n_l = mask['chosen'].sum(1), mask['rejected'].sum(1)
  p_w, p_l = total('policy', 'chosen'), total('policy', 'rejected')
  r_w, r_l = total('ref', 'chosen'), total('ref', 'rejected')
  h_w, h_l = p_w - r_w, p_l - r_l
  d, a_w, a_l = h_w - h_l, p_w / n_w, p_l / n_l
  beta, e = o.get('beta'), o.get('label_smoothing', 0)

  def ls(z):
    return -np.logaddexp(0, -z)

  def sg(z):
    return 1 / (1 + np.exp(-z))

  def nll(factor):
    return {'seq': np.mean(-factor * a_w), 'sum': np.mean(-factor * p_w),
            'token': -factor * p_w.sum() / n_w.sum()}[o.get('nll_reduction', 'seq')]

  def smooth(z):
    return np.mean(-(1 - e) * ls(z) - e * ls(-z))

  if name == 'orpo':
    odds = (a_w - a_l) - (np.log(1 - np.exp(a_w)) - np.log(1 - np.exp(a_l)))
    return nll(1) - o['lam'] * np.mean(ls(odds))
  target = sg(o.get('eta', 1) * batch['reward_margin'])
  formulas = {
      'dpo': lambda: smooth(beta * d),
      'robust': lambda: np.mean(-(1 - e) * ls(beta * d) + e * ls(-beta * d)) / (1 - 2 * e),
      'ipo': lambda: np.mean((h_w / n_w - h_l / n_l - 1 / (2 * beta)) ** 2),
      'hinge': lambda: np.mean(np.maximum(0, 1 - beta * d)),
      'slic': lambda: np.mean(np.maximum(0, o['delta'] - p_w + p_l)) + nll(o['lam']),
      'dpo_norm': lambda: np.mean(-ls(beta * (h_w / n_w - h_l / n_l))),
      'rdpo_len': lambda: np.mean(-ls(beta * d + o['alpha_len'] * (n_w - n_l))),
      'dpop': lambda: np.mean(-ls(beta * (d - o['lam'] * np.maximum(0, -h_w)))),
      'simpo': lambda: np.mean(-ls(beta * (a_w - a_l) - o['gamma'])),
      'cpo': lambda: smooth(beta * (p_w - p_l)) + nll(o['alpha']),
      'sppo': lambda: np.mean((h_w - 0.5 / beta) ** 2 + (h_l + 0.5 / beta) ** 2),
      'exo': lambda: np.mean(sg(beta * d) * (ls(beta * d) - np.log(1 - e))
                             + sg(-beta * d) * (ls(-beta * d) - np.log(e))),
      'nca': lambda: np.mean(-ls(beta * h_w) - 0.5 * ls(-beta * h_w) - 0.5 * ls(-beta * h_l)),
      'aot': lambda: smooth(beta * (np.sort(p_w - p_l) - np.sort(r_w - r_l))),
      'aot_unpaired': lambda: smooth(beta * (np.sort(h_w) - np.sort(h_l))),
      'bco': lambda: np.mean(-ls(beta * h_w) - ls(-beta * h_l)),
      'apo_zero': lambda: np.mean(1 - sg(beta * h_w) + sg(beta * h_l)),
      'apo_down': lambda: np.mean(sg(beta * h_w) + 1 - sg(beta * d)),
      'discopop': lambda: np.mean(-ls(beta * d) * (1 - sg(beta * d / o['tau']))
                                  + np.exp(-beta * d) * sg(beta * d / o['tau'])),
      'irpo': lambda: np.mean(-ls(beta * d)) + nll(o['alpha']),
      'scpo': lambda: np.mean(-ls(beta * d)) + nll(o['alpha']),
      'dive': lambda: o['alpha'] * np.mean(-ls(beta * d)) + nll(1 - o['alpha']),
      'nll': lambda: nll(1),
      'reward_aware': lambda: np.mean(
          target * (np.log(target) - ls(beta * d)) + (1 - target) * (
              np.log(1 - target) - ls(-beta * d))),
  }
  return formulas[name]()


@pytest.mark.parametrize('name', PAIRWISE)
def test_values_match_float64(name):
  options = {'delta_mode': 'none'} if name == 'bco' else {}
  for batch in map(with_rewards, (A, B, C)):
    wide = {key: np.asarray(x, np.float64) for key, x in batch.items()}
    np.testing.assert_allclose(
        value(name, batch, **options)[0], _loss64(name, wide, options), rtol=2e-5)


# Variants


def test_ld_dpo_weighs_tokens_beyond_the_shorter_response():
  """By hand on fixture B: lengths 4 and 3, then 2 and 4."""
  found = value('dpo', B, PairOptions(ld_alpha=0.5), beta=1.0)[1]['per_example']
  h_w = np.array([0.2 - 0.05 + 0.45 + 0.5 * -0.2, -0.2])
  h_l = np.array([-0.85, 0.2 - 0.05 + 0.5 * (0.5 - 0.1)])
  np.testing.assert_allclose(found, np.logaddexp(0, h_l - h_w), rtol=1e-5)


def test_wpo_multiplies_rows_by_detached_confidences():
  collision = {f'{side}_collision': jnp.full(B[f'{side}_mask'].shape, -0.7)
               for side in ('chosen', 'rejected')}
  options = PairOptions(wpo=True)
  a_w, a_l = np.array([-0.3625, -0.875]), np.array([-0.95, -0.5125])
  weights = np.exp(a_w + 0.7 + a_l + 0.7)
  plain = value('dpo', B)[1]['per_example']
  np.testing.assert_allclose(
      value('dpo', B | collision, options)[1]['per_example'], weights * plain, rtol=1e-5)
  slope = jax.grad(lambda b: value('dpo', b, options)[0])(B | collision)
  expected = jax.grad(lambda b: value('dpo', b)[0])(
      B | {'weights': jnp.asarray(weights, jnp.float32)})
  np.testing.assert_allclose(slope['policy_chosen'], expected['policy_chosen'], rtol=1e-5)


def test_likelihood_may_count_other_tokens():
  mask = jnp.asarray([[1, 1, 0, 0], [1, 0, 0, 0]])
  terms, _ = totals('irpo', pair_sums(B | {'nll_mask': mask}), nll_reduction='token')
  np.testing.assert_allclose(terms['nll'][0], 0.2 + 0.35 + 1.5, rtol=1e-6)
  assert normalisers(pair_sums(B | {'nll_mask': mask}))['tokens'] == 3


def test_mixtures_are_weighted_sums():
  parts = {'dpo': (0.8, {}), 'bco': (0.2, {'delta_mode': 'none'}), 'nll': (1.0, {})}
  s, _ = survey('bco', pair_sums(B), delta_mode='none')
  mixed, rows = mixed_totals(parts, s)
  expected = sum(w * value(name, B, **options)[0] for name, (w, options) in parts.items())
  np.testing.assert_allclose(divide(mixed, normalisers(s)), expected, rtol=1e-6)
  assert set(mixed) == {'dpo/preference', 'bco/preference', 'nll/nll'} and rows.shape == (2,)


def test_sppo_takes_win_probabilities_per_row():
  rows = {'p_chosen': jnp.asarray([0.8, 0.8]), 'p_rejected': jnp.asarray([0.2, 0.2])}
  np.testing.assert_allclose(value('sppo', B | rows, beta=0.5)[0], 1.032500, rtol=1e-5)


# Bad input


@pytest.mark.parametrize(('name', 'options', 'words'), [
    ('dpo', {'beta': 0.0}, 'beta'), ('dpo', {'beta': float('nan')}, 'beta'),
    ('dpo', {'beta': '0.1'}, 'beta'), ('dpo', {'label_smoothing': 0.6}, 'label_smoothing'),
    ('robust', {'label_smoothing': 0.5}, 'label_smoothing'),
    ('exo', {'label_smoothing': 0.0}, 'label_smoothing'), ('discopop', {'tau': 0.0}, 'tau'),
    ('simpo', {'gamma': -0.1}, 'gamma'), ('irpo', {'alpha': -1.0}, 'alpha'),
    ('dive', {'alpha': 1.5}, 'alpha'), ('irpo', {'nll_reduction': 'mean'}, 'nll_reduction'),
    ('bco', {'delta_mode': 'mean'}, 'delta_mode'), ('bco', {'delta': 0.1}, 'delta_mode'),
    ('sppo', {'p_chosen': 1.5}, 'p_chosen'), ('dpo', {'gamma': 1.0}, 'no option'),
    ('ppo', {}, 'unknown loss')])
def test_bad_options_are_refused_before_anything_runs(name, options, words):
  with pytest.raises(ValueError, match=words):
    check_loss(name, options)
  with pytest.raises(ValueError, match=words):
    pref_loss(name, B, **options)


@pytest.mark.parametrize(('name', 'options', 'words'), [
    ('simpo', {'reference_free': True}, 'reference'), ('orpo', {'divergence': 'js'}, 'divergence'),
    ('aot', {'wpo': True}, 'WPO'), ('nll', {'divergence': 'forward_kl'}, 'divergence')])
def test_variants_that_do_not_apply_are_refused(name, options, words):
  with pytest.raises(ValueError, match=words):
    check_loss(name, {}, PairOptions(**options))


def test_bad_batches_are_refused():
  for key in ('policy_chosen', 'ref_rejected', 'chosen_mask'):
    with pytest.raises(ValueError, match=key):
      pref_loss('dpo', {name: x for name, x in B.items() if name != key})
  pref_loss('simpo', {name: x for name, x in B.items() if not name.startswith('ref')})
  with pytest.raises(ValueError, match='weights'):
    pref_loss('aot', B | {'weights': jnp.ones(2)})
  with pytest.raises(ValueError, match='reward_margin'):
    pref_loss('reward_aware', B)
  with pytest.raises(ValueError, match='divergence_alpha'):
    PairOptions(divergence='alpha')


def test_initial_state_is_empty():
  assert initial_state()['count'] == 0
