"""Adapter folders of PEFT in and out: adapter_config.json and adapter_model.safetensors.

PEFT holds one pair of matrices per module, lora_A [r, inputs] and lora_B [outputs, r]. Modules are
named as the tensors of a checkpoint are (`hugging_face_names`). Where a family stacks several of
our projections in one module, they share its A on the way in; on the way out their A are stacked
and their B become the blocks of one block-diagonal matrix, which is the same map.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import jax
import ml_dtypes  # noqa: F401  (registers bfloat16 with NumPy; safetensors looks it up by name)
import numpy as np
import safetensors
import safetensors.numpy
from jax.experimental import multihost_utils

from jaxrl.errors import InputError
from jaxrl.models import peft_config
from jaxrl.models.config import Lora, ModelConfig
from jaxrl.models.hugging_face_names import TENSORS
from jaxrl.models.local_copy import PICKLE_SUFFIXES, fetch_weights
from jaxrl.models.lora import TARGETS, Adapter, check_lora, possible_targets, split_dimensions
from jaxrl.models.model_folder import StoredTensor, existing_folder, local_path, read_header
from jaxrl.models.params import layer_specs

CONFIG = 'adapter_config.json'
WEIGHTS = 'adapter_model.safetensors'
PREFIX = 'base_model.model.'
FLOATS = ('F32', 'BF16', 'F16')


@dataclasses.dataclass(frozen=True)
class Module:
  """One matrix of a checkpoint that an adapter can be on; '{layer}' stands for the layer."""

  name: str                            # 'model.layers.{layer}.self_attn.q_proj'
  parts: tuple[str, ...]               # ours, in their order along the outputs
  inputs: int
  outputs: tuple[int, ...]             # of each part


def modules(c: ModelConfig) -> list[Module]:
  """The modules of this family that adapters are read from and written to."""
  table, specs = TENSORS[c.family], layer_specs(c)
  found: dict[str, Module] = {}
  for target in possible_targets(c):
    row = table[f'layers/{target}']
    parts = tuple(path.removeprefix('layers/') for path in row.fused) or (target,)
    inputs, _ = split_dimensions(specs[target])
    found[row.name] = Module(
        row.name.removesuffix('.weight'), parts,
        math.prod(specs[target].shape[d] for d in inputs),
        tuple(math.prod(specs[part].shape[d] for d in split_dimensions(specs[part])[1])
              for part in parts))
  return list(found.values())


# In


def read_adapter(folder: str | os.PathLike, c: ModelConfig) -> tuple[Lora, Adapter]:
  """The adapter in `folder` for the model `c`, as float32 arrays on the host.

  Modules of a lower rank than the highest are padded with zeros, as are layers that the adapter
  leaves out; where alpha or rank differ between modules, B carries the difference.

  Raises:
    InputError: a field of adapter_config.json that changes the numbers and is not supported; no
      safetensors file, or a damaged one; a tensor that is missing, not of this model, of the wrong
      shape or type, or not finite.
  """
  folder = existing_folder(folder)
  fetch_weights(folder)
  config = peft_config.read(folder / CONFIG)
  stored = _find_tensors(folder)
  known = {module.name.format(layer=layer): (module, layer)
           for module in modules(c) for layer in range(c.n_layers)}
  adapted = _adapted_modules(stored, known, folder / WEIGHTS)
  config.check_targets(list(known), adapted)

  settings = {name: config.rank_and_scale(name) for name in adapted}
  targets = tuple(t for t in TARGETS if any(t in known[name][0].parts for name in adapted))
  rank = max(r for r, _ in settings.values())
  lora = _common_lora(config, rank, targets)
  specs = layer_specs(c)
  # Filled per layer as matrices, in the shapes of the specs at the end.
  flat: dict[str, tuple[np.ndarray, np.ndarray]] = {}
  tensors = _read_tensors(folder / WEIGHTS)
  for name in adapted:
    module, layer = known[name]
    r, scale = settings[name]
    a, b = (
        _checked(tensors, stored, f'{PREFIX}{name}.lora_{side}.weight', shape)
        for side, shape in (('A', (r, module.inputs)), ('B', (sum(module.outputs), r))))
    if scale != lora.scale:
      b = (b.astype(np.float64) * (scale / lora.scale)).astype(np.float32)
    begin = 0
    for part, size in zip(module.parts, module.outputs, strict=True):
      all_a, all_b = flat.setdefault(part, (
          np.zeros((c.n_layers, module.inputs, rank), np.float32),
          np.zeros((c.n_layers, rank, size), np.float32)))
      all_a[layer, :, :r] = a.T
      all_b[layer, :r] = b[begin:begin + size].T
      begin += size
  layers = {}
  for target in targets:
    inputs, outputs = split_dimensions(specs[target])
    a, b = flat[target]
    layers[target] = {
        'a': a.reshape(c.n_layers, *(specs[target].shape[d] for d in inputs), rank),
        'b': b.reshape(c.n_layers, rank, *(specs[target].shape[d] for d in outputs))}
  return lora, {'layers': layers}


def _find_tensors(folder: Path) -> dict[str, StoredTensor]:
  path = folder / WEIGHTS
  if path.exists():
    return read_header(path)
  pickles = sorted(p.name for p in folder.iterdir() if p.suffix in PICKLE_SUFFIXES)
  if pickles:
    raise InputError(
        'the adapter is a pickle file, which can run any code when opened and is never loaded',
        where=folder, expected=WEIGHTS, found=pickles[0],
        fix='Convert it where you trust it: model.save_pretrained(folder, safe_serialization=True) '
            'in peft')
  raise InputError('the folder has no adapter', where=folder, expected=WEIGHTS,
                   found=', '.join(sorted(p.name for p in folder.iterdir())[:8]))


def _adapted_modules(
    stored: dict[str, StoredTensor], known: dict[str, tuple[Module, int]], path: Path
) -> list[str]:
  """Modules that have tensors in the file, in the order of the model."""
  expected = {f'{PREFIX}{name}.lora_{side}.weight' for name in known for side in 'AB'}
  for tensor in sorted(stored):
    if tensor not in expected:
      raise InputError(
          f'tensor {tensor!r} does not belong to an adapter of this model', where=path,
          expected=f'names like {PREFIX}{next(iter(known))}.lora_A.weight',
          fix='Use an adapter that was trained on this model, on its attention and MLP alone')
  adapted = [name for name in known
             if any(f'{PREFIX}{name}.lora_{side}.weight' in stored for side in 'AB')]
  for name in adapted:
    for side in 'AB':
      tensor = f'{PREFIX}{name}.lora_{side}.weight'
      if tensor not in stored:
        raise InputError(f'tensor {tensor!r} is missing', where=path,
                         expected='lora_A and lora_B of every module', fix='Save the adapter again')
  if not adapted:
    raise InputError('the adapter has no tensors', where=path, expected='lora_A and lora_B',
                     fix='Save the adapter again')
  return adapted


def _read_tensors(path: Path) -> dict[str, np.ndarray]:
  try:
    return safetensors.numpy.load_file(path)
  except (OSError, safetensors.SafetensorError) as e:
    raise InputError('the file cannot be read', where=path, found=str(e),
                     fix='Copy the file again') from e


def _checked(
    tensors: dict[str, np.ndarray], stored: dict[str, StoredTensor], name: str,
    shape: tuple[int, int],
) -> np.ndarray:
  """A tensor as float32."""
  tensor = stored[name]
  if tensor.shape != shape:
    raise InputError(f'tensor {name!r} has the wrong shape', where=tensor.file,
                     expected=list(shape), found=list(tensor.shape),
                     fix=f'Use the {CONFIG} and the model that belong to this adapter')
  if tensor.dtype not in FLOATS:
    raise InputError(f'tensor {name!r} has an unsupported type', where=tensor.file,
                     expected=' or '.join(FLOATS), found=tensor.dtype,
                     fix='Save the adapter unquantised')
  x = tensors[name].astype(np.float32)
  if not np.isfinite(x).all():
    raise InputError(f'tensor {name!r} holds NaN or inf', where=tensor.file,
                     expected='finite numbers',
                     found=f'{int((~np.isfinite(x)).sum())} that are not',
                     fix='Use an undamaged adapter')
  return x


def _common_lora(config: peft_config.PeftConfig, rank: int, targets: tuple[str, ...]) -> Lora:
  """One rank and alpha for all modules; the file's own where they serve every one of them."""
  if rank == config.rank:
    return Lora(rank, config.alpha, targets, config.rank_stabilised)
  own = Lora(config.rank, config.alpha, targets, config.rank_stabilised).scale
  width = math.sqrt(rank) if config.rank_stabilised else rank
  return Lora(rank, own * width, targets, config.rank_stabilised)


