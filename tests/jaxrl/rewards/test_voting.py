from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxrl.rewards.canonical import canonical_number
from jaxrl.rewards.voting import majority_vote, votes


@pytest.mark.parametrize('answers, expected_votes, expected_majority', [
    (['18', '18', '20', '18', None, '18', '20', '7'], [4, 4, 2, 4, 0, 4, 2, 1], ('18', 4)),
    (['9', '3', '3', '9'], [2, 2, 2, 2], ('9', 2)),
    (['3', '9', '9', '3'], [2, 2, 2, 2], ('3', 2)),
    ([None, None], [0, 0], (None, 0)),
    ([], [], (None, 0)),
    ([None, None, '1'], [0, 0, 1], ('1', 1)),
])
def test_specification_examples(answers, expected_votes, expected_majority):
  assert votes(answers) == expected_votes
  assert majority_vote(answers) == expected_majority


@given(st.lists(st.none() | st.sampled_from('abcd')))
def test_majority_has_the_most_votes_and_came_first(answers):
  counts = votes(answers)
  answer, n = majority_vote(answers)
  assert n == max(counts, default=0)
  if n:
    assert answers[counts.index(n)] == answer
  else:
    assert answer is None


@given(st.lists(st.tuples(st.fractions(min_value=-5, max_value=5, max_denominator=4),
                          st.integers(1, 9)), max_size=12))
def test_equal_rationals_vote_together(drawn):
  answers = [canonical_number(f'{v.numerator * k}/{v.denominator * k}') for v, k in drawn]
  values = [Fraction(v) for v, _ in drawn]
  assert votes(answers) == [values.count(v) for v in values]
