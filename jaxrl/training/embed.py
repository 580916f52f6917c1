"""Embeddings of responses by a frozen model: its final hidden states, averaged."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl.data.batches import TokenRow
from jaxrl.errors import InputError
from jaxrl.models.config import ModelConfig
from jaxrl.models.decoder import cast, forward
from jaxrl.models.gather import gather_place
from jaxrl.training.logps import ComputePolicy
from jaxrl.training.loop import put_batch
from jaxrl.training.score import by_length


def response_means(
    params,
    ids: jax.Array,           # [B, T] int32
    mask: jax.Array,          # [B, T] bool, True on response ids
    c: ModelConfig,
    policy: ComputePolicy,
) -> jax.Array:               # [B, D] float32
  """Mean of the final hidden states over the response ids, L2-normalised; zero without any."""
  hidden = forward(cast(params, policy.jax_dtype), ids, c)
  # `where`, not a product: what stands in padding must not matter, whatever it is.
  kept = jnp.where(mask[..., None], hidden.astype(jnp.float32), 0.0)
  mean = kept.sum(axis=1) / jnp.maximum(mask.sum(axis=1), 1)[:, None].astype(jnp.float32)
  norm = jnp.sqrt(jnp.sum(mean * mean, axis=-1))[:, None]
  return mean / jnp.where(norm > 0, norm, 1.0)


def embed_rows(
    params: dict,
    rows: Sequence[TokenRow],
    c: ModelConfig,
    policy: ComputePolicy,
    *,
    mesh: jax.sharding.Mesh,
    lengths: Sequence[int],
    batch_size: int,
    pad_id: int,
    on_rows: Callable[[int], None] = lambda n: None,
) -> np.ndarray:              # [n, D] float32
  """Per row the L2-normalised mean of the final hidden states over its response ids.

  Takes what `score_rows` takes. The last id of a row is read too, which scoring does not need, so
  that a row that just fits the largest of `lengths` there has one more padded length here. A row
  without response ids is the zero vector.

  Raises:
    InputError: a row has no ids, or is longer than every padded length.
  """
  fn = _compiled(c, policy)
  out = np.zeros((len(rows), c.d_model), np.float32)
  for group, filled in by_length(rows, batch_size):
    ids, mask = _arrays(filled, lengths, pad_id)
    placed = put_batch({'ids': ids, 'mask': mask}, mesh)
    out[group] = gather_place(fn(params, placed['ids'], placed['mask']), ())[:len(group)]
    on_rows(len(group))
  return out


def _arrays(
    rows: Sequence[TokenRow], lengths: Sequence[int], pad_id: int
) -> tuple[np.ndarray, np.ndarray]:
  """Whole rows of ids, and where their responses are, both [B, T]."""
  longest, allowed = max(len(row) for row in rows), (*sorted(lengths), max(lengths) + 1)
  t = next((length for length in allowed if length >= longest), None)
  if t is None or not min(len(row) for row in rows):
    raise InputError(
        'a row does not fit the padded lengths', where='embeddings',
        expected=f'1 to {allowed[-1]} ids', found=f'{longest if t is None else 0} ids')
  ids = np.full((len(rows), t), pad_id, np.int32)
  mask = np.zeros((len(rows), t), bool)
  for n, row in enumerate(rows):
    ids[n, :len(row)] = [*row.prompt_ids, *row.response_ids]
    mask[n, len(row.prompt_ids):len(row)] = True
  return ids, mask


@functools.cache
def _compiled(c: ModelConfig, policy: ComputePolicy) -> jax.stages.Wrapped:
  """One function per model shape: jit knows compiled programs by the function's identity."""
  return jax.jit(functools.partial(response_means, c=c, policy=policy))
