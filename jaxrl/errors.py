"""The one exception for bad input: flags, files, rows, checkpoints, meshes, memory budgets."""

from __future__ import annotations


class InputError(ValueError):
  """Something the user gave cannot be used; raised before anything is compiled.

  The message is one sentence a person can act on: where, what, expected, found, what to do.
  """

  def __init__(
      self,
      what: str,
      *,
      where: object | None = None,
      expected: object | None = None,
      found: object | None = None,
      fix: str | None = None,
  ):
    message = f'{where}: {what}' if where is not None else what
    if expected is not None:
      message += f'; expected {expected}'
    if found is not None:
      message += f'; found {found}'
    message += '.'
    if fix:
      message += f' {fix.rstrip(".")}.'
    super().__init__(message)
