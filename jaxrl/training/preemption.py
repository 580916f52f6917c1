"""SIGTERM: the machine is about to be taken away, and all processes must save the same step."""

from __future__ import annotations

import contextlib
import itertools
import signal
import threading
from collections.abc import Iterator
from types import FrameType

import jax

from jaxrl.training.agreement import exchange, first_said, say_first

_LAST = 'last step'
_questions = itertools.count()   # asked by all processes in the same order, over the whole run


class Preempted(Exception):
  """The system asked this process to end; what was done is saved and the same command goes on."""


class Notice:
  """Listens for SIGTERM inside its context; outside, the signal does what it did before."""

  def __init__(self, seconds: float = 1800.0) -> None:
    self.seen = False        # by this process
    self._seconds = seconds
    self._leaving: str | None = None

  def __enter__(self) -> Notice:
    self._listens = threading.current_thread() is threading.main_thread()   # a rule of Python's
    if self._listens:
      self._before = signal.signal(signal.SIGTERM, self._on_signal)
    return self

  def __exit__(self, kind: object, error: object, trace: object) -> None:
    if self._listens:
      signal.signal(signal.SIGTERM, self._before)
      if self.seen and error is None:
        signal.raise_signal(signal.SIGTERM)   # it came too late to be answered here

  def _on_signal(self, number: int, frame: FrameType | None) -> None:
    del number, frame
    self.seen = True
    if self._leaving is not None:
      raise Preempted(self._leaving)

  @contextlib.contextmanager
  def may_leave(self, sentence: str) -> Iterator[None]:
    """A block with nothing to save: a notice ends it at once, by Preempted with this sentence.

    With several processes it runs to its end: the others would wait for this one's part in it.
    """
    if jax.process_count() == 1:
      self._leaving = sentence
    try:
      if self.seen and self._leaving is not None:
        raise Preempted(sentence)
      yield
    finally:
      self._leaving = None

  def due(self) -> bool:
    """Whether to save and leave after the step just dispatched; asked once per step.

    Of several processes the first with a notice names the step after next. That is late enough:
    before a process asks after step n it has waited for the metrics of step n - 1, so that all
    others have dispatched n - 1, and their answers after n - 2 are given.
    """
    if jax.process_count() == 1:
      return self.seen
    question = next(_questions)
    last = say_first(_LAST, str(question + 2)) if self.seen else first_said(_LAST)
    return last is not None and question >= int(last)

  def due_for_any(self) -> bool:
    """Whether any process has a notice by now; asked where all wait for each other anyway."""
    if jax.process_count() == 1:
      return self.seen
    return 'True' in exchange(f'notice {next(_questions)}', str(self.seen), self._seconds)
