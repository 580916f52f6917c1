"""Pairwise preference losses over per-token log-probs: DPO and IRPO.

A batch is a mapping of arrays [B, T] (chosen and rejected may differ in T):
`policy_chosen`, `policy_rejected`, `ref_chosen`, `ref_rejected`, bool or 0/1 `chosen_mask` and
`rejected_mask` (1 on response tokens, EOS included), and optionally `weights` [B].

A row is valid iff both masks hold at least one token. A loss is a sum of terms, each a total over
rows and the normaliser that divides it ('pairs' or 'tokens'); totals add over micro-batches and
devices, so the division happens once over the global batch.
"""

from __future__ import annotations

import dataclasses
import inspect
import math
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp

from jaxrl.losses.mean import Mean, mean_over

Batch = Mapping[str, jax.Array]
KEYS = ('policy_chosen', 'policy_rejected', 'ref_chosen', 'ref_rejected', 'chosen_mask',
        'rejected_mask')


@dataclasses.dataclass(frozen=True)
class PairSums:
  """What every loss is made of, per pair; names follow the papers' symbols."""

  n_w: jax.Array              # [B] float32, chosen response tokens
  n_l: jax.Array              # [B]
  p_w: jax.Array              # [B] float32, log pi(y_w | x)
  p_l: jax.Array              # [B]
  r_w: jax.Array              # [B] float32, log pi_ref(y_w | x); no gradient
  r_l: jax.Array              # [B]
  valid: jax.Array            # [B] bool
  weights: jax.Array          # [B] float32

  @property
  def margin(self) -> jax.Array:
    """D = (P_w - R_w) - (P_l - R_l), [B]."""
    return (self.p_w - self.r_w) - (self.p_l - self.r_l)

  @property
  def mean_nll(self) -> jax.Array:
    """-P_w / n_w, [B]."""
    return -self.p_w / jnp.maximum(self.n_w, 1)


def pair_sums(batch: Batch) -> PairSums:
  """Masked sums of the batch, by selection: a masked nan reaches neither value nor gradient.

  Raises:
    ValueError: a key is missing, or shapes do not fit together.
  """
  _check_shapes(batch)
  chosen, rejected = batch['chosen_mask'].astype(bool), batch['rejected_mask'].astype(bool)

  def total(values, mask):
    return jnp.sum(jnp.where(mask, values, 0).astype(jnp.float32), axis=-1)

  n_w, n_l = (jnp.sum(m, axis=-1, dtype=jnp.float32) for m in (chosen, rejected))
  weights = batch.get('weights')
  return PairSums(
      n_w=n_w, n_l=n_l,
      p_w=total(batch['policy_chosen'], chosen), p_l=total(batch['policy_rejected'], rejected),
      r_w=jax.lax.stop_gradient(total(batch['ref_chosen'], chosen)),
      r_l=jax.lax.stop_gradient(total(batch['ref_rejected'], rejected)),
      valid=(n_w >= 1) & (n_l >= 1),
      weights=jnp.ones_like(n_w) if weights is None else weights.astype(jnp.float32))


def _check_shapes(batch: Batch) -> None:
  missing = [key for key in KEYS if key not in batch]
  if missing:
    raise ValueError(f'preference batch lacks {missing}; it needs {list(KEYS)}')
  for side in ('chosen', 'rejected'):
    shapes = {key: batch[key].shape for key in KEYS if key.endswith(side) or key.startswith(side)}
    if len(set(shapes.values())) != 1 or len(next(iter(shapes.values()))) != 2:
      raise ValueError(f'arrays of the {side} side must share one shape [B, T]; found {shapes}')
  b = batch['chosen_mask'].shape[0]
  if batch['rejected_mask'].shape[0] != b:
    raise ValueError(
        f'chosen has {b} rows and rejected {batch["rejected_mask"].shape[0]}; they must be equal')
  weights = batch.get('weights')
  if weights is not None and weights.shape != (b,):
    raise ValueError(f'weights must have shape ({b},); found {weights.shape}')


@dataclasses.dataclass(frozen=True)
class Term:
  """One summand of a loss before division: per-row values and what divides their total."""

  per_row: jax.Array          # [B] float32
  normaliser: str             # 'pairs' or 'tokens'


