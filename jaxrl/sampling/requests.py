"""What the rollout engine is asked for, and what it gives back."""

from __future__ import annotations

import dataclasses

from jaxrl.errors import InputError


@dataclasses.dataclass(frozen=True)
class SamplingConfig:
  """How tokens are drawn, for all requests of an engine; the temperature is each request's."""

  max_new_tokens: int
  top_p: float = 1.0
  top_k: int | None = None

  def __post_init__(self):
    if self.max_new_tokens < 1:
      raise InputError('nothing would be sampled', where='--max_new_tokens',
                       expected='at least 1', found=self.max_new_tokens)
    if not 0 < self.top_p <= 1:
      raise InputError('top_p out of range', where='--top_p', expected='in (0, 1]',
                       found=self.top_p)
    if self.top_k is not None and self.top_k < 1:
      raise InputError('top_k out of range', where='--top_k', expected='at least 1',
                       found=self.top_k)


@dataclasses.dataclass(frozen=True)
class Request:
  """One response to draw: which prompt, which draw of it, and how.

  `key` names the prompt in the random stream: (seed, key, draw) decides the response, whatever the
  slot, the batch or the order.
  """

  key: int                    # uint32; e.g. a hash of the prompt id
  draw: int
  prompt_ids: tuple[int, ...]
  temperature: float          # 0 is greedy


@dataclasses.dataclass(frozen=True)
class Sample:
  """A finished response; EOS is among the ids iff it was sampled."""

  request: int                # index into the requests
  response_ids: list[int]
  logprobs: list[float]       # temperature 1, untruncated, one per response id
  finish_reason: str          # 'eos' or 'length'
