"""`config.json` of a Hugging Face folder, to `ModelConfig` and back.

A family's forward pass in `transformers` is the definition of what its fields mean. A field that it
reads and that this project does not honour may only hold a value under which it does nothing, and a
field that nobody has heard of is an error, because leaving it out could change the numbers.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxrl.errors import InputError
from jaxrl.models.config import Experts, ModelConfig
from jaxrl.models.hugging_face_families import FAMILIES, HARMLESS, NEUTRAL, PHI3_CODE, Family
from jaxrl.models.hugging_face_fields import boolean, integer, malformed, positive, short
from jaxrl.models.hugging_face_rope import read_rope, write_rope
from jaxrl.models.model_folder import existing_folder, read_object

CONFIG = 'config.json'
ACTIVATIONS = {
    'silu': 'silu',
    'swish': 'silu',
    'gelu': 'gelu',
    'gelu_python': 'gelu',
    'gelu_pytorch_tanh': 'gelu_tanh',
    'gelu_python_tanh': 'gelu_tanh',
    'gelu_new': 'gelu_tanh',
}
WRITTEN_ACTIVATIONS = {'silu': 'silu', 'gelu': 'gelu', 'gelu_tanh': 'gelu_pytorch_tanh'}
HAS_WINDOW = {'full_attention': False, 'attention': False, 'sliding_attention': True}


def read_config(folder: str | os.PathLike) -> ModelConfig:
  """The configuration of the model in `folder`.

  Both spellings of rotary settings and of windows are read: those of transformers 4 (`rope_theta`
  with `rope_scaling`, `sliding_window_pattern`) and 5 (`rope_parameters`, `layer_types`).

  Raises:
    InputError: no folder or no config.json, invalid JSON, an unknown family, a missing or
      malformed field, a field that would change the numbers and is not honoured, or one that is
      not known.
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
                     expected=' or '.join(FAMILIES), found=name,
                     fix='Use a model of a supported family')
  family = FAMILIES[name]
  config = _one_expert_count(config, family, where)
  _check_fields(config, name, family, where)
  given, config = config, {**family.defaults, **config}

  d_model = integer(config, 'hidden_size', where)
  n_heads = integer(config, 'num_attention_heads', where)
  n_kv = integer(config, 'num_key_value_heads', where, default=n_heads)
  if n_heads % n_kv:
    raise InputError('num_attention_heads is not a multiple of num_key_value_heads', where=where,
                     found=f'{n_heads} and {n_kv}', fix='Check config.json')
  if config.get('head_dim') is None and d_model % n_heads:
    raise InputError('hidden_size is not a multiple of num_attention_heads', where=where,
                     expected='a multiple, or head_dim', found=f'{d_model} and {n_heads}',
                     fix='Check config.json')
  d_head = integer(config, 'head_dim', where, default=d_model // n_heads)
  if d_head % 2:
    raise InputError('rotary positions need an even head_dim', where=where, found=d_head,
                     fix='Check config.json')
  n_layers = integer(config, 'num_hidden_layers', where)
  windows = _windows(config, family, n_layers, where)
  length = integer(config, 'max_position_embeddings', where,
                   default=family.defaults['max_position_embeddings'])
  rope = read_rope(given, family, d_head=d_head, length=length, where=where)
  if rope.scaling is not None and rope.scaling.kind == 'longrope':
    length = min(length, rope.scaling.original_length)
  bias = family.reads('attention_bias') and boolean(config, 'attention_bias', where, default=False)
  experts = _experts(config, family, where)
  found: dict[str, Any] = dict(
      family=name,
      vocab_size=integer(config, 'vocab_size', where),
      d_model=d_model,
      n_layers=n_layers,
      n_heads=n_heads,
      n_kv=n_kv,
      d_head=d_head,
      d_mlp=integer(config, _mlp_field(family), where),
      max_length=length,
      norm_eps=positive(config, 'rms_norm_eps', where, default=family.defaults['rms_norm_eps']),
      rope_theta=rope.theta,
      rope_scaling=rope.scaling,
      rotary_fraction=rope.fraction,
      local_rope_theta=rope.local_theta if windows else None,
      windows=windows,
      attention_softcap=_softcap(config, 'attn_logit_softcapping', family, where),
      qkv_bias=bias,
      o_bias=bias,
      activation=_activation(config, family, where),
      experts=experts,
      tie_embeddings=boolean(
          config, 'tie_word_embeddings', where, default=family.defaults['tie_word_embeddings']),
      final_softcap=_softcap(config, 'final_logit_softcapping', family, where),
      init_std=positive(config, 'initializer_range', where, default=0.02))
  if family.reads('query_pre_attn_scalar'):                # Gemma
    found['attention_scale'] = integer(config, 'query_pre_attn_scalar', where) ** -0.5
    found['embedding_scale'] = d_model ** 0.5
  return ModelConfig(**{**found, **family.fixed})


def write_config(c: ModelConfig) -> dict[str, Any]:
  """The `config.json` object of `c`, for transformers 4 and 5; token ids are left open (null).

  Adapters are not part of it.

  Raises:
    InputError: the family cannot express `c`.
  """
  family = FAMILIES[c.family]
  config: dict[str, Any] = {
      'architectures': [family.architecture],
      'model_type': c.family,
      'vocab_size': c.vocab_size,
      'hidden_size': c.d_model,
      'num_hidden_layers': c.n_layers,
      'num_attention_heads': c.n_heads,
      'num_key_value_heads': c.n_kv,
      'head_dim': c.d_head,
      _mlp_field(family): c.d_mlp,
      'max_position_embeddings': c.max_length,
      'hidden_act': WRITTEN_ACTIVATIONS[c.activation],
      'rms_norm_eps': c.norm_eps,
      'tie_word_embeddings': c.tie_embeddings,
      'initializer_range': c.init_std,
      'use_cache': True,
      'bos_token_id': None,
      'eos_token_id': None,
      'pad_token_id': None,
  }
  if family.reads('hidden_activation'):
    config['hidden_activation'] = config['hidden_act']
  if family.reads('attention_bias'):
    config['attention_bias'] = c.qkv_bias
  if family.reads('query_pre_attn_scalar') and c.attention_scale is not None:
    config['query_pre_attn_scalar'] = round(c.attention_scale ** -2)
  if family.reads('attn_logit_softcapping'):
    config['attn_logit_softcapping'] = c.attention_softcap
  if family.reads('final_logit_softcapping'):
    config['final_logit_softcapping'] = c.final_softcap
  config |= _written_experts(c, family) | _written_windows(c, family) | write_rope(c, family)
  _check_expressed(c, config)
  return config


def _check_expressed(c: ModelConfig, config: dict[str, Any]) -> None:
  read = parse_config(config, where='the configuration to write')
  for field in dataclasses.fields(c):
    ours, theirs = (getattr(x, field.name) for x in (c, read))
    if ours != theirs and field.name != 'lora':
      raise InputError(
          f'config.json of family {c.family!r} cannot express {field.name!r}', expected=theirs,
          found=short(ours), fix='Use another family or configuration')


def _check_fields(config: dict[str, Any], name: str, family: Family, where: object) -> None:
  """Every field is read, harmless, or holds a value under which it does nothing."""
  architectures = config.get('architectures')
  if architectures is not None and (
      not isinstance(architectures, list) or family.architecture not in architectures):
    raise InputError('this architecture is not supported', where=where,
                     expected=family.architecture, found=architectures,
                     fix='Use the causal language model of the family')
  for field, value in config.items():
    if family.reads(field) or field in HARMLESS:
      continue
    neutral = NEUTRAL.get(field)
    if neutral is None:
      raise InputError(
          f'field {field!r} is not known, and it could change the numbers', where=where,
          found=short(value),
          fix='Remove it from config.json if it does not change the forward pass')
    if field == 'auto_map' and name == 'phi3' and _is_published_phi3(value):
      continue
    if field == 'hidden_act' and isinstance(value, str) and (
        ACTIVATIONS.get(value) == _activation(config, family, where)):
      continue
    if value not in neutral:
      raise InputError(
          f'field {field!r} changes the model in a way that is not supported', where=where,
          expected=neutral[0], found=short(value),
          fix='Use a checkpoint without it; it would be wrong to ignore it')


def _is_published_phi3(auto_map: object) -> bool:
  return isinstance(auto_map, dict) and all(
      key == 'AutoTokenizer' or PHI3_CODE.get(key) == value for key, value in auto_map.items())


def _activation(config: Mapping[str, Any], family: Family, where: object) -> str:
  field = 'hidden_activation' if family.reads('hidden_activation') else 'hidden_act'
  value = config.get(field)
  value = family.defaults[field] if value is None else value
  if not isinstance(value, str) or value not in ACTIVATIONS:
    raise InputError(f'field {field!r} names an activation that is not supported', where=where,
                     expected=' or '.join(ACTIVATIONS), found=short(value),
                     fix='Use a checkpoint with a supported activation')
  return ACTIVATIONS[value]


def _softcap(config: Mapping, field: str, family: Family, where: object) -> float | None:
  if not family.reads(field) or config[field] is None:
    return None
  return positive(config, field, where)


def _mlp_field(family: Family) -> str:
  name = 'moe_intermediate_size'
  return name if family.reads(name) else 'intermediate_size'


def _experts(config: Mapping, family: Family, where: object) -> Experts | None:
  if not family.reads('num_experts_per_tok'):
    return None
  count = integer(config, _count_field(family), where)
  per_token = integer(config, 'num_experts_per_tok', where)
  if per_token > count:
    raise InputError("field 'num_experts_per_tok' is above the number of experts", where=where,
                     expected=f'at most {count}', found=per_token, fix='Check config.json')
  normalise = not family.reads('norm_topk_prob') or boolean(config, 'norm_topk_prob', where)
  return Experts(count, per_token, normalise)


def _written_experts(c: ModelConfig, family: Family) -> dict[str, Any]:
  if c.experts is None or not family.reads('num_experts_per_tok'):
    return {}
  fields: dict[str, Any] = {
      _count_field(family): c.experts.count, 'num_experts_per_tok': c.experts.per_token}
  if family.reads('norm_topk_prob'):
    # There is no dense layer, whose width intermediate_size would be.
    fields |= {
        'norm_topk_prob': c.experts.normalise, 'decoder_sparse_step': 1, 'mlp_only_layers': [],
        'intermediate_size': c.d_mlp}
  return fields


def _one_expert_count(config: dict[str, Any], family: Family, where: object) -> dict[str, Any]:
  """The number of experts under the name the family has for it; transformers takes both."""
  if not family.reads('num_experts_per_tok'):
    return config
  name = _count_field(family)
  other, = {'num_experts', 'num_local_experts'} - {name}
  if config.get(other, config.get(name)) != config.get(name, config.get(other)):
    raise InputError('the number of experts is given twice', where=where,
                     found=f'{name}={short(config[name])} and {other}={short(config[other])}',
                     fix='Keep the right one')
  named = {name: config[other]} if other in config else {}
  return {field: value for field, value in config.items() if field != other} | named


def _count_field(family: Family) -> str:
  return 'num_experts' if family.reads('num_experts') else 'num_local_experts'


def _windows(
    config: Mapping, family: Family, n_layers: int, where: object) -> tuple[int | None, ...]:
  """The window of each layer, or () where no layer has one."""
  width = None
  if family.reads('sliding_window') and config['sliding_window'] is not None:
    width = integer(config, 'sliding_window', where)
  if family.reads('use_sliding_window') and not boolean(config, 'use_sliding_window', where):
    width = None
  listed = config['layer_types']
  if listed is None or family.windows in ('none', 'all'):
    has_window = _default_windows(config, family, n_layers, width, where)
  if listed is not None:
    if not isinstance(listed, list) or len(listed) != n_layers or not all(
        isinstance(kind, str) and kind in HAS_WINDOW for kind in listed):
      raise malformed(
          'layer_types', listed, f"{n_layers} of 'full_attention' and 'sliding_attention'", where)
    by_list = [HAS_WINDOW[kind] for kind in listed]
    if family.windows in ('none', 'all') and by_list != has_window:
      raise InputError(
          "field 'layer_types' contradicts what the family does", where=where,
          expected=f'a window in {sum(has_window)} of {n_layers} layers', found=short(listed),
          fix='Use a checkpoint without it')
    has_window = by_list
  if any(has_window) and width is None:
    raise InputError('layers have a window of no width', where=where, expected='sliding_window',
                     found=short({k: config.get(k) for k in (
                         'sliding_window', 'use_sliding_window', 'layer_types')}),
                     fix='Check config.json')
  return tuple(width if x else None for x in has_window) if any(has_window) else ()


def _default_windows(
    config: Mapping, family: Family, n_layers: int, width: int | None, where: object
) -> list[bool]:
  """Which layers have a window where `layer_types` does not say."""
  if family.windows == 'none':
    return [False] * n_layers
  if family.windows == 'pattern':
    pattern = 2
    if family.reads('sliding_window_pattern'):
      pattern = integer(config, 'sliding_window_pattern', where,
                        default=family.defaults['sliding_window_pattern'])
    return [bool((n + 1) % pattern) for n in range(n_layers)]
  first = config.get('max_window_layers', 0)
  if type(first) is not int or first < 0:
    raise malformed('max_window_layers', first, 'a whole number', where)
  if family.windows == 'all' and width is not None and first:
    raise InputError(
        "field 'max_window_layers' changes the model in a way that is not supported", where=where,
        expected='0 where layers have a window', found=first, fix='Use a checkpoint without it')
  return [width is not None and n >= first for n in range(n_layers)]


def _written_windows(c: ModelConfig, family: Family) -> dict[str, Any]:
  if not family.reads('sliding_window'):
    return {}
  has_window = [w is not None for w in c.windows] or [False] * c.n_layers
  # Gemma in transformers wants a width even where no layer uses it.
  unused = family.defaults['sliding_window'] if family.windows == 'pattern' else None
  fields: dict[str, Any] = {
      'sliding_window': next((w for w in c.windows if w is not None), unused)}
  if family.reads('use_sliding_window'):
    fields |= {
        'use_sliding_window': any(has_window),
        'max_window_layers': has_window.index(True) if any(has_window) else c.n_layers,
    }
  if family.windows != 'all':
    fields['layer_types'] = [
        'sliding_attention' if x else 'full_attention' for x in has_window]
  if family.reads('sliding_window_pattern'):
    # Versions of transformers that know no layer_types read this instead.
    pattern = has_window.index(False) + 1 if False in has_window else c.n_layers + 1
    if has_window == [bool((n + 1) % pattern) for n in range(c.n_layers)]:
      fields['sliding_window_pattern'] = pattern
  return fields
