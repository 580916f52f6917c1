"""Pairs and train steps for the tiny model; a step is compiled once per process for all tests."""

import functools

import jax
import numpy as np
import optax

from jaxrl.data.batches import Pair, TokenRow
from jaxrl.models.params import param_shardings
from jaxrl.parallel.mesh import make_mesh
from jaxrl.training.logps import ComputePolicy
from jaxrl.training.loop import put_batch
from jaxrl.training.objectives import preference_objective, sft_objective
from jaxrl.training.optimizer import OptimizerConfig, guarded, make_optimizer
from jaxrl.training.score import score_rows
from jaxrl.training.step import init_state, train_step
from tests.tiny_model import CONFIG, QUICK, random_params

POLICY = ComputePolicy('float32', chunk=8, remat='all')
OPTIMIZER = OptimizerConfig(learning_rate=1e-3, warmup_steps=2, weight_decay=0.1)
LENGTHS = (16,)
PAD = 0
# Momentum and clipping, but no division by a root: an update is as exact as its gradient.
MOMENTUM = guarded(optax.chain(optax.clip_by_global_norm(0.5), optax.trace(0.9)))


def one_device():
  return make_mesh(devices=jax.devices()[:1])


def random_row(rng, most=9):
  ids = rng.integers(0, CONFIG.vocab_size, 16).tolist()
  prompt = int(rng.integers(1, 8))
  return TokenRow(ids[:prompt], ids[prompt:prompt + int(rng.integers(1, most + 1))])


def random_pairs(count, seed=0, most=9):
  """Pairs of very unequal lengths, weights and made-up reference log-probs."""
  rng = np.random.default_rng(seed)
  made = []
  for _ in range(count):
    chosen, rejected = random_row(rng, most), random_row(rng, most)
    refs = (-5 * rng.random(len(row.response_ids)) for row in (chosen, rejected))
    made.append(Pair(chosen, rejected, *refs, weight=float(rng.random() + 0.5)))
  return made


def own_reference(pairs, params):
  """The same pairs with log-probs that `params` give them."""
  mesh = one_device()
  rows = [row for pair in pairs for row in (pair.chosen, pair.rejected)]
  with jax.set_mesh(mesh):
    logps = score_rows(params, rows, CONFIG, POLICY, mesh=mesh, lengths=LENGTHS, batch_size=16,
                       pad_id=PAD)
  return [
      Pair(p.chosen, p.rejected, logps[2 * n], logps[2 * n + 1]) for n, p in enumerate(pairs)]


@functools.cache
def compiled_step(loss='irpo', optimizer=OPTIMIZER, micro_batches=1):
  """(state, batch, lr) -> (state, metrics), which donates; `optimizer` None is MOMENTUM."""
  options = {'irpo': {'beta': 0.1, 'alpha': 1.0}, 'dpo': {'beta': 0.1},
             'irpo_token': {'beta': 0.1, 'alpha': 1.0, 'nll_reduction': 'token'}}
  objective = (
      sft_objective(CONFIG, POLICY) if loss == 'sft' else
      preference_objective(loss.partition('_')[0], options[loss], CONFIG, POLICY))
  return jax.jit(
      functools.partial(train_step, objective=objective, tx=transformation(optimizer),
                        micro_batches=micro_batches),
      donate_argnums=0, compiler_options=QUICK)


def transformation(optimizer=OPTIMIZER):
  return MOMENTUM if optimizer is None else make_optimizer(optimizer)


@functools.cache
def _initial(optimizer):
  return jax.jit(
      functools.partial(init_state, tx=transformation(optimizer)), compiler_options=QUICK)


def start_state(mesh, optimizer=OPTIMIZER, params=None):
  """The state of step 0; its parameters are a copy, for a step may donate them."""
  params = random_params() if params is None else params
  params = jax.device_put(jax.tree.map(np.array, params), param_shardings(CONFIG, mesh))
  with jax.set_mesh(mesh):
    return _initial(optimizer)(params)


def take_steps(step, state, batches, mesh, learning_rate=0.1):
  """(state, metrics of the last step)."""
  with jax.set_mesh(mesh):
    for batch in batches:
      state, metrics = step(state, put_batch(batch, mesh), np.float32(learning_rate))
  return state, metrics
