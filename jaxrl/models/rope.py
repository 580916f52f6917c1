"""Rotary position embeddings (Su et al. 2021), in the half-split layout of Hugging Face weights."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl.models.config import ModelConfig


def frequencies(c: ModelConfig) -> np.ndarray:
  """Angular frequencies [H / 2], float32, after scaling."""
  freq = 1.0 / c.rope_theta ** (np.arange(0, c.d_head, 2, dtype=np.float32) / c.d_head)
  scaling = c.rope_scaling
  if scaling is None:
    return freq.astype(np.float32)
  if scaling.kind == 'linear':
    return (freq / scaling.factor).astype(np.float32)
  # Llama 3.1: long wavelengths are stretched, short ones kept, those between blended.
  wavelength = 2 * math.pi / freq
  low = scaling.original_length / scaling.low_freq_factor
  high = scaling.original_length / scaling.high_freq_factor
  blend = (scaling.original_length / wavelength - scaling.low_freq_factor) / (
      scaling.high_freq_factor - scaling.low_freq_factor)
  between = (1 - blend) * freq / scaling.factor + blend * freq
  scaled = np.where(wavelength > low, freq / scaling.factor, freq)
  scaled = np.where((wavelength <= low) & (wavelength >= high), between, scaled)
  return scaled.astype(np.float32)


def rope_angles(positions: jax.Array, c: ModelConfig) -> jax.Array:
  """Angles [B, T, H / 2] in radians, float32, of integer positions [B, T]."""
  return positions.astype(jnp.float32)[..., None] * jnp.asarray(frequencies(c))[None, None]


def apply_rope(x: jax.Array, angles: jax.Array) -> jax.Array:
  """Rotates the pairs (x[i], x[i + H/2]) of x [B, T, N, H] by `angles` [B, T, H / 2]."""
  first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
  cos, sin = jnp.cos(angles)[:, :, None], jnp.sin(angles)[:, :, None]
  rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
  return rotated.astype(x.dtype)
