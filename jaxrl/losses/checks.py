"""Static parameters of losses, checked before anything is traced."""

from __future__ import annotations

import math
from collections.abc import Callable


def check_number(name: str, value: float, holds: Callable[[float], bool], expected: str) -> None:
  """Raises ValueError unless `value` is a finite number for which `holds`."""
  if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
    raise ValueError(f'{name} must be a finite number {expected}; found {value!r}')
  if not holds(value):
    raise ValueError(f'{name} must be {expected}; found {value!r}')


def check_positive(name: str, value: float) -> None:
  check_number(name, value, lambda x: x > 0, '> 0')


def check_not_negative(name: str, value: float) -> None:
  check_number(name, value, lambda x: x >= 0, '>= 0')