def dpo(s: PairSums, *, beta: float = 0.1, label_smoothing: float = 0.0) -> dict[str, Term]:
  """-(1-e) log sigmoid(beta D) - e log sigmoid(-beta D); Rafailov et al. 2023, eq. 7.

  `label_smoothing` e > 0 is the conservative variant for labels flipped at rate e.
  """
  _check('beta', beta, lambda x: x > 0, '> 0')
  _check('label_smoothing', label_smoothing, lambda x: 0 <= x <= 0.5, 'in [0, 0.5]')
  z = beta * s.margin
  loss = -jax.nn.log_sigmoid(z)
  if label_smoothing:
    loss = (1 - label_smoothing) * loss - label_smoothing * jax.nn.log_sigmoid(-z)
  return {'preference': Term(loss, 'pairs')}


def irpo(
    s: PairSums, *, beta: float = 0.1, alpha: float = 1.0, nll_reduction: str = 'seq'
) -> dict[str, Term]:
  """-log sigmoid(beta D) + alpha NLL(chosen); Pang et al. 2024 (version 3), eq. 1.

  `nll_reduction`: 'seq' is -P_w / n_w per pair (the paper), 'token' divides the batch total of
  -P_w by the batch total of n_w, 'sum' is -P_w per pair.
  """
  _check('alpha', alpha, lambda x: x >= 0, '>= 0')
  terms = dpo(s, beta=beta)
  if nll_reduction == 'seq':
    terms['nll'] = Term(alpha * s.mean_nll, 'pairs')
  elif nll_reduction == 'token':
    terms['nll'] = Term(-alpha * s.p_w, 'tokens')
  elif nll_reduction == 'sum':
    terms['nll'] = Term(-alpha * s.p_w, 'pairs')
  else:
    raise ValueError(f"nll_reduction must be 'seq', 'token' or 'sum'; found {nll_reduction!r}")
  return terms


def _check(name: str, value: float, holds: Callable[[float], bool], expected: str) -> None:
  if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
    raise ValueError(f'{name} must be a finite number {expected}; found {value!r}')
  if not holds(value):
    raise ValueError(f'{name} must be {expected}; found {value!r}')


LOSSES: dict[str, Callable[..., dict[str, Term]]] = {'dpo': dpo, 'irpo': irpo}


def normalisers(s: PairSums) -> dict[str, jax.Array]:
  """Counts that divide the totals: valid pairs, and chosen tokens of valid pairs."""
  return {
      'pairs': jnp.sum(s.valid, dtype=jnp.float32),
      'tokens': jnp.sum(jnp.where(s.valid, s.n_w, 0)),
  }


def totals(
    name: str, s: PairSums, **options
) -> tuple[dict[str, tuple[jax.Array, str]], jax.Array]:
  """Per term (total over valid rows, its normaliser); and the per-row loss [B].

  Raises:
    ValueError: unknown loss, or an option out of range or not of this loss.
  """
  if name not in LOSSES:
    raise ValueError(f'unknown loss {name!r}; known: {sorted(LOSSES)}')
  known = inspect.signature(LOSSES[name]).parameters.keys() - {'s'}
  if unknown := sorted(options.keys() - known):
    raise ValueError(f'loss {name!r} has no option {unknown[0]!r}; it has {sorted(known)}')
  terms = LOSSES[name](s, **options)
  rows = {key: jnp.where(s.valid, s.weights * t.per_row, 0.0) for key, t in terms.items()}
  per_row = sum(rows.values(), jnp.zeros_like(s.n_w))
  return {key: (jnp.sum(rows[key]), terms[key].normaliser) for key in terms}, per_row


def divide(
    term_totals: Mapping[str, tuple[jax.Array, str]], counts: Mapping[str, jax.Array]
) -> jax.Array:
  """The scalar loss: each total over its count; 0 when nothing was valid."""
  parts = (total / jnp.maximum(counts[kind], 1) for total, kind in term_totals.values())
  return sum(parts, jnp.zeros((), jnp.float32))


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


def pref_loss(name: str, batch: Batch, **options) -> tuple[jax.Array, dict[str, jax.Array]]:
  """The whole batch at once: (loss [], aux), as the training step computes it in pieces.

  aux: `per_example` [B], `n_valid` [], and the standard metrics as scalars.
  """
  s = pair_sums(batch)
  term_totals, per_row = totals(name, s, **options)
  beta = options.get('beta', 0.1)
  aux = {key: m.value() for key, m in pref_metrics(s, beta).items()}
  aux |= {'per_example': per_row, 'n_valid': jnp.sum(s.valid)}
  return divide(term_totals, normalisers(s)), aux
