"""Logits changed before the filters: biases, penalties on what was said, ends kept off."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from jaxrl.errors import InputError


def adjust(
    logits: jax.Array,        # [R, V] float32
    *,
    logit_bias: Sequence[tuple[int, float]] = (),   # (id, what is added to its logit); -inf bans
    repetition_penalty: float = 1.0,
    presence_penalty: float = 0.0,
    min_new_tokens: int = 0,
    end_ids: Sequence[int] = (),
    seen_prompt: jax.Array | None = None,     # [R, V] bool, True for ids of the prompt
    seen_response: jax.Array | None = None,   # [R, V] bool, True for ids of the response so far
    new: jax.Array | None = None,             # [R] int32, response tokens so far
) -> jax.Array:               # [R, V] float32
  """Applies what is not at its default, in the order of transformers; the rest costs nothing.

  - `logit_bias` is added.
  - `repetition_penalty` p: logits of ids in the prompt or the response are divided by p where
    positive and multiplied by p where negative (Keskar et al. 2019, as in transformers).
  - `presence_penalty` is subtracted once from logits of ids in the response.
  - `end_ids` are banned from rows with fewer than `min_new_tokens` response tokens.

  Arrays are needed only where a setting reads them. `check` refuses settings that leave no token.
  """
  vocabulary = logits.shape[-1]
  if logit_bias:
    ids, values = zip(*logit_bias, strict=True)
    bias = jnp.zeros((vocabulary,), jnp.float32).at[jnp.asarray(ids)].add(jnp.asarray(values))
    logits = logits + bias[None]
  if repetition_penalty != 1:
    assert seen_prompt is not None and seen_response is not None, 'repetition_penalty reads both'
    penalised = jnp.where(logits > 0, logits / repetition_penalty, logits * repetition_penalty)
    logits = jnp.where(seen_prompt | seen_response, penalised, logits)
  if presence_penalty != 0:
    assert seen_response is not None, 'presence_penalty reads the response'
    logits = logits - jnp.where(seen_response, jnp.float32(presence_penalty), 0.0)
  if min_new_tokens > 0:
    assert new is not None, 'min_new_tokens reads the number of response tokens'
    ends = jnp.zeros((vocabulary,), bool).at[jnp.asarray(end_ids)].set(True)
    logits = jnp.where((new < min_new_tokens)[:, None] & ends[None], -jnp.inf, logits)
  return logits


def check(
    vocabulary: int,
    *,
    logit_bias: Sequence[tuple[int, float]],
    min_new_tokens: int,
    end_ids: Sequence[int],
) -> None:
  """Refuses biases that do not fit the vocabulary.

  Raises:
    InputError: an id that is not in the vocabulary, or every token banned.
  """
  unknown = [id for id, _ in logit_bias if not 0 <= id < vocabulary]
  if unknown:
    raise InputError('the vocabulary has no such token', where='--logit_bias',
                     expected=f'0 to {vocabulary - 1}', found=unknown[0])
  banned = {id for id, value in logit_bias if value == -float('inf')}
  if min_new_tokens > 0:
    banned |= {*end_ids}
  if len(banned) == vocabulary:
    raise InputError('every token is banned', where='--logit_bias',
                     expected='at least one token that can be drawn', found=f'{vocabulary} banned',
                     fix='Ban fewer tokens, or lower --min_new_tokens')
