"""What a person sees while a run works: a live bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import contextlib
import time
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence

import rich.progress
from rich.console import Console
from rich.table import Table
from rich.text import Text

# Characters that turn the direction of text around; they would show a line other than it is.
_DIRECTIONS = set('\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069')


class Bar:
  """Counts the work done in one stage."""

  def __init__(self, on_advance: Callable[[int], None]):
    self.done = 0
    self._on_advance = on_advance

  def advance(self, n: int = 1) -> None:
    self.done += n
    self._on_advance(self.done)


class Progress:
  """Writes to one rich console; text is shown as it is, never read as markup or control codes."""

  def __init__(
      self, console: Console | None = None, *, clock: Callable[[], float] = time.monotonic
  ):
    self._console = console or Console()
    self._clock = clock

  @contextlib.contextmanager
  def stage(self, name: str, total: int | None, unit: str) -> Iterator[Bar]:
    """Shows the work of the block, `total` units of it (None when that is not known).

    On a terminal a bar with rate and time left, elsewhere a line at the start. Either way one line
    at the end stays: how much was done, how long it took, how fast.
    """
    start = self._clock()
    with contextlib.ExitStack() as stack:
      if self._console.is_terminal:
        live = stack.enter_context(self._live(unit))
        task = live.add_task(visible(name), total=total)
        bar = Bar(lambda done: live.update(task, completed=done))
      else:
        self.line(f'{name}: {unit}' if total is None else f'{name}: {total} {unit}')
        bar = Bar(lambda done: None)
      finished = False
      try:
        yield bar
        finished = True
      finally:
        stack.close()   # takes the bar away before the last line is written
        seconds = self._clock() - start
        amount = f'{bar.done} {unit}'
        if not finished:
          amount = f'stopped after {amount}'
        rate = f', {_show_rate(bar.done / seconds)} {unit}/s' if seconds > 0 else ''
        self.line(f'{name}: {amount} in {duration(seconds)}{rate}')

  def line(self, text: str) -> None:
    """One line, above the bar if there is one; never wrapped or cut."""
    self._console.print(Text(visible(text)), soft_wrap=True)

  def table(self, title: str, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """A table; columns in which all cells are numbers are aligned to the right."""
    cells = [list(row) for row in rows]
    table = Table(title=Text(visible(title)), title_justify='left')
    for i, column in enumerate(columns):
      is_number = bool(cells) and all(isinstance(row[i], int | float) for row in cells)
      table.add_column(
          Text(visible(column)), justify='right' if is_number else 'left', overflow='fold'
      )
    for row in cells:
      table.add_row(*(Text(_show(cell)) for cell in row))
    if self._console.is_terminal:
      self._console.print(table)
      return
    width = self._console.width   # a file has no width that cells should be folded to
    self._console.width = 10_000
    try:
      self._console.print(table)
    finally:
      self._console.width = width

  def _live(self, unit: str) -> rich.progress.Progress:
    return rich.progress.Progress(
        rich.progress.TextColumn('{task.description}', markup=False),
        rich.progress.BarColumn(),
        rich.progress.MofNCompleteColumn(),
        _RateColumn(unit),
        rich.progress.TimeRemainingColumn(),
        console=self._console,
        transient=True,
        get_time=self._clock,
    )


class _RateColumn(rich.progress.ProgressColumn):
  """Units per second, once two advances have been seen."""

  def __init__(self, unit: str):
    super().__init__()
    self._unit = unit

  def render(self, task: rich.progress.Task) -> Text:
    speed = task.finished_speed or task.speed
    return Text(self._unit if speed is None else f'{_show_rate(speed)} {self._unit}/s')


def visible(text: str) -> str:
  """`text` on one line, with control characters spelled out as escapes such as \\x1b."""
  return ''.join(
      c if unicodedata.category(c) not in ('Cc', 'Cs') and c not in _DIRECTIONS
      else c.encode('unicode_escape').decode()
      for c in text
  )


def duration(seconds: float) -> str:
  """'12.3 s' below a minute, then 'M:SS' or 'H:MM:SS'."""
  if seconds < 59.95:
    return f'{seconds:.1f} s'
  minutes, rest = divmod(round(seconds), 60)
  hours, minutes = divmod(minutes, 60)
  return f'{hours}:{minutes:02}:{rest:02}' if hours else f'{minutes}:{rest:02}'


def _show_rate(rate: float) -> str:
  return f'{rate:,.0f}' if rate >= 100 else f'{rate:.3g}'


def _show(cell: object) -> str:
  return f'{cell:.4g}' if isinstance(cell, float) else visible(str(cell))
