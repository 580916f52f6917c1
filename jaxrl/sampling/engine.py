"""The rollout engine: slots that decode together on the device and are refilled as they finish.

Two compiled programs per (slots, cache length): `prefill` computes a prompt once and copies its
keys and values into the slots of all its draws; `decode` runs a fixed number of steps on the device
before the host looks. Each device of the mesh owns an equal share of the slots and holds whole
parameters; nothing crosses devices while decoding.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from jaxrl.errors import InputError
from jaxrl.models.config import ModelConfig
from jaxrl.models.decoder import Cache, cast, decode_step, forward, init_cache, logits
from jaxrl.parallel.sharding import ROLLOUT_SLOTS
from jaxrl.sampling.filters import draw_tokens
from jaxrl.sampling.requests import Request, Sample, SamplingConfig


@dataclasses.dataclass(frozen=True)
class EngineConfig:
  """Static shapes of the engine; they change speed, never samples."""

  slots: int = 256            # responses decoded together, over all devices
  cadence: int = 16           # decode steps between looks of the host
  prefill_prompts: int = 16   # prompts computed in one prefill, per device
  prompt_multiple: int = 32   # prompts are padded to a multiple of this
  dtype: str = 'bfloat16'     # of matrix products and of the cache


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Slots:
  """All slots of one device; a slot holds one response being drawn."""

  cache: Cache
  last: jax.Array             # [R] int32, newest token, not yet in the cache
  position: jax.Array         # [R] int32, its position
  new: jax.Array              # [R] int32, response tokens so far
  busy: jax.Array             # [R] bool, True while decoding
  key: jax.Array              # [R] uint32, prompt key
  draw: jax.Array             # [R] uint32
  temperature: jax.Array      # [R] float32
  tokens: jax.Array           # [R, M] int32, response ids
  logprobs: jax.Array         # [R, M] float32


def _empty_slots(c: ModelConfig, slots: int, length: int, max_new: int, dtype) -> Slots:
  def zeros(kind, *shape):
    return jnp.zeros((slots, *shape), kind)

  return Slots(
      cache=init_cache(c, slots, length, dtype), last=zeros(jnp.int32), position=zeros(jnp.int32),
      new=zeros(jnp.int32), busy=zeros(bool), key=zeros(jnp.uint32), draw=zeros(jnp.uint32),
      temperature=zeros(jnp.float32), tokens=zeros(jnp.int32, max_new),
      logprobs=zeros(jnp.float32, max_new))


def _prefill(params, state: Slots, prompts, assign, c: ModelConfig) -> Slots:
  """Computes prompts and starts the slots that asked for them.

  prompts: int32 [G, Tp], right-padded. assign: per slot, `source` [R] (row of `prompts`, or -1 to
  leave the slot alone), `length` [R], `key`, `draw`, `temperature` [R], `last` [R] (the last
  prompt id, which the first decode step feeds).
  """
  _, kept = forward(params, prompts, c, keep_kv=True)
  assert kept is not None
  starts = assign['source'] >= 0                                        # [R]
  source = jnp.where(starts, assign['source'], 0)
  width = prompts.shape[1]

  def place(cache, new):          # [L, R, S, K, H], [L, G, Tp, K, H]
    rows = jnp.where(starts[None, :, None, None, None], new[:, source], cache[:, :, :width])
    return cache.at[:, :, :width].set(rows)

  def start(value, old):
    return jnp.where(starts, value, old)

  return Slots(
      cache=Cache(place(state.cache.k, kept[0]), place(state.cache.v, kept[1])),
      last=start(assign['last'], state.last),
      position=start(assign['length'] - 1, state.position),
      new=start(0, state.new), busy=starts | state.busy,
      key=start(assign['key'], state.key), draw=start(assign['draw'], state.draw),
      temperature=start(assign['temperature'], state.temperature),
      tokens=state.tokens, logprobs=state.logprobs)


def _decode(params, state: Slots, seed, c: ModelConfig, config: SamplingConfig,
            eos: tuple[int, ...], steps: int) -> Slots:
  """Up to `steps` tokens for every busy slot; stops early when none is busy."""
  rows = jnp.arange(state.last.shape[0], dtype=jnp.int32)

  def token_key(key, draw, new):
    folded = jax.random.key(seed)
    for n in (key, draw, new):
      folded = jax.random.fold_in(folded, n)
    return folded

  def one(carry):
    step, s = carry
    hidden, cache = decode_step(params, s.last, s.position, s.cache, c)
    scores = logits(params, hidden, c)
    keys = jax.vmap(token_key)(s.key, s.draw, s.new)
    token, logprob = draw_tokens(
        keys, scores, s.temperature, top_k=config.top_k, top_p=config.top_p)
    at = jnp.where(s.busy, s.new, config.max_new_tokens)                # out of range: not written
    new = s.new + s.busy
    ended = functools.reduce(jnp.logical_or, [token == e for e in eos])
    return step + 1, Slots(
        cache=cache, last=jnp.where(s.busy, token, s.last),
        position=s.position + s.busy, new=new,
        busy=s.busy & ~ended & (new < config.max_new_tokens),
        key=s.key, draw=s.draw, temperature=s.temperature,
        tokens=s.tokens.at[rows, at].set(token, mode='drop'),
        logprobs=s.logprobs.at[rows, at].set(logprob, mode='drop'))

  def more(carry):
    step, s = carry
    return (step < steps) & jnp.any(s.busy)

  return jax.lax.while_loop(more, one, (jnp.int32(0), state))[1]


@dataclasses.dataclass(frozen=True)
class Engine:
  """Compiled-once programs for one model shape, sampling configuration and mesh."""

  empty: Any                 # jitted: () -> slots, none of them busy
  prefill: Any               # jitted: (params, slots, prompts, assignments) -> slots
  decode: Any                # jitted: (params, slots, seed) -> slots
  model: ModelConfig
  sampling: SamplingConfig
  config: EngineConfig
  mesh: jax.sharding.Mesh
  max_prompt: int             # longest prompt, in ids
  eos_ids: tuple[int, ...]
  pad_id: int

  @property
  def slots_per_device(self) -> int:
    return self.config.slots // self.mesh.size

  def compiled_programs(self) -> int:
    """How many programs have been compiled so far; bounded by the number of prompt widths + 2."""
    return sum(program._cache_size() for program in (self.empty, self.prefill, self.decode))


def prompt_widths(max_prompt: int, multiple: int) -> tuple[int, ...]:
  """Padded prompt lengths: `multiple` doubled until the longest prompt fits."""
  widths = [multiple]
  while widths[-1] < max_prompt:
    widths.append(2 * widths[-1])
  return tuple(widths)


def _slot_specs() -> Any:
  """Slots are split over every mesh axis; the cache has them on its second dimension."""
  rows, cache = PartitionSpec(ROLLOUT_SLOTS), PartitionSpec(None, ROLLOUT_SLOTS)
  fields: dict[str, Any] = {f.name: rows for f in dataclasses.fields(Slots)}
  two: Any = (cache, cache)
  return Slots(**(fields | {'cache': Cache(*two)}))


def make_engine(
    model: ModelConfig,
    sampling: SamplingConfig,
    config: EngineConfig,
    mesh: jax.sharding.Mesh,
    *,
    max_prompt: int,
    eos_ids: tuple[int, ...],
    pad_id: int,
) -> Engine:
  """Builds the engine; nothing is compiled until the first `generate`.

  Raises:
    InputError: the slots do not divide over the devices, another size is not positive, no EOS, or
      prompt and response together exceed the positions the model was trained for.
  """
  if config.slots % mesh.size or config.slots < 1:
    raise InputError('slots must divide evenly over the devices', where='--slots',
                     expected=f'a positive multiple of {mesh.size}', found=config.slots)
  for name in ('cadence', 'prefill_prompts', 'prompt_multiple'):
    if getattr(config, name) < 1:
      raise InputError('the engine would never move', where=f'EngineConfig.{name}',
                       expected='at least 1', found=getattr(config, name))
  if not eos_ids:
    raise InputError('no response could ever end', where='tokenizer', expected='an EOS id',
                     found='none')
  if max_prompt + sampling.max_new_tokens > model.max_length:
    raise InputError(
        'prompt and response do not fit into the context of the model', where='--max_new_tokens',
        expected=f'longest prompt + max_new_tokens <= {model.max_length}',
        found=f'{max_prompt} + {sampling.max_new_tokens}',
        fix='Lower --max_new_tokens or --max_prompt_length')
  specs, rows = _slot_specs(), PartitionSpec(ROLLOUT_SLOTS)
  on_slots = functools.partial(jax.shard_map, mesh=mesh, check_vma=False, out_specs=specs)
  prefill = on_slots(functools.partial(_prefill, c=model),
                     in_specs=(PartitionSpec(), specs, rows, rows))
  length = prompt_widths(max_prompt, config.prompt_multiple)[-1] + sampling.max_new_tokens
  empty = on_slots(functools.partial(
      _empty_slots, model, config.slots // mesh.size, length, sampling.max_new_tokens,
      jnp.dtype(config.dtype)), in_specs=())
  decode = on_slots(
      functools.partial(_decode, c=model, config=sampling, eos=eos_ids, steps=config.cadence),
      in_specs=(PartitionSpec(), specs, PartitionSpec()))
  return Engine(
      empty=jax.jit(empty), prefill=jax.jit(prefill, donate_argnums=1),
      decode=jax.jit(decode, donate_argnums=1),
      model=model, sampling=sampling, config=config, mesh=mesh, max_prompt=max_prompt,
      eos_ids=eos_ids, pad_id=pad_id)


def rollout_params(params: dict, mesh: jax.sharding.Mesh, dtype: str) -> dict:
  """Parameters as the engine reads them: in the compute dtype, whole on every device."""
  return _compiled_cast(mesh, dtype)(params)


@functools.cache
def _compiled_cast(mesh: jax.sharding.Mesh, dtype: str) -> Any:
  """One function per mesh and dtype: jit knows compiled programs by the function's identity."""
  whole = jax.sharding.NamedSharding(mesh, PartitionSpec())
  return jax.jit(functools.partial(cast, dtype=jnp.dtype(dtype)), out_shardings=whole)


