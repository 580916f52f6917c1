"""One gradient rule for all implementations: what the backward pass is given is the same for each.

That is the output and the log-sum-exp of each query, both under the checkpoint name `attn`. The
platform may be chosen inside of the two functions (`by_platform`): it is known when a program is
lowered, not when it is traced, and a conditional that were differentiated would keep what each of
its branches wants.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
from jax.ad_checkpoint import checkpoint_name

from kernels import varying
from kernels.attention.spans import Spans, clipped

SAVED = 'attn'                # checkpoint name of the output and its log-sum-exp


@dataclasses.dataclass(frozen=True)
class Options:
  scale: float
  softcap: float | None


@dataclasses.dataclass(frozen=True)
class Rules:
  """An implementation. `plan` is what it wants of that kind: a `Plan`, or several by name."""

  # (q, k, v, spans, plan, options) -> the output [B, T, N, H], log-sum-exp [B, N, T] float32, which
  # is anything finite for a query that sees nothing
  forward: Callable[..., tuple[jax.Array, jax.Array]]
  # (q, k, v, spans, plan, out, lse, d_out, options) -> dq, dk, dv as q, k and v are
  backward: Callable[..., tuple[jax.Array, jax.Array, jax.Array]]


def attention(
    q: jax.Array,             # [B, T, N, H]
    k: jax.Array,             # [B, S, K, H]
    v: jax.Array,             # [B, S, K, H]
    spans: Spans,             # already clipped to the window
    plan: Any,                # of the same spans
    rules: Rules,
    options: Options,
) -> jax.Array:               # [B, T, N, H]
  """See `kernels.attention.attention`. Under `jax.checkpoint` a policy that saves the name 'attn'
  keeps the forward function from running twice."""
  spans = clipped(spans, k.shape[1])
  # Inside shard_map keys may be whole where queries are split: their gradient is summed out here.
  return _attention(*varying.alike((q, k, v, spans, plan)), rules, options)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def _attention(q, k, v, spans, plan, rules, options):
  return rules.forward(q, k, v, spans, plan, options)[0]


def _forward(q, k, v, spans, plan, rules, options):
  out, lse = rules.forward(q, k, v, spans, plan, options)
  out, lse = checkpoint_name(out, SAVED), checkpoint_name(lse, SAVED)
  return out, (q, k, v, spans, plan, out, lse)


def _backward(rules, options, saved, d_out):
  return (*rules.backward(*saved, d_out, options), None, None)


_attention.defvjp(_forward, _backward)


def by_platform(default: tuple[str, Rules], **others: tuple[str, Rules]) -> Rules:
  """Rules that take those of the platform which the program is lowered for, with its plan.

  Each is a name, by which its plan is found among those given, and rules.
  """
  def chosen(rule: str, arrays, options):
    q, k, v, spans, plans, *rest = arrays

    def branch(name, rules):
      return lambda q, k, v, spans, plans, *rest: getattr(rules, rule)(
          q, k, v, spans, plans[name], *rest, options)

    return jax.lax.platform_dependent(
        q, k, v, spans, plans, *rest, default=branch(*default),
        **{platform: branch(*of) for platform, of in others.items()})

  return Rules(
      lambda *arguments: chosen('forward', arguments[:-1], arguments[-1]),
      lambda *arguments: chosen('backward', arguments[:-1], arguments[-1]))
