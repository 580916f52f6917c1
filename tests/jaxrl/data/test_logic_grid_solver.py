"""The solver against every arrangement there is, at sizes where all of them can be listed."""

import itertools

from hypothesis import example, given, settings
from hypothesis import strategies as st

from jaxrl.data.logic_grid_solver import KINDS, PLACES, Clue, find_arrangements, holds


def every_arrangement(houses, features, clues):
  """All that satisfy the clues, by trying all permutations of every feature."""
  orders = list(itertools.permutations(range(houses)))
  return {a for a in itertools.product(orders, repeat=features) if all(holds(c, a) for c in clues)}


@st.composite
def systems(draw):
  """Houses, features and clues, true or not."""
  houses, features = draw(st.sampled_from([(2, 1), (2, 3), (3, 1), (3, 3), (4, 1), (4, 2), (5, 1)]))
  items = st.tuples(st.integers(0, features - 1), st.integers(0, houses - 1))
  places = st.builds(lambda kind, item, house: Clue(kind, item, house=house),
                     st.sampled_from(PLACES), items, st.integers(0, houses - 1))
  pairs = st.builds(Clue, st.sampled_from([k for k in KINDS if k not in PLACES]), items, items)
  return houses, features, draw(st.lists(places | pairs, max_size=6))


@given(systems())
@settings(max_examples=150, deadline=None)
@example((3, 2, []))
@example((4, 2, [Clue('two_between', (0, 1), (1, 2)), Clue('next_to', (0, 0), (1, 2))]))
@example((2, 2, [Clue('left_of', (0, 0), (0, 0))]))
def test_solver_finds_what_trying_all_finds(system):
  houses, features, clues = system
  expected = every_arrangement(*system)
  found = find_arrangements(houses, features, clues, limit=1000)
  assert len(found) == len(set(found)) and set(found) == expected
  assert len(find_arrangements(houses, features, clues)) == min(len(expected), 2)


def test_each_kind_says_what_its_name_says():
  """Two features of four houses; item (0, 0) is in house 1 and item (1, v) in house v."""
  arrangement = ((1, 0, 2, 3), (0, 1, 2, 3))
  true_for = {
      'same_house': {1}, 'directly_left': {2}, 'directly_right': {0}, 'next_to': {0, 2},
      'left_of': {2, 3}, 'right_of': {0}, 'one_between': {3}, 'two_between': set()}
  for kind, values in true_for.items():
    assert {v for v in range(4) if holds(Clue(kind, (0, 0), (1, v)), arrangement)} == values, kind
  assert holds(Clue('two_between', (1, 0), (1, 3)), arrangement)
  assert [holds(Clue('found_at', (0, 0), house=h), arrangement) for h in range(4)] == [0, 1, 0, 0]
  assert [holds(Clue('not_at', (0, 0), house=h), arrangement) for h in range(4)] == [1, 0, 1, 1]


def test_limit_is_kept_where_there_are_many():
  assert len(find_arrangements(6, 6, [], limit=3)) == 3
