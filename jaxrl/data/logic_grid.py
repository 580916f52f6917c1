"""Logic-grid puzzles: drawn from a seed with one solution each, as text, and read back from text.

The form is that of ZebraLogic (Lin et al. 2025): n houses, m features, numbered clues. A puzzle
depends on (seed, size, index) alone. No clue of it can be left out: without any one of them there
is a second solution.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from jaxrl.data.logic_grid_solver import (
    KINDS,
    PAIRS,
    PLACES,
    Arrangement,
    Clue,
    Item,
    Kind,
    find_arrangements,
    holds,
)
from jaxrl.data.logic_grid_words import FEATURES, NAME, Feature
from jaxrl.errors import InputError

SIZES = tuple(itertools.product(range(2, 7), repeat=2))   # (houses, features) of the benchmark
# The benchmark calls all other sizes hard.
EASY_SIZES = frozenset({(2, 2), (2, 3), (2, 4), (2, 5), (2, 6), (3, 2), (3, 3)})
ORDINALS = ('first', 'second', 'third', 'fourth', 'fifth', 'sixth')
# How often a kind is tried. The kinds of the clues that remain are then about as frequent as in
# the public puzzles: docs/logic_puzzles.md has the counts.
WEIGHTS: Mapping[Kind, float] = {
    'found_at': 4, 'not_at': 10, 'same_house': 8, 'directly_left': 1.5, 'directly_right': 0.5,
    'next_to': 1.5, 'left_of': 3.5, 'right_of': 2.5, 'one_between': 1.2, 'two_between': 0.4}
REPEATS = 200   # equal puzzles in a row before a size is held to be exhausted

_SENTENCES: Mapping[Kind, str] = {
    'found_at': '{} is in the {} house.',
    'not_at': '{} is not in the {} house.',
    'directly_left': '{} is directly left of {}.',
    'directly_right': '{} is directly right of {}.',
    'next_to': '{} and {} are next to each other.',
    'left_of': '{} is somewhere to the left of {}.',
    'right_of': '{} is somewhere to the right of {}.',
    'one_between': 'There is one house between {} and {}.',
    'two_between': 'There are two houses between {} and {}.',
    'same_house': '{} is {}.',   # last: it fits most of the others
}
_OPENING = (
    'There are {n} houses, numbered 1 to {n} from left to right, as seen from across the street. '
    'Each house is occupied by a different person. Each house has a unique attribute for each of '
    'the following characteristics:')


@dataclasses.dataclass(frozen=True)
class Puzzle:
  """Features with their values as the text lists them, and clues that name both by number."""

  features: tuple[Feature, ...]
  values: tuple[tuple[str, ...], ...]   # [features][houses]
  clues: tuple[Clue, ...]

  @property
  def houses(self) -> int:
    return len(self.values[0])

  def arrangements(self, limit: int = 2) -> list[Arrangement]:
    """Up to `limit` solutions; one in the list is the proof that there is no other."""
    return find_arrangements(self.houses, len(self.features), self.clues, limit)


# Drawing


def draw_puzzle(houses: int, features: int, seed: int, index: int) -> tuple[Puzzle, Arrangement]:
  """The puzzle of this seed, size and index, and its only solution.

  Raises:
    ValueError: a size that the vocabulary does not have.
  """
  if not 2 <= houses <= len(ORDINALS) or not 1 <= features <= len(FEATURES):
    raise ValueError(f'2 to {len(ORDINALS)} houses and 1 to {len(FEATURES)} features; '
                     f'found {houses} and {features}')
  rng = np.random.default_rng((seed, houses, features, index))
  others = [feature for feature in FEATURES if feature is not NAME]
  chosen = (NAME, *(others[n] for n in rng.permutation(len(others))[:features - 1]))
  values = []
  for feature in chosen:
    words = list(feature.phrases)
    values.append(tuple(words[n] for n in rng.permutation(len(words))[:houses]))
  arrangement: Arrangement = tuple(
      tuple(rng.permutation(houses).tolist()) for _ in range(features))
  clues = needed_clues(houses, features, weighted_clues(arrangement, rng))
  ordered = tuple(clues[n] for n in rng.permutation(len(clues)))
  return Puzzle(chosen, tuple(values), ordered), arrangement


def true_clues(arrangement: Arrangement) -> list[Clue]:
  """Every clue that holds, except for those between two values of one feature that always do."""
  houses = range(len(arrangement[0]))
  items = [(f, v) for f in range(len(arrangement)) for v in houses]
  places = [Clue(kind, item, house=h) for kind in PLACES for item in items for h in houses]
  pairs = [Clue(kind, *two) for kind in PAIRS for two in itertools.permutations(items, 2)
           if two[0] < two[1] or kind not in ('same_house', 'next_to', 'one_between',
                                              'two_between')]
  return [clue for clue in (*places, *pairs) if holds(clue, arrangement)]


def weighted_clues(arrangement: Arrangement, rng: np.random.Generator) -> list[Clue]:
  """All true clues in random order: first a kind by its weight, then one of that kind."""
  by_kind: dict[Kind, list[Clue]] = {kind: [] for kind in KINDS}
  for clue in true_clues(arrangement):
    by_kind[clue.kind].append(clue)
  # Each kind's k-th clue comes k expected draws later: exponential gaps at the kind's rate.
  times = []
  for kind, clues in by_kind.items():
    at = np.cumsum(rng.exponential(1 / WEIGHTS[kind], len(clues)))
    order = rng.permutation(len(clues))
    times += [(float(t), clues[n]) for t, n in zip(at, order, strict=True)]
  return [clue for _, clue in sorted(times, key=lambda timed: timed[0])]


def needed_clues(houses: int, features: int, clues: Sequence[Clue]) -> list[Clue]:
  """A part of `clues` that still has one solution only, and of which no clue can be left out.

  Raises:
    ValueError: all clues together have no solution or more than one.
  """
  def is_unique(part: Sequence[Clue]) -> bool:
    return len(find_arrangements(houses, features, part)) == 1

  if not is_unique(clues):
    raise ValueError('the clues have no solution, or more than one')
  few, enough = 0, len(clues)         # more clues never have more solutions
  while enough - few > 1:
    middle = (few + enough) // 2
    few, enough = (few, middle) if is_unique(clues[:middle]) else (middle, enough)
  kept = list(clues[:enough])
  for clue in tuple(kept):
    without = [other for other in kept if other is not clue]
    if is_unique(without):
      kept = without
  return kept


def draw_puzzles(
    houses: int, features: int, seed: int, count: int
) -> Iterator[tuple[int, Puzzle, Arrangement]]:
  """`count` different puzzles of one size with their index; a repeated text is passed over.

  Raises:
    InputError: there seem to be no more different ones.
  """
  seen: set[str] = set()
  repeats = 0
  for index in itertools.count():
    if len(seen) == count:
      return
    puzzle, arrangement = draw_puzzle(houses, features, seed, index)
    text = puzzle_text(puzzle)
    repeats = repeats + 1 if text in seen else 0
    if repeats > REPEATS:
      raise InputError('there are not so many different puzzles', where=f'{houses}x{features}',
                       expected=f'about {len(seen)}', found=count, fix='Ask for fewer')
    if not repeats:
      seen.add(text)
      yield index, puzzle, arrangement


# Text


def puzzle_text(puzzle: Puzzle) -> str:
  """The puzzle as a question: houses, features with their values, and numbered clues."""
  features = [
      f' - {feature.intro}: {", ".join(f"`{value}`" for value in values)}'
      for feature, values in zip(puzzle.features, puzzle.values, strict=True)]
  clues = [f'{n}. {clue_text(puzzle, clue)}' for n, clue in enumerate(puzzle.clues, 1)]
  return '\n'.join((_OPENING.format(n=puzzle.houses), *features, '', '## Clues:', *clues))


def clue_text(puzzle: Puzzle, clue: Clue) -> str:
  """'Eric is in the first house.'"""
  def phrase(item: Item) -> str:
    feature, value = item
    return puzzle.features[feature].phrases[puzzle.values[feature][value]][0]

  if clue.other is None:
    assert clue.house is not None
    second = ORDINALS[clue.house]
  else:
    second = phrase(clue.other)
  text = _SENTENCES[clue.kind].format(phrase(clue.item), second)
  return text[0].upper() + text[1:]


def solution_table(puzzle: Puzzle, arrangement: Arrangement) -> dict[str, list]:
  """{'header': ['House', 'Name', ...], 'rows': [['1', 'Eric', ...], ...]}."""
  rows = [[str(house + 1)] for house in range(puzzle.houses)]
  for values, places in zip(puzzle.values, arrangement, strict=True):
    for value, house in zip(values, places, strict=True):
      rows[house].append(value)
  return {'header': ['House', *(feature.header for feature in puzzle.features)], 'rows': rows}


def parse_puzzle(text: str, where: str = 'the puzzle') -> Puzzle:
  """The puzzle that a text states; the inverse of `puzzle_text`, and made for the public puzzles.

  Raises:
    InputError: a number of houses, a feature or a clue that is not in the known words.
  """
  def bad(what: str, expected: str, found: object) -> InputError:
    return InputError(what, where=where, expected=expected, found=repr(found))

  stated = re.search(r'There are ([2-6]) houses', text)
  if stated is None:
    raise bad('the number of houses is not stated', "'There are N houses', N from 2 to 6",
              text[:40])
  intros = {feature.intro: feature for feature in FEATURES}
  features, values = [], []
  for intro, listed in re.findall(r'^ *- (.+?): (`.*)$', text, re.MULTILINE):
    if intro not in intros:
      raise bad('a feature is not known', 'one of jaxrl/data/logic_grid_words.py', intro)
    features.append(intros[intro])
    values.append(tuple(re.findall(r'`([^`]*)`', listed)))
    unknown = set(values[-1]) - intros[intro].phrases.keys()
    if unknown or len(set(values[-1])) != int(stated[1]):
      raise bad(f'the values of {intros[intro].header} cannot be used',
                f'{stated[1]} different known values', listed)
  if not features:
    raise bad('no features are listed', "lines such as ' - Each person has ...: `a`, `b`'", '')
  items = {
      phrase.casefold(): (f, v)
      for f, feature in enumerate(features) for v, value in enumerate(values[f])
      for phrase in feature.phrases[value]}
  clues = []
  for sentence in re.findall(r'^ *[0-9]+\. (.*\S) *$', text, re.MULTILINE):
    clue = parse_clue(sentence, items)
    if clue is None or (clue.house is not None and clue.house >= int(stated[1])):
      raise bad('a clue cannot be read', 'a relation of known phrases', sentence)
    clues.append(clue)
  return Puzzle(tuple(features), tuple(values), tuple(clues))


def parse_clue(sentence: str, items: Mapping[str, Item]) -> Clue | None:
  """The clue that a sentence states; `items` has the known phrases in lower case."""
  sentence = sentence.casefold()
  for kind, form in _SENTENCES.items():
    before, between, after = (part.casefold() for part in form.split('{}'))
    if not (sentence.startswith(before) and sentence.endswith(after)):
      continue
    inside = sentence[len(before):len(sentence) - len(after)]
    # A phrase may hold the words between the two, such as 'is' and 'and'.
    for match in re.finditer(re.escape(between), inside):
      first, second = inside[:match.start()], inside[match.end():]
      if first not in items:
        continue
      if kind in PLACES and second in ORDINALS:
        return Clue(kind, items[first], house=ORDINALS.index(second))
      if kind in PAIRS and second in items:
        return Clue(kind, items[first], items[second])
  return None
