"""Likelihood displacement in the small: DPO widens the margin and lowers both, IRPO raises chosen.

Pang et al. 2024, figure 2: pairs that share a long prefix, from a model that knows both responses.
"""

import functools

import jax
import numpy as np
import pytest

from jaxrl.data.batches import Pair, TokenRow, pair_arrays, sequence_arrays
from tests import tiny_training as tiny
from tests.tiny_model import CONFIG

PAIRS, STEPS, HALF = 64, 200, 32


def shared_prefix_pairs():
  """Responses of eight ids that differ in the last one."""
  rng = np.random.default_rng(0)
  made = []
  for _ in range(PAIRS):
    ids = rng.integers(0, CONFIG.vocab_size, 11).tolist()
    right, wrong = rng.choice(CONFIG.vocab_size, 2, replace=False).tolist()
    made.append(Pair(
        TokenRow(ids[:4], [*ids[4:], right]), TokenRow(ids[:4], [*ids[4:], wrong]), (), ()))
  return made


@functools.cache
def start():
  """(parameters trained on both responses alike, pairs with their log-probs)."""
  pairs = shared_prefix_pairs()
  rows = [sequence_arrays([p.chosen for p in half] + [p.rejected for p in half], tiny.LENGTHS,
                          tiny.PAD) for half in (pairs[:HALF], pairs[HALF:])]
  mesh = tiny.one_device()
  state, _ = tiny.take_steps(
      tiny.compiled_step('sft'), tiny.start_state(mesh), rows * 60, mesh, learning_rate=3e-3)
  params = jax.tree.map(np.asarray, state.params)
  return params, tiny.own_reference(pairs, jax.device_put(params))


def log_probs(pairs):
  """Mean log-prob per response of (chosen, rejected)."""
  return tuple(
      float(np.mean([np.sum(getattr(p, side)) for p in pairs]))
      for side in ('chosen_ref', 'rejected_ref'))


def train(loss):
  """((chosen, rejected) before, the same after)."""
  params, pairs = start()
  mesh = tiny.one_device()
  batches = [pair_arrays(half, tiny.LENGTHS, tiny.PAD) for half in (pairs[:HALF], pairs[HALF:])]
  state, _ = tiny.take_steps(
      tiny.compiled_step(loss), tiny.start_state(mesh, params=params), batches * (STEPS // 2),
      mesh, learning_rate=1e-4)
  trained = tiny.own_reference(pairs, jax.tree.map(np.asarray, state.params))
  return log_probs(pairs), log_probs(trained)


@pytest.mark.parametrize('loss', ['dpo', 'irpo'])
def test_the_margin_grows_and_only_irpo_keeps_the_chosen_likely(loss):
  (chosen, rejected), (new_chosen, new_rejected) = train(loss)
  assert abs(chosen - rejected) < 0.5, 'the model knew both alike'
  assert new_chosen - new_rejected > chosen - rejected + 5
  if loss == 'dpo':
    assert new_chosen < chosen - 1
  else:
    assert new_chosen > chosen + 0.3
