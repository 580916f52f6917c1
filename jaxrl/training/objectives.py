"""What is minimised: supervised likelihood, the pairwise losses, KTO and WSPO, over batches of ids.

An objective works on any part of a batch; what depends on the whole of it (counts, sorts, running
means, a moving reference) is computed once per step, before the batch is split.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl.losses import kto, preference, wspo
from jaxrl.losses.checks import check_number
from jaxrl.losses.mean import mean_over
from jaxrl.losses.pairs import PLAIN, PairOptions, PairSums
from jaxrl.losses.whole_batch import initial_state
from jaxrl.models.config import ModelConfig
from jaxrl.models.lora import attach
from jaxrl.training.logps import (
    ComputePolicy,
    by_unit,
    logps_and_collisions,
    response_logps,
)

Batch = Mapping[str, jax.Array]
Totals = dict[str, tuple[jax.Array, str]]            # term -> (total over rows, its normaliser)
Parts = Mapping[str, tuple[float, Mapping[str, Any]]]   # loss -> (weight, options)


@dataclasses.dataclass(frozen=True)
class Objective:
  """Term totals and metrics of a part of a batch, the batch's counts, and what precedes them.

  Attributes:
    totals: (params, part) -> term totals and metrics of any part, and as 'row_finite' which of
      its rows' log-probs are numbers. The loss is the sum over terms of total / count, whatever
      the parts were.
    counts: batch -> the normalisers of the whole batch.
    survey: (params, batch, state, step, micro_batches) -> the batch with what the whole of it says
      about each row, and the new state; no gradient passes. None where a row says it all.
    initial_state: params -> the state before step 0, checkpointed with the optimizer's.
  """

  totals: Callable[[dict, Batch], tuple[Totals, dict[str, Any]]]
  counts: Callable[[Batch], dict[str, jax.Array]]
  survey: Callable[[dict, Batch, dict, jax.Array, int], tuple[Batch, dict]] | None = None
  initial_state: Callable[[dict], dict] = lambda params: {}


def sft_objective(c: ModelConfig, policy: ComputePolicy) -> Objective:
  """Mean negative log-likelihood per response token; batch of `sequence_arrays` [B, T]."""

  def totals(params, part):
    logps = response_logps(params, part, c, policy)
    nll = mean_over(-logps, by_unit(part)['mask'])
    return {'nll': (nll.total, 'tokens')}, {'row_finite': _finite(part, logps)}

  def counts(batch):
    return {'tokens': jnp.sum(batch['mask'], dtype=jnp.float32)}

  return Objective(totals, counts)


def preference_objective(
    name: str, options: Mapping, c: ModelConfig, policy: ComputePolicy, *,
    pair_options: PairOptions = PLAIN,
) -> Objective:
  """A pairwise loss by name with its options; batch of `pair_arrays` [P, 2, T]."""
  return mixed_objective({name: (1.0, options)}, c, policy, pair_options=pair_options)


@dataclasses.dataclass(frozen=True)
class MovingReference:
  """TR-DPO (Gorbatovski et al. 2024): every `sync_steps`, ref := mix policy + (1 - mix) ref."""

  sync_steps: int = 512
  mix: float = 0.6

  def __post_init__(self):
    check_number('sync_steps', self.sync_steps, lambda n: n >= 1 and n == int(n), 'whole, >= 1')
    check_number('mix', self.mix, lambda x: 0 < x <= 1, 'in (0, 1]')


def mixed_objective(
    parts: Parts, c: ModelConfig, policy: ComputePolicy, *,
    pair_options: PairOptions = PLAIN, moving: MovingReference | None = None,
) -> Objective:
  """sum_k weight_k * loss_k over one batch of `pair_arrays` [P, 2, T].

  Raises:
    ValueError: an unknown loss, an option out of range or that does not apply.
  """
  check_mixture(parts, pair_options, moving)
  names = tuple(parts)
  uses_reference = any(preference.needs_reference(name, pair_options) for name in names)
  surveyed = [name for name in names if preference.is_surveyed(name)]
  if not uses_reference:
    pair_options = dataclasses.replace(pair_options, reference_free=True)   # nothing reads it
  beta = preference.metric_beta(names[0], parts[names[0]][1])

  def sums(policy_logps, part, collisions=None) -> PairSums:
    sides = {'chosen': 0, 'rejected': 1}
    batch = {f'{side}_mask': part['mask'][:, n] for side, n in sides.items()}
    batch |= {f'policy_{side}': policy_logps[:, n] for side, n in sides.items()}
    batch |= {f'ref_{side}': part['ref_logps'][:, n] for side, n in sides.items()}
    if collisions is not None:
      batch |= {f'{side}_collision': collisions[:, n] for side, n in sides.items()}
    elif pair_options.wpo:      # counts and surveys do not read weights
      batch |= {f'{side}_collision': policy_logps[:, n] for side, n in sides.items()}
    s = preference.pair_sums(batch | {'weights': part['weights']}, pair_options)
    rows = {key.removeprefix('row/'): x for key, x in part.items() if key.startswith('row/')}
    return dataclasses.replace(s, rows=rows)

  def totals(params, part):
    collisions = None
    if pair_options.wpo:
      logps, collisions = logps_and_collisions(params, part, c, policy)
    else:
      logps = response_logps(params, part, c, policy)
    s = sums(logps, by_unit(part), collisions)
    terms, _ = preference.mixed_totals(parts, s)
    return terms, preference.pref_metrics(s, beta) | {'row_finite': _finite(part, logps)}

  def counts(batch):
    units = by_unit(batch)
    return preference.normalisers(sums(units['ref_logps'], units))

  def survey(params, batch, state, step, micro_batches):
    if moving is not None:
      reference = _moved(state['reference'], params, step, moving)
      state = state | {'reference': reference}
      logps = scored(reference, batch, c, policy, micro_batches)
      batch = {**batch, 'ref_logps': logps.reshape(batch['ref_logps'].shape)}
    for name in surveyed:
      s, moments = preference.survey(
          name, sums(scored(params, batch, c, policy, micro_batches), by_unit(batch)),
          state.get('running'), **parts[name][1])
      found = {f'row/{key}': x.reshape(batch['weights'].shape) for key, x in s.rows.items()}
      batch = {**batch, **found}
      if 'running' in state:
        state = state | {'running': dict(moments)}
    return batch, state

  def start(params):
    state: dict = {'running': initial_state()} if 'bco' in map(preference.resolve, names) else {}
    if moving is not None:
      state['reference'] = jax.tree.map(jnp.copy, params)
    return state

  if moving is None and not surveyed:
    return Objective(totals, counts)
  return Objective(totals, counts, survey, start)


def check_mixture(
    parts: Parts, pair_options: PairOptions, moving: MovingReference | None
) -> None:
  """Raises ValueError for losses that cannot be used, alone or with each other."""
  for name, (_, options) in parts.items():
    preference.check_loss(name, options, pair_options)
  if moving is not None and not any(
      preference.needs_reference(name, pair_options) for name in parts):
    raise ValueError(f'{", ".join(parts)} has no reference that could move')
  surveyed = [name for name in parts if preference.is_surveyed(name)]
  if len(surveyed) > 1:
    raise ValueError(f'{" and ".join(surveyed)} each look at the whole batch; take one of them')


def _finite(part: Batch, logps: jax.Array) -> jax.Array:
  """Bool, laid out as `numbers` of the part: which rows' log-probs are all finite."""
  units = by_unit(part)
  known = jnp.isfinite(logps)
  for name in ('ref_logps', 'weak_gap'):
    known &= jnp.isfinite(units[name]) if name in units else True
  each = jnp.all(known | ~units['mask'], axis=tuple(range(1, known.ndim)))
  return each.reshape(part['mask'].shape[:2 if 'places' in part else 1])


