"""Best of N and the majority's response, by hand-worked cases."""

import math

import numpy as np
import pytest

from jaxrl.errors import InputError
from jaxrl.rewards.best_of import best_of, logprob_mean, logprob_sum, majority
from jaxrl.rewards.checking import AnswerRule

NUMBER = AnswerRule('number')


def test_sum_prefers_short_and_mean_does_not():
  short, long = [-1.0, -1.0], [-0.5, -0.5, -0.5, -0.75]
  assert logprob_sum(short) == -2.0 and logprob_sum(long) == -2.25
  assert logprob_mean(short) == -1.0 and logprob_mean(long) == -0.5625
  assert best_of([short, long], logprob_sum) == 0
  assert best_of([short, long], logprob_mean) == 1
  assert best_of(['a', 'abc', 'abd'], len) == 1            # the first of equals
  # Summed in float64: in float32 the small ones would be lost.
  assert logprob_sum(np.float32([-1e8, *[-1.0] * 64])) == -1e8 - 64


@pytest.mark.parametrize('responses, score', [([], len), (['a', 'b'], lambda _: math.nan)])
def test_no_best(responses, score):
  with pytest.raises(InputError, match='there is no best response'):
    best_of(responses, score)
  with pytest.raises(InputError, match='no mean log-prob'):
    logprob_mean([])


def said(*numbers):
  return [f'So.\nFinal answer: {n}' for n in numbers]


def test_majority():
  found = majority(said(7, '1,000', 1000, 'none'), NUMBER)
  assert (found.answer, found.votes, found.chosen) == ('1000', 2, 1)
  assert found.answers == ('7', '1000', '1000', None)
  assert majority(said(7, 8), NUMBER).answer == '7'        # a tie: seen first
  scored = majority(said(7, 1000, 1000, 7, 1000), NUMBER, scores=[0, -3, -1, 0, -2])
  assert (scored.answer, scored.votes, scored.chosen) == ('1000', 3, 2)


def test_majority_of_unreadable_answers():
  found = majority(['a', 'b'], NUMBER, scores=[-2, -1])
  assert (found.answer, found.votes, found.chosen) == (None, 0, 1)
  with pytest.raises(InputError):
    majority([], NUMBER)


def test_labels_are_those_of_the_item():
  rule = AnswerRule('choice')
  texts = ['Final answer: (D)', 'Final answer: (D)', 'Final answer: (B)']
  assert majority(texts, rule, labels=('A', 'B')).answer == 'B'
  assert majority(texts, rule).answer == 'D'
