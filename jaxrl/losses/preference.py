"""Pairwise preference losses by name: which there are, what they need, and how they add up.

A loss is a sum of terms, each a total over rows and the normaliser that divides it ('pairs' or
'tokens'); totals add over micro-batches and devices, so the division happens once over the global
batch. `pairs.py` says what a batch holds.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxrl.losses import pairwise, whole_batch
from jaxrl.losses.checks import check_number
from jaxrl.losses.mean import Mean, mean_over
from jaxrl.losses.pairs import PLAIN, Batch, PairOptions, PairSums, pair_sums
from jaxrl.losses.terms import Term, divide, normalisers

__all__ = [
    'LOSSES', 'PairOptions', 'check_loss', 'divide', 'normalisers', 'pair_sums', 'pref_loss',
    'pref_metrics', 'survey', 'totals',
]


@dataclasses.dataclass(frozen=True)
class Loss:
  """A formula and what it reads."""

  terms: Callable[..., dict[str, Term]]
  reference: bool = True      # reads the reference's log-probs
  log_ratios: bool = True     # reads h_w and h_l, which stand for a divergence
  weighted: bool = True       # a pair's weight means something


LOSSES: Mapping[str, Loss] = {
    'dpo': Loss(pairwise.dpo),
    'robust': Loss(pairwise.robust),
    'ipo': Loss(pairwise.ipo),
    'hinge': Loss(pairwise.hinge),
    'slic': Loss(pairwise.slic, reference=False, log_ratios=False),
    'dpo_norm': Loss(pairwise.dpo_norm),
    'rdpo_len': Loss(pairwise.rdpo_len),
    'dpop': Loss(pairwise.dpop),
    'simpo': Loss(pairwise.simpo, reference=False, log_ratios=False),
    'orpo': Loss(pairwise.orpo, reference=False, log_ratios=False),
    'cpo': Loss(pairwise.cpo, reference=False, log_ratios=False),
    'sppo': Loss(pairwise.sppo),
    'exo': Loss(pairwise.exo),
    'nca': Loss(pairwise.nca),
    'aot': Loss(whole_batch.aot, log_ratios=False, weighted=False),
    'aot_unpaired': Loss(whole_batch.aot_unpaired, weighted=False),
    'bco': Loss(whole_batch.bco),
    'apo_zero': Loss(pairwise.apo_zero),
    'apo_down': Loss(pairwise.apo_down),
    'discopop': Loss(pairwise.discopop),
    'irpo': Loss(pairwise.irpo),
    'scpo': Loss(pairwise.scpo),
    'dive': Loss(pairwise.dive),
    'nll': Loss(pairwise.nll, reference=False, log_ratios=False),
    'reward_aware': Loss(pairwise.reward_aware),
}
ALIASES = {'rpo': 'irpo', 'sigmoid': 'dpo', 'sigmoid_norm': 'dpo_norm', 'sft': 'nll'}


# What a row may carry beside its sums: constants of a survey, and numbers of the batch.
_ROWS = ('aot_target', 'aot_loser', 'aot_winner', 'bco_delta', 'reward_margin')


def resolve(name: str) -> str:
  """The loss's own name; raises ValueError for one that nobody knows."""
  name = ALIASES.get(name, name)
  if name not in LOSSES:
    raise ValueError(f'unknown loss {name!r}; known: {sorted(LOSSES)}')
  return name


def defaults(name: str) -> dict[str, Any]:
  """The options of a loss with their default values."""
  parameters = inspect.signature(LOSSES[resolve(name)].terms).parameters
  return {key: p.default for key, p in parameters.items() if key != 's'}


def needs_reference(name: str, pair_options: PairOptions = PLAIN) -> bool:
  """Whether the loss reads reference log-probs."""
  return LOSSES[resolve(name)].reference and not pair_options.reference_free


def check_loss(
    name: str, options: Mapping[str, Any], pair_options: PairOptions = PLAIN
) -> None:
  """Raises ValueError for an unknown loss, an option out of range, or one that does not apply."""
  loss, known = LOSSES[resolve(name)], defaults(name)
  if unknown := sorted(options.keys() - known):
    raise ValueError(f'loss {name!r} has no option {unknown[0]!r}; it has {sorted(known)}')
  if pair_options.reference_free and not loss.reference:
    raise ValueError(f'loss {name!r} has no reference, so reference_free does nothing')
  if pair_options.divergence != 'reverse_kl' and not loss.log_ratios:
    raise ValueError(f'loss {name!r} reads no log-ratios, so divergence does nothing')
  if pair_options.wpo and not loss.weighted:
    raise ValueError(f'loss {name!r} pairs responses anew, so WPO weights have no pair to weigh')
  if resolve(name) == 'bco':
    whole_batch.check_bco(**{**known, **options})

  def on_one_pair():           # traced only: nothing is compiled here
    one = jnp.ones(1, jnp.float32)
    sums = PairSums(*(one,) * 10, valid=one > 0, weights=one, rows=dict.fromkeys(_ROWS, one))
    return {key: t.per_row for key, t in loss.terms(sums, **options).items()}

  jax.eval_shape(on_one_pair)


