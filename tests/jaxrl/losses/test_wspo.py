"""WSPO: worked values, where the gradient goes, and batches that do not fit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl.losses.wspo import wspo_loss

W1 = {'policy_strong': [[-1.0, -0.5, -2.0]], 'ref_strong': [[-1.2, -0.4, -1.5]],
      'weak_aligned': [[-0.9, -0.7, -1.1]], 'weak_ref': [[-1.0, -0.6, -1.6]], 'mask': [[1, 1, 1]]}
W2 = {'policy_strong': [[-0.8, -1.4, -0.3, -0.6], [-2.0, -0.1, 0, 0]],
      'ref_strong': [[-1.0, -1.1, -0.5, -0.6], [-1.5, -0.3, 0, 0]],
      'weak_aligned': [[-0.7, -1.3, -0.6, -0.9], [-1.8, -0.4, 0, 0]],
      'weak_ref': [[-1.1, -1.2, -0.9, -0.4], [-1.6, -0.2, 0, 0]],
      'mask': [[1, 1, 1, 1], [1, 1, 0, 0]]}
W1, W2 = ({key: jnp.asarray(x, jnp.float32) for key, x in w.items()} for w in (W1, W2))


@pytest.mark.parametrize(('batch', 'gamma', 'token', 'rows', 'sequence'), [
    (W1, 0.1, 0.105667, (0.105667,), 0.097200), (W1, 0.5, 0.188333, (0.188333,), 0.163333),
    (W1, 1.0, 0.336667, (0.336667,), 0.270000),
    (W2, 0.1, 0.077438, (0.119425, 0.035450), 0.035237),
    (W2, 0.5, 0.070938, (0.095625, 0.046250), 0.015937),
    (W2, 1.0, 0.105000, (0.085000, 0.125000), 0.002500)])
def test_wspo_worked_values(batch, gamma, token, rows, sequence):
  loss, aux = wspo_loss(batch, gamma=gamma)
  np.testing.assert_allclose(loss, token, atol=1e-6)
  np.testing.assert_allclose(aux['per_example'], rows, atol=1e-6)
  np.testing.assert_allclose(wspo_loss(batch, gamma=gamma, level='sequence')[0], sequence,
                             atol=1e-6)


def test_wspo_gradient_reaches_the_strong_policy_alone():
  grads = jax.grad(lambda b: wspo_loss(b, gamma=0.1)[0])(W1)
  np.testing.assert_allclose(
      grads['policy_strong'], [[-0.005333, 0.006000, -0.036667]], atol=1e-6)
  assert not any(np.any(grads[key]) for key in ('ref_strong', 'weak_aligned', 'weak_ref'))


def test_shapes_must_agree():
  with pytest.raises(ValueError, match='shape'):
    wspo_loss(W2 | {'weak_ref': W1['weak_ref']})
