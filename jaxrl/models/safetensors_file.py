"""Writing safetensors files a tensor at a time, byte for byte as the safetensors library does.

The library wants all tensors of a file at once; the format does not: a header that gives every
place, then the bytes. Format: https://huggingface.co/docs/safetensors/index#format.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

# How the format spells a type, in the order in which the library writes them.
SPELLING: Mapping[str, str] = {'float32': 'F32', 'bfloat16': 'BF16', 'float16': 'F16'}


def file_order(tensors: Mapping[str, tuple[tuple[int, ...], np.dtype]]) -> list[str]:
  """Names in the order of their bytes in a file."""
  kinds = list(SPELLING)
  return sorted(tensors, key=lambda name: (kinds.index(tensors[name][1].name), name))


def write_file(
    path: Path,
    tensors: Mapping[str, tuple[tuple[int, ...], np.dtype]],   # name -> shape, type
    value: Callable[[str], np.ndarray],                        # called in `file_order`
) -> None:
  """One file with the metadata that transformers wants; OSError where it cannot be written."""
  header: dict[str, object] = {'__metadata__': {'format': 'pt'}}
  position = 0
  for name in file_order(tensors):
    shape, dtype = tensors[name]
    end = position + math.prod(shape) * dtype.itemsize
    header[name] = {
        'dtype': SPELLING[dtype.name], 'shape': list(shape), 'data_offsets': [position, end]}
    position = end
  text = json.dumps(header, separators=(',', ':'), ensure_ascii=False).encode()
  text += b' ' * (-len(text) % 8)
  with path.open('wb') as f:
    f.write(len(text).to_bytes(8, 'little') + text)
    for name in file_order(tensors):
      x = value(name)
      if (x.shape, x.dtype) != tensors[name]:
        raise ValueError(f'{name}: {x.shape} {x.dtype} instead of {tensors[name]}')
      f.write(np.ascontiguousarray(x).reshape(-1).view(np.uint8).data)
