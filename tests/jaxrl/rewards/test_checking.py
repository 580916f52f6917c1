"""Verdicts over batches: every kind of rule, every verdict, and options that do not apply."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxrl.errors import InputError
from jaxrl.rewards import checking
from jaxrl.rewards.checking import AnswerRule, Check, Verdict, canonical_gold, check_answers

NUMBER = AnswerRule('number')
MATH = AnswerRule('math')
CHOICE = AnswerRule('choice')
JSON = AnswerRule('number', marker=None, layout='json')


def test_number_verdicts():
  responses = ['Final answer: $1,234', 'Final answer: 5', 'I give up', 'Final answer: 1', 'x']
  golds = ['... <<1+1=2>>\n#### 1234', '6', '6', 'no number', None]
  assert check_answers(NUMBER, responses, golds) == [
      Check('1234', Verdict.CORRECT),
      Check('5', Verdict.WRONG),
      Check(None, Verdict.UNPARSEABLE_ANSWER),
      Check('1', Verdict.UNPARSEABLE_GOLD),
      Check(None, Verdict.UNPARSEABLE_GOLD),
  ]


def test_math_verdicts_from_the_box_and_from_the_final_answer_line():
  responses = [
      '\\boxed{\\frac12}\nFinal answer: 0.5',
      'Final answer: $\\frac{2}{4}$.',
      '\\boxed{2}\nFinal answer: 1/2',       # the box wins
      '\\boxed{\nFinal answer: 1/2',         # cut box: the line is all there is
      'so \\boxed{1/2',
      'one half',
  ]
  verdicts = [check.verdict for check in check_answers(MATH, responses, ['\\dfrac{1}{2}'] * 6)]
  assert verdicts == ['correct', 'correct', 'wrong', 'correct',
                      'unparseable_answer', 'unparseable_answer']


def test_math_without_a_marker_reads_the_box_only():
  rule = AnswerRule('math', marker=None)
  assert check_answers(rule, ['Final answer: 3'], ['3'])[0].verdict is Verdict.UNPARSEABLE_ANSWER


def test_choice_verdicts_follow_each_items_own_labels():
  responses = ['Final answer: (B)', 'Final answer: (2)', 'Final answer: (E)', 'Final answer: (A)']
  golds = ['B', '2', 'A', '5']
  labels = [['A', 'B', 'C', 'D'], ['1', '2', '3', '4'], ['A', 'B', 'C', 'D'], ['1', '2', '3', '4']]
  assert check_answers(CHOICE, responses, golds, labels) == [
      Check('B', Verdict.CORRECT),
      Check('B', Verdict.CORRECT),
      Check(None, Verdict.UNPARSEABLE_ANSWER),
      Check('A', Verdict.UNPARSEABLE_GOLD),   # gold 5 among four options
  ]


def test_json_layout_reads_the_answer_field():
  responses = ['{"reasoning": "1\n2", "answer": "$1,000"}', '{"answer": "x"}', 'Final answer: 1000']
  assert [check.verdict for check in check_answers(JSON, responses, ['1000'] * 3)] == [
      'correct', 'unparseable_answer', 'unparseable_answer']
  rule = AnswerRule('math', marker=None, layout='json')
  assert check_answers(rule, ['{"answer": "$\\\\boxed{\\frac12}$"}'], ['0.5'])[0].answer == '1/2'


@pytest.mark.parametrize('rule, text, expected', [
    (NUMBER, 'Natalia sold 48/2 = <<48/2=24>>24 clips.\n#### 72', '72'),
    (AnswerRule('number', marker='A:'), 'She makes $<<9*2=18>>18.\nA: 18', '18'),
    (NUMBER, '$1,234', '1234'),
    (NUMBER, '3/4 cups', '3/4'),
    (NUMBER, '12 + 6 = 18', '18'),
    (NUMBER, '3 or 4', None),
    (NUMBER, '', None),
    (NUMBER, '####', None),
    (MATH, '\\frac{1}{2}', '1/2'),
    (MATH, 'Adding gives $\\boxed{\\frac12}$ and so on.', '1/2'),
    (MATH, 'Adding gives \\boxed{\\frac12', None),
    (MATH, ' ', None),
    (AnswerRule('math', strict_fractions=True), '\\frac{2}{4}', '2/4'),
    (CHOICE, 'C', 'C'),
    (CHOICE, '(c)', 'C'),
    (CHOICE, '3', 'C'),
    (CHOICE, 'iron', None),
    (CHOICE, '6', None),
])
def test_gold(rule, text, expected):
  assert canonical_gold(rule, text) == expected


def test_symbolic_asks_once_per_question_and_never_about_two_numbers(monkeypatch):
  asked = []

  def are_equivalent(pairs, *, seconds, workers):
    asked.append((list(pairs), seconds, workers))
    return [True, None][:len(pairs)]

  monkeypatch.setattr(checking.math_equivalence, 'are_equivalent', are_equivalent)
  rule = AnswerRule('math', symbolic=True, timeout=1.5, workers=3)
  responses = [f'\\boxed{{{x}}}' for x in ('1+x', 'x+1', '1+x', '7', 'y')] + ['none']
  golds = ['x + 1', 'x+1', 'x + 1', '8', 'x+1', 'x+1']
  verdicts = [check.verdict for check in check_answers(rule, responses, golds)]
  assert asked == [([('x + 1', '1+x'), ('x+1', 'y')], 1.5, 3)]
  assert verdicts == ['correct', 'correct', 'correct', 'wrong', 'timeout', 'unparseable_answer']


@pytest.mark.parametrize('options, sentence', [
    (dict(kind='essay'), "AnswerRule: kind cannot be used; .*found 'essay'"),
    (dict(kind='number', marker=None), 'marker'),
    (dict(kind='number', marker=' '), 'marker'),
    (dict(kind='number', symbolic=True), 'symbolic'),
    (dict(kind='choice', strict_fractions=True), 'strict_fractions'),
    (dict(kind='math', strict_fractions=True, symbolic=True), 'strict_fractions'),
    (dict(kind='math', fallback='last_number'), 'fallback'),
    (dict(kind='number', fallback='first_number'), 'fallback'),
    (dict(kind='number', layout='json'), 'marker'),
    (dict(kind='choice', layout='json', marker=None), 'layout'),
    (dict(kind='number', layout='xml'), 'layout'),
    (dict(kind='math', timeout=0), 'timeout'),
    (dict(kind='math', timeout=float('nan')), 'timeout'),
    (dict(kind='math', timeout=float('inf')), 'timeout'),
    (dict(kind='math', timeout='5'), 'timeout'),
    (dict(kind='math', workers=0), 'workers'),
    (dict(kind='math', workers=1.5), 'workers'),
])
def test_a_rule_that_cannot_work_is_refused(options, sentence):
  with pytest.raises(InputError, match=sentence):
    AnswerRule(**options)


def test_columns_of_different_length_are_refused():
  with pytest.raises(InputError, match='golds and responses differ'):
    check_answers(NUMBER, ['a', 'b'], ['1'])
  with pytest.raises(InputError, match='labels and responses differ'):
    check_answers(CHOICE, ['a'], ['A'], [])


def test_nothing_to_check():
  assert check_answers(AnswerRule('math', symbolic=True), [], []) == []


@given(st.sampled_from([NUMBER, MATH, CHOICE, JSON, AnswerRule('number', fallback='last_number')]),
       st.lists(st.tuples(st.text(), st.none() | st.text()), max_size=4))
@settings(max_examples=60)
def test_no_text_raises(rule, rows):
  checks = check_answers(rule, [response for response, _ in rows], [gold for _, gold in rows])
  assert len(checks) == len(rows)
  for check, (_, gold) in zip(checks, rows, strict=True):
    assert (check.answer is None) or check.verdict is not Verdict.UNPARSEABLE_ANSWER
    if gold is None:
      assert check.verdict is Verdict.UNPARSEABLE_GOLD