# Out


def write_adapter(folder: str | os.PathLike, adapter: Adapter, c: ModelConfig) -> None:
  """Writes the adapter of `c.lora` as float32; the same arguments always give the same bytes.

  Every module gets the same rank, the smallest that holds all of them, so that programs which know
  no rank_pattern read the folder right. The files are written beside `folder` and renamed into
  place. Where factors are spread over several hosts every host has to call this.

  Raises:
    InputError: the folder exists, a factor is not finite, or the disk refuses.
  """
  check_lora(c)
  assert c.lora is not None
  folder = local_path(folder)
  if jax.process_index() == 0 and os.path.lexists(folder):
    raise InputError('the folder to save the adapter in already exists', where=folder,
                     expected='a new name', fix='Choose another name, or remove the folder first')
  used = [(m, [p for p in m.parts if p in c.lora.targets]) for m in modules(c)]
  used = [(m, parts) for m, parts in used if parts]
  blocks = max(len(parts) for _, parts in used)
  config = peft_config.PeftConfig(
      rank=blocks * c.lora.rank,
      # Keeps the scale: alpha over the rank, or over its root.
      alpha=c.lora.alpha * (math.sqrt(blocks) if c.lora.rank_stabilised else blocks),
      rank_stabilised=c.lora.rank_stabilised,
      target_modules=tuple(sorted(m.name.rpartition('.')[2] for m, _ in used)))
  tensors = dict(_stored_tensors(adapter, c, used, config.rank, folder))
  temporary = folder.with_name(folder.name + '.saving')
  try:
    if jax.process_index() == 0:
      shutil.rmtree(temporary, ignore_errors=True)   # left by a run that was killed
      temporary.mkdir(parents=True)
      (temporary / CONFIG).write_text(
          json.dumps(peft_config.encode(config), indent=2, sort_keys=True) + '\n')
      safetensors.numpy.save_file(tensors, temporary / WEIGHTS, metadata={'format': 'pt'})
      temporary.rename(folder)
  except (OSError, safetensors.SafetensorError) as e:
    raise InputError('the adapter cannot be written', where=folder, found=str(e),
                     fix='Free some space or choose another folder') from e
  finally:
    if jax.process_index() == 0:
      shutil.rmtree(temporary, ignore_errors=True)   # gone already where all went well
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices(f'saved {folder.name}')


