"""adapter_config.json of PEFT: what it says, and the fields that are refused by name.

Meanings follow peft.LoraConfig and `check_target_module_exists` of PEFT 0.21. A field that is not
known here may be present only with an empty value.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxrl.errors import InputError
from jaxrl.models.model_folder import read_object

# Fields that say how an adapter was trained or stored, not what it computes.
WITHOUT_EFFECT = {
    'auto_mapping', 'base_model_name_or_path', 'corda_config', 'eva_config', 'inference_mode',
    'loftq_config', 'lora_dropout', 'lora_ga_config', 'megatron_config', 'megatron_core',
    'peft_version', 'qalora_group_size', 'revision', 'runtime_config',
}
HONOURED = {
    'alpha_pattern', 'exclude_modules', 'init_lora_weights', 'layers_pattern',
    'layers_to_transform', 'lora_alpha', 'peft_type', 'r', 'rank_pattern', 'target_modules',
    'task_type', 'use_rslora',
}
# Starts that leave the weights of the model as they are; others move a part of them into the
# adapter, which then fits the moved weights alone.
INITIALISATIONS = (True, False, 'gaussian', 'eva', 'orthogonal')
LAYERS_PATTERNS: tuple = (None, '', [], 'layers', ['layers'])


@dataclasses.dataclass(frozen=True)
class PeftConfig:
  """The fields of a LoRA configuration that change numbers."""

  rank: int
  alpha: float
  rank_stabilised: bool
  target_modules: str | tuple[str, ...]               # a regular expression, or endings of names
  exclude_modules: str | tuple[str, ...] = ()
  layers: tuple[int, ...] | None = None               # None: all
  rank_pattern: Mapping[str, int] = dataclasses.field(default_factory=dict)
  alpha_pattern: Mapping[str, float] = dataclasses.field(default_factory=dict)
  path: Path | None = None                            # where it was read, for messages

  def rank_and_scale(self, module: str) -> tuple[int, float]:
    """Of one module, by its full name without a prefix."""
    rank = self.rank_pattern.get(_first_match(self.rank_pattern, module), self.rank)
    alpha = self.alpha_pattern.get(_first_match(self.alpha_pattern, module), self.alpha)
    return rank, alpha / (math.sqrt(rank) if self.rank_stabilised else rank)

  def names(self, module: str) -> bool:
    """Whether `target_modules` and what restricts it name the module."""
    if _is_named(self.exclude_modules, module):
      return False
    if self.target_modules == 'all-linear':
      return not module.startswith(('lm_head', 'model.embed_tokens'))
    if not _is_named(self.target_modules, module):
      return False
    if self.layers is None or module in self.target_modules:
      return True
    layer = re.match(r'.*?\.[^.]*\.(\d+)\.', module)
    return layer is not None and int(layer[1]) in self.layers

  def check_targets(self, known: Sequence[str], adapted: Collection[str]) -> None:
    """Refuses a folder whose configuration and tensors name different modules.

    Raises:
      InputError: naming a module that only one of the two has, or one that cannot be adapted.
    """
    for other in ('lm_head', 'model.embed_tokens'):
      if self.names(other):
        raise InputError('adapters on embedding and output matrix are not supported',
                         where=self.path, expected='target_modules of attention and MLP',
                         found=other, fix='Train the adapter without it')
    for module in known:
      if self.names(module) != (module in adapted):
        lacking = 'has no tensors' if self.names(module) else 'is not among target_modules'
        raise InputError(f'module {module!r} {lacking}', where=self.path,
                         expected='the same modules in target_modules and in the weights',
                         fix='Save the adapter again')


def _first_match(patterns: Mapping[str, Any], module: str) -> str:
  return next((key for key in patterns if re.match(rf'(.*\.)?({key})$', module)), '')


def _is_named(patterns: str | tuple[str, ...], module: str) -> bool:
  if isinstance(patterns, str):
    return re.fullmatch(patterns, module) is not None
  return any(module == p or module.endswith(f'.{p}') for p in patterns)


def read(path: Path) -> PeftConfig:
  """The configuration in the file.

  Raises:
    InputError: not JSON, not LoRA, a value of the wrong kind, or a field that changes the numbers
      and is not supported.
  """
  values = read_object(path)

  def refuse(field: str, expected: object, fix: str = 'Save the adapter again') -> InputError:
    return InputError(f'the field {field!r} cannot be used', where=path, expected=expected,
                      found=repr(values.get(field))[:120], fix=fix)

  if values.get('peft_type') != 'LORA':
    raise refuse('peft_type', 'LORA', 'Use a LoRA adapter')
  if values.get('task_type') not in (None, 'CAUSAL_LM'):
    raise refuse('task_type', 'CAUSAL_LM', 'Use an adapter of a causal language model')
  if values.get('bias', 'none') != 'none':
    raise refuse('bias', 'none', 'Merge the adapter into its model with peft first')
  for field, value in values.items():
    if value and field not in HONOURED | WITHOUT_EFFECT | {'bias'}:
      raise refuse(field, 'nothing', 'Merge the adapter into its model with peft first')
  if values.get('init_lora_weights', True) not in INITIALISATIONS:
    raise refuse('init_lora_weights', 'a start that leaves the model as it is',
                 'Convert it with path_initial_model_for_weight_conversion of peft')
  if not (type(values.get('r')) is int and values['r'] > 0):
    raise refuse('r', 'a whole number > 0')
  if not _is_number(values.get('lora_alpha')):
    raise refuse('lora_alpha', 'a number')
  if values.get('layers_pattern') not in LAYERS_PATTERNS:
    raise refuse('layers_pattern', 'layers')
  layers = values.get('layers_to_transform')
  layers = [layers] if type(layers) is int else layers or None
  if layers is not None and not _is_list(layers, int):
    raise refuse('layers_to_transform', 'layer numbers')
  for field in ('rank_pattern', 'alpha_pattern'):
    pattern = values.get(field) or {}
    if not (isinstance(pattern, dict) and all(map(_is_number, pattern.values()))):
      raise refuse(field, '{pattern: number > 0}')
    if field == 'rank_pattern' and not _is_list([*pattern.values()], int):
      raise refuse(field, '{pattern: whole number > 0}')
  for field in ('target_modules', 'exclude_modules'):
    value = values.get(field)
    is_absent = field == 'exclude_modules' and not value
    if not (is_absent or value and (isinstance(value, str) or _is_list(value, str))):
      raise refuse(field, 'a list of module names, or a regular expression')
  for field in ('target_modules', 'exclude_modules', 'rank_pattern', 'alpha_pattern'):
    value = values.get(field) or ()
    # The elements of a list are endings of names.
    for pattern in () if isinstance(value, list) else [value] if isinstance(value, str) else value:
      try:
        re.compile(pattern)
      except re.error as e:
        raise refuse(field, f'a regular expression ({e})') from e

  def named(field: str) -> str | tuple[str, ...]:
    value = values.get(field) or ()
    if not isinstance(value, str):
      return tuple(value)
    return value.lower() if value.lower() == 'all-linear' else value

  return PeftConfig(
      rank=values['r'], alpha=float(values['lora_alpha']),
      rank_stabilised=bool(values.get('use_rslora')), target_modules=named('target_modules'),
      exclude_modules=named('exclude_modules'), layers=tuple(layers) if layers else None,
      rank_pattern=values.get('rank_pattern') or {},
      alpha_pattern=values.get('alpha_pattern') or {}, path=path)


def _is_number(x: object) -> bool:
  return isinstance(x, int | float) and type(x) is not bool and 0 < x < math.inf


def _is_list(x: object, kind: type) -> bool:
  return isinstance(x, list) and all(type(e) is kind for e in x)


def encode(config: PeftConfig) -> dict[str, Any]:
  """The object that PEFT reads; fields that are left out have PEFT's defaults."""
  alpha = config.alpha
  return {
      'peft_type': 'LORA', 'task_type': 'CAUSAL_LM', 'base_model_name_or_path': None,
      'inference_mode': True, 'r': config.rank,
      'lora_alpha': int(alpha) if alpha.is_integer() else alpha, 'lora_dropout': 0.0,
      'use_rslora': config.rank_stabilised, 'use_dora': False, 'bias': 'none',
      'fan_in_fan_out': False, 'init_lora_weights': True, 'modules_to_save': None,
      'target_modules': list(config.target_modules), 'rank_pattern': {}, 'alpha_pattern': {},
      'layers_to_transform': None, 'layers_pattern': None,
  }
