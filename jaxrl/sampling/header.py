"""What all prompts begin with: a few-shot header, a judge's instructions, a system message."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

LEAST = 64                    # ids; a shorter header is not worth a region of its own


def common_header(prompts: Iterable[Sequence[int]], *, least: int = LEAST) -> tuple[int, ...]:
  """The longest common beginning that leaves every prompt an id; () where it is under `least`.

  It is to be taken over all prompts of a task, not over those that are left to draw: the header
  changes in which order attention is summed, and so the last bits of log-probs.
  """
  header: Sequence[int] | None = None
  seen: Sequence[int] | None = None
  for ids in prompts:
    if header is None:
      header = seen = ids
    shared = min(len(header), max(len(ids) - 1, 0))
    while header[:shared] != ids[:shared]:
      shared = next(n for n in range(shared) if header[n] != ids[n])
    if shared < least:
      return ()
    header = header[:shared]
  if header is None or seen is None:
    return ()
  header = header[:len(seen) - 1]
  return tuple(header) if len(header) >= least else ()
