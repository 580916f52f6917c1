"""Optimizers and learning-rate schedules, as optax chains."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import optax

from jaxrl.errors import InputError

SCHEDULES = ('constant', 'linear', 'cosine')


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
  """AdamW (Loshchilov and Hutter 2019) with warm-up, decay and a bound on the gradient norm."""

  learning_rate: float
  schedule: str = 'constant'
  warmup_steps: int = 0
  b1: float = 0.9
  b2: float = 0.95
  weight_decay: float = 0.0
  clip_norm: float | None = 1.0


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


def make_optimizer(config: OptimizerConfig) -> optax.GradientTransformation:
  """Clip, Adam, weight decay on matrices only: the direction, which the step scales by -lr.

  The learning rate is an argument of the step, so that one compiled program serves every schedule.
  """
  parts = [] if config.clip_norm is None else [optax.clip_by_global_norm(config.clip_norm)]
  parts.append(optax.scale_by_adam(b1=config.b1, b2=config.b2))
  if config.weight_decay:
    parts.append(optax.add_decayed_weights(
        config.weight_decay, mask=lambda params: jax.tree.map_with_path(_is_matrix, params)))
  return optax.chain(*parts)


def _is_matrix(path: tuple, weight: jax.Array) -> bool:
  """True for weights that multiply as matrices; the axis that layers are stacked on is not one."""
  is_stacked = any(getattr(key, 'key', None) == 'layers' for key in path)
  return jnp.ndim(weight) - is_stacked > 1
