"""Somers' D of votes given correctness, against a count of all pairs."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxrl.evaluation.vote_correlation import somers_d, vote_correlation


@given(st.lists(st.tuples(st.integers(0, 5), st.booleans()), min_size=1, max_size=30))
def test_against_all_pairs(responses):
  right = [v for v, r in responses if r]
  wrong = [v for v, r in responses if not r]
  found = somers_d([v for v, _ in responses], [r for _, r in responses])
  if not right or not wrong:
    assert found is None
    return
  order = [(a > b) - (a < b) for a, b in itertools.product(right, wrong)]
  assert found == pytest.approx(sum(order) / len(order))


def test_lengths_must_agree():
  with pytest.raises(ValueError, match='one verdict per response'):
    somers_d([1, 2], [True])


def test_responses_without_a_verdict_are_left_out():
  rows = [{'votes': v, 'verdict': verdict} for v, verdict in [
      (3, 'correct'), (1, 'wrong'), (0, 'unparseable_answer'), (9, 'unparseable_gold'),
      (9, 'timeout')]]
  assert vote_correlation(rows) == 1.0
  assert vote_correlation(rows[:1]) is None
