"""Settings of the process itself."""

from __future__ import annotations

import ctypes
import resource
import sys
from collections.abc import Callable

import jax

_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8


def keep_pages() -> None:
  """Tells glibc to keep freed memory instead of returning it to the kernel after every step.

  A step on the CPU backend allocates and frees its temporaries as one block. Of the embedded
  world's model it then touches 98,000 fresh pages, which took a quarter of the step: 1.09 s without
  this and 0.83 s with it on two shared cores (`python -m benchmarks.keep_pages`). Does nothing on
  systems without glibc. Call before the first large allocation.
  """
  if not sys.platform.startswith('linux'):
    return
  try:
    mallopt = ctypes.CDLL('libc.so.6').mallopt
  except (OSError, AttributeError):
    return
  mallopt(_M_MMAP_MAX, 0)            # blocks of any size come from the heap
  mallopt(_M_TRIM_THRESHOLD, -1)     # which never shrinks
  mallopt(_M_ARENA_MAX, 1)


def count_programs() -> Callable[[], int]:
  """Starts counting the programs XLA compiles; the result gives the number so far.

  A number that grows with the data means shapes that were not meant to vary.
  """
  seen = [0]

  def on_event(event: str, duration_secs: float, **kwargs: str | int) -> None:
    del duration_secs, kwargs
    if event == '/jax/core/compile/backend_compile_duration':
      seen[0] += 1

  jax.monitoring.register_event_duration_secs_listener(on_event)
  return lambda: seen[0]


def peak_memory() -> int:
  """Largest resident size of this process so far, in bytes."""
  kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  return kilobytes if sys.platform == 'darwin' else 1024 * kilobytes
