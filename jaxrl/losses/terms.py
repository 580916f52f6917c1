"""Summands of a loss before division, and what divides them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from jaxrl.losses.pairs import PairSums

NLL_REDUCTIONS = ('seq', 'token', 'sum')


@dataclasses.dataclass(frozen=True)
class Term:
  """One summand: per-row values, and the count that divides their total over the batch."""

  per_row: jax.Array          # [B] float32
  normaliser: str             # 'pairs' or 'tokens'


Terms = Mapping[str, Term]


def nll_term(s: PairSums, factor: float, reduction: str) -> Term:
  """factor * negative log-likelihood of the chosen response.

  'seq' is the mean over the tokens of each response, 'sum' their sum, 'token' divides the batch
  total by the batch's tokens.
  """
  if reduction == 'seq':
    return Term(factor * s.mean_nll, 'pairs')
  if reduction == 'sum':
    return Term(factor * s.nll_total, 'pairs')
  if reduction == 'token':
    return Term(factor * s.nll_total, 'tokens')
  raise ValueError(f'nll_reduction must be one of {list(NLL_REDUCTIONS)}; found {reduction!r}')


def normalisers(s: PairSums) -> dict[str, jax.Array]:
  """Counts that divide the totals: valid pairs, and likelihood tokens of valid pairs."""
  return {
      'pairs': jnp.sum(s.valid, dtype=jnp.float32),
      'tokens': jnp.sum(jnp.where(s.valid, s.nll_count, 0)),
  }


def divide(
    totals: Mapping[str, tuple[jax.Array, str]], counts: Mapping[str, jax.Array]
) -> jax.Array:
  """The scalar loss: each total over its count; 0 when nothing was valid."""
  parts = (total / jnp.maximum(counts[kind], 1) for total, kind in totals.values())
  return sum(parts, jnp.zeros((), jnp.float32))
