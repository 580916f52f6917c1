"""The pairwise loss family: every formula as a function of one pair's sums.

z = beta D is the scaled margin, LS the log-sigmoid. Defaults are those of the papers or, where
they give none, of common practice. Every function raises ValueError for options out of range.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxrl.losses.checks import check_not_negative, check_number, check_positive
from jaxrl.losses.pairs import PairSums
from jaxrl.losses.terms import Term, nll_term

log_sigmoid = jax.nn.log_sigmoid
sigmoid = jax.nn.sigmoid


def _preference(per_row: jax.Array) -> dict[str, Term]:
  return {'preference': Term(per_row, 'pairs')}


def smoothed(z: jax.Array, label_smoothing: float) -> jax.Array:
  """-(1-e) LS(z) - e LS(-z); at e = 0 the second part is left out, not multiplied by 0."""
  loss = -log_sigmoid(z)
  if label_smoothing:
    loss = (1 - label_smoothing) * loss - label_smoothing * log_sigmoid(-z)
  return loss


def check_smoothing(value: float) -> None:
  check_number('label_smoothing', value, lambda x: 0 <= x <= 0.5, 'in [0, 0.5]')


def dpo(s: PairSums, *, beta: float = 0.1, label_smoothing: float = 0.0) -> dict[str, Term]:
  """-(1-e) LS(z) - e LS(-z); Rafailov et al. 2023, eq. 7.

  `label_smoothing` e > 0 is the conservative variant for labels flipped at rate e.
  """
  check_positive('beta', beta)
  check_smoothing(label_smoothing)
  return _preference(smoothed(beta * s.margin, label_smoothing))


def robust(s: PairSums, *, beta: float = 0.1, label_smoothing: float = 0.1) -> dict[str, Term]:
  """Unbiased under labels flipped at rate e (Chowdhury et al. 2024); it can be negative."""
  check_positive('beta', beta)
  check_number('label_smoothing', label_smoothing, lambda x: 0 <= x < 0.5, 'in [0, 0.5)')
  z, e = beta * s.margin, label_smoothing
  loss = -log_sigmoid(z)
  if e:
    loss = ((1 - e) * loss + e * log_sigmoid(-z)) / (1 - 2 * e)
  return _preference(loss)


def ipo(s: PairSums, *, beta: float = 0.1, length_normalize: bool = True) -> dict[str, Term]:
  """(hb_w - hb_l - 1/(2 beta))^2; Azar et al. 2024, eq. 17, with log-ratios averaged over tokens.

  `length_normalize=False` takes their sums, as the paper writes it.
  """
  check_positive('beta', beta)
  gap = s.hb_w - s.hb_l if length_normalize else s.margin
  return _preference((gap - 1 / (2 * beta)) ** 2)


def hinge(s: PairSums, *, beta: float = 0.05) -> dict[str, Term]:
  """max(0, 1 - z); Liu et al. 2024 (RSO)."""
  check_positive('beta', beta)
  return _preference(jnp.maximum(0.0, 1 - beta * s.margin))


def slic(
    s: PairSums, *, delta: float = 1.0, lam: float = 0.0, nll_reduction: str = 'sum'
) -> dict[str, Term]:
  """max(0, delta - P_w + P_l) + lam NLL; Zhao et al. 2023 (SLiC-HF), no reference."""
  check_not_negative('delta', delta)
  check_not_negative('lam', lam)
  terms = _preference(jnp.maximum(0.0, delta - s.p_w + s.p_l))
  return terms | {'nll': nll_term(s, lam, nll_reduction)}


def dpo_norm(s: PairSums, *, beta: float = 5.0) -> dict[str, Term]:
  """-LS(beta (hb_w - hb_l)): log-ratios averaged over tokens; Lambert et al. 2024 (Tulu 3)."""
  check_positive('beta', beta)
  return _preference(-log_sigmoid(beta * (s.hb_w - s.hb_l)))


def rdpo_len(s: PairSums, *, beta: float = 0.1, alpha_len: float = 0.01) -> dict[str, Term]:
  """-LS(z + alpha_len (n_w - n_l)): a longer chosen response explains part of the preference."""
  check_positive('beta', beta)
  check_not_negative('alpha_len', alpha_len)
  return _preference(-log_sigmoid(beta * s.margin + alpha_len * (s.n_w - s.n_l)))


def dpop(s: PairSums, *, beta: float = 0.3, lam: float = 5.0) -> dict[str, Term]:
  """-LS(beta (D - lam max(0, -h_w))); Pal et al. 2024 (DPO-positive)."""
  check_positive('beta', beta)
  check_not_negative('lam', lam)
  return _preference(-log_sigmoid(beta * (s.margin - lam * jnp.maximum(0.0, -s.h_w))))


def _reward(logp: jax.Array, reward_alpha: float) -> jax.Array:
  """(1 - p^-alpha) / alpha of p = exp(logp), or logp itself at alpha 0 (AlphaPO)."""
  check_number('reward_alpha', reward_alpha, lambda x: True, '')
  return -jnp.expm1(-reward_alpha * logp) / reward_alpha if reward_alpha else logp


def simpo(
    s: PairSums, *, beta: float = 2.5, gamma: float = 1.375, reward_alpha: float = 0.0
) -> dict[str, Term]:
  """-LS(beta (a_w - a_l) - gamma); Meng et al. 2024, no reference.

  `reward_alpha` is AlphaPO's (Gupta et al. 2025) shape of the reward; 0 is the log-prob.
  """
  check_positive('beta', beta)
  check_not_negative('gamma', gamma)
  gap = _reward(s.a_w, reward_alpha) - _reward(s.a_l, reward_alpha)
  return _preference(-log_sigmoid(beta * gap - gamma))


LARGEST_MEAN_LOGP = -1e-6              # below probability 1, where the odds are infinite


def _log1mexp(x: jax.Array) -> jax.Array:
  """log(1 - exp(x)) for x < 0 (Maechler 2012); both branches are finite for their gradients."""
  is_small = x > -jnp.log(2.0)
  near = jnp.log(-jnp.expm1(jnp.where(is_small, x, -0.5)))
  far = jnp.log1p(-jnp.exp(jnp.where(is_small, -1.0, x)))
  return jnp.where(is_small, near, far)


def orpo(s: PairSums, *, lam: float = 0.1, nll_reduction: str = 'token') -> dict[str, Term]:
  """NLL - lam LS(log odds ratio of the mean probabilities); Hong et al. 2024, no reference."""
  check_not_negative('lam', lam)
  a_w, a_l = (jnp.minimum(a, LARGEST_MEAN_LOGP) for a in (s.a_w, s.a_l))
  odds = (a_w - a_l) - (_log1mexp(a_w) - _log1mexp(a_l))
  return {'nll': nll_term(s, 1.0, nll_reduction)} | _preference(-lam * log_sigmoid(odds))


def cpo(
    s: PairSums, *, beta: float = 0.1, alpha: float = 1.0, label_smoothing: float = 0.0,
    nll_reduction: str = 'token', reward_alpha: float = 0.0,
) -> dict[str, Term]:
  """DPO's loss on P_w - P_l plus alpha NLL; Xu et al. 2024, no reference."""
  check_positive('beta', beta)
  check_not_negative('alpha', alpha)
  check_smoothing(label_smoothing)
  z = beta * (_reward(s.p_w, reward_alpha) - _reward(s.p_l, reward_alpha))
  return _preference(smoothed(z, label_smoothing)) | {'nll': nll_term(s, alpha, nll_reduction)}


