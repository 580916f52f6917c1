"""Slots on the device: what each holds, how one is given to a request, and how all decode."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl.models.config import ModelConfig
from jaxrl.models.decoder import logits as decoder_logits
from jaxrl.models.params import Params
from jaxrl.sampling import cache
from jaxrl.sampling.cache import Region
from jaxrl.sampling.draw import draw_tokens, picked_logprob
from jaxrl.sampling.penalties import adjust
from jaxrl.sampling.requests import SamplingConfig
from kernels.decoding import Shared


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Slots:
  """All slots of one part of the mesh; a slot holds one response being drawn."""

  own: Region
  last: jax.Array             # [R] int32, newest token, not yet in the cache
  position: jax.Array         # [R] int32, its position
  new: jax.Array              # [R] int32, response tokens so far
  cap: jax.Array              # [R] int32, most response tokens
  busy: jax.Array             # [R] bool, True while decoding
  key: jax.Array              # [R] uint32, prompt key
  draw: jax.Array             # [R] uint32
  temperature: jax.Array      # [R] float32
  headed: jax.Array           # [R] bool, whether the prompt begins with the header
  row: jax.Array              # [R] int32, of the prompt region; -1 for none
  place: jax.Array            # [R] int32, among the readers of that row
  readers: jax.Array          # [G, m] int32, slots that read each row; R for nobody
  length: jax.Array           # [G] int32, keys of each row
  first: jax.Array            # [G] int32, position of a row's first key
  tokens: jax.Array           # [R, M] int32, response ids
  logprobs: jax.Array         # [R, M] float32
  in_prompt: jax.Array        # [R, V] bool where a penalty needs it, else [R, 0]
  in_response: jax.Array      # [R, V] bool where a penalty needs it, else [R, 0]


ASSIGNED = {                  # what `start` sets per slot
    'last': np.int32, 'position': np.int32, 'cap': np.int32, 'key': np.uint32, 'draw': np.uint32,
    'temperature': np.float32, 'headed': np.bool_}


def empty_slots(
    count: int, rows: int, readers: int, c: ModelConfig, config: SamplingConfig, *,
    own: Region,
) -> Slots:
  """`count` slots, none of them busy, before a prompt region of `rows` with `readers` each."""
  def zeros(kind, *shape):
    return jnp.zeros((count, *shape), kind)

  return Slots(
      own=own, last=zeros(jnp.int32),
      position=zeros(jnp.int32), new=zeros(jnp.int32), cap=zeros(jnp.int32), busy=zeros(bool),
      key=zeros(jnp.uint32), draw=zeros(jnp.uint32), temperature=zeros(jnp.float32),
      headed=zeros(bool), row=zeros(jnp.int32) - 1, place=zeros(jnp.int32),
      readers=jnp.full((rows, readers), count, jnp.int32), length=jnp.zeros(rows, jnp.int32),
      first=jnp.zeros(rows, jnp.int32), tokens=zeros(jnp.int32, config.max_new_tokens),
      logprobs=zeros(jnp.float32, config.max_new_tokens),
      in_prompt=zeros(bool, c.vocab_size if config.remembers_prompt else 0),
      in_response=zeros(bool, c.vocab_size if config.remembers_response else 0))


def start_slots(state: Slots, assign: dict[str, jax.Array]) -> Slots:
  """Gives slots to requests and takes them from those that were stopped.

  assign: `starts`, `halts` [R] bool; ASSIGNED [R]; the tables `row`, `place` [R], `readers`
  [G, m], `length`, `first` [G]; `prompt` [R, P'] int32, the ids of a starting slot's prompt padded
  with the size of the vocabulary, P' = 0 where nothing needs them.
  """
  starts, rows = assign['starts'], jnp.arange(state.last.shape[0], dtype=jnp.int32)
  in_prompt = jnp.where(starts[:, None], False, state.in_prompt)
  in_prompt = in_prompt.at[rows[:, None], assign['prompt']].set(True, mode='drop')
  changed: dict[str, Any] = {
      name: jnp.where(starts, assign[name], getattr(state, name)) for name in ASSIGNED}
  changed |= {name: assign[name] for name in ('row', 'place', 'readers', 'length', 'first')}
  return dataclasses.replace(
      state, **changed, new=jnp.where(starts, 0, state.new),
      busy=(state.busy & ~assign['halts']) | starts, in_prompt=in_prompt,
      in_response=jnp.where(starts[:, None], False, state.in_response))


def halve_slots(state: Slots, kept: jax.Array, readers: jax.Array) -> Slots:
  """The slots `kept` [R'] alone, in that order; `readers` [G, m] has them by their new numbers."""
  shared = ('readers', 'length', 'first')
  slots: dict[str, Any] = {
      f.name: getattr(state, f.name)[kept] for f in dataclasses.fields(state)
      if f.name not in ('own', *shared)}
  own = jax.tree.map(lambda x: x[:, :, kept], state.own)
  return dataclasses.replace(state, own=own, readers=readers, **slots)


def _shared(state: Slots, prompts: Region, header: Region | None, header_length: int):
  """The regions that several slots read: their prompts, and the header of all prompts."""
  regions = [Shared(prompts.k, prompts.v, state.length, state.first, state.readers, state.row,
                    state.place)]
  if header is not None:
    slots = jnp.arange(state.last.shape[0], dtype=jnp.int32)
    regions.append(Shared(
        header.k, header.v, jnp.full((1,), header_length, jnp.int32), jnp.zeros((1,), jnp.int32),
        jnp.where(state.headed & state.busy, slots, slots.shape[0])[None],
        jnp.where(state.headed, 0, -1), slots))
  return tuple(regions)


def decode_slots(
    params: Params, state: Slots, prompts: Region, header: Region | None, seed: jax.Array,
    enough: jax.Array, c: ModelConfig, config: SamplingConfig, eos: tuple[int, ...],
    header_length: int, steps: int,
) -> Slots:
  """Up to `steps` tokens for every busy slot; stops early when `enough` or fewer are busy."""
  rows = jnp.arange(state.last.shape[0], dtype=jnp.int32)
  ends = eos + config.stop_ids
  forced = jnp.array(config.forced_ids, jnp.int32)

  def token_key(key, draw, new):
    folded = jax.random.key(seed)
    for n in (key, draw, new):
      folded = jax.random.fold_in(folded, n)
    return folded

  def one(carry):
    step, s = carry
    hidden, own = cache.decode(
        params, s.last, s.position, s.own, jnp.where(s.busy, s.new + 1, 0),
        _shared(s, prompts, header, header_length), c)
    raw = decoder_logits(params, hidden, c)
    scores = adjust(
        raw, logit_bias=config.logit_bias, repetition_penalty=config.repetition_penalty,
        presence_penalty=config.presence_penalty, min_new_tokens=config.min_new_tokens,
        end_ids=ends, seen_prompt=s.in_prompt, seen_response=s.in_response, new=s.new)
    keys = jax.vmap(token_key)(s.key, s.draw, s.new)
    token = draw_tokens(keys, scores, s.temperature, top_k=config.top_k, top_p=config.top_p,
                        min_p=config.min_p)
    if config.forced_ids:
      token = jnp.where(s.new < forced.size, forced[jnp.minimum(s.new, forced.size - 1)], token)
    at = jnp.where(s.busy, s.new, s.tokens.shape[1])                    # out of range: not written
    new = s.new + s.busy
    ended = functools.reduce(jnp.logical_or, [token == e for e in ends])
    seen = jnp.where(s.busy, token, s.in_response.shape[1])
    return step + 1, dataclasses.replace(
        s, own=own, last=jnp.where(s.busy, token, s.last),
        position=s.position + s.busy, new=new, busy=s.busy & ~ended & (new < s.cap),
        tokens=s.tokens.at[rows, at].set(token, mode='drop'),
        logprobs=s.logprobs.at[rows, at].set(picked_logprob(raw, token), mode='drop'),
        in_response=s.in_response.at[rows, seen].set(True, mode='drop'))

  def more(carry):
    step, s = carry
    return (step < steps) & (jnp.sum(s.busy) > enough[0])

  return jax.lax.while_loop(more, one, (jnp.int32(0), state))[1]
