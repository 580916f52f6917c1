"""`config.json` of a Hugging Face folder, to `ModelConfig` and back.

A family's forward pass in `transformers` is the definition of what its fields mean. A field that it
reads and that this project does not honour may only hold a value under which it does nothing.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxrl.errors import InputError
from jaxrl.models.config import ModelConfig, RopeScaling
from jaxrl.models.model_folder import existing_folder, read_object

CONFIG = 'config.json'


@dataclasses.dataclass(frozen=True)
class Family:
  """What is particular to one `model_type`."""

  architecture: str
  norm_eps: float                      # what transformers takes when the field is absent
  max_length: int
  neutral: Mapping[str, tuple]         # field -> values under which it does nothing


FAMILIES = {
    'llama': Family(
        architecture='LlamaForCausalLM',
        norm_eps=1e-6,
        max_length=2048,
        neutral={
            'hidden_act': ('silu', 'swish'),
            'attention_bias': (False, None),
            'mlp_bias': (False, None),
            'attention_dropout': (0, None),
            'pretraining_tp': (1, None),
            'partial_rotary_factor': (1, None),
            'quantization_config': (None,),
            'per_layer_config': (None, {}),
            'is_encoder_decoder': (False, None),
            'auto_map': (None, {}),
        }),
}
# The keys of `rope_scaling` that are honoured, by kind.
ROPE_KEYS: dict[str, tuple[str, ...]] = {
    'default': (),
    'linear': ('factor',),
    'llama3': (
        'factor', 'low_freq_factor', 'high_freq_factor', 'original_max_position_embeddings'),
}


def read_config(folder: str | os.PathLike) -> ModelConfig:
  """The configuration of the model in `folder`.

  Both spellings of rotary settings are read: `rope_theta` with `rope_scaling` (transformers 4)
  and `rope_parameters` (transformers 5).

  Raises:
    InputError: no folder or no config.json, invalid JSON, an unknown family, a missing or
      malformed field, or a field that would change the numbers and is not honoured.
  """
  folder = existing_folder(folder)
  path = folder / CONFIG
  if not path.is_file():
    raise InputError(
        'the folder has no config.json', where=folder,
        found=', '.join(sorted(p.name for p in folder.iterdir())[:8]) or 'an empty folder',
        fix='Give the path of the folder that holds config.json')
  return parse_config(read_object(path), where=path)


def parse_config(config: dict[str, Any], *, where: str | Path = CONFIG) -> ModelConfig:
  """The configuration a `config.json` object describes; raises as `read_config`."""
  name = config.get('model_type')
  if not isinstance(name, str) or name not in FAMILIES:
    raise InputError('this model_type is not supported', where=where,
                     expected=' or '.join(sorted(FAMILIES)), found=name,
                     fix='Use a model of a supported family')
  family = FAMILIES[name]
  architectures = config.get('architectures')
  if architectures is not None and family.architecture not in architectures:
    raise InputError('this architecture is not supported', where=where,
                     expected=family.architecture, found=architectures,
                     fix='Use the causal language model of the family')
  for field, values in family.neutral.items():
    if field in config and config[field] not in values:
      raise InputError(
          f'field {field!r} changes the model in a way that is not supported', where=where,
          expected=values[0], found=_short(config[field]),
          fix='Use a checkpoint without it; it would be wrong to ignore it')

  d_model = _integer(config, 'hidden_size', where)
  n_heads = _integer(config, 'num_attention_heads', where)
  n_kv = _integer(config, 'num_key_value_heads', where, default=n_heads)
  if n_heads % n_kv:
    raise InputError('num_attention_heads is not a multiple of num_key_value_heads', where=where,
                     found=f'{n_heads} and {n_kv}', fix='Check config.json')
  if config.get('head_dim') is None and d_model % n_heads:
    raise InputError('hidden_size is not a multiple of num_attention_heads', where=where,
                     expected='a multiple, or head_dim', found=f'{d_model} and {n_heads}',
                     fix='Check config.json')
  d_head = _integer(config, 'head_dim', where, default=d_model // n_heads)
  if d_head % 2:
    raise InputError('rotary positions need an even head_dim', where=where, found=d_head,
                     fix='Check config.json')
  max_length = _integer(config, 'max_position_embeddings', where, default=family.max_length)
  theta, scaling = _rope(config, max_length, where)
  tied = config.get('tie_word_embeddings', False)
  if not isinstance(tied, bool):
    raise InputError("field 'tie_word_embeddings' is malformed", where=where,
                     expected='true or false', found=_short(tied), fix='Check config.json')
  return ModelConfig(
      family=name,
      vocab_size=_integer(config, 'vocab_size', where),
      d_model=d_model,
      n_layers=_integer(config, 'num_hidden_layers', where),
      n_heads=n_heads,
      n_kv=n_kv,
      d_head=d_head,
      d_mlp=_integer(config, 'intermediate_size', where),
      max_length=max_length,
      norm_eps=_positive(config, 'rms_norm_eps', where, default=family.norm_eps),
      rope_theta=theta,
      rope_scaling=scaling,
      tie_embeddings=tied,
      init_std=_positive(config, 'initializer_range', where, default=0.02))


def write_config(c: ModelConfig) -> dict[str, Any]:
  """The `config.json` object of `c`, for transformers 4 and 5; token ids are left open (null)."""
  scaling = c.rope_scaling
  rope: dict[str, Any] = {'rope_type': 'default' if scaling is None else scaling.kind}
  if scaling is not None:
    rope['factor'] = scaling.factor
  if scaling is not None and scaling.kind == 'llama3':
    rope |= {
        'low_freq_factor': scaling.low_freq_factor,
        'high_freq_factor': scaling.high_freq_factor,
        'original_max_position_embeddings': scaling.original_length,
    }
  return {
      'architectures': [FAMILIES[c.family].architecture],
      'model_type': c.family,
      'vocab_size': c.vocab_size,
      'hidden_size': c.d_model,
      'num_hidden_layers': c.n_layers,
      'num_attention_heads': c.n_heads,
      'num_key_value_heads': c.n_kv,
      'head_dim': c.d_head,
      'intermediate_size': c.d_mlp,
      'max_position_embeddings': c.max_length,
      'hidden_act': 'silu',
      'attention_bias': False,
      'mlp_bias': False,
      'rms_norm_eps': c.norm_eps,
      'rope_theta': c.rope_theta,
      'rope_scaling': None if scaling is None else rope,
      'rope_parameters': rope | {'rope_theta': c.rope_theta},
      'tie_word_embeddings': c.tie_embeddings,
      'initializer_range': c.init_std,
      'use_cache': True,
      'bos_token_id': None,
      'eos_token_id': None,
      'pad_token_id': None,
  }


def _rope(config: dict, max_length: int, where) -> tuple[float, RopeScaling | None]:
  """(theta, scaling) from either spelling; where both are given they must agree."""
  read = []
  for field in ('rope_parameters', 'rope_scaling'):
    settings = config.get(field)
    if settings is None:
      continue
    if not isinstance(settings, dict):
      raise InputError(f'field {field!r} is malformed', where=where, expected='an object or null',
                       found=_short(settings), fix='Check config.json')
    theta = _positive(settings, 'rope_theta', where,
                      default=_positive(config, 'rope_theta', where, default=10_000.0))
    read.append((theta, _rope_scaling(settings, config, max_length, field, where)))
  theta = _positive(config, 'rope_theta', where, default=read[0][0] if read else 10_000.0)
  found = read or [(theta, None)]
  if any(settings != found[0] for settings in found) or theta != found[0][0]:
    raise InputError(
        'the rotary settings contradict each other', where=where,
        expected='rope_parameters, or rope_theta with rope_scaling',
        found=_short({k: config.get(k) for k in ('rope_theta', 'rope_scaling', 'rope_parameters')}),
        fix='Keep the right one')
  return found[0]


def _rope_scaling(settings: dict, config: dict, max_length: int, field: str, where):
  kind = settings.get('rope_type', settings.get('type', 'default'))
  if not isinstance(kind, str) or kind not in ROPE_KEYS:
    raise InputError(f'field {field!r} has an unknown rope_type', where=where,
                     expected=' or '.join(ROPE_KEYS), found=_short(kind),
                     fix='Use a checkpoint with supported rotary scaling')
  for key, value in settings.items():
    is_neutral = key == 'partial_rotary_factor' and value == 1
    if key not in ('rope_type', 'type', 'rope_theta', *ROPE_KEYS[kind]) and not is_neutral:
      raise InputError(f'field {field!r} has a key that is not supported', where=where,
                       expected=f'for {kind!r} only {", ".join(ROPE_KEYS[kind]) or "rope_theta"}',
                       found=f'{key}={_short(value)}', fix='Use a checkpoint without it')
  if kind == 'default':
    return None
  factor = _positive(settings, 'factor', where)
  if kind == 'linear':
    return RopeScaling('linear', factor)
  outer = _integer(config, 'original_max_position_embeddings', where, default=max_length)
  length = _integer(settings, 'original_max_position_embeddings', where, default=outer)
  if length != outer and config.get('original_max_position_embeddings') is not None:
    raise InputError('original_max_position_embeddings is given twice', where=where,
                     found=f'{outer} and, in {field}, {length}', fix='Keep the right one')
  scaling = RopeScaling(
      'llama3', factor,
      low_freq_factor=_positive(settings, 'low_freq_factor', where),
      high_freq_factor=_positive(settings, 'high_freq_factor', where),
      original_length=length)
  if scaling.high_freq_factor <= scaling.low_freq_factor:
    raise InputError('high_freq_factor is not above low_freq_factor', where=where,
                     found=f'{scaling.high_freq_factor} and {scaling.low_freq_factor}',
                     fix='Check config.json')
  return scaling


def _integer(config: dict, field: str, where, *, default: int | None = None) -> int:
  value = config.get(field)
  value = default if value is None else value
  if type(value) is not int or value < 1:
    raise InputError(f'field {field!r} is malformed' if value is not None else
                     f'field {field!r} is missing', where=where,
                     expected='a positive whole number', found=_short(value),
                     fix='Check config.json')
  return value


def _positive(config: dict, field: str, where, *, default: float | None = None) -> float:
  value = config.get(field)
  value = default if value is None else value
  is_number = isinstance(value, int | float) and not isinstance(value, bool)
  if value is None or not is_number or not (math.isfinite(value) and value > 0):
    raise InputError(f'field {field!r} is malformed' if value is not None else
                     f'field {field!r} is missing', where=where, expected='a positive number',
                     found=_short(value), fix='Check config.json')
  return float(value)


def _short(value: object) -> str:
  text = repr(value)
  return text if len(text) <= 120 else text[:117] + '...'