def _check_requests(engine: Engine, requests: Sequence[Request]) -> None:
  for n, r in enumerate(requests):
    if not r.prompt_ids:
      raise InputError('the prompt has no ids', where=f'request {n}', expected='at least one id')
    if len(r.prompt_ids) > engine.max_prompt:
      raise InputError('the prompt is too long', where=f'request {n}',
                       expected=f'at most {engine.max_prompt} ids', found=len(r.prompt_ids))
    if not 0 <= r.temperature < float('inf'):
      raise InputError('temperature out of range', where=f'request {n}',
                       expected='a finite number >= 0', found=r.temperature)


def _fill(engine: Engine, owner: np.ndarray, pending: collections.deque[int],
          requests: Sequence[Request]) -> tuple[np.ndarray, dict[str, np.ndarray]]:
  """Gives free slots to pending requests; returns the prompts and assignments of one prefill."""
  per_device, devices = engine.slots_per_device, engine.mesh.size
  prompts: list[list[tuple[int, ...]]] = [[] for _ in range(devices)]
  names = ('source', 'length', 'key', 'draw', 'temperature', 'last')
  kinds = (np.int32, np.int32, np.uint32, np.uint32, np.float32, np.int32)
  assign = {name: np.zeros(len(owner), kind) for name, kind in zip(names, kinds, strict=True)}
  assign['source'][:] = -1
  for slot in np.flatnonzero(owner < 0):
    if not pending:
      break
    request = requests[pending[0]]
    held = prompts[slot // per_device]
    if not held or held[-1] != request.prompt_ids:     # draws of one prompt come together
      if len(held) == engine.config.prefill_prompts:
        continue
      held.append(request.prompt_ids)
    owner[slot] = pending.popleft()
    values = (len(held) - 1, len(request.prompt_ids), request.key, request.draw,
              request.temperature, request.prompt_ids[-1])
    for name, value in zip(names, values, strict=True):
      assign[name][slot] = value
  longest = max(len(p) for held in prompts for p in held)
  width = next(w for w in prompt_widths(engine.max_prompt, engine.config.prompt_multiple)
               if w >= longest)
  padded = np.full((devices, engine.config.prefill_prompts, width), engine.pad_id, np.int32)
  for device, held in enumerate(prompts):
    for row, ids in enumerate(held):
      padded[device, row, :len(ids)] = ids
  return padded.reshape(-1, width), assign


def generate(
    engine: Engine, params: dict, requests: Sequence[Request], *, seed: int
) -> Iterator[Sample]:
  """Yields one finished sample per request, in completion order.

  A sample is a function of (params, prompt ids, seed, key, draw) alone. `params` come from
  `rollout_params`. Draws of one prompt should stand together in `requests`: the prompt is then
  computed once for all of them.

  Raises:
    InputError: a prompt is empty or too long, or a temperature out of range; nothing has been
      compiled then.
  """
  _check_requests(engine, requests)
  slots = jax.sharding.NamedSharding(engine.mesh, PartitionSpec(ROLLOUT_SLOTS))
  state = engine.empty()
  seed_array = jax.device_put(
      jnp.uint32(seed), jax.sharding.NamedSharding(engine.mesh, PartitionSpec()))
  owner = np.full(engine.config.slots, -1)
  pending = collections.deque(range(len(requests)))
  refill_at = max(engine.config.slots // 4, 1)
  while pending or (owner >= 0).any():
    while pending and ((owner < 0).sum() >= refill_at or (owner < 0).all()):
      prompts, assign = _fill(engine, owner, pending, requests)
      state = engine.prefill(params, state, *jax.device_put((prompts, assign), slots))
    state = engine.decode(params, state, seed_array)
    busy, new = jax.device_get((state.busy, state.new))
    finished = np.flatnonzero((owner >= 0) & ~busy)
    if finished.size:
      yield from _collect(engine, state, finished, owner[finished], new)
      owner[finished] = -1


def _collect(engine, state, finished, owners, new) -> Iterator[Sample]:
  tokens, logprobs = jax.device_get((state.tokens, state.logprobs))
  for slot, request in zip(finished, owners, strict=True):
    n = int(new[slot])
    ids = tokens[slot, :n].tolist()
    ended = n < engine.sampling.max_new_tokens or ids[-1] in engine.eos_ids
    yield Sample(int(request), ids, logprobs[slot, :n].tolist(), 'eos' if ended else 'length')
