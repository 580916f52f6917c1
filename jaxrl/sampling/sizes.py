"""Sizes of the rollout engine: static shapes, which change speed and not tokens."""

from __future__ import annotations

import dataclasses
import math

KEY_BLOCK = 64                # keys of a slot are stored and read in blocks, see kernels.decoding


@dataclasses.dataclass(frozen=True)
class EngineConfig:
  """Sizes of the engine; they change speed, not tokens.

  But for `kv_cache='int8'` with `chunk`: later chunks see what earlier ones stored, rounded.
  """

  slots: int | None = None    # responses decoded together, over all devices; None: see `memory`
  cadence: int = 16           # at most so many decode steps between looks of the host
  prefill_tokens: int = 512   # tokens computed in one prefill, per part of the mesh
  prompt_multiple: int = 32   # prompts are padded to this, doubled as often as needed
  chunk: int = 512            # longer prompts are computed in chunks of this
  tensor: int | None = None   # devices that share one copy of the parameters; None: as in training
  dtype: str = 'bfloat16'     # of matrix products and of the cache
  shrink: bool = False        # use fewer slots when few responses are left; compiles for each
  kv_cache: str = 'dtype'     # 'dtype', or 'int8' with one scale per key


def prompt_widths(longest: int, config: EngineConfig) -> tuple[int, ...]:
  """Padded lengths of a chunk: the multiple, doubled until the longest fits, at most `chunk`."""
  widths = [min(config.prompt_multiple, config.chunk)]
  while widths[-1] < min(longest, config.chunk):
    widths.append(min(2 * widths[-1], config.chunk))
  return tuple(widths)


def region_length(longest: int, config: EngineConfig) -> int:
  """Keys in a row of the prompt region: whole chunks where a prompt may have several."""
  if longest <= config.chunk:
    return prompt_widths(longest, config)[-1]
  return math.ceil(longest / config.chunk) * config.chunk


def prompt_rows(slots: int, readers: int) -> int:
  """Rows of the prompt region: twice what full slots need, for prompts with few draws left."""
  return slots if readers == 1 else min(slots, 2 * math.ceil(slots / readers) + 1)
