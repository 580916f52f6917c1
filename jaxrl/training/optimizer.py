"""Optimizers and learning-rate schedules, as optax chains."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import optax

from jaxrl.errors import InputError
from jaxrl.training.adam import scale_by_adam
from jaxrl.training.adam8bit import scale_by_adam8bit

SCHEDULES = ('constant', 'linear', 'cosine')
OPTIMIZERS = ('adamw', 'adafactor', 'adamw8bit')
MOMENT_DTYPES = ('float32', 'bfloat16')


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
  """An optimizer by name with warm-up, decay and a bound on the gradient norm.

  `adamw` (Loshchilov and Hutter 2019) keeps 8 bytes per parameter, 6 with `moment_dtype`
  bfloat16; `adamw8bit` (Dettmers et al. 2022) 2; `adafactor` (Shazeer and Stern 2018) keeps rows
  and columns of second moments and no first.
  """

  learning_rate: float
  schedule: str = 'constant'
  warmup_steps: int = 0
  b1: float = 0.9             # not of adafactor
  b2: float = 0.95            # not of adafactor, whose decay follows the number of steps
  weight_decay: float = 0.0
  clip_norm: float | None = 1.0
  optimizer: str = 'adamw'
  moment_dtype: str = 'float32'   # of adamw's first moment
  moment_block: int = 256     # values of a row that share a scale, of adamw8bit


def learning_rate_schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
  """Linear warm-up to `learning_rate`, then constant, or down to 0 at step `steps`.

  Raises:
    InputError: unknown schedule, or a warm-up longer than the run.
  """
  if config.schedule not in SCHEDULES:
    raise InputError('unknown learning-rate schedule', where='--schedule',
                     expected=f'one of {", ".join(SCHEDULES)}', found=config.schedule)
  if config.warmup_steps >= steps and config.warmup_steps > 0:
    raise InputError('the warm-up leaves no step at full learning rate', where='--warmup_steps',
                     expected=f'fewer than the {steps} training steps', found=config.warmup_steps)
  peak, after = config.learning_rate, max(steps - config.warmup_steps, 1)
  decay = {
      'constant': lambda: optax.constant_schedule(peak),
      'linear': lambda: optax.linear_schedule(peak, 0.0, after),
      'cosine': lambda: optax.cosine_decay_schedule(peak, after),
  }[config.schedule]()
  if not config.warmup_steps:
    return decay
  warmup = optax.linear_schedule(peak / config.warmup_steps, peak, config.warmup_steps)
  return optax.join_schedules([warmup, decay], [config.warmup_steps])


def check_optimizer(config: OptimizerConfig) -> None:
  """Refuses optimizers that there are not, and options that do not apply to the one chosen.

  Raises:
    InputError: naming the flag.
  """
  for flag, names in (('optimizer', OPTIMIZERS), ('moment_dtype', MOMENT_DTYPES)):
    if getattr(config, flag) not in names:
      raise InputError(f'unknown {flag}', where=f'--{flag}',
                       expected=f'one of {", ".join(names)}', found=getattr(config, flag))
  if config.moment_block < 1:
    raise InputError('a block holds values', where='--moment_block', expected='at least 1',
                     found=config.moment_block)
  defaults = {f.name: f.default for f in dataclasses.fields(config)}
  applies = {'b1': ('adamw', 'adamw8bit'), 'b2': ('adamw', 'adamw8bit'),
             'moment_dtype': ('adamw',), 'moment_block': ('adamw8bit',)}
  for option, optimizers in applies.items():
    if getattr(config, option) != defaults[option] and config.optimizer not in optimizers:
      flag = f'adam_{option}' if option in ('b1', 'b2') else option
      raise InputError('the option does not apply', where=f'--{flag}',
                       expected=f'--optimizer={" or ".join(optimizers)}',
                       found=config.optimizer, fix='Leave it out')


def make_optimizer(config: OptimizerConfig) -> optax.GradientTransformationExtraArgs:
  """Clip, scale by moments, decay matrices: the direction, which the step scales by -lr.

  The learning rate is an argument of the step, so that one compiled program serves every schedule.
  `update` takes `finite`, bool []: where it is False the state stays as it was.
  """
  check_optimizer(config)
  parts = [] if config.clip_norm is None else [optax.clip_by_global_norm(config.clip_norm)]
  parts.append(_scaling(config))
  if config.weight_decay:
    parts.append(optax.add_decayed_weights(
        config.weight_decay, mask=lambda params: jax.tree.map_with_path(_is_matrix, params)))
  return optax.chain(*parts)


def guarded(tx: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
  """`tx` with an `update` that takes `finite`, and keeps its state where that is False."""

  def update(grads, state, params=None, *, finite: jax.Array | bool = True, **extra):
    updates, after = tx.update(grads, state, params, **extra)
    return updates, jax.tree.map(lambda new, old: jnp.where(finite, new, old), after, state)

  return optax.GradientTransformationExtraArgs(tx.init, update)


def _scaling(config: OptimizerConfig) -> optax.GradientTransformation:
  """What turns clipped gradients into directions of about unit size."""
  if config.optimizer == 'adafactor':
    # An absolute learning rate, as of the others: optax's multiply_by_parameter_scale is left out.
    return guarded(optax.chain(_laid_out_by_use(optax.scale_by_factored_rms()),
                               optax.clip_by_block_rms(1.0)))
  if config.optimizer == 'adamw8bit':
    return guarded(scale_by_adam8bit(config.b1, config.b2, block=config.moment_block))
  mu_dtype = None if config.moment_dtype == 'float32' else jnp.dtype(config.moment_dtype)
  return scale_by_adam(config.b1, config.b2, mu_dtype=mu_dtype)


def _laid_out_by_use(tx: optax.GradientTransformation) -> optax.GradientTransformation:
  """`tx`, whose state starts laid out over the devices as its updates leave it.

  Zeros of a shape that no parameter has would start on every device, and a step that finds its
  state laid out otherwise is compiled twice.
  """

  def init(params):
    state = tx.init(params)
    with jax.numpy_dtype_promotion('standard'):
      after = jax.eval_shape(lambda state: tx.update(params, state, params)[1], state)
    return jax.tree.map(
        lambda x, a: x if a.sharding is None else jax.sharding.reshard(x, a.sharding),
        state, after)

  return optax.GradientTransformation(init, tx.update)


def _is_matrix(path: tuple, weight: jax.Array) -> bool:
  """True for weights that multiply as matrices; the axis that layers are stacked on is not one."""
  is_stacked = any(getattr(key, 'key', None) == 'layers' for key in path)
  return jnp.ndim(weight) - is_stacked > 1
