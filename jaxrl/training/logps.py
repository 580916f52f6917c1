"""Per-token log-probs of targets under a decoder: one function trains, scores and checks."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp

from jaxrl.errors import InputError
from jaxrl.models.config import ModelConfig
from jaxrl.models.decoder import REMAT, Layout, cast, forward, output_matrix
from jaxrl.parallel.sharding import per_row
from kernels.attention import Spans
from kernels.token_logp import log_collision, token_logp

Batch = Mapping[str, jax.Array]
# Arrays of packed rows that are not of units [B, K, ...].
PER_ROW = ('inputs', 'positions', *(f.name for f in dataclasses.fields(Spans)), 'picked', 'targets')


@dataclasses.dataclass(frozen=True)
class ComputePolicy:
  """How the forward pass runs; part of the identity of stored log-probs.

  Raises:
    InputError: an unknown policy of recomputation.
  """

  dtype: str = 'bfloat16'     # of matrix products; parameters stay float32
  chunk: int = 512            # tokens of a device whose logits exist at one time
  remat: str = 'attn'         # what of a layer is kept for the backward pass, of `decoder.REMAT`

  def __post_init__(self):
    if self.remat not in REMAT:
      raise InputError('unknown policy of recomputation', where='--remat',
                       expected=f'one of {", ".join(REMAT)}', found=self.remat)

  @property
  def jax_dtype(self):
    return jnp.dtype(self.dtype)


def target_logps(
    params,
    inputs: jax.Array,        # [B, T] int32
    targets: jax.Array,       # [B, T] int32
    c: ModelConfig,
    policy: ComputePolicy,
) -> jax.Array:               # [B, T] float32
  """log p(targets[t] | inputs[:t+1]), temperature 1, untruncated."""
  return response_logps(params, {'inputs': inputs, 'targets': targets}, c, policy)


def response_logps(params, batch: Batch, c: ModelConfig, policy: ComputePolicy) -> jax.Array:
  """Log-probs float32 of the targets of a batch, laid out as its `mask` after `by_unit`.

  Padded rows give [..., T], as `inputs` is; packed ones (`data.packing`) give [B * K, ..., R].
  """
  logps, _ = _scored(params, batch, c, policy, collisions=False)
  return logps


def logps_and_collisions(
    params, batch: Batch, c: ModelConfig, policy: ComputePolicy
) -> tuple[jax.Array, jax.Array]:
  """`response_logps`, and log sum_v p(v)^2 of each without gradient, from one forward pass."""
  logps, collisions = _scored(params, batch, c, policy, collisions=True)
  assert collisions is not None
  return logps, collisions


def by_unit(batch: Batch) -> Batch:
  """A batch whose packed rows of units [B, K, ...] are one row of units [B * K, ...]."""
  if 'places' not in batch:
    return batch
  return {key: x if key in PER_ROW else x.reshape(-1, *x.shape[2:]) for key, x in batch.items()}


def _scored(
    params, batch: Batch, c: ModelConfig, policy: ComputePolicy, *, collisions: bool
) -> tuple[jax.Array, jax.Array | None]:
  params = cast(params, policy.jax_dtype)
  finish: Callable[[jax.Array], jax.Array]
  if 'places' in batch:
    layout = Layout(batch['positions'], Spans(*(batch[f.name] for f in dataclasses.fields(Spans))))
    hidden = forward(params, batch['inputs'], c, layout=layout, remat=policy.remat)
    if 'picked' in batch:
      hidden = per_row(lambda h, n: jnp.take_along_axis(h, n[..., None], 1), hidden,
                       batch['picked'])
    targets, places = batch['targets'], batch['places']

    def finish(x):            # [B, M] -> [B K, ..., R]
      flat = per_row(lambda x, n: jnp.take_along_axis(x, n, 1), x,
                     places.reshape(places.shape[0], -1))
      return flat.reshape(places.shape).reshape(-1, *places.shape[2:])
  else:
    shape = batch['inputs'].shape
    inputs, targets = (batch[key].reshape(-1, shape[-1]) for key in ('inputs', 'targets'))
    hidden = forward(params, inputs, c, remat=policy.remat)

    def finish(x):
      return x.reshape(shape)

  head = output_matrix(params, c)
  logps = finish(token_logp(
      hidden, head, targets, chunk=policy.chunk, softcap=c.final_softcap))
  if not collisions:
    return logps, None
  return logps, finish(log_collision(
      hidden, head, chunk=policy.chunk, softcap=c.final_softcap))
