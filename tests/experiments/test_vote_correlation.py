"""Figures of votes on recorded responses, by hand."""

import pytest

from experiments.vote_correlation import VOTED, by_problem, lines, measure
from jaxrl.rewards.checking import Check, Verdict
from tests.shared_data import SHARED, needs_shared

RIGHT, WRONG = Verdict.CORRECT, Verdict.WRONG


def checks(*answers, gold='1'):
  return [Check(a, RIGHT if a == gold else
                Verdict.UNPARSEABLE_ANSWER if a is None else WRONG) for a in answers]


def test_by_hand():
  problems = [checks('1', '1', '2', None), checks('3', '3', '3', '1'), checks('1', '1')]
  found = measure(problems, 4)
  assert (found.problems, found.right) == (2, 3 / 8)
  assert found.top == pytest.approx((2 / 4 + 3 / 4) / 2)
  # Right responses have 2, 2 and 1 votes; wrong ones 1, 0 and 3, 3, 3. Of 15 pairs the right one
  # has more votes in 5 (2>1, 2>0 twice each; 1>0), as many in 1, fewer in 9.
  assert found.correlation == pytest.approx((5 - 9) / 15)
  # Within problems: 4 pairs in the right order in the first, 3 in the wrong one in the second.
  assert found.order == pytest.approx((3 / 7, 0, 4 / 7))


def test_too_few_responses():
  with pytest.raises(ValueError, match='no problem has 3 responses'):
    measure([checks('1', '2')], 3)


def test_groups_keep_the_order_and_leave_out_what_has_no_verdict():
  found = by_problem(['b', 'a', 'b', 'a'], [
      Check('1', RIGHT), Check('2', WRONG), Check('3', Verdict.TIMEOUT), Check('4', RIGHT)])
  assert [[c.answer for c in group] for group in found] == [['1'], ['2', '4']]


@needs_shared
def test_votes_tell_right_from_wrong_on_real_responses():
  rows = [line.split(' | ') for line in lines(SHARED)]
  assert {row[0].removeprefix('| ') for row in rows} == set(VOTED)
  assert all(0.2 < float(row[5]) < 1 for row in rows)
