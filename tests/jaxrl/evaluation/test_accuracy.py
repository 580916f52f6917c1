"""Majority votes over drawn answers."""

import pytest

from jaxrl.evaluation.accuracy import majority_correct


def rows(prompt_id, *answers):
  """'7+' is the answer 7 judged correct, '7' judged wrong, '-' unparseable, '?' a bad gold."""
  kinds = {'-': (None, 'unparseable_answer'), '?': ('5', 'unparseable_gold')}
  made = []
  for text in answers:
    wrong = 'correct' if text.endswith('+') else 'wrong'
    answer, verdict = kinds.get(text, (text.rstrip('+'), wrong))
    made.append({'prompt_id': prompt_id, 'answer': answer, 'verdict': verdict})
  return made


@pytest.mark.parametrize(('answers', 'is_right'), [
    (['7+'], True),
    (['8'], False),
    (['8', '7+', '7+'], True),
    (['7+', '8', '8'], False),
    (['7+', '8', '8', '7+'], True),      # a tie goes to the answer drawn first
    (['8', '7+', '7+', '8'], False),
    (['7+', '8', '9'], True),
    (['-', '-', '-', '7+'], True),       # what cannot be read does not vote
    (['-', '-'], False),
])
def test_the_most_frequent_answer_decides(answers, is_right):
  assert majority_correct(rows('a', *answers)) == {'a': is_right}


def test_prompts_whose_gold_cannot_be_parsed_are_left_out():
  assert majority_correct(rows('a', '7+', '7+') + rows('b', '?', '?') + rows('c', '3')) == {
      'a': True, 'c': False}


def test_draws_of_a_prompt_need_not_stand_together():
  a, b = rows('a', '7+', '7+', '8'), rows('b', '1', '2+', '1')
  mixed = [row for pair in zip(a, b, strict=True) for row in pair]
  assert majority_correct(mixed) == {'a': True, 'b': False}
  assert majority_correct([]) == {}
