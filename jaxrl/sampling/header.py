"""What all prompts begin with: a few-shot header, a judge's instructions, a system message."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

LEAST = 64                    # ids; a shorter header is not worth a region of its own


def common_header(prompts: Iterable[Sequence[int]], *, least: int = LEAST) -> tuple[int, ...]:
  """The longest common beginning that leaves every prompt an id; () where it is under `least`.

  It is to be taken over all prompts of a task, not over those that are left to draw: the header
  changes in which order attention is summed, and so the last bits of log-probs.
  """
  header: tuple[int, ...] | None = None
  for ids in prompts:
    most = max(len(ids) - 1, 0)
    if header is None:
      header = tuple(ids[:most])
    else:
      ends = (n for n, (a, b) in enumerate(zip(header, ids[:most], strict=False)) if a != b)
      header = header[:next(ends, min(len(header), most))]
    if len(header) < least:
      return ()
  return header or ()
