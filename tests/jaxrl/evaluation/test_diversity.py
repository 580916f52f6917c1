"""Diversity metrics: the worked examples, their ranges, and averages over questions."""

import gzip
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxrl.data.world import problems
from jaxrl.evaluation.diversity import (
    EQUATION,
    by_side,
    difficulty_level,
    distinct_answers,
    distinct_equation_chains,
    distinct_n,
    ead,
    embedding_diversity,
    equation_chain,
    levels,
    ngram_counts,
    solved_share,
)
from tests.shared_data import SHARED, needs_shared

SETS = st.lists(st.lists(st.sampled_from('abcdAB'), max_size=9).map(' '.join), max_size=6)


def test_worked_distinct_n():
  assert ngram_counts(['a b a b', 'a b c']) == [(3, 7), (3, 5), (3, 3), (1, 1), (0, 0)]
  assert distinct_n(['a b a b', 'a b c']) == pytest.approx(0.757143, abs=1e-6)
  cats = ['the cat sat on the mat', 'the cat ran', 'a dog sat on the mat']
  assert distinct_n(cats) == pytest.approx(0.762222, abs=1e-6)
  assert distinct_n([]) == distinct_n(['', ' \n']) == 0
  assert distinct_n(['The the']) == 0.75, 'case does not tell words apart'


@given(SETS)
def test_distinct_n_is_a_share_and_no_ngram_crosses_texts(texts):
  value = distinct_n(texts)
  assert 0 <= value <= 1
  assert distinct_n([*texts, '']) == distinct_n(texts[::-1]) == pytest.approx(value)
  if any(texts):
    assert distinct_n(texts * 2) == pytest.approx(value / 2)


def test_worked_ead():
  assert ead(['a b a b', 'a b c'], 50) == pytest.approx(0.774933, abs=1e-6)
  assert ead([], 50) == 0
  assert ead(['a a a'], 1) == 1
  # With endless words chance would repeat none, and the correction vanishes.
  assert ead(['a b a b', 'a b c'], 10**12) == pytest.approx(0.757143, abs=1e-6)
  with pytest.raises(ValueError, match='vocabulary must be at least 1; found 0'):
    ead(['a'], 0)


def test_worked_embedding_diversity():
  assert embedding_diversity([[1, 0], [0.6, 0.8], [0, 1]]) == pytest.approx(0.533333, abs=1e-6)
  assert embedding_diversity(np.zeros((0, 3))) == embedding_diversity([]) == 0
  assert embedding_diversity([[1.0, 2.0]]) == 0
  assert embedding_diversity([[1, 0], [0, 0], [1, 0]]) == pytest.approx(2 / 3)
  assert embedding_diversity([[1, 0], [-3, 0]]) == pytest.approx(2)


@pytest.mark.parametrize('bad', [[[1.0], [np.nan]], [[np.inf], [1.0]], [[1.0], [1.0, 2.0]],
                                 [1.0, 2.0]])
def test_bad_embeddings(bad):
  with pytest.raises(ValueError):
    embedding_diversity(bad)


def test_equation_chains():
  text = 'She sold 48/2 = <<48/2=24>>24 clips.\nIn all 48+24 = << 48 + 24 = 72 >>72.\n#### 72'
  assert equation_chain(text) == ('48/2=24', '48+24=72')
  assert equation_chain('24 clips') == equation_chain('<<24 clips') == ()
  assert distinct_equation_chains([text, 'nothing', text.replace(' ', ''), '<<1+1=2>>', '']) == 2
  assert distinct_equation_chains([]) == distinct_equation_chains(['none']) == 0


def test_equations_of_the_embedded_world():
  problem = next(problems('train', 1, seed=0))
  lines = problem.reasoning.splitlines()
  assert equation_chain(problem.reasoning, EQUATION) == tuple(lines[:-1])
  assert equation_chain('So 3 + 4 = 7, and 2*3.5 - 1=6.', EQUATION) == ('3+4=7', '2*3.5-1=6')
  assert equation_chain('x = 4, 2002-03-04, a+b=c', EQUATION) == ()


@needs_shared
def test_equation_chains_of_real_solutions():
  path = SHARED / 'gsm8k' / 'train.jsonl.gz'
  with gzip.open(path, 'rt') as file:
    first = [json.loads(next(file))['answer'] for _ in range(50)]
  chains = [equation_chain(answer) for answer in first]
  assert [len(chain) for chain in chains] == [answer.count('<<') for answer in first]
  assert all('=' in step for chain in chains for step in chain)
  assert sum(map(bool, chains)) > 45


def test_distinct_answers():
  assert distinct_answers(['18', '18', None, '20', None]) == 2
  assert distinct_answers([None]) == distinct_answers([]) == 0


def test_difficulty_levels():
  found = {n: difficulty_level(n, 50) for n in (50, 40, 39, 30, 29, 20, 19, 10, 9, 0)}
  assert found == {50: 1, 40: 1, 39: 2, 30: 2, 29: 3, 20: 3, 19: 4, 10: 4, 9: 5, 0: 5}
  for correct, total in ((0, 0), (-1, 5), (6, 5)):
    with pytest.raises(ValueError, match=f'found {correct} and {total}'):
      difficulty_level(correct, total)


def row(prompt_id, verdict, response, answer='7'):
  return {'prompt_id': prompt_id, 'verdict': verdict, 'response': response, 'answer': answer}


ROWS = [
    row('a', 'correct', 'a b a b <<1+2=3>>'), row('b', 'wrong', 'a', '1'),
    row('a', 'correct', 'a b c <<1+2=3>>'), row('b', 'unparseable_answer', 'b', None),
    row('a', 'wrong', 'x', '2'), row('b', 'correct', 'a a'), row('b', 'correct', 'b b'),
    row('b', 'timeout', 'never looked at', None), row('c', 'correct', 'alone')]


def test_averages_over_questions():
  """`c` has one response, and `a` one wrong response, so they do not count there."""
  embeddings = np.eye(9)
  embeddings[6] = embeddings[5]
  found = by_side(ROWS, embeddings, vocabulary=50)
  assert found.pop('positive/distinct_n') == pytest.approx(
      np.mean([distinct_n(['a b a b <<1+2=3>>', 'a b c <<1+2=3>>']), distinct_n(['a a', 'b b'])]))
  assert found.pop('positive/ead') == pytest.approx(
      np.mean([ead([ROWS[0]['response'], ROWS[2]['response']], 50), ead(['a a', 'b b'], 50)]))
  assert found.pop('negative/ead') == pytest.approx(ead(['a', 'b'], 50))
  assert found == {
      'positive/questions': 2, 'positive/equation_chains': 0.5, 'positive/embedding': 0.5,
      'negative/questions': 1, 'negative/distinct_n': 1.0, 'negative/equation_chains': 0.0,
      'negative/embedding': 1.0, 'distinct_answers': 2.0}


def test_a_side_without_questions_has_no_numbers():
  assert by_side([row('a', 'correct', 'x')]) == {'positive/questions': 0, 'negative/questions': 0}
  assert by_side([]) == {'positive/questions': 0, 'negative/questions': 0}
  with pytest.raises(ValueError, match='2 embeddings for 9 responses'):
    by_side(ROWS, np.ones((2, 2)))


def test_levels_and_solved_share():
  assert levels(ROWS) == {'a': 2, 'b': 3, 'c': 1}
  assert solved_share([*ROWS, row('d', 'wrong', '')]) == 0.75
  assert solved_share([]) == 0
