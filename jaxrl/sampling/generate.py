"""Drawing responses: the host side of the engine, which feeds slots and collects what they drew."""

from __future__ import annotations

import collections
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from jaxrl.errors import InputError
from jaxrl.models.params import Params
from jaxrl.sampling.engine import Engine
from jaxrl.sampling.requests import Request, Sample
from jaxrl.sampling.rollout_params import rollout_params
from jaxrl.sampling.schedule import Placement, Schedule
from jaxrl.sampling.sizes import prompt_widths
from jaxrl.sampling.slots import ASSIGNED
from jaxrl.sampling.stop_strings import first_stop

Refused = Callable[[int, InputError], None]
FEWEST_SLOTS = 8              # of a part; fewer take as long


def generate(
    engine: Engine,
    params: Params,
    requests: Iterable[Request],
    *,
    seed: int,
    step: int | None = None,
    draws: int | None = None,
    on_refused: Refused | None = None,
) -> Iterator[Sample]:
  """Yields one finished sample per request, in completion order.

  A sample is a function of (params, prompt ids, seed, key, draw) alone. Draws of one prompt that
  stand together, or nearly, share its keys and values.

  Args:
    params: from `rollout_params`.
    requests: any number. A sequence is checked whole before anything is compiled; of an iterator
      requests are read as slots become free.
    seed: uint32.
    step: of the parameters; goes into the samples.
    draws: most draws of one prompt, where `requests` is no sequence; it decides how many slots may
      read a prompt at a time.
    on_refused: is told of each bad request by its number, and the others go on; without it the
      first bad request is an error.

  Raises:
    InputError: a prompt is empty or too long, or a setting of a request is out of range.
  """
  def refuse(number: int, error: InputError) -> None:
    if on_refused is None:
      raise error
    on_refused(number, error)

  if isinstance(requests, Sequence):
    bad = {n: error for n, request in enumerate(requests)
           if (error := _fault(engine, n, request)) is not None}
    for n, error in bad.items():
      refuse(n, error)
    numbered: Iterator = ((n, request) for n, request in enumerate(requests) if n not in bad)
    if draws is None:
      counts = collections.Counter(request.prompt_ids for request in requests)
      draws = max(counts.values(), default=1)
  else:
    numbered = _sound(engine, requests, refuse)
  readers = min(1 << (max(draws or 1, 1) - 1).bit_length(), engine.slots_per_part)
  slots = engine.slots_per_part
  schedule = Schedule(numbered, parts=engine.parts, slots=slots, rows=engine.prompt_rows(readers),
                      members=readers, lookahead=4 * slots * engine.parts)
  if schedule.waiting:
    yield from _Rollout(engine, params, schedule, seed, step).samples()


def engine_params(engine: Engine, params: Params) -> Params:
  """`params`, on the mesh of training, as `engine` reads them; see `rollout_params`."""
  return rollout_params(params, engine.model, engine.mesh, engine.config.dtype)


def _sound(engine: Engine, requests: Iterable[Request], refuse: Refused) -> Iterator:
  for n, request in enumerate(requests):
    error = _fault(engine, n, request)
    if error is None:
      yield n, request
    else:
      refuse(n, error)


def _fault(engine: Engine, number: int, r: Request) -> InputError | None:
  """What is wrong with a request."""
  where, most = f'request {number}', engine.sampling.max_new_tokens
  if not r.prompt_ids:
    return InputError('the prompt has no ids', where=where, expected='at least one id')
  if len(r.prompt_ids) > engine.max_prompt:
    return InputError('the prompt is too long', where=where,
                      expected=f'at most {engine.max_prompt} ids', found=len(r.prompt_ids))
  if min(r.prompt_ids) < 0 or max(r.prompt_ids) >= engine.model.vocab_size:
    return InputError('the vocabulary has no such token', where=where,
                      expected=f'ids from 0 to {engine.model.vocab_size - 1}',
                      found=f'{min(r.prompt_ids)} to {max(r.prompt_ids)}')
  if not 0 <= r.temperature < float('inf'):
    return InputError('temperature out of range', where=where, expected='a finite number >= 0',
                      found=r.temperature)
  for name, value in (('key', r.key), ('draw', r.draw)):
    if not 0 <= value < 2**32:
      return InputError(f'{name} out of range', where=where, expected='0 to 2**32 - 1',
                        found=value)
  least = max(engine.sampling.min_new_tokens, len(engine.sampling.forced_ids) + 1)
  if r.max_new_tokens is not None and not least <= r.max_new_tokens <= most:
    return InputError('max_new_tokens out of range', where=where, found=r.max_new_tokens,
                      expected=f"from {least} to the engine's {most}")
  return None


