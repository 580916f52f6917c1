"""What every contender of the rollout benchmark is asked for: a checkpoint, prompts, and lengths.

Only the standard library and numpy are imported: contenders live in environments of their own.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

VOCABULARY = 32_000
LLAMA_56M: dict[str, Any] = {       # 56.0M parameters
    'model_type': 'llama', 'hidden_size': 512, 'num_hidden_layers': 8, 'num_attention_heads': 8,
    'num_key_value_heads': 4, 'head_dim': 64, 'intermediate_size': 1376, 'vocab_size': VOCABULARY,
    'max_position_embeddings': 2048, 'tie_word_embeddings': False,
    # Tunix 0.1.7 rotates by this base whatever its configuration says.
    'rope_theta': 1_000_000.0,
}


@dataclasses.dataclass(frozen=True)
class Workload:
  """Prompts, and where each of their samples ends.

  A length stands for an EOS that nobody can foresee: a contender may stop a row once it has that
  many tokens, and may neither sort nor group rows by it.
  """

  prompts: tuple[tuple[int, ...], ...]    # ids
  lengths: tuple[tuple[int, ...], ...]    # per prompt, per draw: response tokens
  max_new_tokens: int                     # no length exceeds it
  top_p: float                            # temperature is 1

  @property
  def useful_tokens(self) -> int:
    return sum(map(sum, self.lengths))

  @property
  def longest_prompt(self) -> int:
    return max(map(len, self.prompts))

  def cut(self, tokens: int) -> Workload:
    """The same shapes with no response longer than `tokens`, to warm up on."""
    lengths = tuple(tuple(min(n, tokens) for n in row) for row in self.lengths)
    return dataclasses.replace(self, lengths=lengths)

  def batches(self, rows: int) -> list[Workload]:
    """Whole prompts in the order given, `rows` samples at a time."""
    step = max(rows // len(self.lengths[0]), 1)
    return [dataclasses.replace(self, prompts=self.prompts[n:n + step],
                                lengths=self.lengths[n:n + step])
            for n in range(0, len(self.prompts), step)]


def make_workload(kind: str, *, prompts: int, draws: int, mean: int, max_new_tokens: int,
                  top_p: float, seed: int) -> Workload:
  """`kind` 'equal': every response has `mean` tokens, and contenders know no response is longer.

  'varied': gamma of shape 2 and that mean, cut to 4..max_new_tokens. Prompts have 40 to 100 ids.
  """
  rng = np.random.default_rng(seed)
  ids = [rng.integers(3, VOCABULARY, rng.integers(40, 101)).tolist() for _ in range(prompts)]
  if kind == 'equal':
    lengths, max_new_tokens = np.full((prompts, draws), mean), mean
  else:
    drawn = rng.gamma(2.0, mean / 2, (prompts, draws))
    lengths = np.clip(np.rint(drawn), 4, max_new_tokens).astype(int)
  return Workload(tuple(map(tuple, ids)), tuple(map(tuple, lengths.tolist())), max_new_tokens,
                  top_p)


def checked(responses: list[list[int]], workload: Workload) -> int:
  """How many useful tokens `responses`, in the order of prompts and draws, hold: all of them.

  Raises:
    ValueError: a response is shorter than its length.
  """
  wanted = [n for row in workload.lengths for n in row]
  for row, (ids, n) in enumerate(zip(responses, wanted, strict=True)):
    if len(ids) < n or not all(0 <= token < VOCABULARY for token in ids[:n]):
      raise ValueError(f'response {row} should have {n} ids, has {len(ids)}')
  return sum(wanted)