def _moved(reference: dict, params: dict, step: jax.Array, moving: MovingReference) -> dict:
  """The reference of this step: mixed with the policy where `step` falls on the interval."""
  due = (step > 0) & (step % moving.sync_steps == 0)
  mix = jnp.where(due, jnp.float32(moving.mix), 0.0)
  return jax.tree.map(
      lambda r, p: jnp.where(due, mix * p + (1 - mix) * r, r).astype(r.dtype), reference, params)


def scored(
    params: dict, rows: Batch, c: ModelConfig, policy: ComputePolicy, micro_batches: int
) -> jax.Array:
  """`response_logps` of a whole batch without gradient, a micro-batch at a time."""
  params = jax.lax.stop_gradient(params)

  def one(part):
    return response_logps(params, part, c, policy)

  if micro_batches == 1:
    return jax.lax.stop_gradient(one(rows))
  units = by_unit(rows)['mask']
  out = jax.lax.map(one, jax.tree.map(lambda x: split_rows(x, micro_batches), dict(rows)))
  if 'places' in rows:        # [parts, rows of a part * K, ...]: units of a row stay together
    out = out.reshape(micro_batches, rows['places'].shape[0] // micro_batches, -1, *out.shape[2:])
  return jax.lax.stop_gradient(jnp.swapaxes(out, 0, 1).reshape(units.shape))


def split_rows(x: jax.Array, parts: int) -> jax.Array:
  """[B, ...] -> [parts, B / parts, ...], part j holding the rows j, j + parts, ...

  Strided, because each part then has as many rows on every device as the others and none moves.
  """
  return jnp.swapaxes(x.reshape(x.shape[0] // parts, parts, *x.shape[1:]), 0, 1)


def kto_objective(options: Mapping, c: ModelConfig, policy: ComputePolicy) -> Objective:
  """KTO; batch of `labelled_arrays`: rows [B, T], their labels, and mismatched rows [B, T].

  Raises:
    ValueError: an option out of range.
  """
  beta = float(options.get('beta', 0.1))
  # NumPy's zeros, so that nothing is compiled here.
  empty: Any = dict.fromkeys(kto.KEYS, np.zeros((1, 1))) | {'label': np.zeros(1)}
  jax.eval_shape(lambda: kto.kto(empty, jnp.zeros(()), **options))

  def totals(params, part):
    logps = response_logps(params, part, c, policy)
    finite, part = _finite(part, logps), by_unit(part)
    batch = {'policy': logps, 'ref': part['ref_logps'], 'mask': part['mask'],
             'label': part['label']}
    per_row, valid = kto.kto(batch, part['row/z0'], **options)
    gap = jnp.where(part['mask'], jax.lax.stop_gradient(logps) - part['ref_logps'], 0)
    reward, liked = beta * jnp.sum(gap, axis=1), part['label'].astype(bool)
    return {'preference': (jnp.sum(per_row), 'rows')}, {
        'rewards/desirable': mean_over(reward, valid & liked),
        'rewards/undesirable': mean_over(reward, valid & ~liked),
        'kto/z0': mean_over(part['row/z0'], valid), 'row_finite': finite}

  def counts(batch):
    return {'rows': jnp.sum(jnp.any(by_unit(batch)['mask'], axis=1), dtype=jnp.float32)}

  def survey(params, batch, state, step, micro_batches):
    del step
    rows = {key.removeprefix('kl_'): x for key, x in batch.items() if key.startswith('kl_')}
    units = by_unit(rows)
    z0 = kto.kl_estimate({
        'kl_policy': scored(params, rows, c, policy, micro_batches),
        'kl_ref': units['ref_logps'], 'kl_mask': units['mask']}).value()
    kept = {key: x for key, x in batch.items() if not key.startswith('kl_')}
    z0 = jnp.maximum(z0, 0.0)
    return kept | {'row/z0': jnp.zeros_like(batch['label']) + z0}, state

  return Objective(totals, counts, survey)


def wspo_objective(options: Mapping, c: ModelConfig, policy: ComputePolicy) -> Objective:
  """WSPO; batch of `weak_arrays` [B, T] with `ref_logps` of the strong model and `weak_gap`.

  Raises:
    ValueError: an option out of range.
  """
  empty: Any = dict.fromkeys(wspo.KEYS, np.zeros((1, 1)))
  jax.eval_shape(lambda: wspo.wspo(empty, **options))
  gamma = float(options.get('gamma', 0.1))

  def totals(params, part):
    logps = response_logps(params, part, c, policy)
    finite, part = _finite(part, logps), by_unit(part)
    weak = part['weak_gap']
    per_row, valid = wspo.wspo({
        'policy_strong': logps, 'ref_strong': part['ref_logps'], 'weak_aligned': weak,
        'weak_ref': jnp.zeros_like(weak), 'mask': part['mask']}, **options)
    strong = jax.lax.stop_gradient(logps) - part['ref_logps']
    return {'preference': (jnp.sum(jnp.where(valid, per_row, 0.0)), 'rows')}, {
        'wspo/strong_gap': mean_over(strong, part['mask']),
        'wspo/weak_gap': mean_over(weak, part['mask']),
        'wspo/error': mean_over(jnp.abs(gamma * strong - weak), part['mask']),
        'row_finite': finite}

  def counts(batch):
    return {'rows': jnp.sum(jnp.any(by_unit(batch)['mask'], axis=1), dtype=jnp.float32)}

  return Objective(totals, counts)


def with_adapter(objective: Objective, frozen: dict) -> Objective:
  """The objective of an adapter on `frozen`; both are traced, neither is copied."""
  survey = objective.survey
  return dataclasses.replace(
      objective,
      totals=lambda adapter, part: objective.totals(attach(frozen, adapter), part),
      survey=None if survey is None else lambda adapter, *rest: survey(
          attach(frozen, adapter), *rest))
