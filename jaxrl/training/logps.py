"""Per-token log-probs of targets under a decoder: one function trains, scores and checks."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from jaxrl.models.config import ModelConfig
from jaxrl.models.decoder import cast, forward, output_matrix
from kernels.token_logp import log_collision, token_logp


@dataclasses.dataclass(frozen=True)
class ComputePolicy:
  """How the forward pass runs; part of the identity of stored log-probs."""

  dtype: str = 'bfloat16'     # of matrix products; parameters stay float32
  chunk: int = 512            # target positions whose logits exist at one time, per row
  remat: bool = True          # recompute layers in the backward pass

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
  params = cast(params, policy.jax_dtype)
  hidden = forward(params, inputs, c, remat=policy.remat)
  return token_logp(
      hidden, output_matrix(params, c), targets, chunk=policy.chunk, softcap=c.final_softcap)


def logps_and_collisions(
    params,
    inputs: jax.Array,        # [B, T] int32
    targets: jax.Array,       # [B, T] int32
    c: ModelConfig,
    policy: ComputePolicy,
) -> tuple[jax.Array, jax.Array]:   # [B, T] float32 each
  """`target_logps`, and log sum_v p(v | inputs[:t+1])^2 without gradient, from one forward pass."""
  params = cast(params, policy.jax_dtype)
  hidden = forward(params, inputs, c, remat=policy.remat)
  head = output_matrix(params, c)
  logps = token_logp(hidden, head, targets, chunk=policy.chunk, softcap=c.final_softcap)
  collisions = log_collision(
      *jax.lax.stop_gradient((hidden, head)), chunk=policy.chunk, softcap=c.final_softcap)
  return logps, collisions
