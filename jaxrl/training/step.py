"""One optimizer step as a pure function of (state, batch), exact under micro-batching."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import optax

from jaxrl.losses import preference
from jaxrl.losses.mean import Mean, mean_over
from jaxrl.models.config import ModelConfig
from jaxrl.training.logps import ComputePolicy, target_logps

Batch = Mapping[str, jax.Array]
Totals = dict[str, tuple[jax.Array, str]]            # term -> (total over rows, its normaliser)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
  """Everything that changes from step to step."""

  step: jax.Array             # [] int32, steps taken
  params: dict                # float32 masters
  opt_state: optax.OptState


@dataclasses.dataclass(frozen=True)
class Objective:
  """What is minimised: term totals and metrics of a part of a batch, and the batch's counts.

  `totals(params, part)` gives term totals and metrics of any part; `counts(batch)` the normalisers
  of the whole batch. The loss is the sum over terms of total / count, whatever the parts were.
  """

  totals: Callable[[dict, Batch], tuple[Totals, dict[str, Mean]]]
  counts: Callable[[Batch], dict[str, jax.Array]]


def sft_objective(c: ModelConfig, policy: ComputePolicy) -> Objective:
  """Mean negative log-likelihood per response token; batch of `sequence_arrays` [B, T]."""

  def totals(params, part):
    logps = target_logps(params, part['inputs'], part['targets'], c, policy)
    nll = mean_over(-logps, part['mask'])
    return {'nll': (nll.total, 'tokens')}, {}

  def counts(batch):
    return {'tokens': jnp.sum(batch['mask'], dtype=jnp.float32)}

  return Objective(totals, counts)


def preference_objective(
    name: str, options: Mapping, c: ModelConfig, policy: ComputePolicy
) -> Objective:
  """A pairwise loss by name with its options; batch of `pair_arrays` [P, 2, T]."""

  def sums(policy_logps, part):
    return preference.pair_sums({
        'policy_chosen': policy_logps[:, 0], 'policy_rejected': policy_logps[:, 1],
        'ref_chosen': part['ref_logps'][:, 0], 'ref_rejected': part['ref_logps'][:, 1],
        'chosen_mask': part['mask'][:, 0], 'rejected_mask': part['mask'][:, 1],
        'weights': part['weights']})

  def totals(params, part):
    p, _, t = part['inputs'].shape
    rows = {key: part[key].reshape(2 * p, t) for key in ('inputs', 'targets')}
    logps = target_logps(params, rows['inputs'], rows['targets'], c, policy)
    s = sums(logps.reshape(p, 2, t), part)
    terms, _ = preference.totals(name, s, **options)
    return terms, preference.pref_metrics(s, options['beta'])

  def counts(batch):
    return preference.normalisers(sums(batch['ref_logps'], batch))

  return Objective(totals, counts)


def init_state(params: dict, tx: optax.GradientTransformation) -> TrainState:
  """Step 0 with a fresh optimizer state."""
  return TrainState(jnp.zeros((), jnp.int32), params, tx.init(params))


def _split_rows(x: jax.Array, parts: int) -> jax.Array:
  """[B, ...] -> [parts, B / parts, ...], part j holding the rows j, j + parts, ...

  Strided, because each part then has as many rows on every device as the others and none moves.
  """
  return jnp.swapaxes(x.reshape(x.shape[0] // parts, parts, *x.shape[1:]), 0, 1)


def train_step(
    state: TrainState,
    batch: Batch,
    learning_rate: jax.Array,   # [] float32
    *,
    objective: Objective,
    tx: optax.GradientTransformation,
    micro_batches: int = 1,
) -> tuple[TrainState, dict[str, Mean]]:
  """The next state and metrics as (total, count).

  Rows are split into `micro_batches` equal parts whose gradients are added; since every part is
  divided by the whole batch's counts the sum is the gradient of the whole batch. A non-finite loss
  or gradient leaves parameters and optimizer untouched and sets `nonfinite`; the loop then stops.
  """
  counts = objective.counts(batch)

  def loss_of(params, part):
    terms, metrics = objective.totals(params, part)
    divided = {name: total / jnp.maximum(counts[kind], 1) for name, (total, kind) in terms.items()}
    loss = sum(divided.values(), jnp.zeros((), jnp.float32))
    share = jnp.float32(1 / micro_batches)   # parts of a sum: the counts add up to one
    if len(divided) > 1:
      metrics |= {f'loss/{name}': Mean(v, share) for name, v in divided.items() if name != 'nll'}
    return loss, metrics | {'loss': Mean(loss, share)}

  grad_of = jax.grad(loss_of, has_aux=True)
  if micro_batches == 1:
    grads, metrics = grad_of(state.params, batch)
  else:
    parts = jax.tree.map(lambda x: _split_rows(x, micro_batches), batch)

    def add(carry, part):
      return jax.tree.map(jnp.add, carry, grad_of(state.params, part)), None

    first = jax.tree.map(lambda x: x[0], parts)
    _, shapes = jax.eval_shape(grad_of, state.params, first)
    # Gradients lie where their parameters lie; what is carried must be laid out alike.
    zeros = (jax.tree.map(jnp.zeros_like, state.params),
             jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes))
    (grads, metrics), _ = jax.lax.scan(add, zeros, parts)

  grad_norm = optax.global_norm(grads)
  with jax.numpy_dtype_promotion('standard'):   # optax mixes floats with int32 counts
    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    updates = jax.tree.map(lambda u: -learning_rate * u, updates)
  finite = jnp.isfinite(grad_norm) & jnp.isfinite(metrics['loss'].total)

  def keep(new, old):
    return jax.tree.map(lambda n, o: jnp.where(finite, n, o), new, old)

  one = jnp.ones((), jnp.float32)
  metrics |= {
      'grad_norm': Mean(grad_norm, one),
      'update_norm': Mean(optax.global_norm(updates), one),
      'nonfinite': Mean(1.0 - finite.astype(jnp.float32), one),
      'num_tokens': Mean(jnp.sum(batch['mask'], dtype=jnp.float32), one),
  }
  params = keep(optax.apply_updates(state.params, updates), state.params)
  return TrainState(state.step + 1, params, keep(opt_state, state.opt_state)), metrics