class _Rollout:
  """One call of `generate`: the state on the devices beside the host's book of it."""

  def __init__(self, engine: Engine, params: Params, schedule: Schedule, seed: int,
               step: int | None):
    self.engine, self.params, self.schedule = engine, params, schedule
    self.seed, self.step = seed, step
    self.requests: dict[int, Request] = {}               # of busy slots, by slot
    self.matched = np.zeros(schedule.count, int)    # ids without a stop string so far
    rows = schedule.rows * engine.parts
    self.length, self.first = np.zeros(rows, np.int32), np.zeros(rows, np.int32)
    self.headed = np.zeros(rows, bool)
    self.slots, self.prompts = self._run(engine.empty(schedule.members))
    self.header = self._header()
    self.seed_array = self._put(np.uint32(seed), PartitionSpec())

  def _run(self, program: Any, *arguments: Any) -> Any:
    with jax.set_mesh(self.engine.mesh):
      return program(*arguments)

  def _put(self, tree: Any, spec: PartitionSpec | None = None) -> Any:
    """Host arrays on the devices, by default split over the parts."""
    spec = PartitionSpec('data') if spec is None else spec
    return jax.device_put(tree, NamedSharding(self.engine.mesh, spec))

  def _header(self) -> Any:
    ids, chunk = self.engine.header_ids, self.engine.config.chunk
    if not ids:
      return None
    width = min(chunk, -(-len(ids) // 16) * 16)
    padded = np.full(-(-len(ids) // width) * width, self.engine.pad_id, np.int32)
    padded[:len(ids)] = ids
    tokens = self._put(padded.reshape(-1, 1, width), PartitionSpec())
    return self._run(self.engine.header, self.params, tokens)

  def samples(self) -> Iterator[Sample]:
    """Decodes until nothing waits and nothing is busy."""
    engine, schedule = self.engine, self.schedule
    refill_at = max(schedule.slots // 16, 1)
    halts = np.zeros(schedule.count, bool)
    while schedule.waiting or schedule.busy().size:
      placed = schedule.fill()
      if placed or halts.any():
        self._prefill([p for p in placed if p.fresh])
        self._start(placed, halts)
      if engine.config.shrink:
        self._shrink()
      busy = schedule.busy_by_part()
      # Back to the host as soon as some slots can be given away, or else when all have ended.
      enough = np.maximum(busy - refill_at, 0) if schedule.waiting else np.zeros_like(busy)
      self.slots = self._run(
          engine.decode, self.params, self.slots, self.prompts, self.header, self.seed_array,
          self._put(enough.astype(np.int32)))
      finished, halts = self._finished()
      yield from finished

  def _shrink(self) -> None:
    """Goes on with half the slots once all that is left fits into them, as often as it does."""
    schedule = self.schedule
    half = schedule.slots // 2
    if schedule.waiting or half < FEWEST_SLOTS or schedule.busy_by_part().max() > half:
      return
    kept = schedule.halve()                              # [parts, half], slots within their part
    whole = (kept + 2 * half * np.arange(self.engine.parts)[:, None]).reshape(-1)
    self.requests = {
        new: self.requests[old] for new, old in enumerate(whole.tolist())
        if old in self.requests}
    self.matched = self.matched[whole]
    self.slots = self._run(
        self.engine.halve, self.slots, self._put(kept.reshape(-1)), self._put(schedule.readers))
    self._shrink()

  def _prefill(self, fresh: Sequence[Placement]) -> None:
    """Computes the prompts of new rows, those of like length together."""
    engine = self.engine
    config, header = engine.config, engine.header_ids
    by_width: dict[tuple[int, int], list[list[tuple[int, tuple[int, ...]]]]] = {}
    widths = prompt_widths(engine.max_prompt - 1, config)
    for row, ids in {p.row: p.request.prompt_ids for p in fresh}.items():
      headed = bool(header) and len(ids) > len(header) and ids[:len(header)] == header
      own = ids[len(header) if headed else 0:-1]
      self.length[row], self.first[row] = len(own), len(header) if headed else 0
      self.headed[row] = headed
      if own:
        width = next(w for w in widths if w >= min(len(own), config.chunk))
        chunks = -(-len(own) // width)
        groups = by_width.setdefault((width, chunks), [[] for _ in range(engine.parts)])
        groups[row // self.schedule.rows].append((row % self.schedule.rows, own))
    for (width, chunks), groups in sorted(by_width.items()):
      batch = max(config.prefill_tokens // width, 1)
      for start in range(0, max(map(len, groups)), batch):
        self._prefill_batch([g[start:start + batch] for g in groups], width, chunks, batch)

  def _prefill_batch(self, groups, width: int, chunks: int, batch: int) -> None:
    """Computes up to `batch` prompts of every part, chunk by chunk."""
    parts, rows = self.engine.parts, self.schedule.rows
    tokens = np.full((parts, batch, width * chunks), self.engine.pad_id, np.int32)
    places = np.zeros((parts, batch), np.int32)
    for part, group in enumerate(groups):
      for n, (row, ids) in enumerate(group):
        tokens[part, n, :len(ids)], places[part, n] = ids, row
    first = self.first.reshape(parts, rows)[np.arange(parts)[:, None], places]
    count = np.array([len(g) for g in groups], np.int32)
    for n in range(chunks):
      program = self.engine.next_chunk if n else self.engine.first_chunk
      chunk = tokens[:, :, n * width:(n + 1) * width].reshape(-1, width)
      self.prompts = self._run(
          program, self.params, self.prompts, self.header,
          *self._put((chunk, places.reshape(-1), first.reshape(-1), count)),
          self._put(np.int32(n * width), PartitionSpec()))

  def _start(self, placed: Sequence[Placement], halts: np.ndarray) -> None:
    engine, schedule, slots = self.engine, self.schedule, self.schedule.count
    assign: dict[str, np.ndarray] = {
        name: np.zeros(slots, kind) for name, kind in ASSIGNED.items()}
    assign['starts'] = np.zeros(slots, bool)
    width = engine.max_prompt if engine.sampling.remembers_prompt else 0
    assign['prompt'] = np.full((slots, width), engine.model.vocab_size, np.int32)
    for p in placed:
      r, slot = p.request, p.slot
      values = (r.prompt_ids[-1], len(r.prompt_ids) - 1,
                r.max_new_tokens or engine.sampling.max_new_tokens, r.key, r.draw, r.temperature,
                self.headed[p.row])
      for name, value in zip(ASSIGNED, values, strict=True):
        assign[name][slot] = value
      assign['starts'][slot] = True
      if width:
        assign['prompt'][slot, :len(r.prompt_ids)] = r.prompt_ids
      self.requests[slot], self.matched[slot] = r, 0
    assign |= {'halts': halts, 'row': schedule.row, 'place': schedule.place,
               'readers': schedule.readers, 'length': self.length, 'first': self.first}
    self.slots = self._run(engine.start, self.slots, self._put(assign))

  def _finished(self) -> tuple[list[Sample], np.ndarray]:
    """Samples that have ended, their slots now free, and slots to be halted on the device."""
    engine, schedule = self.engine, self.schedule
    busy, new = jax.device_get((self.slots.busy, self.slots.new))
    held = schedule.busy()
    halts = np.zeros(schedule.count, bool)
    stops = engine.sampling.stop_strings
    if not stops and busy[held].all():
      return [], halts
    tokens, logprobs = jax.device_get((self.slots.tokens, self.slots.logprobs))
    done = []
    for slot in held:
      n, reason = int(new[slot]), None
      if stops:
        assert engine.decode_text is not None
        stop = first_stop(
            tokens[slot, :n].tolist(), int(self.matched[slot]), stops, engine.decode_text)
        self.matched[slot] = n
        if stop is not None:
          n, reason, halts[slot] = stop, 'stop', busy[slot]
      if reason is None and not busy[slot]:
        last = int(tokens[slot, n - 1])
        reason = ('eos' if last in engine.eos_ids
                  else 'stop' if last in engine.sampling.stop_ids else 'length')
      if reason is None:
        continue
      r = self.requests.pop(int(slot))
      done.append(Sample(
          int(schedule.number[slot]), tokens[slot, :n].tolist(), logprobs[slot, :n].tolist(),
          reason, self.seed, r.key, r.draw, self.step))
      schedule.release(int(slot))
    return done, halts
