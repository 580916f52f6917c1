"""The book of slots, rows and readers, without a device: nothing lost, nothing twice, no leak."""

import itertools

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxrl.sampling.requests import Request
from jaxrl.sampling.schedule import Schedule
from jaxrl.sampling.sizes import prompt_rows


class Book:
  """A schedule beside what its caller knows: which prompt each row holds, and who was placed."""

  def __init__(self, requests, *, parts, slots, members, rows=None, lookahead=None):
    self.requests, self.read, self.placed = requests, 0, []
    self.reads_enough = lookahead is None
    rows = prompt_rows(slots, members) if rows is None else rows
    self.content = {}           # row -> prompt ids computed into it
    self.schedule = Schedule(
        self.counted(), parts=parts, slots=slots, rows=rows, members=members,
        lookahead=4 * parts * slots if lookahead is None else lookahead)

  def counted(self):
    for numbered in enumerate(self.requests):
      self.read += 1
      yield numbered

  @property
  def waiting(self):
    """Requests that were read and not placed."""
    return self.read - len(self.placed)

  def readers_of(self, row):
    book = self.schedule
    return [slot for slot in book.busy() if self.row_of(slot) == row]

  def row_of(self, slot):
    book = self.schedule
    return slot // book.slots * book.rows + book.row[slot]

  def fill(self):
    book = self.schedule
    held = {row: len(self.readers_of(row)) for row in range(book.parts * book.rows)}
    busy = {*book.busy().tolist()}
    placed = book.fill()
    fresh = {}
    for p in placed:
      assert p.slot not in busy, 'a slot is given away while it is free'
      busy.add(p.slot)
      assert p.request is self.requests[p.number]
      if p.fresh:
        assert held[p.row] == 0, 'the row of a new prompt has no readers'
        assert fresh.setdefault(p.row, p.request.prompt_ids) == p.request.prompt_ids
    self.content |= fresh       # the engine computes all new prompts before it starts any draw
    for p in placed:
      assert self.row_of(p.slot) == p.row
      assert self.content[p.row] == p.request.prompt_ids, 'the row holds the prompt of its readers'
    self.placed += [p.number for p in placed]
    self.check_tables()
    if self.reads_enough:
      self.check_nothing_idles()
    return placed

  def check_tables(self):
    """row, place and readers say the same from both sides."""
    book = self.schedule
    assert len(self.placed) == len(set(self.placed))
    assert book.waiting == (self.waiting > 0)
    read = {}
    for slot in book.busy():
      row = self.row_of(slot)
      assert row // book.rows == slot // book.slots
      read[row, book.place[slot]] = slot % book.slots
    assert len(read) == len(book.busy())
    for (row, place), slot in np.ndenumerate(book.readers):
      assert slot == read.get((row, place), book.slots)
    free = book.number < 0
    assert (book.row[free] == -1).all() and book.count == free.size
    assert (book.busy_by_part() == (~free).reshape(book.parts, -1).sum(axis=1)).all()

  def check_nothing_idles(self):
    """Where a slot is free and a request waits, every row has readers, or the part has its share.

    A row that is never given back would idle: its part could not start another prompt.
    """
    book = self.schedule
    share = -(-(self.waiting + len(book.busy())) // book.parts)
    for part in range(book.parts):
      busy = book.busy_by_part()[part]
      rows = range(part * book.rows, (part + 1) * book.rows)
      if self.waiting and busy < min(book.slots, share):
        assert all(self.readers_of(row) for row in rows)

  def halve(self):
    """Every request stays in its row; slots are the old ones under new numbers."""
    book = self.schedule
    number, row = (x.reshape(book.parts, -1).copy() for x in (book.number, book.row))
    kept = book.halve()
    assert kept.shape == (book.parts, number.shape[1] // 2) == (book.parts, book.slots)
    for old, new in ((number, book.number), (row, book.row)):
      assert (np.take_along_axis(old, kept, axis=1).reshape(-1) == new).all()
    assert (book.number >= 0).sum() == (number >= 0).sum(), 'all that was busy is kept'
    self.check_tables()

  def release(self, slot):
    self.schedule.release(int(slot))
    self.check_tables()


prompts = st.lists(st.tuples(
    st.integers(0, 4),                                     # which prompt; they come again
    st.integers(1, 12),                                    # draws of it that stand together
    st.one_of(st.none(), st.integers(1, 5))), max_size=8)
sizes = st.fixed_dictionaries({
    'parts': st.integers(1, 3), 'slots': st.integers(1, 6), 'members': st.sampled_from([1, 2, 4])})


def requests_of(groups):
  return [Request(key, draw, (key,), 1.0, expected_tokens=expected)
          for key, count, expected in groups for draw in range(count)]


@settings(max_examples=150, deadline=None)
@given(groups=prompts, size=sizes, data=st.data())
def test_every_request_is_placed_once_and_no_row_is_lost(groups, size, data):
  size['members'] = min(size['members'], size['slots'])
  rows = data.draw(st.sampled_from([None, 1, 2]))          # fewer than the engine would have
  book = Book(requests_of(groups), **size, rows=rows)
  while book.schedule.waiting or book.schedule.busy().size:
    book.fill()
    busy = book.schedule.busy().tolist()
    assert busy, 'something moves'
    for slot in data.draw(st.sets(st.sampled_from(busy), min_size=1)):
      book.release(slot)
    half = book.schedule.slots // 2
    if not book.schedule.waiting and half and book.schedule.busy_by_part().max() <= half:
      book.halve()
  assert sorted(book.placed) == list(range(len(book.requests)))


@settings(max_examples=50, deadline=None)
@given(groups=prompts, size=sizes, lookahead=st.integers(1, 5))
def test_reading_hardly_ahead_loses_nothing(groups, size, lookahead):
  size['members'] = min(size['members'], size['slots'])
  book = Book(requests_of(groups), **size, lookahead=lookahead)
  while book.schedule.waiting or book.schedule.busy().size:
    assert book.waiting <= lookahead
    book.fill()
    for slot in book.schedule.busy():
      book.release(slot)
  assert sorted(book.placed) == list(range(len(book.requests)))


@settings(max_examples=50, deadline=None)
@given(parts=st.integers(1, 8), slots=st.integers(1, 8), data=st.data())
def test_few_requests_are_spread_over_all_parts(parts, slots, data):
  count = data.draw(st.integers(1, parts * slots))
  book = Book([Request(n, 0, (n,), 1.0) for n in range(count)], parts=parts, slots=slots, members=1)
  of_part = np.bincount([p.slot // slots for p in book.fill()], minlength=parts)
  assert of_part.sum() == count and of_part.max() == -(-count // parts)


def test_draws_of_a_prompt_share_its_row():
  """Eight draws of each of three prompts in 16 slots: two rows, then one that is free again."""
  book = Book(requests_of([(n, 8, None) for n in range(3)]), parts=1, slots=16, members=8)
  assert {(p.row, p.request.prompt_ids) for p in book.fill()} == {(0, (0,)), (1, (1,))}
  for slot in range(8):
    book.release(slot)
  assert {(p.row, p.request.prompt_ids, p.fresh) for p in book.fill()} == {(0, (2,), True)}


def test_a_row_whose_draws_another_part_took_is_free_again():
  """Prompt 0 is in both parts; its last draws start in the second, and the first one's end."""
  book = Book(requests_of([(0, 6, None), (1, 1, None), (2, 1, None), (3, 1, None)]),
              parts=2, slots=2, members=2, rows=1)
  book.fill()                                              # two draws of prompt 0 in each part
  for slot in (2, 3):
    book.release(slot)
  book.fill()                                              # its last two, in part 1
  for slot in (0, 1):
    book.release(slot)
  assert [p.request.prompt_ids for p in book.fill()] == [(1,)]


def test_long_responses_start_first():
  expected = [3, None, 9, 9, 1]
  requests = [Request(n, 0, (n,), 1.0, expected_tokens=e) for n, e in enumerate(expected)]
  book = Book(requests, parts=1, slots=1, members=1)
  order = []
  for _ in requests:
    order += [p.number for p in book.fill()]
    book.release(0)
  assert order == [2, 3, 0, 4, 1]


def test_requests_are_read_as_they_are_needed():
  """Of a stream without end."""
  stream = ((n, Request(n, 0, (n,), 1.0)) for n in itertools.count())
  schedule = Schedule(stream, parts=1, slots=4, rows=4, members=1, lookahead=8)
  assert next(stream)[0] == 8
  assert len(schedule.fill()) == 4
  assert next(stream)[0] == 13
