"""Log-likelihood of given continuations of a prompt, and of the prompt itself."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxrl.data.batches import TokenRow
from jaxrl.errors import InputError
from jaxrl.models.config import ModelConfig
from jaxrl.training.logps import ComputePolicy
from jaxrl.training.score import score_rows


@dataclasses.dataclass(frozen=True)
class Choices:
  """How likely each continuation of one prompt is."""

  logprobs: tuple[np.ndarray, ...]   # per continuation [ids] float32, temperature 1

  @property
  def sums(self) -> list[float]:
    """log p(continuation | prompt)."""
    return [float(np.sum(x, dtype=np.float64)) for x in self.logprobs]

  @property
  def means(self) -> list[float]:
    """The same per token, so that length does not decide."""
    return [total / len(x) for total, x in zip(self.sums, self.logprobs, strict=True)]

  @property
  def best_by_sum(self) -> int:
    """The likeliest continuation; the first of equals."""
    return int(np.argmax(self.sums))

  @property
  def best_by_mean(self) -> int:
    """The likeliest one per token; the first of equals."""
    return int(np.argmax(self.means))


def score_choices(
    params: dict,
    prompts: Sequence[Sequence[int]],
    choices: Sequence[Sequence[Sequence[int]]],
    c: ModelConfig,
    policy: ComputePolicy,
    **options: Any,
) -> list[Choices]:
  """Scores continuations: `choices[k]` are those of `prompts[k]`, as ids.

  Args:
    options: `mesh`, `lengths`, `batch_size`, `pad_id` and `on_rows` of `score_rows`.

  Raises:
    InputError: a prompt without choices, a choice or a prompt without ids, or one that is too long.
  """
  rows = []
  for number, (prompt, own) in enumerate(zip(prompts, choices, strict=True)):
    if not own or not all(own):
      raise InputError('there is nothing to score', where=f'prompt {number}',
                       expected='continuations of at least one id each',
                       found=f'{len(own)}, of {", ".join(str(len(each)) for each in own)} ids'
                       if own else 'none')
    rows += [TokenRow(prompt, each) for each in own]
  scored = iter(score_rows(params, rows, c, policy, **options))
  return [Choices(tuple(itertools.islice(scored, len(own)))) for own in choices]


def prompt_logprobs(
    params: dict,
    prompts: Sequence[Sequence[int]],
    c: ModelConfig,
    policy: ComputePolicy,
    **options: Any,
) -> list[np.ndarray]:
  """Per prompt the log-prob of each of its ids but the first, float32.

  Args:
    options: as in `score_choices`.
  """
  rows = [TokenRow(prompt[:1], prompt[1:]) for prompt in prompts]
  return score_rows(params, rows, c, policy, **options)
