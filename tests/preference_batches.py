"""What the loss tests share: worked batches, random ones, and a jitted call."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import strategies as st

from jaxrl.losses.pairs import PLAIN
from jaxrl.losses.preference import LOSSES, pref_loss


def pair_batch(*rows):
  names = ('policy_chosen', 'ref_chosen', 'chosen_mask', 'policy_rejected', 'ref_rejected',
           'rejected_mask')
  return {name: jnp.asarray(row, jnp.float32) for name, row in zip(names, rows, strict=True)}


A = pair_batch([[-0.50, -1.20, -0.30]], [[-0.70, -1.00, -0.60]], [[1, 1, 1]],
           [[-0.90, -0.40, 0.00]], [[-0.60, -0.80, 0.00]], [[1, 1, 0]])
B = pair_batch([[-0.20, -0.35, -0.10, -0.80], [-1.50, -0.25, 0, 0]],
           [[-0.40, -0.30, -0.55, -0.60], [-1.10, -0.45, 0, 0]], [[1, 1, 1, 1], [1, 1, 0, 0]],
           [[-0.60, -2.10, -0.15, 0], [-0.05, -0.70, -0.90, -0.40]],
           [[-0.50, -1.30, -0.20, 0], [-0.25, -0.65, -1.40, -0.30]], [[1, 1, 1, 0], [1, 1, 1, 1]])
C = pair_batch([[-0.40, -0.60], [-1.20, -0.20], [-0.30, 0]],
           [[-0.90, -0.30], [-0.70, -0.50], [-0.80, 0]], [[1, 1], [1, 1], [1, 0]],
           [[-0.50, 0], [-2.00, -0.40], [-0.10, -0.90]],
           [[-0.20, 0], [-1.50, -0.60], [-0.60, -0.70]], [[1, 0], [1, 1], [1, 1]])


@functools.partial(jax.jit, static_argnames=('name', 'options', 'pair_options'))
def run(name, options, batch, pair_options=PLAIN):
  return pref_loss(name, batch, pair_options=pair_options, **dict(options))


def value(name, batch, pair_options=PLAIN, **options):
  return run(name, tuple(options.items()), batch, pair_options)


PAIRWISE = sorted(LOSSES)


def with_rewards(batch):
  """`reward_aware` reads one more row; the other losses ignore it."""
  b = batch['chosen_mask'].shape[0]
  return batch | {'reward_margin': jnp.linspace(-1.0, 2.0, b)}


@st.composite
def batches(draw, largest=-1 / 128):
  """Log-probs of both sides under both models, from -6 to `largest`, and masks."""
  logps = st.floats(-6, largest, width=32)
  b, t = 4, 5        # one shape, so one compilation; rows of length 0 stand for smaller batches
  out = {}
  for side in ('chosen', 'rejected'):
    lengths = draw(st.lists(st.integers(0, t), min_size=b, max_size=b))
    out[f'{side}_mask'] = np.arange(t)[None] < np.asarray(lengths)[:, None]
    for model in ('policy', 'ref'):
      values = draw(st.lists(logps, min_size=b * t, max_size=b * t))
      out[f'{model}_{side}'] = np.asarray(values, np.float32).reshape(b, t)
  return out
