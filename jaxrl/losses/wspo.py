"""WSPO: a strong model learns the log-ratio that alignment gave a weak one.

Weak-to-Strong Preference Optimization, token level as in the released code.
"""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from jaxrl.losses.checks import check_positive

KEYS = ('policy_strong', 'ref_strong', 'weak_aligned', 'weak_ref', 'mask')
LEVELS = ('token', 'sequence')


def wspo(
    batch: Mapping[str, jax.Array], *, gamma: float = 0.1, level: str = 'token'
) -> tuple[jax.Array, jax.Array]:
  """(per-row loss [B], validity [B]): the mean over tokens of (gamma d_s - d_w)^2.

  d_s is the strong log-ratio to its reference, d_w the weak one, per token [B, T]. `level`
  'sequence' squares the difference of their sums instead, divided by the tokens.

  Raises:
    ValueError: an option out of range, a missing key or shapes that differ.
  """
  check_positive('gamma', gamma)
  if level not in LEVELS:
    raise ValueError(f'level must be one of {list(LEVELS)}; found {level!r}')
  missing = [key for key in KEYS if key not in batch]
  if missing:
    raise ValueError(f'WSPO batch lacks {missing}; it needs {list(KEYS)}')
  if len({batch[key].shape for key in KEYS}) != 1 or batch['mask'].ndim != 2:
    raise ValueError(f'{", ".join(KEYS)} must share one shape [B, T]; found '
                     f'{ {key: batch[key].shape for key in KEYS} }')
  mask = batch['mask'].astype(bool)
  frozen = {key: jax.lax.stop_gradient(batch[key]) for key in KEYS[1:4]}
  strong = batch['policy_strong'] - frozen['ref_strong']
  weak = frozen['weak_aligned'] - frozen['weak_ref']
  gap = jnp.where(mask, gamma * strong - weak, 0).astype(jnp.float32)
  n = jnp.sum(mask, axis=-1, dtype=jnp.float32)
  squared = jnp.sum(gap, axis=-1) ** 2 if level == 'sequence' else jnp.sum(gap * gap, axis=-1)
  return squared / jnp.maximum(n, 1), n >= 1


def wspo_loss(batch: Mapping[str, jax.Array], **options) -> tuple[jax.Array, dict[str, jax.Array]]:
  """The whole batch at once: (loss [], aux with `per_example` [B] and `n_valid` [])."""
  per_row, valid = wspo(batch, **options)
  per_row = jnp.where(valid, per_row, 0.0)
  count = jnp.sum(valid, dtype=jnp.float32)
  return jnp.sum(per_row) / jnp.maximum(count, 1), {'per_example': per_row, 'n_valid': count}
