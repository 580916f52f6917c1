"""Rotary position embeddings (Su et al. 2021), in the half-split layout of Hugging Face weights."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl.models.config import ModelConfig, RopeScaling


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rotary:
  """Cosine and sine of every position, float32, times the attention factor of their scaling.

  K is 1, or 2 where layers with a window have frequencies of their own: index 0 is then for layers
  that see everything and index 1 for layers with a window. R is `c.d_rotary`.
  """

  cos: jax.Array              # [K, B, T, R / 2]
  sin: jax.Array              # [K, B, T, R / 2]


def frequencies(c: ModelConfig) -> np.ndarray:
  """Angular frequencies [K, R / 2], float32, after scaling; K as in `Rotary`."""
  scaled = _scaled(_wavelengths(c.rope_theta, c.d_rotary), c)
  if c.local_rope_theta is None:
    return scaled[None]
  return np.stack([scaled, 1 / _wavelengths(c.local_rope_theta, c.d_rotary)])


def rope_angles(positions: jax.Array, c: ModelConfig) -> Rotary:
  """The rotations of integer positions [B, T]."""
  table = jnp.asarray(frequencies(c))
  angles = positions.astype(jnp.float32)[None, ..., None] * table[:, None, None, :]
  cos, sin = jnp.cos(angles), jnp.sin(angles)
  if c.rope_scaling is None or c.rope_scaling.attention_factor == 1:
    return Rotary(cos, sin)
  # Layers with frequencies of their own are not scaled.
  factors = [c.rope_scaling.attention_factor, 1][:len(table)]
  scale = jnp.asarray(np.array(factors, np.float32))[:, None, None, None]
  return Rotary(cos * scale, sin * scale)


def apply_rope(
    x: jax.Array,             # [B, T, N, H]
    cos: jax.Array,           # [B, T, R / 2]
    sin: jax.Array,           # [B, T, R / 2]
) -> jax.Array:               # [B, T, N, H]
  """Rotates the pairs (x[i], x[i + R/2]) of the first R dimensions of each head; the rest stay."""
  half = cos.shape[-1]
  first, second = (x[..., s].astype(jnp.float32) for s in np.s_[:half, half:2 * half])
  cos, sin = cos[:, :, None], sin[:, :, None]
  rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
  return jnp.concatenate([rotated.astype(x.dtype), x[..., 2 * half:]], axis=-1)


def _wavelengths(theta: float, width: int) -> np.ndarray:
  """Positions per radian [width / 2], float32."""
  exponents = np.arange(0, width, 2, dtype=np.float32) / np.float32(width)
  return np.float32(theta) ** exponents


def _scaled(wavelengths: np.ndarray, c: ModelConfig) -> np.ndarray:
  """Frequencies [R / 2] after the scaling of `c`, float32."""
  scaling = c.rope_scaling
  if scaling is None:
    scaled = 1 / wavelengths
  elif scaling.kind == 'linear':
    scaled = 1 / wavelengths / scaling.factor
  elif scaling.kind == 'llama3':
    scaled = _llama3(1 / wavelengths, scaling)
  elif scaling.kind == 'yarn':
    scaled = _yarn(wavelengths, scaling, c.rope_theta)
  else:
    scaled = 1 / (np.array(scaling.short_factor, np.float32) * wavelengths)
  return scaled.astype(np.float32)


def _llama3(freq: np.ndarray, scaling: RopeScaling) -> np.ndarray:
  """Long wavelengths are stretched, short ones kept, those between blended."""
  wavelength = 2 * math.pi / freq
  low = scaling.original_length / scaling.low_freq_factor
  high = scaling.original_length / scaling.high_freq_factor
  blend = (scaling.original_length / wavelength - scaling.low_freq_factor) / (
      scaling.high_freq_factor - scaling.low_freq_factor)
  between = (1 - blend) * freq / scaling.factor + blend * freq
  scaled = np.where(wavelength > low, freq / scaling.factor, freq)
  return np.where((wavelength <= low) & (wavelength >= high), between, scaled)


def _yarn(wavelengths: np.ndarray, scaling: RopeScaling, theta: float) -> np.ndarray:
  """Pairs that turn often within the original length are kept, those that turn rarely stretched.

  Peng et al. 2023, section 3.2: between `beta_fast` and `beta_slow` turns the two are blended
  along a ramp over the index of the pair.
  """
  width = 2 * len(wavelengths)

  def pair_with(turns):      # the index, a real number, of the pair that makes so many turns
    return width * math.log(scaling.original_length / (turns * 2 * math.pi)) / (
        2 * math.log(theta))

  low, high = pair_with(scaling.beta_fast), pair_with(scaling.beta_slow)
  if scaling.truncate:
    low, high = math.floor(low), math.ceil(high)
  low, high = max(low, 0), min(high, width - 1)
  high += 0.001 if low == high else 0
  ramp = np.clip((np.arange(len(wavelengths), dtype=np.float32) - low) / (high - low), 0, 1)
  return ramp / (scaling.factor * wavelengths) + (1 - ramp) / wavelengths
