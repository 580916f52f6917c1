"""The rollout engine: its sizes, its compiled programs, and what it refuses.

Programs, all of static shapes: `first_chunk` and `next_chunk` compute a part of some prompts into
the prompt region, one program per padded width; `start` gives slots to requests; `decode` runs many
steps on the device before the host looks. The mesh is ('data', 'tensor'): each part of `data` has
slots and prompts of its own, and nothing but partial sums over `tensor` crosses devices.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from jaxrl.errors import InputError
from jaxrl.models.config import ModelConfig
from jaxrl.parallel.mesh import rollout_mesh
from jaxrl.sampling import cache, penalties
from jaxrl.sampling.cache import empty_region
from jaxrl.sampling.memory import choose_slots
from jaxrl.sampling.requests import SamplingConfig
from jaxrl.sampling.rollout_params import rollout_specs
from jaxrl.sampling.sizes import KEY_BLOCK, EngineConfig, prompt_rows, region_length
from jaxrl.sampling.slots import (
    Slots,
    decode_slots,
    empty_slots,
    halve_slots,
    start_slots,
)
from jaxrl.sampling.stop_strings import DecodeText


@dataclasses.dataclass(frozen=True)
class Engine:
  """Compiled-once programs for one model shape, sampling configuration and mesh."""

  empty: Any                 # readers -> jitted: () -> (slots, none of them busy; prompt region)
  header: Any                # jitted: (params, tokens [n, 1, chunk]) -> region of one row
  first_chunk: Any           # jitted: (params, prompts, header, *chunk) -> prompts
  next_chunk: Any            # jitted: the same, where a chunk has come before
  start: Any                 # jitted: (slots, assignments) -> slots
  halve: Any                 # jitted: (slots, kept, readers) -> half as many slots
  decode: Any                # jitted: (params, slots, prompts, header, seed, enough) -> slots
  model: ModelConfig
  sampling: SamplingConfig
  config: EngineConfig
  mesh: jax.sharding.Mesh     # ('data', 'tensor')
  max_prompt: int             # longest prompt, in ids
  eos_ids: tuple[int, ...]
  pad_id: int
  header_ids: tuple[int, ...]
  decode_text: DecodeText | None
  sizes: str                  # in a sentence: how many slots, and why so many

  @property
  def parts(self) -> int:
    """How many parts of the mesh have slots of their own."""
    return self.mesh.shape['data']

  @property
  def slots_per_part(self) -> int:
    assert self.config.slots is not None, 'make_engine has chosen'
    return self.config.slots // self.parts

  def prompt_rows(self, readers: int) -> int:
    """Rows of the prompt region of each part where up to `readers` slots read one."""
    return prompt_rows(self.slots_per_part, readers)

  def compiled_programs(self) -> int:
    """How many programs have been compiled so far.

    At most (number of `prompt_widths` + 4) for each number of readers in use, which is a power of
    two, and one for the header. With `EngineConfig.shrink` two more for every halving.
    """
    programs = (self.header, self.first_chunk, self.next_chunk, self.start, self.halve, self.decode)
    return self.empty.cache_info().currsize + sum(program._cache_size() for program in programs)


def make_engine(
    model: ModelConfig,
    sampling: SamplingConfig,
    config: EngineConfig,
    mesh: jax.sharding.Mesh,
    *,
    max_prompt: int,
    eos_ids: tuple[int, ...],
    pad_id: int,
    header: Sequence[int] = (),
    decode_text: DecodeText | None = None,
    draws: int = 1,
    requests: int | None = None,
    held: int = 0,
) -> Engine:
  """Builds the engine; nothing is compiled until the first `generate`.

  Args:
    mesh: that of training; the engine uses the same devices as ('data', 'tensor'), or those of
      them that are this process's own.
    max_prompt: longest prompt in ids, the header included.
    header: ids that many prompts begin with (a few-shot header, a judge's instructions), computed
      and stored once per `generate`. A prompt that begins otherwise is computed whole.
    decode_text: ids to text; needed where there are stop strings.
    draws: of each prompt, and `requests` in all, as far as they are known; a number of slots that
      is not given is chosen by them and the memory at hand.
    held: bytes of that memory, per device, that something else will take: parameters in training
      that are not there yet.

  Raises:
    InputError: the slots do not divide over the devices, another size is not positive, no EOS,
      settings that contradict each other or the vocabulary, a model that does not divide over
      `tensor`, or prompt and response together exceed the positions the model was trained for.
  """
  mesh, header = rollout_mesh(mesh, config.tensor), tuple(header)
  _check_sizes(model, sampling, config, mesh, max_prompt, header)
  sizes = f'{config.slots} slots, as asked'
  if config.slots is not None:
    config = dataclasses.replace(config, slots=config.slots // jax.process_count())
  else:
    if requests is not None:
      requests = -(-requests // jax.process_count())
    choice = choose_slots(model, sampling, config, mesh, max_prompt=max_prompt, draws=draws,
                          requests=requests, held=held)
    config, sizes = dataclasses.replace(config, slots=choice.slots), choice.why
  _check_tokens(model, sampling, eos_ids, decode_text)
  spec, tensor = PartitionSpec, 'tensor' if mesh.shape['tensor'] > 1 else None
  rows = spec('data')
  prompts, own = spec(None, 'data', tensor), spec(None, None, 'data', tensor)
  shared_header = spec(None, None, tensor) if header else spec()
  places: dict[str, Any] = {f.name: rows for f in dataclasses.fields(Slots)} | {'own': own}
  slots: Any = Slots(**places)
  mapped = functools.partial(jax.shard_map, mesh=mesh, check_vma=False)

  def jit(program, out_specs, **options):
    # Said outright, as else each program has its own way to say where the same thing lies, and
    # what comes of one is compiled for anew by the next.
    shardings = jax.tree.map(lambda s: jax.NamedSharding(mesh, s), out_specs,
                             is_leaf=lambda s: isinstance(s, PartitionSpec))
    return jax.jit(program, out_shardings=shardings, **options)

  region = functools.partial(empty_region, model, dtype=jnp.dtype(config.dtype),
                             quantised=config.kv_cache == 'int8')
  heads = model.n_kv // mesh.shape['tensor']
  assert config.slots is not None
  per_part = config.slots // mesh.shape['data']

  def with_params(program, *, in_specs, out_specs):
    """`program` on every device; how parameters are split shows in their tree."""
    def run(params, *arguments):
      specs = (rollout_specs(params, model, mesh), *in_specs)
      return mapped(program, in_specs=specs, out_specs=out_specs)(params, *arguments)

    return run

  @functools.cache
  def empty(readers: int):
    def make():
      count = prompt_rows(per_part, readers)
      own = region((math.ceil(sampling.max_new_tokens / KEY_BLOCK), per_part, heads, KEY_BLOCK))
      made = empty_slots(per_part, count, readers, model, sampling, own=own)
      return made, region((count, heads, region_length(max_prompt - 1, config)))

    return jit(mapped(make, in_specs=(), out_specs=(slots, prompts)), (slots, prompts))

  def chunk(continues: bool):
    part = functools.partial(cache.prefill, c=model, continues=continues)
    return jit(
        with_params(part, in_specs=(prompts, shared_header, rows, rows, rows, rows, spec()),
                    out_specs=prompts), prompts, donate_argnums=1)

  def compute_header(weights, tokens):
    length = tokens.shape[0] * tokens.shape[2]
    return cache.compute_header(weights, region((1, heads, length)), tokens, model)

  decode = with_params(
      functools.partial(decode_slots, c=model, config=sampling, eos=eos_ids,
                        header_length=len(header), steps=config.cadence),
      in_specs=(slots, prompts, shared_header, spec(), rows), out_specs=slots)
  return Engine(
      empty=empty,
      header=jit(with_params(compute_header, in_specs=(spec(),), out_specs=shared_header),
                 shared_header),
      first_chunk=chunk(False), next_chunk=chunk(True),
      start=jit(mapped(start_slots, in_specs=(slots, rows), out_specs=slots), slots,
                donate_argnums=0),
      halve=jit(mapped(halve_slots, in_specs=(slots, rows, rows), out_specs=slots), slots),
      decode=jit(decode, slots, donate_argnums=1), model=model, sampling=sampling, config=config,
      mesh=mesh, max_prompt=max_prompt, eos_ids=eos_ids, pad_id=pad_id, header_ids=header,
      decode_text=decode_text, sizes=sizes)


def _check_sizes(
    model: ModelConfig, sampling: SamplingConfig, config: EngineConfig, mesh: jax.sharding.Mesh,
    max_prompt: int, header: tuple[int, ...],
) -> None:
  parts, tensor = mesh.shape['data'] * jax.process_count(), mesh.shape['tensor']
  if config.slots is not None and (config.slots % parts or config.slots < 1):
    raise InputError('slots must divide evenly over the devices', where='--slots',
                     expected=f'a positive multiple of {parts}', found=config.slots)
  for name in ('cadence', 'prefill_tokens', 'prompt_multiple', 'chunk'):
    if getattr(config, name) < 1:
      raise InputError('the engine would never move', where=f'EngineConfig.{name}',
                       expected='at least 1', found=getattr(config, name))
  if config.kv_cache not in ('dtype', 'int8'):
    raise InputError('unknown kind of cache', where='--kv_cache', expected="'dtype' or 'int8'",
                     found=config.kv_cache)
  if model.n_kv % tensor or model.d_mlp % tensor:
    raise InputError(
        'the model cannot be split over so many devices',
        where='--rollout_tensor, or the tensor axis of --mesh',
        expected=f'a divisor of {model.n_kv} key heads and {model.d_mlp} columns', found=tensor)
  if max_prompt + sampling.max_new_tokens > model.max_length:
    raise InputError(
        'prompt and response do not fit into the context of the model', where='--max_new_tokens',
        expected=f'longest prompt + max_new_tokens <= {model.max_length}',
        found=f'{max_prompt} + {sampling.max_new_tokens}',
        fix='Lower --max_new_tokens or --max_prompt_length')
  if header and len(header) >= max_prompt:
    raise InputError('nothing of a prompt would be left after the header', where='header',
                     expected=f'fewer than {max_prompt} ids', found=len(header))


def _check_tokens(
    model: ModelConfig, sampling: SamplingConfig, eos_ids: tuple[int, ...],
    decode_text: DecodeText | None,
) -> None:
  if not eos_ids:
    raise InputError('no response could ever end', where='tokenizer', expected='an EOS id',
                     found='none')
  if sampling.stop_strings and decode_text is None:
    raise InputError('stop strings are matched on text', where='--stop',
                     expected='an engine that can decode', found='none')
  for name, ids in (('stop_token_ids', sampling.stop_ids),
                    ('forced_prefix', sampling.forced_ids)):
    for token in ids:
      if not 0 <= token < model.vocab_size:
        raise InputError('the vocabulary has no such token', where=f'--{name}',
                         expected=f'0 to {model.vocab_size - 1}', found=token)
  if {*eos_ids} & {*sampling.forced_ids}:
    raise InputError('the forced prefix would end the response', where='--forced_prefix',
                     expected='no EOS id', found=sorted({*eos_ids} & {*sampling.forced_ids}))
  penalties.check(
      model.vocab_size, logit_bias=sampling.logit_bias, min_new_tokens=sampling.min_new_tokens,
      end_ids=(*sampling.stop_ids, *(e for e in eos_ids if e < model.vocab_size)))
