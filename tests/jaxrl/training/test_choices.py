"""Scores of given continuations: sums of a plain softmax, and which one is best."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl.errors import InputError
from jaxrl.models.decoder import forward, output_matrix
from jaxrl.models.params import param_shardings
from jaxrl.training.choices import Choices, prompt_logprobs, score_choices
from tests import tiny_training as tiny
from tests.tiny_model import CONFIG, random_params

PROMPTS = [(3, 14, 15), (9,), (2, 6, 5, 3)]
CHOICES = [[(8, 9), (7,), (9, 3, 2, 3)], [(1, 1)], [(8,), (4, 6)]]


def options():
  return {'mesh': tiny.one_device(), 'lengths': (16,), 'batch_size': 8, 'pad_id': 0}


def scored(function, *arguments):
  with jax.set_mesh(tiny.one_device()):
    params = jax.device_put(random_params(), param_shardings(CONFIG, tiny.one_device()))
    return function(params, *arguments, CONFIG, tiny.POLICY, **options())


@pytest.fixture(scope='module')
def reference():
  """Log-probs of every id of a sequence but the first, one sequence at a time."""
  params = jax.tree.map(jnp.asarray, random_params())

  @jax.jit
  def logps(ids):
    hidden = forward(params, ids[None], CONFIG)
    return jax.nn.log_softmax(hidden[0] @ output_matrix(params, CONFIG))

  def one(ids):
    padded = np.zeros(16, np.int32)
    padded[:len(ids)] = ids
    table = np.asarray(logps(padded))
    return np.float32([table[t - 1, ids[t]] for t in range(1, len(ids))])

  return one


def test_continuations_and_prompts(reference):
  found = scored(score_choices, PROMPTS, CHOICES)
  prompts = scored(prompt_logprobs, PROMPTS)
  for prompt, own, result, of_prompt in zip(PROMPTS, CHOICES, found, prompts, strict=True):
    expected = [reference((*prompt, *each))[len(prompt) - 1:] for each in own]
    for a, b in zip(result.logprobs, expected, strict=True):
      np.testing.assert_allclose(a, b, rtol=1e-5)
    np.testing.assert_allclose(result.sums, [np.sum(x) for x in expected], rtol=1e-5)
    np.testing.assert_allclose(result.means, [np.mean(x) for x in expected], rtol=1e-5)
    np.testing.assert_allclose(of_prompt, reference(prompt), rtol=1e-5)
    assert of_prompt.shape == (len(prompt) - 1,)


def test_sum_and_mean_may_disagree():
  choices = Choices((np.float32([-1.0]), np.float32([-0.75, -0.75]), np.float32([-0.75, -0.75])))
  assert choices.sums == [-1.0, -1.5, -1.5] and choices.means == [-1.0, -0.75, -0.75]
  assert choices.best_by_sum == 0 and choices.best_by_mean == 1


@pytest.mark.parametrize('own, found', [([], 'none'), ([(1, 2), ()], '2, of 2, 0 ids')])
def test_nothing_to_score_is_refused(own, found):
  with pytest.raises(InputError, match=f'prompt 1: there is nothing to score.*found {found}'):
    scored(score_choices, PROMPTS[:2], [CHOICES[0], own])
