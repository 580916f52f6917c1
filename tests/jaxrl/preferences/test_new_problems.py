"""Problems that the model writes: how it is asked, and what of its responses is kept."""

import pytest

from jaxrl.data.tasks import TASKS, ask
from jaxrl.preferences import new_problems
from jaxrl.preferences.new_problems import REASONS, clean_question, count_reasons, normalise, sift
from jaxrl.tokens.prompts import Message


@pytest.mark.parametrize('task', ['gsm8k', 'math', 'world'])
def test_the_question_of_a_prompt(task):
  question = r'How many {apples} are $\frac{1}{2}$ of 6?'
  text = ask(TASKS[task], question)
  template = TASKS[task].template
  assert new_problems.question_of(text, template) == question
  assert new_problems.question_of(
      (Message('system', 'x'), Message('user', text)), template) == question


def test_examples_are_different_and_fixed_by_the_seed():
  chosen = new_problems.choose_examples(50, 7, 4, seed=1)
  assert len(chosen) == 50 and all(len(set(c)) == 4 and set(c) <= set(range(7)) for c in chosen)
  assert {i for c in chosen for i in c} == set(range(7))
  assert new_problems.choose_examples(60, 7, 4, seed=1)[:50] == chosen
  assert new_problems.choose_examples(50, 7, 4, seed=2) != chosen
  with pytest.raises(ValueError, match='4 examples cannot be chosen from 3'):
    new_problems.choose_examples(1, 3, 4, seed=0)


def test_prompts():
  text = new_problems.writer_prompt(['One?', 'Two {examples}?'])
  assert text.index('Problem: One?\n\nProblem: Two {examples}?') > 0
  assert text.endswith('New problem:')
  assert new_problems.writer_prompt(['a', 'b'], new_problems.WORLD_WRITER) == 'New:\na\nb'


@pytest.mark.parametrize('response, question', [
    ('  How many? \n', 'How many?'),
    ('Problem: How many?', 'How many?'),
    ('**New problem:** How many?', 'How many?'),
    ('Question 5: How many?\n\nSolution: 3', 'How many?'),
    ('How many?\nAnswer: 3', 'How many?'),
    ('Ana has 2.\n\nHow many?\n\nProblem: Ben has 1.', 'Ana has 2.\n\nHow many?'),
    ('The problem is: how many?', 'The problem is: how many?'),
    ('Solve it.\nSolutions are counted. How many?', 'Solve it.\nSolutions are counted. How many?'),
    ('', ''), ('Problem:', ''), ('\nAnswer: 3', ''),
])
def test_the_question_of_a_response(response, question):
  assert clean_question(response) == question


def test_normal_forms():
  assert normalise(' How\nmany  Apples?') == normalise('how many apples?')
  assert normalise('2+3?') != normalise('2-3?') and normalise('x1') != normalise('x2')


def test_the_first_reason_counts():
  responses = ['New?', 'Old?', 'TEST  one?', 'new?', 'cut', 'Old?', ' ', 'too long', 'Too  long',
               'Fine?', 'Both?']
  written = sift(
      responses, [n == 4 for n in range(len(responses))], train=['old?', 'both?'],
      test=['Test one?', 'Both?'], fits=lambda q: 'long' not in q)
  assert [w.discarded for w in written] == [
      None, 'in_train', 'in_test', 'repeated', 'cut', 'in_train', 'empty', 'unusable', 'repeated',
      None, 'in_test']
  counts = count_reasons(written)
  assert counts['written'] == 11 and counts['kept'] == 2
  assert sum(counts[f'discarded/{reason}'] for reason in REASONS) == 9
