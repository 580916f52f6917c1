"""One optimizer step as a pure function of (state, batch), exact under micro-batching."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import optax

from jaxrl.losses.mean import Mean
from jaxrl.training.objectives import Batch, Objective, split_rows, with_adapter


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
  """Everything that changes from step to step."""

  step: jax.Array             # [] int32, steps taken
  params: dict                # float32 masters of what is trained: the model, or its adapter
  opt_state: optax.OptState
  loss_state: dict = dataclasses.field(default_factory=dict)   # of losses with a running quantity


def init_state(
    params: dict, tx: optax.GradientTransformation, loss_state: dict | None = None
) -> TrainState:
  """Step 0 with a fresh optimizer state."""
  # Moments are float32 whatever the parameters are kept in.
  like = jax.tree.map(lambda x: x.astype(jnp.float32), params)
  return TrainState(jnp.zeros((), jnp.int32), params, tx.init(like), loss_state or {})


def train_step(
    state: TrainState,
    batch: Batch,
    learning_rate: jax.Array,   # [] float32
    frozen: dict | None = None,
    *,
    objective: Objective,
    tx: optax.GradientTransformation,
    micro_batches: int = 1,
) -> tuple[TrainState, dict[str, Mean]]:
  """The next state and metrics as (total, count).

  With `frozen`, the parameters of a model, `state.params` is an adapter on it, and the only thing
  that gradients are taken for; the objective sees the two together.

  Rows are split into `micro_batches` equal parts whose gradients are added; since every part is
  divided by the whole batch's counts the sum is the gradient of the whole batch. A non-finite loss
  or gradient leaves parameters and optimizer untouched and sets `nonfinite`; the loop then stops.
  """
  if frozen is not None:
    objective = with_adapter(objective, frozen)
  loss_state = state.loss_state
  if objective.survey is not None:
    batch, loss_state = objective.survey(
        state.params, batch, loss_state, state.step, micro_batches)
  counts = objective.counts(batch)

  def loss_of(params, part):
    terms, metrics = objective.totals(params, part)
    divided = {name: total / jnp.maximum(counts[kind], 1) for name, (total, kind) in terms.items()}
    loss = sum(divided.values(), jnp.zeros((), jnp.float32))
    share = jnp.float32(1 / micro_batches)   # parts of a sum: the counts add up to one
    if len(divided) > 1:
      metrics |= {f'loss/{name}': Mean(v, share) for name, v in divided.items() if name != 'nll'}
    return loss, metrics | {'loss': Mean(loss, share)}

  def grad_of(params, part):
    grads, metrics = jax.grad(loss_of, has_aux=True)(params, part)
    return jax.tree.map(lambda g: g.astype(jnp.float32), grads), metrics

  if micro_batches == 1:
    grads, metrics = grad_of(state.params, batch)
  else:
    parts = jax.tree.map(lambda x: split_rows(x, micro_batches), batch)

    def add(carry, part):
      return jax.tree.map(jnp.add, carry, grad_of(state.params, part)), None

    first = jax.tree.map(lambda x: x[0], parts)
    _, shapes = jax.eval_shape(grad_of, state.params, first)
    # Gradients lie where their parameters lie; what is carried must be laid out alike.
    zeros = (jax.tree.map(lambda p: jnp.zeros_like(p, jnp.float32), state.params),
             jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes))
    (grads, metrics), _ = jax.lax.scan(add, zeros, parts)

  grad_norm = optax.global_norm(grads)
  with jax.numpy_dtype_promotion('standard'):   # optax mixes floats with int32 counts
    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    updates = jax.tree.map(lambda u: -learning_rate * u, updates)
    moved = optax.apply_updates(state.params, updates)
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
  params = keep(moved, state.params)
  return TrainState(
      state.step + 1, params, keep(opt_state, state.opt_state),
      keep(loss_state, state.loss_state)), metrics
