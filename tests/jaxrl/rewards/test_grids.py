"""Tables in JSON answers: which object counts, what a cell is, and verdicts."""

import json
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxrl.errors import InputError
from jaxrl.rewards.best_of import majority
from jaxrl.rewards.checking import AnswerRule, canonical_gold, check_answers, extract_answer
from jaxrl.rewards.grids import extract_grid, last_solution, read_cells
from jaxrl.rewards.voting import votes

RULE = AnswerRule('grid', marker=None)
CELLS = ('House 1/Name', 'House 1/Pet', 'House 2/Name', 'House 2/Pet')
GOLD = '[["Bob", "cat"], ["Eric", "dog"]]'
CANONICAL = '[["bob","cat"],["eric","dog"]]'
ROWS = {'House 1': {'Name': 'Bob', 'Pet': 'cat'}, 'House 2': {'Name': 'Eric', 'Pet': 'dog'}}


def answer(solution=ROWS, **more):
  return json.dumps({'reasoning': 'So.', 'solution': solution, **more})


def changed(house, **cells):
  return answer({**ROWS, house: {**ROWS[house], **cells}})


@pytest.mark.parametrize('text', [
    answer(),
    f'Let me think {{it through}}.\n```json\n{answer()}\n```\nDone }}.',
    answer().replace('So.', 'a raw\nline break and {\\"solution\\": 5} quoted'),
    changed('House 1', Name=' BOB ', Pet=['cat', 'dog']),
    answer({'house 2': ROWS['House 2'], 'HOUSE 1 ': {'pet': 'cat', 'NAME': 'Bob', 'House': 1}}),
    answer({}) + changed('House 1', Name='Eric') + answer(),
    answer() + '{"solution": "see above"} {"answer": {}} {"solution": ',
    '{"a": ' + answer() + 'x' + answer(),         # the first brace never closes
])
def test_equal_answers_are_one_string(text):
  assert extract_grid(text, CELLS) == CANONICAL


@pytest.mark.parametrize('text', [
    '', 'no table', answer()[:-1], answer().replace('"cat"', 'cat'), answer('Bob'), answer({}),
    answer({'House 1': ROWS['House 1']}), answer([ROWS]), changed('House 1', Pet=None),
    changed('House 1', Pet=' '), changed('House 2', Pet='___'), changed('House 2', Pet=[]),
    changed('House 2', Pet={'kind': 'dog'}), changed('House 2', Pet=True),
    answer({'House 1': 'Bob', 'House 2': ROWS['House 2']}),
    json.dumps({'outer': json.loads(answer())}),
    answer() + answer({}),                          # the last object counts, whatever it holds
])
def test_a_missing_cell_is_no_answer(text):
  assert extract_grid(text, CELLS) is None


def test_cells_of_partial_answers():
  assert read_cells(changed('House 2', Pet=None), CELLS) == ['bob', 'cat', 'eric', None]
  assert read_cells('none', CELLS) == [None] * 4
  assert read_cells(changed('House 1', Name=7), CELLS)[0] == '7'


@pytest.mark.parametrize('text, expected', [
    (GOLD, CANONICAL), (CANONICAL, CANONICAL), ('[[" A "]]', '[["a"]]'),
    ('', None), ('[]', None), ('[[]]', None), ('[["a"], ["b", "c"]]', None), ('[["a", ""]]', None),
    ('[["a", null]]', None), ('[["a", ["b"]]]', None), ('{"a": 1}', None), ('Bob', None),
    ('[' * 100_000, None),
])
def test_gold(text, expected):
  assert canonical_gold(RULE, text) == expected


def test_verdicts():
  texts = [answer(), changed('House 1', Name='Carol'), 'I give up.', answer(), answer(), answer()]
  golds = [GOLD] * 3 + ['', '[["Bob", "cat", "x"], ["Eric", "dog", "y"]]', None]
  assert [check.verdict for check in check_answers(RULE, texts, golds, [CELLS] * 6)] == [
      'correct', 'wrong', 'unparseable_answer', *['unparseable_gold'] * 3]


def test_equal_tables_vote_together():
  texts = [changed('House 1', Pet='CAT'), changed('House 1', Pet='dog'), 'none', answer()]
  assert votes([extract_answer(RULE, text, CELLS) for text in texts]) == [2, 1, 0, 2]
  found = majority(texts, RULE, labels=CELLS)
  assert (found.answer, found.votes, found.chosen) == (CANONICAL, 2, 0)


def test_cells_are_needed():
  with pytest.raises(InputError, match='without the names of its cells'):
    check_answers(RULE, [answer()], [GOLD])
  # A problem that a model wrote has none, and so no answer.
  assert extract_answer(RULE, answer(), ()) is None


@pytest.mark.parametrize('options', [dict(), dict(marker='Final answer:'),
                                     dict(marker=None, layout='json'),
                                     dict(marker=None, symbolic=True)])
def test_options_without_meaning_are_refused(options):
  with pytest.raises(InputError, match='AnswerRule'):
    AnswerRule('grid', **options)


HOSTILE = ['{"', '{', '}', '"', '\\"', '\\', '{"solution": ', '{"solution": {', '[', ']', ':', ',',
           '"a": ', 'NaN', '1e999', '9' * 5000, '\ud800', '\x00', '\n', ' ']


@given(st.lists(st.sampled_from(HOSTILE) | st.text(max_size=3), max_size=15).map(''.join))
def test_no_text_raises(text):
  for wrapped in (text, f'{{"solution": {{"House 1": {{"Name": {text}}}}}}}', f'{text}{answer()}'):
    assert last_solution(wrapped) is None or isinstance(last_solution(wrapped), dict)
    assert extract_grid(wrapped, CELLS) in (None, CANONICAL)
    canonical_gold(RULE, wrapped)


@pytest.mark.parametrize('piece', [
    '{"', '{"a":', '{"a":[', '{"a":1,', '{"a":{},', '{"a":"{', '{"\\"', '{"a" ', '{ ', '[',
    '{"a":{"b":1},"c":[{"d":2},'])
def test_half_a_megabyte_takes_seconds(piece):
  """Trying every brace to the end of the text would take hours; the slowest takes half a second."""
  start = time.process_time()
  extract_grid(piece * (500_000 // len(piece)), CELLS)
  assert time.process_time() - start < 10


def test_an_answer_after_pages_of_broken_objects_is_found():
  assert extract_grid('{"a": {"b", {"c": }\n' * 200 + answer(), CELLS) == CANONICAL
