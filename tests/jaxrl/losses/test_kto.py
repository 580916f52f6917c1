"""KTO: worked values, edges, and where the gradient goes."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl.losses.kto import kto_loss

KTO = {
    'policy': [[-0.4, -0.6], [-1.2, -0.2], [-0.3, 0]],
    'ref': [[-0.9, -0.3], [-0.7, -0.5], [-0.8, 0]],
    'mask': [[1, 1], [1, 1], [1, 0]], 'label': [1, 0, 1],
    'kl_policy': [[-2.1, -1.0], [-1.4, -0.9], [-3.0, 0]],
    'kl_ref': [[-2.3, -1.1], [-1.3, -1.0], [-3.2, 0]], 'kl_mask': [[1, 1], [1, 1], [1, 0]]}
KTO = {key: jnp.asarray(x, jnp.float32) for key, x in KTO.items()}


def test_kto_worked_values():
  loss, aux = kto_loss(KTO, beta=0.1)
  np.testing.assert_allclose(aux['z0'], 0.166667, atol=1e-6)
  np.testing.assert_allclose(aux['per_example'], [0.499167, 0.490834, 0.491667], atol=1e-6)
  np.testing.assert_allclose(loss, 0.493889, atol=1e-6)
  loss, aux = kto_loss(KTO, beta=0.5, desirable_weight=1.33)
  np.testing.assert_allclose(aux['per_example'], [0.659458, 0.454295, 0.609711], atol=1e-6)
  np.testing.assert_allclose(loss, 0.574488, atol=1e-6)
  clamped = KTO | {'kl_policy': KTO['kl_policy'].at[0].set(jnp.asarray([-2.6, -1.2]))}
  loss, aux = kto_loss(clamped, beta=0.5)
  assert aux['z0'] == 0
  np.testing.assert_allclose(loss, 0.462622, atol=1e-6)


def test_kto_edges():
  same = KTO | {'policy': KTO['ref'], 'kl_policy': KTO['kl_ref']}
  np.testing.assert_allclose(kto_loss(same)[0], 0.5)
  no_kl = KTO | {'kl_mask': jnp.zeros_like(KTO['kl_mask'])}
  assert kto_loss(no_kl)[1]['z0'] == 0
  nothing = KTO | {'mask': jnp.zeros_like(KTO['mask'])}
  assert kto_loss(nothing)[0] == 0
  grads = jax.grad(lambda b: kto_loss(b)[0])(KTO)
  assert np.any(grads['policy']) and not any(
      np.any(grads[key]) for key in ('ref', 'kl_policy', 'kl_ref'))
