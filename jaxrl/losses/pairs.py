"""What every pairwise loss is made of: masked sums of per-token log-probs, per pair.

A batch is a mapping of arrays [B, T] (chosen and rejected may differ in T):
`policy_chosen`, `policy_rejected`, `ref_chosen`, `ref_rejected`, bool or 0/1 `chosen_mask` and
`rejected_mask` (1 on response tokens, EOS included). Optional: `weights` [B]; `nll_mask` [B, T] of
the chosen side, where the likelihood term counts other tokens than the response; per-row numbers
that some losses read (`ROWS`); with WPO weights `chosen_collision` and `rejected_collision`
[B, T], log sum_v p_v^2 of the policy at each position.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from jaxrl.losses.checks import check_number

Batch = Mapping[str, jax.Array]
POLICY = ('policy_chosen', 'policy_rejected', 'chosen_mask', 'rejected_mask')
REFERENCE = ('ref_chosen', 'ref_rejected')
ROWS = ('p_chosen', 'p_rejected', 'reward_margin')
DIVERGENCES = ('reverse_kl', 'forward_kl', 'js', 'alpha')
LARGEST_EXPONENT = 80.0                # exp of it is finite in float32


@dataclasses.dataclass(frozen=True)
class PairOptions:
  """Variants that change the sums before any loss sees them.

  Attributes:
    reference_free: the reference counts as 0.
    ld_alpha: weight of tokens beyond the shorter response (LD-DPO); 1 is off.
    divergence: f-divergence that the log-ratios stand for (Wang et al. 2024).
    divergence_alpha: alpha of 'alpha', neither 0 nor 1.
    wpo: weights each pair by how likely the policy finds it (Zhou et al. 2024).
  """

  reference_free: bool = False
  ld_alpha: float = 1.0
  divergence: str = 'reverse_kl'
  divergence_alpha: float | None = None
  wpo: bool = False

  def __post_init__(self):
    check_number('ld_alpha', self.ld_alpha, lambda x: 0 <= x <= 1, 'in [0, 1]')
    if self.divergence not in DIVERGENCES:
      raise ValueError(f'divergence must be one of {list(DIVERGENCES)}; found {self.divergence!r}')
    if (self.divergence == 'alpha') != (self.divergence_alpha is not None):
      raise ValueError("divergence_alpha goes with divergence='alpha', and only with it")
    if self.divergence_alpha is not None:
      check_number('divergence_alpha', self.divergence_alpha, lambda x: x not in (0, 1),
                   'neither 0 nor 1')


PLAIN = PairOptions()


@dataclasses.dataclass(frozen=True)
class PairSums:
  """Per pair, float32; names follow the papers' symbols."""

  n_w: jax.Array              # [B] chosen response tokens
  n_l: jax.Array              # [B]
  p_w: jax.Array              # [B] log pi(y_w | x)
  p_l: jax.Array              # [B]
  r_w: jax.Array              # [B] log pi_ref(y_w | x); no gradient
  r_l: jax.Array              # [B]
  h_w: jax.Array              # [B] log-ratio P - R, or what the divergence makes of it
  h_l: jax.Array              # [B]
  nll_total: jax.Array        # [B] -sum of chosen log-probs that the likelihood term counts
  nll_count: jax.Array        # [B] tokens in it
  valid: jax.Array            # [B] bool
  weights: jax.Array          # [B]
  rows: Mapping[str, jax.Array] = dataclasses.field(default_factory=dict)   # [B] each

  @property
  def margin(self) -> jax.Array:
    """D = h_w - h_l, [B]."""
    return self.h_w - self.h_l

  @property
  def a_w(self) -> jax.Array:
    """Mean policy log-prob of the chosen response, [B]."""
    return self.p_w / jnp.maximum(self.n_w, 1)

  @property
  def a_l(self) -> jax.Array:
    return self.p_l / jnp.maximum(self.n_l, 1)

  @property
  def hb_w(self) -> jax.Array:
    """Mean log-ratio of the chosen response, [B]."""
    return self.h_w / jnp.maximum(self.n_w, 1)

  @property
  def hb_l(self) -> jax.Array:
    return self.h_l / jnp.maximum(self.n_l, 1)

  @property
  def mean_nll(self) -> jax.Array:
    """-mean log-prob of the tokens that the likelihood term counts, [B]."""
    return self.nll_total / jnp.maximum(self.nll_count, 1)


