"""Typed reading of the fields of a JSON object; a missing or malformed one is an `InputError`."""

from __future__ import annotations

import sys
from collections.abc import Mapping

from jaxrl.errors import InputError


def integer(config: Mapping, field: str, where: object, *, default: int | None = None) -> int:
  """A positive whole number; `default` where the field is absent or null."""
  value = config.get(field)
  value = default if value is None else value
  if type(value) is not int or not 1 <= value < 2 ** 31:
    raise malformed(field, value, 'a positive whole number', where)
  return value


def positive(config: Mapping, field: str, where: object, *, default: float | None = None) -> float:
  """A positive finite number; `default` where the field is absent or null."""
  value = config.get(field)
  value = default if value is None else value
  if value is None or not is_positive(value):
    raise malformed(field, value, 'a positive number', where)
  return float(value)


def boolean(config: Mapping, field: str, where: object, *, default: bool | None = None) -> bool:
  """True or false; `default` where the field is absent or null."""
  value = config.get(field)
  value = default if value is None else value
  if not isinstance(value, bool):
    raise malformed(field, value, 'true or false', where)
  return value


def numbers(config: Mapping, field: str, where: object, *, count: int) -> tuple[float, ...]:
  """A list of `count` positive numbers."""
  value = config.get(field)
  if not isinstance(value, list) or len(value) != count or not all(map(is_positive, value)):
    raise malformed(field, value, f'a list of {count} positive numbers', where)
  return tuple(map(float, value))


def is_positive(value: object) -> bool:
  return (isinstance(value, int | float) and not isinstance(value, bool)
          and 0 < value <= sys.float_info.max)


def malformed(field: str, value: object, expected: str, where: object) -> InputError:
  what = f'field {field!r} is missing' if value is None else f'field {field!r} is malformed'
  return InputError(
      what, where=where, expected=expected, found=short(value), fix='Check config.json')


def short(value: object) -> str:
  text = repr(value)
  return text if len(text) <= 120 else text[:117] + '...'