def sppo(
    s: PairSums, *, beta: float = 0.001, p_chosen: float = 1.0, p_rejected: float = 0.0
) -> dict[str, Term]:
  """(h_w - (p_w - 1/2)/beta)^2 + (h_l - (p_l - 1/2)/beta)^2; Wu et al. 2024, beta = 1/eta.

  Rows `p_chosen` and `p_rejected` [B] of the batch, where there, stand before the options.
  """
  check_positive('beta', beta)
  for name, value in (('p_chosen', p_chosen), ('p_rejected', p_rejected)):
    check_number(name, value, lambda x: 0 <= x <= 1, 'in [0, 1]')
  won, lost = s.rows.get('p_chosen', p_chosen), s.rows.get('p_rejected', p_rejected)
  return _preference((s.h_w - (won - 0.5) / beta) ** 2 + (s.h_l - (lost - 0.5) / beta) ** 2)


def exo(s: PairSums, *, beta: float = 0.1, label_smoothing: float = 1e-3) -> dict[str, Term]:
  """Reverse KL from the two-way policy to (1-e, e); Ji et al. 2024. e = 0 has no value."""
  check_positive('beta', beta)
  check_number('label_smoothing', label_smoothing, lambda x: 0 < x < 1, 'in (0, 1)')
  z, e = beta * s.margin, jnp.float32(label_smoothing)
  return _preference(sigmoid(z) * (log_sigmoid(z) - jnp.log1p(-e))
                     + sigmoid(-z) * (log_sigmoid(-z) - jnp.log(e)))


