"""KTO: single responses with a label in place of pairs (Ethayarajh et al. 2024)."""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from jaxrl.losses.checks import check_not_negative, check_positive
from jaxrl.losses.mean import Mean, mean_over

KEYS = ('policy', 'ref', 'mask', 'kl_policy', 'kl_ref', 'kl_mask')


def _ratio(policy: jax.Array, ref: jax.Array, mask: jax.Array) -> tuple[jax.Array, jax.Array]:
  """(masked sum of policy - ref [B], whether the row has a token [B])."""
  mask = mask.astype(bool)
  gap = jnp.where(mask, policy - jax.lax.stop_gradient(ref), 0).astype(jnp.float32)
  return jnp.sum(gap, axis=-1), jnp.any(mask, axis=-1)


def kl_estimate(batch: Mapping[str, jax.Array]) -> Mean:
  """Mean log-ratio of mismatched responses, not yet clamped: totals add over the global batch."""
  h, valid = _ratio(*(jax.lax.stop_gradient(batch[key]) for key in KEYS[3:]))
  return mean_over(h, valid)


def kto(
    batch: Mapping[str, jax.Array], z0: jax.Array, *, beta: float = 0.1,
    desirable_weight: float = 1.0, undesirable_weight: float = 1.0,
) -> tuple[jax.Array, jax.Array]:
  """(per-row loss [B], validity [B]); w (1 - sigmoid(beta (h - z0))) or its mirror image.

  Args:
    batch: `policy`, `ref`, `mask` [B, T], `label` [B] (1 is desirable).
    z0: [] or [B] max(0, `kl_estimate` of the global batch), without gradient.

  Raises:
    ValueError: an option out of range.
  """
  check_positive('beta', beta)
  check_not_negative('desirable_weight', desirable_weight)
  check_not_negative('undesirable_weight', undesirable_weight)
  h, valid = _ratio(batch['policy'], batch['ref'], batch['mask'])
  liked = batch['label'].astype(bool)
  gap = jnp.where(liked, h - z0, z0 - h)
  weight = jnp.where(liked, desirable_weight, undesirable_weight).astype(jnp.float32)
  return jnp.where(valid, weight * jax.nn.sigmoid(-beta * gap), 0.0), valid


def kto_loss(batch: Mapping[str, jax.Array], **options) -> tuple[jax.Array, dict[str, jax.Array]]:
  """The whole batch at once: (loss [], aux with `per_example` [B], `z0` [] and `n_valid` []).

  Raises:
    ValueError: a key is missing, shapes differ, or an option is out of range.
  """
  missing = [key for key in (*KEYS, 'label') if key not in batch]
  if missing:
    raise ValueError(f'KTO batch lacks {missing}')
  for keys in (KEYS[:3], KEYS[3:]):
    if len({batch[key].shape for key in keys}) != 1:
      raise ValueError(f'{", ".join(keys)} must share one shape [B, T]')
  if batch['label'].shape != batch['mask'].shape[:1]:
    raise ValueError(f'label must have shape {batch["mask"].shape[:1]}; '
                     f'found {batch["label"].shape}')
  z0 = jnp.maximum(kl_estimate(batch).value(), 0.0)
  per_row, valid = kto(batch, z0, **options)
  count = jnp.sum(valid, dtype=jnp.float32)
  loss = jnp.sum(per_row) / jnp.maximum(count, 1)
  return loss, {'per_example': per_row, 'z0': z0, 'n_valid': count}