def pair_sums(batch: Batch, options: PairOptions = PLAIN) -> PairSums:
  """Masked sums of the batch, by selection: a masked nan reaches neither value nor gradient.

  A row is valid iff both masks hold at least one token.

  Raises:
    ValueError: a key is missing, or shapes do not fit together.
  """
  check_shapes(batch, options)
  masks = {side: batch[f'{side}_mask'].astype(bool) for side in ('chosen', 'rejected')}
  n_w, n_l = (_total(jnp.ones(m.shape, jnp.float32), m) for m in masks.values())
  shorter = jnp.minimum(n_w, n_l)[:, None]

  def total(name, side):
    values = batch[f'{name}_{side}']
    if options.ld_alpha != 1:
      position = jnp.cumsum(masks[side], axis=1, dtype=jnp.float32)     # from 1 at real tokens
      values = values * jnp.where(position <= shorter, 1.0, options.ld_alpha)
    return _total(values, masks[side])

  def reference(side):
    if options.reference_free:
      return jnp.zeros_like(n_w)
    return jax.lax.stop_gradient(total('ref', side))

  p_w, p_l = total('policy', 'chosen'), total('policy', 'rejected')
  r_w, r_l = reference('chosen'), reference('rejected')
  likely = batch['nll_mask'].astype(bool) if 'nll_mask' in batch else masks['chosen']
  weights = batch['weights'].astype(jnp.float32) if 'weights' in batch else jnp.ones_like(n_w)
  if options.wpo:
    weights = weights * _wpo_weights(batch, masks)
  return PairSums(
      n_w=n_w, n_l=n_l, p_w=p_w, p_l=p_l, r_w=r_w, r_l=r_l,
      h_w=_divergence(p_w - r_w, options), h_l=_divergence(p_l - r_l, options),
      nll_total=-_total(batch['policy_chosen'], likely),
      nll_count=_total(jnp.ones(likely.shape, jnp.float32), likely),
      valid=(n_w >= 1) & (n_l >= 1), weights=weights,
      rows={name: batch[name].astype(jnp.float32) for name in ROWS if name in batch})


def _total(values: jax.Array, mask: jax.Array) -> jax.Array:
  return jnp.sum(jnp.where(mask, values, 0).astype(jnp.float32), axis=-1)


def _divergence(h: jax.Array, options: PairOptions) -> jax.Array:
  """f'(ratio) up to a constant, from the log-ratio; Wang et al. 2024, table 1."""
  if options.divergence == 'forward_kl':
    return -jnp.exp(jnp.minimum(-h, LARGEST_EXPONENT))
  if options.divergence == 'js':
    return jax.nn.log_sigmoid(h)
  if options.divergence == 'alpha':
    assert options.divergence_alpha is not None
    power = options.divergence_alpha - 1
    return jnp.exp(jnp.minimum(power * h, LARGEST_EXPONENT)) / power
  return h


def _wpo_weights(batch: Batch, masks: Mapping[str, jax.Array]) -> jax.Array:
  """exp of the mean over tokens of log p - log sum_v p_v^2, of both sides multiplied; detached."""
  product = jnp.zeros(masks['chosen'].shape[0], jnp.float32)
  for side, mask in masks.items():
    gap = batch[f'policy_{side}'] - batch[f'{side}_collision']
    product += _total(gap, mask) / jnp.maximum(_total(jnp.ones(mask.shape, jnp.float32), mask), 1)
  return jax.lax.stop_gradient(jnp.exp(product))


def check_shapes(batch: Batch, options: PairOptions = PLAIN) -> None:
  """Raises ValueError for a batch that lacks an array or whose shapes do not fit together."""
  needed = (*POLICY, *(() if options.reference_free else REFERENCE),
            *(('chosen_collision', 'rejected_collision') if options.wpo else ()))
  missing = [key for key in needed if key not in batch]
  if missing:
    raise ValueError(f'preference batch lacks {missing}; it needs {list(needed)}')
  for side in ('chosen', 'rejected'):
    keys = [key for key in needed if key.endswith(side) or key.startswith(side)]
    if side == 'chosen' and 'nll_mask' in batch:
      keys.append('nll_mask')
    shapes = {key: batch[key].shape for key in keys}
    if len(set(shapes.values())) != 1 or len(next(iter(shapes.values()))) != 2:
      raise ValueError(f'arrays of the {side} side must share one shape [B, T]; found {shapes}')
  b = batch['chosen_mask'].shape[0]
  if batch['rejected_mask'].shape[0] != b:
    raise ValueError(
        f'chosen has {b} rows and rejected {batch["rejected_mask"].shape[0]}; they must be equal')
  for key in ('weights', *ROWS):
    if key in batch and batch[key].shape != (b,):
      raise ValueError(f'{key} must have shape ({b},); found {batch[key].shape}')