def nca(s: PairSums, *, beta: float = 0.01) -> dict[str, Term]:
  """-LS(beta h_w) - (LS(-beta h_w) + LS(-beta h_l)) / 2; Chen et al. 2024."""
  check_positive('beta', beta)
  w, loser = beta * s.h_w, beta * s.h_l
  return _preference(-log_sigmoid(w) - 0.5 * log_sigmoid(-w) - 0.5 * log_sigmoid(-loser))


def apo_zero(s: PairSums, *, beta: float = 0.1) -> dict[str, Term]:
  """1 - sigmoid(beta h_w) + sigmoid(beta h_l): for chosen responses better than the model's own."""
  check_positive('beta', beta)
  return _preference(sigmoid(-beta * s.h_w) + sigmoid(beta * s.h_l))


def apo_down(s: PairSums, *, beta: float = 0.1) -> dict[str, Term]:
  """sigmoid(beta h_w) + 1 - sigmoid(z): for chosen responses worse than the model's own."""
  check_positive('beta', beta)
  return _preference(sigmoid(beta * s.h_w) + sigmoid(-beta * s.margin))


def discopop(s: PairSums, *, beta: float = 0.05, tau: float = 0.05) -> dict[str, Term]:
  """Blend of logistic and exponential loss found by search; Lu et al. 2024.

  exp(-z) sigmoid(z / tau) is computed as exp(-z + LS(z / tau)), which does not overflow.
  """
  check_positive('beta', beta)
  check_positive('tau', tau)
  z = beta * s.margin
  return _preference(-log_sigmoid(z) * sigmoid(-z / tau) + jnp.exp(-z + log_sigmoid(z / tau)))


def irpo(
    s: PairSums, *, beta: float = 0.1, alpha: float = 1.0, nll_reduction: str = 'seq'
) -> dict[str, Term]:
  """-LS(z) + alpha NLL(chosen); Pang et al. 2024 (version 3), eq. 1."""
  check_not_negative('alpha', alpha)
  return dpo(s, beta=beta) | {'nll': nll_term(s, alpha, nll_reduction)}


def scpo(s: PairSums, *, beta: float = 0.5, alpha: float = 1.0) -> dict[str, Term]:
  """IRPO's loss; the vote margin in `weights` multiplies both terms; Prasad et al. 2024, eq. 2."""
  return irpo(s, beta=beta, alpha=alpha)


def dive(s: PairSums, *, beta: float = 0.4, alpha: float = 0.5) -> dict[str, Term]:
  """-alpha LS(z) - (1 - alpha) a_w."""
  check_number('alpha', alpha, lambda x: 0 <= x <= 1, 'in [0, 1]')
  terms = dpo(s, beta=beta)
  return _preference(alpha * terms['preference'].per_row) | {
      'nll': nll_term(s, 1 - alpha, 'seq')}


def nll(s: PairSums, *, nll_reduction: str = 'seq') -> dict[str, Term]:
  """Negative log-likelihood of the chosen response alone."""
  return {'nll': nll_term(s, 1.0, nll_reduction)}


def reward_aware(s: PairSums, *, beta: float = 0.1, eta: float = 1.0) -> dict[str, Term]:
  """KL from Bernoulli(sigmoid(eta (r_w - r_l))) to Bernoulli(sigmoid(z)); Adler et al. 2024.

  The gap of rewards is row `reward_margin` [B] of the batch.
  """
  check_positive('beta', beta)
  check_positive('eta', eta)
  if 'reward_margin' not in s.rows:
    raise ValueError("loss 'reward_aware' needs the row reward_margin [B] in the batch")
  z, target = beta * s.margin, eta * s.rows['reward_margin']
  return _preference(sigmoid(target) * (log_sigmoid(target) - log_sigmoid(z))
                     + sigmoid(-target) * (log_sigmoid(-target) - log_sigmoid(-z)))
