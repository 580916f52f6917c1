"""How far the votes for an answer tell whether it is right."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from scipy import stats

from jaxrl.rewards.checking import Verdict


def somers_d(votes: Sequence[int], right: Sequence[bool]) -> float | None:
  """Somers' D of votes given correctness; None unless some responses are right and some wrong.

  P(a right response has more votes than a wrong one) - P(it has fewer), both drawn at random; from
  -1 to 1, 0 where votes say nothing. Pairs with equal votes count as neither (Somers 1962).

  Raises:
    ValueError: the two differ in length.
  """
  if len(votes) != len(right):
    raise ValueError(f'need one verdict per response; found {len(votes)} and {len(right)}')
  if len(set(right)) < 2:
    return None
  if len(set(votes)) < 2:
    return 0.0                 # scipy gives nan
  return float(stats.somersd([int(r) for r in right], list(votes)).statistic)


def vote_correlation(scores: Sequence[Mapping]) -> float | None:
  """`somers_d` over score rows of responses that voted; those without a verdict are left out."""
  judged = [row for row in scores if row['verdict'] not in (
      Verdict.UNPARSEABLE_GOLD, Verdict.TIMEOUT)]
  return somers_d([row['votes'] for row in judged],
                  [row['verdict'] == Verdict.CORRECT for row in judged])