def _stored_tensors(
    adapter: Adapter, c: ModelConfig, used: list[tuple[Module, list[str]]], rank: int, folder: Path
) -> Iterator[tuple[str, np.ndarray]]:
  """(name, matrix) of both factors of every module and layer."""
  assert c.lora is not None
  for module, parts in used:
    factors = {}
    for part in parts:
      a, b = (_to_host(adapter['layers'][part][side]) for side in 'ab')
      factors[part] = (a.reshape(c.n_layers, -1, c.lora.rank),
                       b.reshape(c.n_layers, c.lora.rank, -1))
    for layer in range(c.n_layers):
      a = np.zeros((rank, module.inputs), np.float32)
      b = np.zeros((sum(module.outputs), rank), np.float32)
      for n, part in enumerate(parts):
        here = slice(n * c.lora.rank, (n + 1) * c.lora.rank)
        begin = sum(module.outputs[:module.parts.index(part)])
        size = module.outputs[module.parts.index(part)]
        a[here] = factors[part][0][layer].T
        b[begin:begin + size, here] = factors[part][1][layer].T
      for side, x in (('A', a), ('B', b)):
        name = f'{PREFIX}{module.name.format(layer=layer)}.lora_{side}.weight'
        if not np.isfinite(x).all():
          raise InputError(f'tensor {name!r} holds NaN or inf', where=folder,
                           expected='finite numbers', fix='Training diverged')
        yield name, x


def _to_host(x: jax.Array) -> np.ndarray:
  if isinstance(x, jax.Array) and not x.is_fully_addressable:
    x = multihost_utils.process_allgather(x, tiled=True)
  return np.asarray(x, np.float32)
