"""One optimizer step as a pure function of (state, batch), exact under micro-batching."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxrl.losses.mean import Mean, mean_over
from jaxrl.parallel.host_memory import to_host
from jaxrl.parallel.sharding import shard
from jaxrl.training.objectives import Batch, Objective, split_rows, with_adapter

# Numbers of a step by name: `Mean`, and where the objective gives it 'row_finite', bool [rows].
Metrics = dict[str, Any]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
  """Everything that changes from step to step."""

  step: jax.Array             # [] int32, steps taken, those that were skipped included
  skipped: jax.Array          # [] int32, steps skipped in a row up to now
  params: dict                # float32 masters of what is trained: the model, or its adapter
  opt_state: optax.OptState
  loss_state: dict = dataclasses.field(default_factory=dict)   # of losses with a running quantity


def init_state(
    params: dict, tx: optax.GradientTransformationExtraArgs, loss_state: dict | None = None
) -> TrainState:
  """Step 0 with a fresh optimizer state."""
  # Moments are float32 whatever the parameters are kept in.
  like = jax.tree.map(lambda x: x.astype(jnp.float32), params)
  return TrainState(
      jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32), params, tx.init(like), loss_state or {})


def train_step(
    state: TrainState,
    batch: Batch,
    learning_rate: jax.Array,   # [] float32
    frozen: dict | None = None,
    *,
    objective: Objective,
    tx: optax.GradientTransformationExtraArgs,
    micro_batches: int = 1,
) -> tuple[TrainState, Metrics]:
  """The next state and metrics as (total, count).

  With `frozen`, the parameters of a model, `state.params` is an adapter on it, and the only thing
  that gradients are taken for; the objective sees the two together.

  Rows are split into `micro_batches` equal parts whose gradients are added; since every part is
  divided by the whole batch's counts the sum is the gradient of the whole batch. A loss or gradient
  that is not finite leaves parameters, moments and the loss's state untouched and sets
  `nonfinite`; the log then stops the run or counts the step as skipped. An objective whose metrics
  hold 'row_finite', a bool for each row of its part, has the rows named there.
  """
  found = gradients(state.params, state.loss_state, state.step, batch, frozen,
                    objective=objective, micro_batches=micro_batches)
  return apply_gradients(state, found, learning_rate, tx=tx)


def offloaded_step(*, objective: Objective, tx: optax.GradientTransformationExtraArgs,
                   micro_batches: int = 1) -> Callable[..., tuple[TrainState, Metrics]]:
  """`train_step` as two compiled programs, for a state that `offload_optimizer` has moved.

  The first knows nothing of moments, which therefore never lie beside activations; the second
  fetches them, and its results go back to the host. (Inside one program XLA fetches at once.)
  """
  first = jax.jit(functools.partial(
      gradients, objective=objective, micro_batches=micro_batches))
  second = jax.jit(functools.partial(apply_gradients, tx=tx), donate_argnums=(0, 1))

  def step(state, batch, learning_rate, frozen=None):
    found = first(state.params, state.loss_state, state.step, batch, frozen)
    return second(state, found, learning_rate)

  return step


def offload_optimizer(state: TrainState) -> TrainState:
  """The state with the optimizer's arrays in pinned memory of the host, where steps leave them.

  Scalars stay. The given arrays are deleted. To be called outside of jit.
  """
  leaves, treedef = jax.tree.flatten(state.opt_state)
  moved = iter(to_host([x for x in leaves if x.ndim]))
  parked = [next(moved) if x.ndim else x for x in leaves]
  return dataclasses.replace(state, opt_state=jax.tree.unflatten(treedef, parked))


def gradients(
    params: dict,
    loss_state: dict,
    step: jax.Array,          # [] int32
    batch: Batch,
    frozen: dict | None = None,
    *,
    objective: Objective,
    micro_batches: int = 1,
) -> tuple[dict, dict, Metrics]:
  """(float32 gradients of the loss of the whole batch, the loss's next state, metrics)."""
  if frozen is not None:
    objective = with_adapter(objective, frozen)
  if objective.survey is not None:
    batch, loss_state = objective.survey(params, batch, loss_state, step, micro_batches)
  counts = objective.counts(batch)

  def loss_of(params, part):
    terms, metrics = objective.totals(params, part)
    divided = {name: total / jnp.maximum(counts[kind], 1) for name, (total, kind) in terms.items()}
    loss = sum(divided.values(), jnp.zeros((), jnp.float32))
    share = jnp.float32(1 / micro_batches)   # parts of a sum: the counts add up to one
    if len(divided) > 1:
      metrics |= {f'loss/{name}': Mean(v, share) for name, v in divided.items() if name != 'nll'}
    row_finite = metrics.pop('row_finite', None)
    return loss, (metrics | {'loss': Mean(loss, share)}, row_finite)

  def grad_of(part):
    grads, (metrics, row_finite) = jax.grad(loss_of, has_aux=True)(params, part)
    return (jax.tree.map(lambda g: g.astype(jnp.float32), grads), metrics), row_finite

  if micro_batches == 1:
    (grads, metrics), row_finite = grad_of(batch)
  else:
    parts = jax.tree.map(lambda x: split_rows(x, micro_batches), batch)

    def add(carry, part):
      (total, squares), (one, row_finite) = carry, grad_of(part)
      squares = squares + optax.global_norm(one[0]) ** 2
      return (jax.tree.map(jnp.add, total, one), squares), row_finite

    (_, shapes), _ = jax.eval_shape(grad_of, jax.tree.map(lambda x: x[0], parts))
    # Gradients lie where their parameters lie; what is carried must be laid out alike.
    zeros = (jax.tree.map(lambda p: jnp.zeros_like(p, jnp.float32), params),
             jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes))
    ((grads, metrics), squares), row_finite = jax.lax.scan(
        add, (zeros, jnp.zeros((), jnp.float32)), parts)
    if row_finite is not None:
      row_finite = jnp.swapaxes(row_finite, 0, 1)   # as `split_rows` dealt them
    metrics['noise_scale'] = _noise_scale(
        squares, optax.global_norm(grads) ** 2, batch['mask'].shape[0], micro_batches)

  tokens = jnp.sum(batch['mask'], dtype=jnp.float32)
  metrics |= {'num_tokens': Mean(tokens, jnp.ones((), jnp.float32)), 'padding': _padding(batch)}
  if row_finite is not None:
    metrics['row_finite'] = shard(row_finite.reshape(-1), None)   # every process can read all of it
  return grads, loss_state, metrics


