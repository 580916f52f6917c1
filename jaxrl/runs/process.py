"""Settings of the process itself."""

from __future__ import annotations

import ctypes
import sys

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8


def keep_pages() -> None:
  """Tells glibc to keep freed memory instead of returning it to the kernel after every step.

  A step on the CPU backend allocates and frees its temporaries as one block; touching fresh pages
  was a quarter of the step time of the embedded world's model (`benchmarks/keep_pages.py`). Does
  nothing on systems without glibc. Call before the first large allocation.
  """
  if not sys.platform.startswith('linux'):
    return
  try:
    mallopt = ctypes.CDLL('libc.so.6').mallopt
  except (OSError, AttributeError):
    return
  mallopt(_M_MMAP_THRESHOLD, 1 << 30)
  mallopt(_M_TRIM_THRESHOLD, (1 << 31) - 1)
  mallopt(_M_ARENA_MAX, 1)
