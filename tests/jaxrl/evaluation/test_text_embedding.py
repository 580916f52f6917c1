"""Hashed n-grams: unit vectors that depend on the words alone, with honest cosines."""

import numpy as np
import pytest

from jaxrl.evaluation.text_embedding import hashed_ngrams


def test_unit_vectors_of_words_and_their_order():
  found = hashed_ngrams(['the cat sat', 'The  cat\nsat', 'sat cat the', '', 'a'], width=64)
  assert found.shape == (5, 64) and found.dtype == np.float32
  np.testing.assert_array_equal(found[0], found[1])
  assert abs(found[0] - found[2]).max() > 0.1
  np.testing.assert_allclose(np.linalg.norm(found, axis=1), [1, 1, 1, 0, 1], atol=1e-6)
  assert hashed_ngrams([], width=8).shape == (0, 8)


def test_a_vector_does_not_depend_on_its_company_or_on_the_process():
  alone = hashed_ngrams(['3+4=7 so it is 7'], width=16)
  np.testing.assert_array_equal(hashed_ngrams(['x', '3+4=7 so it is 7'], width=16)[1:], alone)
  # The same in every process and on every machine: CRC-32 of 'cat' is 0x9e5e43a8.
  assert hashed_ngrams(['cat'], width=16, orders=(1,))[0].tolist() == [0.0] * 8 + [1.0] + [0.0] * 7


def test_cosines_are_those_of_word_counts_on_average():
  """Half the words are shared, so the cosine is 0.5; 512 places keep the error small."""
  rng = np.random.default_rng(0)
  cosines = []
  for _ in range(100):
    words = [f'w{n}' for n in rng.choice(10**6, 30, replace=False)]
    pair = hashed_ngrams(
        [' '.join(words[:20]), ' '.join(words[10:])], width=512, orders=(1,)).astype(np.float64)
    cosines.append(pair[0] @ pair[1])
  assert np.mean(cosines) == pytest.approx(0.5, abs=0.02) and np.std(cosines) < 0.1


@pytest.mark.parametrize('bad', [{'width': 0}, {'orders': ()}, {'orders': (0, 1)}])
def test_bad_settings(bad):
  with pytest.raises(ValueError, match='must be at least 1'):
    hashed_ngrams(['a'], **bad)
