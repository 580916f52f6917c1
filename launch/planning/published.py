"""config.json of published models by name, for plans of models that are not on this machine.

Sizes as in the repositories of those names on huggingface.co; Llama 2: Touvron et al. 2023,
Llama 3: Grattafiori et al. 2024, table 3.
"""

from __future__ import annotations

import os
from pathlib import Path

from jaxrl.errors import InputError
from jaxrl.models.config import ModelConfig
from jaxrl.models.hugging_face import read_config
from jaxrl.models.hugging_face_config import parse_config


def _llama2(**sizes) -> dict:
  return dict(model_type='llama', vocab_size=32000, max_position_embeddings=4096,
              rms_norm_eps=1e-5, rope_theta=10000.0, tie_word_embeddings=False,
              hidden_act='silu') | sizes


def _llama3(**sizes) -> dict:
  scaling = dict(rope_type='llama3', factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
                 original_max_position_embeddings=8192)
  return dict(model_type='llama', vocab_size=128256, max_position_embeddings=131072,
              rms_norm_eps=1e-5, rope_theta=500000.0, rope_scaling=scaling,
              tie_word_embeddings=False, hidden_act='silu', num_key_value_heads=8) | sizes


_70B = dict(hidden_size=8192, intermediate_size=28672, num_hidden_layers=80,
            num_attention_heads=64, num_key_value_heads=8)
PUBLISHED: dict[str, dict] = {
    'Llama-2-7b-chat-hf': _llama2(
        hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=32),
    'Llama-2-70b-chat-hf': _llama2(**_70B),
    'Llama-3.1-8B': _llama3(
        hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32),
    'Llama-3.1-70B': _llama3(**_70B),
}


def model_config(model: str) -> ModelConfig:
  """The configuration of a Hugging Face folder, weights or not, or of a name of `PUBLISHED`.

  Raises:
    InputError: neither a folder nor a known name.
  """
  if not Path(model).exists() and (known := PUBLISHED.get(os.path.basename(model))) is not None:
    return parse_config(known, where=model)
  if not Path(model).exists():
    raise InputError('there is no such model', where='--model', found=model,
                     expected=f'a folder with a config.json, or one of {", ".join(PUBLISHED)}')
  return read_config(model)
