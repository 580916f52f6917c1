"""Which numbers a floating type cannot hold, fast enough to ask of every weight read or written."""

from __future__ import annotations

import functools

import numpy as np

CHUNK = 2**18                          # numbers at a time, to stay in the processor's cache


def count_not_finite(x: np.ndarray, dtype: np.dtype) -> int:
  """How many numbers of a contiguous array are NaN or inf, or become so as `dtype`.

  Compared as integers, which order numbers of one sign as they are and NaN and inf above all.
  """
  bits = x.reshape(-1).view(f'u{x.dtype.itemsize}')
  sign = bits.dtype.type(1 << (8 * bits.itemsize - 1))
  bound = _first_not_finite(x.dtype, np.dtype(dtype))
  bad = 0
  for n in range(0, bits.size, CHUNK):
    sizes = bits[n:n + CHUNK] & ~sign
    if sizes.max() >= bound:
      bad += int((sizes >= bound).sum())
  return bad


@functools.cache
def _first_not_finite(stored: np.dtype, dtype: np.dtype) -> int:
  """The smallest positive number of type `stored`, as an integer, that `dtype` cannot hold."""
  unsigned = np.dtype(f'u{stored.itemsize}')
  low, high = 0, 1 << (8 * stored.itemsize - 1)
  while low < high:
    middle = (low + high) // 2
    with np.errstate(over='ignore', invalid='ignore'):
      value = np.array(middle, unsigned).view(stored).astype(dtype).astype(np.float32)
    low, high = (middle + 1, high) if np.isfinite(value) else (low, middle)
  return low
