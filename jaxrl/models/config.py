"""What a decoder is: one frozen configuration, read from a Hugging Face `config.json`."""

from __future__ import annotations

import dataclasses
from typing import Literal


@dataclasses.dataclass(frozen=True)
class RopeScaling:
  """Frequency scaling of rotary embeddings; `kind` 'linear' or 'llama3' (Llama 3.1, section 3)."""

  kind: Literal['linear', 'llama3']
  factor: float
  low_freq_factor: float = 1.0
  high_freq_factor: float = 4.0
  original_length: int = 8192


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  """A decoder-only transformer: RMS norm, rotary positions, grouped-query attention, SwiGLU."""

  family: str
  vocab_size: int
  d_model: int
  n_layers: int
  n_heads: int
  n_kv: int
  d_head: int
  d_mlp: int
  max_length: int                      # tokens the positions were trained for
  norm_eps: float = 1e-5
  rope_theta: float = 10_000.0
  rope_scaling: RopeScaling | None = None
  tie_embeddings: bool = False
  init_std: float = 0.02
