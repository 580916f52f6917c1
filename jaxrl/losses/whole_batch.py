"""Losses of a pair that depend on the whole batch: AOT's sorts and BCO's running mean.

Each is split in two. A survey sees the detached sums of every valid pair of the global batch and
gives each row the constants it needs; the loss is then a function of one row and its constants,
so micro-batches and devices add up to exactly the loss, and the gradient, of the whole batch.
"""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from jaxrl.losses.checks import check_number, check_positive
from jaxrl.losses.pairs import PairSums
from jaxrl.losses.pairwise import check_smoothing, smoothed
from jaxrl.losses.terms import Term
from jaxrl.parallel.sharding import shard

Rows = dict[str, jax.Array]            # [B] each
State = Mapping[str, jax.Array]        # scalars carried from step to step
DELTA_MODES = ('running', 'fixed', 'none')


def initial_state() -> dict[str, jax.Array]:
  """What BCO's running mean starts from; checkpointed with the optimizer."""
  return {'mean': jnp.zeros((), jnp.float32), 'count': jnp.zeros((), jnp.float32)}


def _everywhere(x: jax.Array) -> jax.Array:
  """[B] whole on every device: a sort of each device's own rows would be another loss."""
  return shard(jax.lax.stop_gradient(x), None)


def _ranks(values: jax.Array, valid: jax.Array) -> tuple[jax.Array, jax.Array]:
  """(sorted values with invalid rows last, rank of each row among the valid)."""
  order = jnp.argsort(jnp.where(valid, values, jnp.inf), stable=True)
  return values[order], jnp.argsort(order)


def survey_aot(s: PairSums) -> Rows:
  """The sorted reference margin that stands against each row's policy margin."""
  valid = _everywhere(s.valid)
  policy, reference = _everywhere(s.p_w - s.p_l), _everywhere(s.r_w - s.r_l)
  _, rank = _ranks(policy, valid)
  targets, _ = _ranks(reference, valid)
  return {'aot_target': shard(targets[rank], 'batch')}


def aot(s: PairSums, *, beta: float = 0.01, label_smoothing: float = 0.0) -> dict[str, Term]:
  """DPO's loss on sorted policy margins less sorted reference margins; Melnyk et al. 2024.

  Sorts run over the valid rows of the global batch; the gradient flows through the permutation.
  """
  check_positive('beta', beta)
  check_smoothing(label_smoothing)
  q = beta * ((s.p_w - s.p_l) - s.rows['aot_target'])
  return {'preference': Term(smoothed(q, label_smoothing), 'pairs')}


def survey_aot_unpaired(s: PairSums) -> Rows:
  """The rejected log-ratio against each row's chosen one, and the reverse, after both sorts."""
  valid = _everywhere(s.valid)
  h_w, h_l = _everywhere(s.h_w), _everywhere(s.h_l)
  sorted_w, rank_w = _ranks(h_w, valid)
  sorted_l, rank_l = _ranks(h_l, valid)
  return {'aot_loser': shard(sorted_l[rank_w], 'batch'),
          'aot_winner': shard(sorted_w[rank_l], 'batch')}


def aot_unpaired(
    s: PairSums, *, beta: float = 0.01, label_smoothing: float = 0.0
) -> dict[str, Term]:
  """DPO's loss on sorted chosen less sorted rejected log-ratios.

  A row carries the value of its chosen response's place in the order, and the gradient of its
  chosen and of its rejected response, each against its constant partner: over the batch both sum
  to those of the sorted loss.
  """
  check_positive('beta', beta)
  check_smoothing(label_smoothing)

  def loss(winner, loser):
    return smoothed(beta * (winner - loser), label_smoothing)

  own = loss(s.h_w, s.rows['aot_loser'])
  other = loss(s.rows['aot_winner'], s.h_l)
  return {'preference': Term(own + other - jax.lax.stop_gradient(other), 'pairs')}


def survey_bco(
    s: PairSums, state: State, *, beta: float, delta_mode: str, delta: float
) -> tuple[Rows, State]:
  """delta for every row, and the running mean with this batch's implicit rewards in it."""
  if delta_mode != 'running':
    value = jnp.float32(delta if delta_mode == 'fixed' else 0.0)
    return {'bco_delta': jnp.broadcast_to(value, s.n_w.shape)}, state
  rewards = jax.lax.stop_gradient(jnp.where(s.valid, beta * (s.h_w + s.h_l), 0.0))
  added = 2 * jnp.sum(s.valid, dtype=jnp.float32)
  count = state['count'] + added
  mean = (state['mean'] * state['count'] + jnp.sum(rewards)) / jnp.maximum(count, 1)
  rows = jnp.broadcast_to(mean, s.n_w.shape)
  return {'bco_delta': shard(rows, 'batch')}, {'mean': mean, 'count': count}


def bco(
    s: PairSums, *, beta: float = 0.01, delta_mode: str = 'running', delta: float = 0.0
) -> dict[str, Term]:
  """-LS(beta h_w - delta) - LS(delta - beta h_l); Jung et al. 2024.

  `delta_mode` 'running' is the mean of all implicit rewards so far, this batch included; 'fixed'
  takes `delta`; 'none' is 0.
  """
  check_bco(beta, delta_mode, delta)
  shift = s.rows['bco_delta']
  return {'preference': Term(-jax.nn.log_sigmoid(beta * s.h_w - shift)
                             - jax.nn.log_sigmoid(shift - beta * s.h_l), 'pairs')}


def check_bco(beta: float, delta_mode: str, delta: float) -> None:
  """Raises ValueError for options of `bco` that are out of range or without effect."""
  check_positive('beta', beta)
  check_number('delta', delta, lambda x: True, '')
  if delta_mode not in DELTA_MODES:
    raise ValueError(f'delta_mode must be one of {list(DELTA_MODES)}; found {delta_mode!r}')
  if delta and delta_mode != 'fixed':
    raise ValueError(f"delta goes with delta_mode='fixed'; found delta_mode={delta_mode!r}")
