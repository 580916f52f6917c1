"""Samples of several processes: a log for each, which process 0 joins into its own.

A run that was killed goes on from all parts, with as many processes as it then has.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
from etils import epath

from jaxrl.parallel import hosts
from jaxrl.runs import durable
from jaxrl.runs.sample_log import SampleLog, check_header, open_log, read_header, read_log
from jaxrl.runs.stages import await_file

LOG = 'drawn.jsonl'           # in the scratch folder: process 0's own part, and the whole
_PART = re.compile(r'drawn\.(\d+)\.jsonl')


def part(process: int) -> str:
  """The file of a process."""
  return f'drawn.{process}.jsonl' if process else LOG


@contextlib.contextmanager
def own_part(
    scratch: epath.Path, header: Mapping[str, Any], say: Callable[[str], None]
) -> Iterator[SampleLog]:
  """The log that this process appends to; process 0's has all that earlier attempts drew.

  All processes enter it before any one appends, and the parts are whole when all have left it.
  """
  if hosts.is_writer():
    join_parts(scratch, header, say=say)
  hosts.barrier('the samples drawn before')
  os.makedirs(scratch, exist_ok=True)      # of gs:// each machine has a copy of its own
  with open_log(scratch / part(jax.process_index()), header, say=say) as log:
    yield log


def join_parts(
    scratch: epath.Path, header: Mapping[str, Any], *, expected: int = 1,
    say: Callable[[str], None] = lambda text: None,
) -> None:
  """Moves the samples of all other parts into process 0's log; so many parts are waited for.

  Raises:
    InputError: a part was drawn with something else.
  """
  for process in range(1, expected):
    await_file(scratch / part(process))
  with open_log(scratch / LOG, header, say=say) as log:
    for name in filter(_PART.fullmatch, durable.names(scratch)):
      path = scratch / name
      durable.refresh(path)
      if _has_header(path):
        check_header(os.fspath(path), read_header(path), header)
        for row in read_log(path):
          # A kill between the two steps here leaves samples in both files.
          if (row['prompt_id'], row['sample_index']) not in log:
            log.append([row])
        log.sync()
      durable.remove(path)


def _has_header(path: epath.Path) -> bool:
  """Whether a kill did not come before the first line was whole."""
  with path.open('rb') as file:
    return file.readline().endswith(b'\n')


def shares(missing: Sequence[int], prompts: Sequence[str]) -> list[list[int]]:
  """Which of the missing requests each process draws; the draws of a prompt stay together.

  `prompts` has the prompt of every request.
  """
  place: dict[str, int] = {}
  found: list[list[int]] = [[] for _ in range(jax.process_count())]
  for n in missing:
    number = place.setdefault(prompts[n], len(place))
    found[number % len(found)].append(n)
  return found
