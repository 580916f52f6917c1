"""Accuracy of puzzles and of cells, worked by hand."""

import json

import pytest

from jaxrl.data.grid_rows import cell_names
from jaxrl.evaluation.grid_accuracy import grid_accuracy
from jaxrl.rewards.checking import AnswerRule, canonical_gold, check_answers

RULE = AnswerRule('grid', marker=None)
SMALL = (cell_names(2, ('Name', 'Pet')), '[["bob", "cat"], ["eric", "dog"]]')
LARGE = (cell_names(3, 'ABCD'), json.dumps([[f'{h}{f}' for f in 'ABCD'] for h in '123']))


def row(name, problem, wrong=0, text=None, gold=None):
  """A response that has the first `wrong` cells wrong, or that is `text`."""
  cells, stated = problem
  values = [v for r in json.loads(stated) for v in r]
  solution = {}
  for n, (cell, value) in enumerate(zip(cells, values, strict=True)):
    house, _, feature = cell.partition('/')
    solution.setdefault(house, {})[feature] = 'no' if n < wrong else value
  text = json.dumps({'solution': solution}) if text is None else text
  gold = stated if gold is None else gold
  [check] = check_answers(RULE, [text], [gold], [cells])
  return {'prompt_id': name, 'response': text, 'gold': canonical_gold(RULE, gold),
          'verdict': check.verdict}


CELLS = {'a': SMALL[0], 'b': SMALL[0], 'c': LARGE[0], 'd': LARGE[0]}


def test_cells_and_puzzles_by_difficulty():
  rows = [row('a', SMALL), row('b', SMALL, wrong=1), row('c', LARGE, text='no table'),
          row('d', LARGE, wrong=6)]
  assert grid_accuracy(rows, CELLS) == {
      'cell_accuracy': pytest.approx((4 + 3 + 0 + 6) / (4 + 4 + 12 + 12)),
      'easy_puzzles': 2, 'easy_accuracy': 0.5, 'hard_puzzles': 2, 'hard_accuracy': 0.0}


def test_partial_tables_earn_their_cells():
  text = '{"solution": {"House 1": {"Name": "Bob"}, "House 2": {"Name": "Eric", "Pet": "cat"}}}'
  assert grid_accuracy([row('a', SMALL, text=text)], CELLS)['cell_accuracy'] == 0.5


def test_puzzles_without_gold_count_nowhere():
  rows = [row('a', SMALL), row('b', SMALL, gold='')]
  found = grid_accuracy(rows, CELLS)
  assert found == {'cell_accuracy': 1.0, 'easy_puzzles': 1, 'easy_accuracy': 1.0, 'hard_puzzles': 0}
  assert grid_accuracy(rows[1:], CELLS) == {'easy_puzzles': 0, 'hard_puzzles': 0}
