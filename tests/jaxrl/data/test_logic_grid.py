"""Drawn puzzles have one solution, the stated one, and no clue too many; the text reads back."""

import collections
import dataclasses
import itertools
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxrl.data.grid_rows import EXAMPLE_ANSWER, EXAMPLE_PUZZLE
from jaxrl.data.logic_grid import (
    EASY_SIZES,
    SIZES,
    draw_puzzle,
    draw_puzzles,
    parse_puzzle,
    puzzle_text,
    solution_table,
    true_clues,
)
from jaxrl.data.logic_grid_solver import KINDS, holds
from jaxrl.data.logic_grid_words import FEATURES
from jaxrl.errors import InputError
from tests.shared_data import SHARED, needs_shared

REAL = SHARED / 'zebralogic/zebra_grid.jsonl'


@given(st.sampled_from(SIZES), st.integers(0, 2**32 - 1), st.integers(0, 1000))
@settings(max_examples=40, deadline=None)
def test_a_drawn_puzzle(size, seed, index):
  puzzle, arrangement = draw_puzzle(*size, seed, index)
  assert (puzzle.houses, len(puzzle.features)) == size
  assert puzzle.arrangements() == [arrangement]
  assert all(holds(clue, arrangement) for clue in puzzle.clues)
  for clue in puzzle.clues:   # without any one of them there is a second solution
    rest = dataclasses.replace(puzzle, clues=tuple(c for c in puzzle.clues if c != clue))
    solutions = rest.arrangements()
    assert len(solutions) == 2 and any(not holds(clue, other) for other in solutions)
  assert parse_puzzle(puzzle_text(puzzle)) == puzzle
  assert draw_puzzle(*size, seed, index) == (puzzle, arrangement)


def test_the_solution_is_the_only_one_among_all_arrangements():
  """Proof by trying every arrangement of four houses and two features."""
  orders = list(itertools.permutations(range(4)))
  for index in range(5):
    puzzle, arrangement = draw_puzzle(4, 2, 1, index)
    assert [a for a in itertools.product(orders, repeat=2)
            if all(holds(clue, a) for clue in puzzle.clues)] == [arrangement]


def test_seed_size_and_index_all_matter():
  texts = {puzzle_text(draw_puzzle(4, 3, seed, index)[0]) for seed in (0, 1) for index in range(4)}
  assert len(texts) == 8


def test_all_kinds_occur_and_true_clues_are_all():
  puzzles = [draw_puzzle(5, 4, 3, index) for index in range(12)]
  found = collections.Counter(clue.kind for puzzle, _ in puzzles for clue in puzzle.clues)
  assert found.keys() == set(KINDS)
  arrangement = ((0, 1, 2), (2, 0, 1))
  clues = true_clues(arrangement)
  assert len(clues) == len(set(clues)) and all(holds(clue, arrangement) for clue in clues)
  counts = collections.Counter(clue.kind for clue in clues)
  # By hand: 6 items; of their 15 pairs 3 share a house, 8 are neighbours and 4 have one between.
  assert counts == {'found_at': 6, 'not_at': 12, 'same_house': 3, 'next_to': 8, 'one_between': 4,
                    'directly_left': 8, 'directly_right': 8, 'left_of': 12, 'right_of': 12}


def test_puzzles_of_a_file_differ_and_the_first_are_those_of_a_smaller_one():
  many = list(draw_puzzles(2, 2, 0, 60))
  assert len({puzzle_text(puzzle) for _, puzzle, _ in many}) == 60
  assert many[:7] == list(draw_puzzles(2, 2, 0, 7))
  with pytest.raises(InputError, match='2x1: there are not so many different puzzles'):
    list(draw_puzzles(2, 1, 0, 10_000))


@pytest.mark.parametrize('size', [(1, 3), (7, 3), (3, 0), (3, 99)])
def test_sizes_without_words_are_refused(size):
  with pytest.raises(ValueError, match='houses'):
    draw_puzzle(*size, 0, 0)


