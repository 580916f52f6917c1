"""What the rollout engine is asked for, and what it gives back."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any

from jaxrl.errors import InputError


@dataclasses.dataclass(frozen=True)
class SamplingConfig:
  """How tokens are drawn, for all requests of an engine; the temperature is each request's.

  Filters apply in the order temperature, top_k, top_p, min_p, after penalties and biases; recorded
  log-probs are those before all of them, at temperature 1.

  Raises:
    InputError: a setting out of range, or two that contradict each other.
  """

  max_new_tokens: int
  top_p: float = 1.0                    # 0 keeps the most probable token alone
  top_k: int | None = None
  min_p: float = 0.0                    # of the largest probability
  min_new_tokens: int = 0               # no EOS and no stop id is drawn before
  repetition_penalty: float = 1.0       # on tokens of prompt and response (Keskar et al. 2019)
  presence_penalty: float = 0.0         # subtracted once from tokens of the response
  logit_bias: tuple[tuple[int, float], ...] = ()    # added; -inf bans a token
  stop_ids: tuple[int, ...] = ()        # end a response as EOS does, with reason 'stop'
  stop_strings: tuple[str, ...] = ()    # end a response at the token that completes one of them
  forced_ids: tuple[int, ...] = ()      # every response begins with these

  def __post_init__(self):
    def refuse(problem: str, flag: str, expected: str, found: Any):
      raise InputError(problem, where=f'--{flag}', expected=expected, found=found)

    if self.max_new_tokens < 1:
      refuse('nothing would be sampled', 'max_new_tokens', 'at least 1', self.max_new_tokens)
    for name, value in (('top_p', self.top_p), ('min_p', self.min_p)):
      if not 0 <= value <= 1:
        refuse(f'{name} out of range', name, 'in [0, 1]', value)
    if self.top_k is not None and self.top_k < 1:
      refuse('top_k out of range', 'top_k', 'at least 1', self.top_k)
    if not 0 <= self.min_new_tokens <= self.max_new_tokens:
      refuse('min_new_tokens out of range', 'min_new_tokens',
             f'from 0 to --max_new_tokens={self.max_new_tokens}', self.min_new_tokens)
    if not 0 < self.repetition_penalty < math.inf:
      refuse('the penalty cannot be used', 'repetition_penalty', 'a positive number',
             self.repetition_penalty)
    if not math.isfinite(self.presence_penalty):
      refuse('the penalty cannot be used', 'presence_penalty', 'a finite number',
             self.presence_penalty)
    ids = [token for token, _ in self.logit_bias]
    if len({*ids}) < len(ids) or any(
        math.isnan(bias) or bias == math.inf for _, bias in self.logit_bias):
      refuse('the biases cannot be used', 'logit_bias',
             'each token once, with a finite number or -inf', self.logit_bias)
    if '' in self.stop_strings:
      refuse('every response would stop at once', 'stop', 'strings that are not empty', "''")
    if len(self.forced_ids) >= self.max_new_tokens:
      refuse('the forced prefix leaves nothing to draw', 'forced_prefix',
             f'fewer than --max_new_tokens={self.max_new_tokens} tokens', len(self.forced_ids))
    if {*self.forced_ids} & {*self.stop_ids}:
      refuse('the forced prefix holds a stop token', 'forced_prefix', 'none of --stop_token_ids',
             sorted({*self.forced_ids} & {*self.stop_ids}))

  @property
  def remembers_prompt(self) -> bool:
    """Whether logits depend on which tokens the prompt has."""
    return self.repetition_penalty != 1

  @property
  def remembers_response(self) -> bool:
    """Whether logits depend on which tokens the response has so far."""
    return self.repetition_penalty != 1 or self.presence_penalty != 0


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
  max_new_tokens: int | None = None    # of this response; None: the engine's
  expected_tokens: int | None = None   # a guess, for scheduling alone: long ones start early


@dataclasses.dataclass(frozen=True)
class Sample:
  """A finished response; EOS is among the ids iff it was sampled."""

  request: int                # place among the requests
  response_ids: list[int]
  logprobs: list[float]       # temperature 1, untruncated, one per response id
  finish_reason: str          # 'eos', 'stop' or 'length'
  seed: int
  key: int
  draw: int
  step: int | None            # of the parameters, as `generate` was told


def requests_for(
    prompts: Sequence[Sequence[int]], n: int, *, temperature: float, keys: Sequence[int]
) -> Iterator[Request]:
  """`n` draws of every prompt, those of a prompt together.

  Raises:
    InputError: n is not positive.
  """
  if n < 1:
    raise InputError('nothing would be sampled', where='--n', expected='at least 1', found=n)
  for ids, key in zip(prompts, keys, strict=True):
    for draw in range(n):
      yield Request(key, draw, tuple(ids), temperature)
