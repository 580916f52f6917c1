"""Penalties against transformers' processors, and against their definitions."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl.errors import InputError
from jaxrl.sampling.penalties import adjust, check

R, V = 3, 11
LOGITS = np.random.default_rng(0).normal(scale=3, size=(R, V)).astype(np.float32)
PROMPTS = np.array([[1, 2, 2], [5, 6, 10], [0, 0, 0]])
RESPONSES = np.array([[2, 3], [7, 7], [9, 10]])


def seen(ids):
  """[R, V] bool, True for ids of the row."""
  out = np.zeros((R, V), bool)
  np.put_along_axis(out, ids, True, axis=1)
  return out


SEEN = {'seen_prompt': seen(PROMPTS), 'seen_response': seen(RESPONSES)}


@pytest.fixture
def transformers():
  pytest.importorskip('torch')
  return pytest.importorskip('transformers')


def run_transformers(*processors):
  import torch
  scores = torch.tensor(LOGITS)
  ids = torch.tensor(np.concatenate([PROMPTS, RESPONSES], axis=1))
  for processor in processors:
    scores = processor(ids, scores)
  return scores.numpy()


def test_defaults_change_nothing_and_cost_nothing():
  logits = jnp.asarray(LOGITS)
  assert adjust(logits, end_ids=(3,), new=jnp.zeros((R,), jnp.int32), **SEEN) is logits


@pytest.mark.parametrize('penalty', [0.8, 1.3])
def test_repetition_penalty_is_that_of_transformers(transformers, penalty):
  expected = run_transformers(transformers.RepetitionPenaltyLogitsProcessor(penalty))
  found = adjust(jnp.asarray(LOGITS), repetition_penalty=penalty, **SEEN)
  np.testing.assert_allclose(found, expected, rtol=1e-6)
  assert (found != LOGITS).sum() == (SEEN['seen_prompt'] | SEEN['seen_response']).sum()


@pytest.mark.parametrize('minimum', [2, 3])
def test_ends_are_banned_until_the_minimum_as_in_transformers(transformers, minimum):
  expected = run_transformers(transformers.MinNewTokensLengthLogitsProcessor(3, minimum, [4, 8]))
  found = adjust(jnp.asarray(LOGITS), min_new_tokens=minimum, end_ids=(4, 8),
                 new=jnp.full((R,), RESPONSES.shape[1]))
  np.testing.assert_array_equal(found, expected)
  assert np.isneginf(found).sum() == (2 * R if minimum > 2 else 0)


def test_rows_pass_the_minimum_one_by_one():
  found = adjust(jnp.asarray(LOGITS), min_new_tokens=5, end_ids=(4,), new=jnp.array([4, 5, 6]))
  assert np.isneginf(found).sum(axis=1).tolist() == [1, 0, 0]
  assert np.isneginf(found[0, 4])


def test_presence_penalty_is_subtracted_once_from_what_the_response_has():
  found = adjust(jnp.asarray(LOGITS), presence_penalty=0.75, **SEEN)
  np.testing.assert_array_equal(found, LOGITS - 0.75 * SEEN['seen_response'].astype(np.float32))


def test_biases_and_bans_come_first_as_in_transformers(transformers):
  bias = ((2, 4.0), (5, -1.5), (7, -float('inf')), (9, -float('inf')))
  expected = run_transformers(
      transformers.SequenceBiasLogitsProcessor({(id,): value for id, value in bias}),
      transformers.RepetitionPenaltyLogitsProcessor(1.5),
      transformers.MinNewTokensLengthLogitsProcessor(3, 3, [10]))
  found = np.asarray(adjust(
      jnp.asarray(LOGITS), logit_bias=bias, repetition_penalty=1.5, min_new_tokens=3,
      end_ids=(10,), new=jnp.full((R,), 2), **SEEN))
  np.testing.assert_allclose(found, expected, rtol=1e-6)
  assert np.isneginf(found).all(axis=0).nonzero()[0].tolist() == [7, 9, 10]


ALL = tuple((n, -float('inf')) for n in range(V))


@pytest.mark.parametrize(('changes', 'message'), [
    ({'logit_bias': ((V, 1.0),)}, '--logit_bias: .*no such token; expected 0 to 10; found 11'),
    ({'logit_bias': ((-1, 1.0),)}, '--logit_bias: .*no such token.*found -1'),
    ({'logit_bias': ALL}, 'every token is banned.*found 11 banned'),
    ({'logit_bias': ALL[:-1], 'min_new_tokens': 1, 'end_ids': (V - 1,)}, 'every token is banned'),
])
def test_settings_that_leave_nothing_or_name_nothing_are_errors(changes, message):
  with pytest.raises(InputError, match=message):
    check(V, **({'logit_bias': (), 'min_new_tokens': 0, 'end_ids': ()} | changes))


def test_settings_that_leave_one_token_are_fine():
  check(V, logit_bias=ALL[:-1], min_new_tokens=0, end_ids=(V - 1,))
  check(V, logit_bias=ALL[:-2], min_new_tokens=3, end_ids=(V - 1,))