def test_sizes_are_those_of_the_benchmark():
  assert len(SIZES) == 25 and len(EASY_SIZES) == 7 and EASY_SIZES < set(SIZES)


def test_words_are_unmistakable():
  assert all(len(feature.phrases) == 6 for feature in FEATURES)
  for parts in (
      [f.header for f in FEATURES], [f.intro for f in FEATURES],
      [p.lower() for f in FEATURES for phrases in f.phrases.values() for p in phrases]):
    assert len(set(parts)) == len(parts)


# The public puzzles


def real_rows():
  return [json.loads(line) for line in REAL.read_text().splitlines()]


@needs_shared
def test_every_clue_of_the_real_puzzles_is_read_and_the_stated_solution_is_the_only_one():
  rows = real_rows()
  assert len(rows) == 10
  for row in rows:
    puzzle = parse_puzzle(row['puzzle'], row['id'])
    stated = row['puzzle'].split('## Clues:')[1].strip().splitlines()
    assert len(puzzle.clues) == len(stated), row['id']
    assert f'{puzzle.houses}*{len(puzzle.features)}' == row['size']
    [arrangement] = puzzle.arrangements()
    assert solution_table(puzzle, arrangement) == row['solution']
    for n in range(len(puzzle.clues)):   # theirs have no clue too many either
      rest = dataclasses.replace(puzzle, clues=puzzle.clues[:n] + puzzle.clues[n + 1:])
      assert len(rest.arrangements()) == 2, (row['id'], n)


@needs_shared
def test_our_text_has_the_form_of_the_real_one():
  """Rendering a real puzzle gives its text, but for odd grammar, capitals and second phrases."""
  same = total = 0
  for row in real_rows():
    ours = puzzle_text(parse_puzzle(row['puzzle'])).splitlines()
    theirs = row['puzzle'].strip().splitlines()
    assert len(ours) == len(theirs)
    start = ours.index('## Clues:')
    assert ours[:start + 1] == theirs[:start + 1]
    same += sum(a == b for a, b in zip(ours, theirs, strict=True))
    total += len(ours)
  assert same / total > 0.85, (same, total)


# Reading

SMALL = """There are 2 houses, numbered 1 to 2 from left to right.
 - Each person has a unique name: `Bob`, `Eric`
 - Each person has a favorite color: `red`, `blue`

## Clues:
1. Bob is directly left of the person who loves red."""


@pytest.mark.parametrize('old, new, message', [
    ('There are 2', 'There are 9', "the number of houses is not stated"),
    ('a favorite color', 'a favorite tree', "a feature is not known; .*favorite tree"),
    ('`blue`', '`teal`', 'the values of Color cannot be used; expected 2 different known values'),
    ('`blue`', '`red`', 'the values of Color cannot be used'),
    ('`red`, `blue`', '`red`', 'the values of Color cannot be used'),
    ('loves red', 'loves green', "a clue cannot be read; .*'Bob is directly left of"),
    ('directly left of', 'taller than', 'a clue cannot be read'),
    ('directly left of the person who loves red', 'in the third house', 'a clue cannot be read'),
    (' - ', ' * ', 'no features are listed'),
])
def test_what_cannot_be_read_is_named(old, new, message):
  assert len(parse_puzzle(SMALL).clues) == 1
  with pytest.raises(InputError, match=f'^here: {message}'):
    parse_puzzle(SMALL.replace(old, new), 'here')


def test_the_worked_example_of_the_prompt_is_right():
  puzzle = parse_puzzle(EXAMPLE_PUZZLE)
  [arrangement] = puzzle.arrangements()
  table = solution_table(puzzle, arrangement)
  stated = json.loads(EXAMPLE_ANSWER)['solution']
  assert stated == {f'House {row[0]}': dict(zip(table['header'][1:], row[1:], strict=True))
                    for row in table['rows']}
