"""What a decoder is: one frozen configuration, read from a Hugging Face `config.json`."""

from __future__ import annotations

import dataclasses
from typing import Literal


@dataclasses.dataclass(frozen=True)
class RopeScaling:
  """Frequency scaling of rotary embeddings.

  `linear` (Chen et al. 2023), `llama3` (Llama 3.1, section 3), `yarn` (Peng et al. 2023) and
  `longrope` (Ding et al. 2024). LongRoPE changes its factors with the length of the sequence; a
  model that has it is used up to the length where they change, with `short_factor`.
  """

  kind: Literal['linear', 'llama3', 'yarn', 'longrope']
  factor: float
  low_freq_factor: float = 1.0              # llama3
  high_freq_factor: float = 4.0             # llama3
  original_length: int = 8192               # llama3, yarn, longrope
  beta_fast: float = 32.0                   # yarn
  beta_slow: float = 1.0                    # yarn
  truncate: bool = True                     # yarn: whole dimensions as bounds of the ramp
  attention_factor: float = 1.0             # yarn, longrope: multiplies cosine and sine
  short_factor: tuple[float, ...] = ()      # longrope, one per rotated pair
  long_factor: tuple[float, ...] = ()       # longrope, kept for export
  extended_length: int = 0                  # longrope: max_position_embeddings, kept for export


@dataclasses.dataclass(frozen=True)
class Experts:
  """A mixture of experts in place of the MLP: each token goes to the `per_token` likeliest."""

  count: int
  per_token: int
  normalise: bool = True                    # the weights of the chosen ones sum to 1


@dataclasses.dataclass(frozen=True)
class Lora:
  """Low-rank adapters (Hu et al. 2021): W x + scale * B A x on the projections `targets`."""

  rank: int
  alpha: float
  targets: tuple[str, ...]                  # names of layer parameters: 'q', 'v', ...
  rank_stabilised: bool = False             # PEFT's use_rslora: alpha / sqrt(rank)

  @property
  def scale(self) -> float:
    return self.alpha / (self.rank ** 0.5 if self.rank_stabilised else self.rank)


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  """A decoder-only transformer: RMS norm, rotary positions, grouped-query attention, gated MLP."""

  family: str                               # model_type of config.json
  vocab_size: int
  d_model: int
  n_layers: int
  n_heads: int
  n_kv: int
  d_head: int
  d_mlp: int                                # of one expert where there are experts
  max_length: int                           # tokens the positions were trained for

  norm_eps: float = 1e-5
  norm_offset: bool = False                 # norms multiply by 1 + weight (Gemma)
  # Norms of what enters attention and MLP (Llama), of what leaves them (OLMo 2), or both (Gemma 2).
  norm_placement: Literal['before', 'after', 'around'] = 'before'

  rope_theta: float = 10_000.0
  rope_scaling: RopeScaling | None = None
  rotary_fraction: float = 1.0              # share of each head that is rotated
  local_rope_theta: float | None = None     # of layers with a window, unscaled (Gemma 3)

  windows: tuple[int | None, ...] = ()      # per layer: keys a query sees, itself included
  attention_scale: float | None = None      # None: d_head ** -0.5
  attention_softcap: float | None = None    # scores become cap * tanh(score / cap)
  qkv_bias: bool = False
  o_bias: bool = False
  qk_norm: Literal['none', 'head', 'width'] = 'none'   # RMS norm per head or over all heads

  activation: Literal['silu', 'gelu', 'gelu_tanh'] = 'silu'
  experts: Experts | None = None

  embedding_scale: float = 1.0
  tie_embeddings: bool = False
  final_softcap: float | None = None        # of the logits

  init_std: float = 0.02
  lora: Lora | None = None

  @property
  def d_rotary(self) -> int:
    """Rotated dimensions of a head."""
    return int(self.d_head * self.rotary_fraction)
