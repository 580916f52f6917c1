"""The words of logic-grid puzzles: features, their values, and what clues call who has a value.

The vocabulary is that of the ZebraLogic puzzles (Lin et al. 2025, "ZebraLogic: on the scaling
limits of LLMs for logical reasoning"), filled up to six values each, the most that a puzzle has.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping


@dataclasses.dataclass(frozen=True)
class Feature:
  """One column of a solution.

  Attributes:
    header: the key of the column in an answer.
    intro: the sentence that lists the values in a puzzle.
    phrases: value -> what clues call the person who has it. Clues are written with the first, and
      read with any: public puzzles have several, not all of them grammatical.
  """

  header: str
  intro: str
  phrases: Mapping[str, tuple[str, ...]]


def _all(written: str, values: str | Mapping[str, str], *read: str) -> dict[str, tuple[str, ...]]:
  """The same phrases for all values; `values` may say what stands for a value in them."""
  if isinstance(values, str):
    values = {value: value for value in values.split(', ')}
  return {value: tuple(phrase.format(word) for phrase in (written, *read))
          for value, word in values.items()}


NAME = Feature('Name', 'Each person has a unique name',
               _all('{}', 'Alice, Arnold, Bob, Carol, Eric, Peter'))
FEATURES = (
    NAME,
    Feature('Children', 'Each mother is accompanied by their child',
            _all('the person who is the mother of {}',
                 'Alice, Bella, Fred, Meredith, Samantha, Timothy',
                 "the person's child is named {}", 'the person whose child is named {}')),
    Feature('Mother', "The mothers' names in different houses are unique",
            _all("the person whose mother's name is {}",
                 'Aniya, Holly, Janelle, Kailyn, Penny, Sarah')),
    Feature('MusicGenre', 'People have unique favorite music genres',
            _all('the person who loves {} music', {
                'classical': 'classical', 'country': 'country', 'hip hop': 'hip-hop',
                'jazz': 'jazz', 'pop': 'pop', 'rock': 'rock'})),
    Feature('BookGenre', 'People have unique favorite book genres',
            _all('the person who loves {} books', {
                'biography': 'biography', 'fantasy': 'fantasy',
                'historical fiction': 'historical fiction', 'mystery': 'mystery',
                'romance': 'romance', 'science fiction': 'science fiction'})),
    Feature('Height', 'People have unique heights', {
        **_all('the person who is {}', 'very short, short, tall, very tall, super tall'),
        'average': ('the person who has an average height',)}),
    Feature('Pet', 'Each person has a unique type of pet', {
        **_all('the person who owns a {}', 'bird, cat, dog, hamster, rabbit'),
        'fish': ('the person with an aquarium of fish',)}),
    Feature('Flower', 'They all have a unique favorite flower', {
        'carnations': ('the person who loves a carnations arrangement',),
        'daffodils': ('the person who loves a bouquet of daffodils',),
        'iris': ('the person who loves the bouquet of iris',
                 'the person who loves the boquet of iris'),
        'lilies': ('the person who loves the bouquet of lilies',
                   'the person who loves the boquet of lilies'),
        'roses': ('the person who loves the rose bouquet',),
        'tulips': ('the person who loves the vase of tulips',)}),
    Feature('Color', 'Each person has a favorite color',
            _all('the person whose favorite color is {}', 'blue, green, purple, red, white, yellow',
                 'the person who loves {}')),
    Feature('Education', 'Each person has a unique level of education',
            _all('the person with {}', {
                'associate': "an associate's degree", 'bachelor': "a bachelor's degree",
                'doctorate': 'a doctorate', 'high school': 'a high school diploma',
                'master': "a master's degree", 'trade school': 'a trade school certificate'})),
    Feature('Vacation', 'Each person prefers a unique type of vacation', {
        'beach': ('the person who loves beach vacations',),
        'camping': ('the person who enjoys camping trips',),
        'city': ('the person who prefers city breaks',),
        'cruise': ('the person who likes going on cruises',),
        'cultural': ('the person who goes on cultural tours',),
        'mountain': ('the person who enjoys mountain retreats',)}),
    Feature('PhoneModel', 'People use unique phone models',
            _all('the person who uses {}', {
                'google pixel 6': 'a Google Pixel 6', 'huawei p50': 'a Huawei P50',
                'iphone 13': 'an iPhone 13', 'oneplus 9': 'a OnePlus 9',
                'samsung galaxy s21': 'a Samsung Galaxy S21', 'xiaomi mi 11': 'a Xiaomi Mi 11'})),
    Feature('CarModel', 'People own unique car models',
            _all('the person who owns a {}', {
                'bmw 3 series': 'BMW 3 Series', 'chevrolet silverado': 'Chevrolet Silverado',
                'ford f150': 'Ford F-150', 'honda civic': 'Honda Civic',
                'tesla model 3': 'Tesla Model 3', 'toyota camry': 'Toyota Camry'})),
    Feature('FavoriteSport', 'People have unique favorite sports',
            _all('the person who loves {}',
                 'baseball, basketball, soccer, swimming, tennis, volleyball')),
    Feature('Birthday', 'Each person has a unique birthday month',
            _all('the person whose birthday is in {}', {
                'jan': 'January', 'feb': 'February', 'mar': 'March', 'april': 'April',
                'may': 'May', 'sept': 'September'})),
    Feature('Hobby', 'Each person has a unique hobby', {
        'cooking': ('the person who loves cooking',),
        'gardening': ('the person who enjoys gardening',),
        'knitting': ('the person who enjoys knitting',),
        'painting': ('the person who paints as a hobby',),
        'photography': ('the photography enthusiast',),
        'woodworking': ('the woodworking hobbyist',)}),
)