def apply_gradients(
    state: TrainState,
    found: tuple[dict, dict, Metrics],
    learning_rate: jax.Array,   # [] float32
    *,
    tx: optax.GradientTransformationExtraArgs,
) -> tuple[TrainState, Metrics]:
  """The next state from what `gradients` found; moments in the host's memory go back there.

  `tx.update` takes `finite` and keeps its state where that is False (`optimizer.guarded`).
  """
  grads, loss_state, metrics = found
  grad_norm = optax.global_norm(grads)
  rested = jax.tree.map(_on_device, state.opt_state)
  # Known before any update: waiting for all of them would keep all new moments beside the old.
  finite = jnp.isfinite(grad_norm) & jnp.isfinite(metrics['loss'].total)

  def keep(new, old):
    return jax.tree.map(lambda n, o: jnp.where(finite, n, o), new, old)

  with jax.numpy_dtype_promotion('standard'):   # optax mixes floats with int32 counts
    updates, opt_state = tx.update(grads, rested, state.params, finite=finite)
    updates = jax.tree.map(lambda u: -learning_rate * u, updates)
    params = keep(optax.apply_updates(state.params, updates), state.params)
  one, update_norm = jnp.ones((), jnp.float32), optax.global_norm(updates)
  # Of the new ones: whatever else reads the old ones makes the compiler copy them all first.
  wide = jax.tree.map(lambda p: p.astype(jnp.float32), params)
  metrics = metrics | {
      'grad_norm': Mean(grad_norm, one),
      'update_norm': Mean(update_norm, one),
      'update_ratio': Mean(update_norm, optax.global_norm(wide)),
      'nonfinite': Mean(1.0 - finite.astype(jnp.float32), one),
      'skipped_in_a_row': Mean(jnp.where(finite, 0.0, state.skipped + 1.0), one),
  }
  return TrainState(
      state.step + 1, jnp.where(finite, 0, state.skipped + 1), params,
      jax.tree.map(_as_it_lay, opt_state, state.opt_state),
      keep(loss_state, state.loss_state)), metrics


def _noise_scale(squares: jax.Array, square: jax.Array, rows: int, parts: int) -> Mean:
  """The simple noise scale tr(Sigma) / |G|^2 in rows; McCandlish et al. 2018, appendix A.1.

  squares: sum over parts of |g_j|^2, of gradients g_j whose sum is that of the batch.
  square: |sum_j g_j|^2.

  A part alone estimates the gradient by parts * g_j, from rows / parts rows. Total and count are
  the unbiased estimates of numerator and denominator, so that windows add both before dividing.
  """
  trace = rows * (parts * squares - square) / (parts - 1)
  return Mean(trace, parts * (square - squares) / (parts - 1))


def _padding(batch: Batch) -> Mean:
  """Share of places that hold no token."""
  if 'end' in batch:          # packed rows: the token at i sees keys up to i, padding sees none
    empty = batch['end'] == 0
    return mean_over(empty.astype(jnp.float32), jnp.ones_like(empty))
  mask = batch['mask']        # a padded row ends with its last response token
  places = jnp.arange(1, mask.shape[-1] + 1, dtype=jnp.int32)
  places = places.reshape((1,) * (mask.ndim - 1) + places.shape)
  real = jnp.sum(jnp.max(jnp.where(mask, places, 0), axis=-1), dtype=jnp.float32)
  return Mean(mask.size - real, jnp.full((), mask.size, jnp.float32))


def _on_device(x: jax.Array) -> jax.Array:
  """The array in the device's memory, where all computing is."""
  if jax.typeof(x).memory_space == jax.memory.Space.Host:
    return jax.device_put(x, jax.memory.Space.Device)
  return x


def _as_it_lay(new: jax.Array, old: jax.Array) -> jax.Array:
  """The new array in the memory that the old one was in."""
  if jax.typeof(old).memory_space == jax.memory.Space.Host:
    return jax.device_put(new, jax.memory.Space.Host)
  return new
