"""Which request is drawn in which slot: a plain host-side book of slots, prompts and draws."""

from __future__ import annotations

import collections
import dataclasses
import heapq
import itertools
from collections.abc import Iterator

import numpy as np

from jaxrl.sampling.requests import Request

Numbered = tuple[int, Request]


@dataclasses.dataclass
class Prompt:
  """A prompt with draws that have not been started."""

  ids: tuple[int, ...]
  waiting: collections.deque[Numbered]


@dataclasses.dataclass(frozen=True)
class Placement:
  """A request that has been given a slot."""

  slot: int                   # over all parts
  row: int                    # of the prompt region, over all parts
  number: int                 # of the request
  request: Request
  fresh: bool                 # the prompt's keys are not in the row yet


class Schedule:
  """Slots and prompt rows of all parts of the mesh.

  `slots` and `rows` count per part; at most `members` slots read one row. Part d owns slots
  [d * slots, (d + 1) * slots) and rows alike.
  """

  def __init__(self, requests: Iterator[Numbered], *, parts: int, slots: int, rows: int,
               members: int, lookahead: int):
    self.parts, self.slots, self.rows, self.members = parts, slots, rows, members
    self._requests, self._lookahead = requests, lookahead
    self._order = itertools.count()
    self._queue: list[tuple[int, int, Prompt]] = []      # heap: longest expected response first
    self._open: dict[tuple[int, ...], Prompt] = {}       # those with draws that wait
    self._waiting = 0                                    # draws in the queue
    self._resident: list[Prompt | None] = [None] * (parts * rows)
    self.number = np.full(parts * slots, -1)             # request of each slot, -1 where free
    self.row = np.full(parts * slots, -1, np.int32)      # row of each slot, within its part
    self.place = np.zeros(parts * slots, np.int32)       # place among the readers of that row
    self.readers = np.full((parts * rows, members), slots, np.int32)   # slots; `slots`: nobody
    self._read_ahead()

  def _read_ahead(self) -> None:
    while self._waiting < self._lookahead:
      numbered = next(self._requests, None)
      if numbered is None:
        return
      request = numbered[1]
      prompt = self._open.get(request.prompt_ids)
      if prompt is None:
        prompt = Prompt(request.prompt_ids, collections.deque())
        self._open[request.prompt_ids] = prompt
        heapq.heappush(
            self._queue, (-(request.expected_tokens or 0), next(self._order), prompt))
      prompt.waiting.append(numbered)
      self._waiting += 1

  @property
  def waiting(self) -> bool:
    """Whether any request has not been started."""
    return self._waiting > 0

  @property
  def count(self) -> int:
    """Slots of all parts."""
    return self.parts * self.slots

  def busy_by_part(self) -> np.ndarray:
    """[parts] how many slots hold a request."""
    return (self.number >= 0).reshape(self.parts, self.slots).sum(axis=1)

  def busy(self) -> np.ndarray:
    """Slots that hold a request."""
    return np.flatnonzero(self.number >= 0)

  def release(self, slot: int) -> None:
    """Frees a slot whose request has ended."""
    row = slot // self.slots * self.rows + self.row[slot]
    self.readers[row, self.place[slot]] = self.slots
    self.number[slot] = self.row[slot] = -1

  def _is_empty(self, row: int) -> bool:
    prompt = self._resident[row]
    return prompt is None or not (
        prompt.waiting or (self.readers[row] < self.slots).any())

  def halve(self) -> np.ndarray:
    """Goes on with half the slots, those that are busy among them.

    Returns the slots kept, [parts, slots / 2] numbers within their part: slot n is now the n-th.
    """
    half = self.slots // 2
    free = (self.number < 0).reshape(self.parts, self.slots)
    kept = np.sort(np.argsort(free, axis=1, kind='stable')[:, :half], axis=1).astype(np.int32)
    whole = (kept + self.slots * np.arange(self.parts)[:, None]).reshape(-1)
    place = np.full((self.parts, self.slots + 1), half, np.int32)        # of old slots among new
    np.put_along_axis(place, kept, np.arange(half, dtype=np.int32)[None], axis=1)
    readers = self.readers.reshape(self.parts, -1)
    self.readers = np.take_along_axis(place, readers, axis=1).reshape(self.readers.shape)
    self.number, self.row, self.place = self.number[whole], self.row[whole], self.place[whole]
    self.slots = half
    return kept

  def fill(self) -> list[Placement]:
    """Gives free slots to requests: draws of prompts that are there first, then new prompts."""
    self._read_ahead()          # a prompt of many draws was read in part
    placed = []
    for part in self._parts_by_room():
      placed += self._fill_part(part)
    return placed

  def _parts_by_room(self) -> list[int]:
    free = (self.number < 0).reshape(self.parts, self.slots).sum(axis=1)
    return np.argsort(-free, kind='stable').tolist()

  def _fill_part(self, part: int) -> list[Placement]:
    own = range(part * self.slots, (part + 1) * self.slots)
    free = [slot for slot in own if self.number[slot] < 0]
    if self._waiting + (self.number >= 0).sum() < len(self.number):
      # Not enough for all: every part takes its share, none waits beside a full one.
      share = -(-(self._waiting + int((self.number >= 0).sum())) // self.parts)
      free = free[:max(share - (self.slots - len(free)), 0)]
    placed: list[Placement] = []
    for row in range(part * self.rows, (part + 1) * self.rows):
      prompt = self._resident[row]
      if prompt is not None and prompt.waiting:
        self._give(row, prompt, free, placed, fresh=False)
    empty = [row for row in range(part * self.rows, (part + 1) * self.rows)
             if self._is_empty(row)]
    while free and empty and (prompt := self._next()) is not None:
      row = empty.pop(0)
      self._resident[row] = prompt
      self._give(row, prompt, free, placed, fresh=True)
    return placed

  def _next(self) -> Prompt | None:
    """The prompt to begin next; those that have been given away meanwhile are forgotten."""
    while self._queue and not self._queue[0][2].waiting:
      heapq.heappop(self._queue)
    return self._queue[0][2] if self._queue else None

  def _give(self, row: int, prompt: Prompt, free: list[int], placed: list[Placement], *,
            fresh: bool) -> None:
    """Starts draws of a prompt in free slots, as many as its row has places for."""
    for place in np.flatnonzero(self.readers[row] == self.slots):
      if not (free and prompt.waiting):
        break
      slot = free.pop(0)
      number, request = prompt.waiting.popleft()
      self._waiting -= 1
      self.number[slot], self.row[slot], self.place[slot] = number, row % self.rows, place
      self.readers[row, place] = slot % self.slots
      placed.append(Placement(slot, row, number, request, fresh))
    if not prompt.waiting and self._open.get(prompt.ids) is prompt:
      del self._open[prompt.ids]
      self._read_ahead()
