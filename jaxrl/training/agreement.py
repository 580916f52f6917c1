"""What every process of a run has to say about one thing, known to all of them.

It goes through the key-value store of `jax.distributed` and is no device program: a background
thread may ask while the main thread waits in a collective. With one process nothing is sent.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import jax
from jax._src import distributed  # the store has no public name

from jaxrl.parallel.hosts import HostLost

_DONE = 'done'


def exchange(name: str, text: str, seconds: float) -> list[str]:
  """The texts of all processes, in their order; a name is used once in a run.

  Raises:
    HostLost: a process said nothing for so many seconds.
  """
  if jax.process_count() == 1:
    return [text]
  _say(name, text)
  return [_hear(name, process, seconds) for process in range(jax.process_count())]


def _store() -> Any:
  return distributed.global_state.client


def _say(name: str, text: str) -> None:
  _store().key_value_set(
      f'jaxrl/{name}/{jax.process_index()}', text, allow_overwrite=True)


def _hear(name: str, process: int, seconds: float) -> str:
  try:
    return _store().blocking_key_value_get(
        f'jaxrl/{name}/{process}', int(1000 * seconds))
  except jax.errors.JaxRuntimeError as error:
    if 'DEADLINE_EXCEEDED' not in str(error):
      raise
    raise HostLost(
        f'process {jax.process_index()} of {jax.process_count()} waited {seconds:g} s for process '
        f'{process} at "{name}".') from error


def first_said(name: str) -> str | None:
  """What `say_first` left under this name; None while nobody has."""
  try:
    return _store().key_value_try_get(f'jaxrl/{name}')
  except jax.errors.JaxRuntimeError as error:
    if 'NOT_FOUND' not in str(error):
      raise
    return None


def say_first(name: str, text: str) -> str:
  """Leaves `text` under this name unless another process was earlier; what stands there."""
  try:
    _store().key_value_set(f'jaxrl/{name}', text)
  except jax.errors.JaxRuntimeError as error:
    if 'ALREADY_EXISTS' not in str(error):
      raise
  said = first_said(name)
  assert said is not None
  return said


class OtherFailed(RuntimeError):
  """Another process could not do its part."""


class Together:
  """Work of all processes in phases: none passes a phase that another one will not reach."""

  def __init__(self, name: str, phases: Sequence[str], seconds: float):
    self.name, self.phases, self.seconds = name, phases, seconds

  def reach(self, phase: str) -> None:
    """Waits until all processes have reached `phase`.

    Raises:
      OtherFailed: a process said that it never will.
      HostLost: a process said nothing for so many seconds.
    """
    said = exchange(f'{self.name}/{phase}', _DONE, self.seconds)
    for process, text in enumerate(said):
      if text != _DONE:
        raise OtherFailed(f'process {process}: {text}')

  def fail(self, error: BaseException) -> None:
    """Lets the other processes know, in whichever phase they wait."""
    if jax.process_count() > 1:
      for phase in self.phases:
        with contextlib.suppress(jax.errors.JaxRuntimeError):   # the store may be what failed
          _say(f'{self.name}/{phase}', f'{type(error).__name__}: {error}')
