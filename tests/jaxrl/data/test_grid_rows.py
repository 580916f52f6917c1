"""Rows of logic-grid puzzles as problems."""

import json

import pytest

from jaxrl.data.readers import read_problems
from jaxrl.data.rows import Row
from jaxrl.data.tasks import TASKS, get_task, read_answer
from jaxrl.errors import InputError
from jaxrl.rewards.checking import AnswerRule, check_answers
from tests.shared_data import SHARED, needs_shared

TASK = TASKS['zebralogic']
TABLE = {'header': ['House', 'Name', 'Pet'], 'rows': [['1', 'Bob', 'cat'], ['2', 'Eric', 'dog']]}


def row(table):
  return Row('f.jsonl', 3, {'id': 'a', 'puzzle': 'Who?', 'solution': table})


def test_cells_are_the_labels_and_the_form_names_them():
  gold, solution, labels, form = read_answer(row(TABLE), TASK)
  assert json.loads(gold) == [['Bob', 'cat'], ['Eric', 'dog']] and solution is None
  assert labels == ('House 1/Name', 'House 1/Pet', 'House 2/Name', 'House 2/Pet')
  blank = json.loads(form[form.index('{'):])
  assert blank['solution'] == {f'House {n}': {'Name': '___', 'Pet': '___'} for n in (1, 2)}


@pytest.mark.parametrize('blank', ['___', None, ' '])
def test_a_hidden_solution_still_says_what_is_asked(blank):
  hidden = {**TABLE, 'rows': [['1', blank, blank], ['2', blank, blank]]}
  with pytest.raises(InputError, match="f.jsonl, row 3, field 'solution': .*an empty cell"):
    read_answer(row(hidden), TASK)
  _, _, labels, form = read_answer(row(TABLE), TASK)
  assert read_answer(row(hidden), TASK, keep_missing=True) == ('', None, labels, form)
  assert read_answer(row(hidden), TASK, keep_unreadable=True) == ('', None, labels, form)


@pytest.mark.parametrize('table, message', [
    ('Bob', 'the solution is not a table'),
    ({'header': ['House', 'Name']}, 'the solution is not a table'),
    ({'header': ['Name', 'Pet'], 'rows': [['Bob', 'cat']]}, 'the header cannot be used'),
    ({'header': ['House', 'Pet', 'pet'], 'rows': [['1', 'a', 'b']]}, 'the header cannot be used'),
    ({'header': ['House'], 'rows': [['1']]}, 'the header cannot be used'),
    ({'header': ['House', 3], 'rows': [['1', 'a']]}, 'a name of the header has the wrong type'),
    ({'header': ['House', 'Name'], 'rows': []}, 'the rows do not fit'),
    ({'header': ['House', 'Name'], 'rows': [['1']]}, 'the rows do not fit'),
    ({'header': ['House', 'Name'], 'rows': [['2', 'a'], ['1', 'b']]}, 'houses are not in order'),
    ({'header': ['House', 'Name'], 'rows': [['1', 4]]}, 'a cell .* has the wrong type'),
    (None, "field 'solution' is null"),
])
def test_bad_tables_are_named_even_where_gold_is_not_needed(table, message):
  for keep in (False, True):
    with pytest.raises(InputError, match=f'^f.jsonl, row 3.*{message}'):
      read_answer(row(table), TASK, keep_unreadable=keep)


@needs_shared
def test_real_puzzles_are_read_and_their_own_solutions_are_correct():
  problems = read_problems(SHARED / 'zebralogic/zebra_grid.jsonl', TASK)
  assert len(problems) == 10
  rule = AnswerRule('grid', marker=None)
  responses = []
  for problem in problems:
    rows = json.loads(problem.gold)
    headers = [name.partition('/')[2] for name in problem.labels[:len(rows[0])]]
    solution = {f'House {n + 1}': dict(zip(headers, r, strict=True)) for n, r in enumerate(rows)}
    responses.append(json.dumps({'reasoning': 'By the clues.', 'solution': solution}))
    blank = json.loads(problem.prompt[problem.prompt.rindex('{\n    "reasoning"'):])
    assert [(house, list(row)) for house, row in blank['solution'].items()] == [
        (house, headers) for house in solution]
    assert problem.prompt.count('## Clues:') == 2
    assert '# Puzzle to Solve\n\nThere are' in problem.prompt
  golds, labels = [p.gold for p in problems], [p.labels for p in problems]
  assert {c.verdict for c in check_answers(rule, responses, golds, labels)} == {'correct'}
  others = responses[1:] + responses[:1]   # of another size, or of other features
  assert 'correct' not in {c.verdict for c in check_answers(rule, others, golds, labels)}
  echoed = [problem.prompt for problem in problems]   # the form copied, with its blanks
  assert {c.verdict for c in check_answers(rule, echoed, golds, labels)} == {'unparseable_answer'}


def test_a_template_of_ones_own_keeps_the_form():
  task = get_task('zebralogic', template='Solve.\n{question}')
  [asked] = [task.template.replace('{question}', 'Who?' + read_answer(row(TABLE), task)[3])]
  assert asked.startswith('Solve.\nWho?\n\n# Instruction') and '"House 2"' in asked