def value_at_reference(name: str, options: Mapping[str, Any]) -> float:
  """The preference term of a pair where policy = reference, which is where training starts."""
  zero, one = jnp.zeros(1, jnp.float32), jnp.ones(1, jnp.float32)
  sums = PairSums(
      one, one, *(zero,) * 8, valid=one > 0, weights=one, rows=dict.fromkeys(_ROWS, zero))
  return float(LOSSES[resolve(name)].terms(sums, **options)['preference'].per_row[0])


def survey(
    name: str, s: PairSums, state: whole_batch.State | None = None, **options
) -> tuple[PairSums, whole_batch.State]:
  """The sums with the constants that a loss of the whole batch gives each row, and its new state.

  `s` must be of the global batch. Losses of single pairs pass through.
  """
  state = whole_batch.initial_state() if state is None else state
  name = resolve(name)
  if name == 'aot':
    rows = whole_batch.survey_aot(s)
  elif name == 'aot_unpaired':
    rows = whole_batch.survey_aot_unpaired(s)
  elif name == 'bco':
    rows, state = whole_batch.survey_bco(s, state, **{**defaults(name), **options})
  else:
    return s, state
  return dataclasses.replace(s, rows={**s.rows, **rows}), state


def is_surveyed(name: str) -> bool:
  """Whether the loss of a row depends on the rest of the batch."""
  return resolve(name) in ('aot', 'aot_unpaired', 'bco')


def totals(
    name: str, s: PairSums, **options
) -> tuple[dict[str, tuple[jax.Array, str]], jax.Array]:
  """Per term (total over valid rows, its normaliser); and the per-row loss [B].

  Raises:
    ValueError: unknown loss, or an option out of range or not of this loss.
  """
  loss, known = LOSSES[resolve(name)], defaults(name)
  if unknown := sorted(options.keys() - known):
    raise ValueError(f'loss {name!r} has no option {unknown[0]!r}; it has {sorted(known)}')
  terms = loss.terms(s, **options)
  weights = s.weights if loss.weighted else jnp.ones_like(s.weights)
  rows = {key: jnp.where(s.valid, weights * t.per_row, 0.0) for key, t in terms.items()}
  per_row = sum(rows.values(), jnp.zeros_like(s.n_w))
  return {key: (jnp.sum(rows[key]), terms[key].normaliser) for key in terms}, per_row


def mixed_totals(
    parts: Mapping[str, tuple[float, Mapping[str, Any]]], s: PairSums
) -> tuple[dict[str, tuple[jax.Array, str]], jax.Array]:
  """`totals` of sum_k weight_k * loss_k; `parts` maps a loss to (weight, options).

  Terms are named 'loss/term' where there are several losses.
  """
  out: dict[str, tuple[jax.Array, str]] = {}
  per_row = jnp.zeros_like(s.n_w)
  for name, (weight, options) in parts.items():
    check_number(f'weight of {name}', weight, lambda x: x > 0, '> 0')
    part, rows = totals(name, s, **options)
    prefix = f'{name}/' if len(parts) > 1 else ''
    out |= {f'{prefix}{key}': (weight * total, kind) for key, (total, kind) in part.items()}
    per_row = per_row + weight * rows
  return out, per_row


def pref_metrics(s: PairSums, beta: float) -> dict[str, Mean]:
  """Standard metrics over valid pairs; a tie counts 0 in the accuracy."""
  chosen, rejected = beta * (s.p_w - s.r_w), beta * (s.p_l - s.r_l)
  rows = {
      'rewards/chosen': chosen,
      'rewards/rejected': rejected,
      'rewards/margins': chosen - rejected,
      'rewards/accuracies': (chosen > rejected).astype(jnp.float32),
      'logps/chosen': s.p_w,
      'logps/rejected': s.p_l,
      'loss/nll': s.mean_nll,
      'length/chosen': s.n_w,
      'length/rejected': s.n_l,
  }
  return {name: mean_over(value, s.valid) for name, value in rows.items()}


def metric_beta(name: str, options: Mapping[str, Any]) -> float:
  """The factor of implicit rewards in metrics: the loss's beta, or 1 where it has none."""
  return float({**defaults(name), **options}.get('beta', 1.0))


def pref_loss(
    name: str, batch: Batch, *, pair_options: PairOptions = PLAIN,
    state: whole_batch.State | None = None, **options,
) -> tuple[jax.Array, dict[str, Any]]:
  """The whole batch at once: (loss [], aux), as the training step computes it in pieces.

  aux: `per_example` [B], `n_valid` [], the standard metrics as scalars, and `state` after this
  batch for losses that carry one.

  Raises:
    ValueError: unknown loss, an option out of range or not of this loss, or a malformed batch.
  """
  check_loss(name, options, pair_options)
  if 'weights' in batch and not LOSSES[resolve(name)].weighted:
    raise ValueError(f'loss {name!r} pairs responses anew, so weights have no pair to weigh')
  free = pair_options
  if not LOSSES[resolve(name)].reference:
    free = dataclasses.replace(pair_options, reference_free=True)   # nothing reads it
  s, state = survey(name, pair_sums(batch, free), state, **options)
  term_totals, per_row = totals(name, s, **options)
  aux: dict[str, Any] = {
      key: m.value() for key, m in pref_metrics(s, metric_beta(name, options)).items()}
  aux |= {'per_example': per_row, 'n_valid': jnp.sum(s.valid), 'state': state}
  return divide(term_totals, normalisers(s)), aux
