"""The rotary settings of a `config.json`, to fields of `ModelConfig` and back.

There are two spellings: `rope_theta` with `rope_scaling` (transformers 4) and `rope_parameters`
(transformers 5), in Gemma 3 one object per type of layer. Where a file has both they must agree.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from jaxrl.errors import InputError
from jaxrl.models.config import ModelConfig, RopeScaling
from jaxrl.models.hugging_face_families import Family
from jaxrl.models.hugging_face_fields import boolean, integer, malformed, numbers, positive, short

ORIGINAL = 'original_max_position_embeddings'
# The keys of the settings that are honoured, by kind.
KEYS: dict[str, tuple[str, ...]] = {
    'default': (),
    'linear': ('factor',),
    'llama3': ('factor', 'low_freq_factor', 'high_freq_factor', ORIGINAL),
    'yarn': (
        'factor', 'attention_factor', 'beta_fast', 'beta_slow', 'mscale', 'mscale_all_dim',
        'truncate', ORIGINAL),
    'longrope': ('factor', 'attention_factor', 'short_factor', 'long_factor', ORIGINAL),
}
LAYER_TYPES = ('full_attention', 'sliding_attention')
FIELDS = ('rope_theta', 'rope_scaling', 'rope_parameters', 'partial_rotary_factor',
          'rope_local_base_freq')


@dataclasses.dataclass(frozen=True)
class Rope:
  theta: float
  scaling: RopeScaling | None
  fraction: float                  # share of each head that is rotated
  local_theta: float | None        # of layers with a window, where they have their own


def read_rope(
    config: Mapping[str, Any], family: Family, *, d_head: int, length: int, where: object) -> Rope:
  """The rotary settings of `config`, whose `max_position_embeddings` is `length`.

  Raises:
    InputError: a setting is malformed, unknown or given twice with different values.
  """
  local_theta = None
  spellings = {name: config.get(name) for name in ('rope_parameters', 'rope_scaling')}
  if family.reads('rope_local_base_freq'):
    spellings['rope_parameters'], local = _by_layer_type(spellings['rope_parameters'], where)
    named = _theta(local, config, 'rope_local_base_freq', family, where)
    local_theta = _one_of('rope_local_base_freq', named, config, where)
  read = []
  for name, settings in spellings.items():
    if settings is None or settings == {}:
      continue
    if not isinstance(settings, dict):
      raise malformed(name, settings, 'an object or null', where)
    theta = _theta(settings, config, 'rope_theta', family, where)
    fraction = _fraction(settings, config, family, name, where)
    kind = _kind(settings, family, name, where)
    scaling = _scaling(kind, settings, config, int(d_head * fraction), length, family, name, where)
    read.append(Rope(theta, scaling, fraction, local_theta))
  plain = Rope(
      _theta({}, config, 'rope_theta', family, where), None,
      _fraction({}, config, family, 'rope_parameters', where), local_theta)
  found = read or [plain]
  if any(rope != found[0] for rope in found):
    raise _contradiction(config, where)
  _one_of('rope_theta', found[0].theta, config, where)
  if found[0].theta <= 1 or (local_theta is not None and local_theta <= 1):
    raise InputError('the base of the rotary frequencies is too small', where=where,
                     expected='rope_theta above 1', found=f'{found[0].theta} and {local_theta}',
                     fix='Check config.json')
  width = int(d_head * found[0].fraction)
  if width < 2 or width % 2:
    raise InputError(
        'the rotated part of a head is not an even number of dimensions', where=where,
        expected='head_dim * partial_rotary_factor to be even', found=width,
        fix='Check config.json')
  return found[0]


def write_rope(c: ModelConfig, family: Family) -> dict[str, Any]:
  """The rotary fields of `config.json`, in both spellings."""
  fields: dict[str, Any] = {'rope_theta': c.rope_theta}
  settings = _written_scaling(c)
  fields['rope_scaling'] = None if c.rope_scaling is None else settings
  if settings['rope_type'] == 'linear' and not family.reads('rope_local_base_freq'):
    # In transformers 4 OLMo 2 knows no `rope_type`, Gemma 3 knows no `type`, the others know both.
    fields['rope_scaling'] = {'type': 'linear', 'factor': settings['factor']}
  flat = settings | {'rope_theta': c.rope_theta}
  if family.reads('partial_rotary_factor'):
    fields['partial_rotary_factor'] = c.rotary_fraction
    flat['partial_rotary_factor'] = c.rotary_fraction
    if c.rope_scaling is not None and c.rope_scaling.kind == 'longrope':
      fields['rope_scaling'] = _three_fields(settings, c.rope_scaling)
  fields['rope_parameters'] = flat
  if c.rope_scaling is not None and c.rope_scaling.kind == 'longrope':
    fields |= {
        ORIGINAL: c.rope_scaling.original_length,
        'max_position_embeddings': c.rope_scaling.extended_length,
    }
  elif family.defaults[ORIGINAL] is not None:
    fields[ORIGINAL] = c.max_length
  if family.reads('rope_local_base_freq'):
    local = family.defaults['rope_local_base_freq'] if c.local_rope_theta is None else (
        c.local_rope_theta)
    fields['rope_local_base_freq'] = local
    fields['rope_parameters'] = {
        'full_attention': flat,
        'sliding_attention': {'rope_type': 'default', 'rope_theta': local},
    }
  return fields


def _by_layer_type(settings: object, where: object) -> tuple[dict | None, dict]:
  """The settings of layers that see everything, and of those with a window."""
  if settings is None:
    return None, {}
  if not isinstance(settings, dict) or not set(settings) <= set(LAYER_TYPES):
    raise malformed('rope_parameters', settings, f'one object each for {LAYER_TYPES}', where)
  whole, local = (settings.get(kind) or {} for kind in LAYER_TYPES)
  if not isinstance(local, dict) or not isinstance(whole, dict):
    raise malformed('rope_parameters', settings, f'one object each for {LAYER_TYPES}', where)
  if local.get('rope_type', local.get('type', 'default')) != 'default' or not (
      set(local) <= {'rope_type', 'type', 'rope_theta'}):
    raise InputError(
        'rotary scaling of layers with a window is not supported', where=where,
        expected="rope_type 'default' in sliding_attention", found=short(local),
        fix='Use a checkpoint without it')
  return whole, local


def _theta(settings: dict, config: Mapping, field: str, family: Family, where: object) -> float:
  outer = positive(config, field, where, default=family.defaults[field])
  return positive(settings, 'rope_theta', where, default=outer)


def _one_of(field: str, value: float, config: Mapping, where: object) -> float:
  """`value`, which the field outside the settings must not contradict."""
  if positive(config, field, where, default=value) != value:
    raise _contradiction(config, where)
  return value


def _contradiction(config: Mapping, where: object) -> InputError:
  return InputError(
      'the rotary settings contradict each other', where=where,
      expected='rope_parameters, or rope_theta with rope_scaling',
      found=short({name: config[name] for name in FIELDS if config.get(name) is not None}),
      fix='Keep the right one')


def _fraction(
    settings: dict, config: Mapping, family: Family, name: str, where: object) -> float:
  outer = positive(config, 'partial_rotary_factor', where, default=1.0)
  inner = positive(settings, 'partial_rotary_factor', where, default=outer)
  given = config.get('partial_rotary_factor') is not None
  if inner > 1 or inner != 1 and not family.reads('partial_rotary_factor'):
    raise InputError(
        f'field {name!r} has a key that is not supported', where=where,
        expected='whole heads to be rotated', found=f'partial_rotary_factor={inner}',
        fix='Use a checkpoint without it')
  if given and inner != outer:
    raise _contradiction(config, where)
  return inner


def _kind(settings: dict, family: Family, name: str, where: object) -> str:
  kind = settings.get('rope_type', settings.get('type', 'default'))
  if family.reads('partial_rotary_factor') and kind in ('su', 'yarn'):
    kind = 'longrope'                # as it was called when Phi-3 came out
  if not isinstance(kind, str) or kind not in KEYS:
    raise InputError(f'field {name!r} has an unknown rope_type', where=where,
                     expected=' or '.join(KEYS), found=short(kind),
                     fix='Use a checkpoint with supported rotary scaling')
  known = ('rope_type', 'type', 'rope_theta', 'partial_rotary_factor', *KEYS[kind])
  for key, value in settings.items():
    if key not in known:
      raise InputError(
          f'field {name!r} has a key that is not supported', where=where,
          expected=f'for {kind!r} only {", ".join(KEYS[kind]) or "rope_theta"}',
          found=f'{key}={short(value)}', fix='Use a checkpoint without it')
  return kind


def _scaling(
    kind: str, settings: dict, config: Mapping, width: int, length: int, family: Family, name: str,
    where: object) -> RopeScaling | None:
  if kind == 'default':
    return None
  if kind == 'linear':
    return RopeScaling('linear', positive(settings, 'factor', where))
  outer = integer(config, ORIGINAL, where, default=family.defaults[ORIGINAL] or length)
  original = integer(settings, ORIGINAL, where, default=outer)
  if original < 2:
    raise malformed(ORIGINAL, original, 'at least 2', where)
  fixed = config.get(ORIGINAL) is not None or family.defaults[ORIGINAL] is not None
  if original != outer and fixed:
    raise InputError(f'{ORIGINAL} is given twice', where=where,
                     found=f'{outer} and, in {name}, {original}', fix='Keep the right one')
  if kind == 'llama3':
    return _llama3(settings, original, where)
  factor = positive(settings, 'factor', where, default=length / original)
  if kind == 'yarn':
    if 'factor' not in settings:
      raise malformed('factor', None, 'a positive number or null', where)
    return _yarn(settings, factor, original, family, where)
  inferred = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
  return RopeScaling(
      'longrope', factor,
      original_length=original,
      attention_factor=positive(settings, 'attention_factor', where, default=inferred),
      short_factor=numbers(settings, 'short_factor', where, count=width // 2),
      long_factor=numbers(settings, 'long_factor', where, count=width // 2),
      extended_length=length)


def _llama3(settings: dict, original: int, where: object) -> RopeScaling:
  scaling = RopeScaling(
      'llama3', positive(settings, 'factor', where),
      low_freq_factor=positive(settings, 'low_freq_factor', where),
      high_freq_factor=positive(settings, 'high_freq_factor', where),
      original_length=original)
  if scaling.high_freq_factor <= scaling.low_freq_factor:
    raise InputError('high_freq_factor is not above low_freq_factor', where=where,
                     found=f'{scaling.high_freq_factor} and {scaling.low_freq_factor}',
                     fix='Check config.json')
  return scaling


def _yarn(
    settings: dict, factor: float, original: int, family: Family, where: object) -> RopeScaling:
  truncate = boolean(settings, 'truncate', where, default=True)
  if not truncate and family.reads('rope_local_base_freq'):
    # transformers looks for it outside the settings of the layer type, and so never finds it.
    raise InputError("rotary setting 'truncate' has no effect in this family", where=where,
                     expected=True, found=truncate, fix='Leave it out')

  def magnitude(weight):
    return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

  if settings.get('mscale') and settings.get('mscale_all_dim'):
    inferred = magnitude(positive(settings, 'mscale', where)) / magnitude(
        positive(settings, 'mscale_all_dim', where))
  else:
    inferred = magnitude(1)
  scaling = RopeScaling(
      'yarn', factor,
      original_length=original,
      beta_fast=positive(settings, 'beta_fast', where, default=32.0),
      beta_slow=positive(settings, 'beta_slow', where, default=1.0),
      truncate=truncate,
      attention_factor=positive(settings, 'attention_factor', where, default=inferred))
  if scaling.beta_fast <= scaling.beta_slow:
    raise InputError('beta_fast is not above beta_slow', where=where,
                     found=f'{scaling.beta_fast} and {scaling.beta_slow}', fix='Check config.json')
  return scaling


def _written_scaling(c: ModelConfig) -> dict[str, Any]:
  scaling = c.rope_scaling
  if scaling is None:
    return {'rope_type': 'default'}
  settings: dict[str, Any] = {'rope_type': scaling.kind, 'factor': scaling.factor}
  if scaling.kind != 'linear':
    settings[ORIGINAL] = scaling.original_length
  if scaling.kind == 'llama3':
    settings |= {
        'low_freq_factor': scaling.low_freq_factor,
        'high_freq_factor': scaling.high_freq_factor,
    }
  elif scaling.kind == 'yarn':
    settings |= {
        'attention_factor': scaling.attention_factor,
        'beta_fast': scaling.beta_fast,
        'beta_slow': scaling.beta_slow,
    }
    if not scaling.truncate:
      settings['truncate'] = False
  elif scaling.kind == 'longrope':
    settings |= {
        'attention_factor': scaling.attention_factor,
        'short_factor': list(scaling.short_factor),
        'long_factor': list(scaling.long_factor),
    }
  return settings


def _three_fields(settings: dict[str, Any], scaling: RopeScaling) -> dict[str, Any]:
  """What Phi-3 has in transformers 4, which takes these three fields and no others.

  A factor that does not follow from the two lengths cannot be said there; it stays, so that the
  configuration is refused instead of misread.
  """
  implied = scaling.extended_length / scaling.original_length
  magnitude = math.sqrt(1 + math.log(implied) / math.log(scaling.original_length)) if (
      implied > 1) else 1.0
  three = {
      'type': 'longrope', 'short_factor': settings['short_factor'],
      'long_factor': settings['long_factor'],
  }
  if (scaling.factor, scaling.attention_factor) == (implied, magnitude):
    return three
  return three | {name: settings[name] for name in ('factor', 'attention_factor')}
