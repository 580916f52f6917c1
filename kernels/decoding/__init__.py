"""Decoding attention: one new token per slot over its own keys and those it shares."""

from __future__ import annotations

from collections.abc import Sequence

import jax

from kernels.decoding import blockwise, ref, tpu
from kernels.decoding.cache import Own, Quantised, Shared, quantise
from kernels.decoding.write import write_keys

__all__ = ['Own', 'Quantised', 'Shared', 'decode_attention', 'quantise', 'write_keys']


def _gpu(*arrays, **options) -> jax.Array:
  from kernels.decoding import gpu  # by name only: importing Mosaic GPU takes 1.5 s
  return gpu.decode_attention(*arrays, **options)


IMPLEMENTATIONS = {
    'blockwise': blockwise.decode_attention, 'gpu': _gpu, 'ref': ref.decode_attention,
    'tpu': tpu.decode_attention}


def decode_attention(
    q: jax.Array,             # [R, N, H]
    own: Own,
    shared: Sequence[Shared],
    *,
    layer: jax.Array,         # [] int32, which layer of the caches
    positions: jax.Array,     # [R] int32, of the query tokens
    scale: float,
    window: int | jax.Array | None = None,
    softcap: float | None = None,
    impl: str | None = None,
) -> jax.Array:               # [R, N, H] in q's dtype
  """softmax(scale * q k^T) v over what each slot sees; `ref.decode_attention` defines it.

  `impl=None` is 'tpu' in programs for TPUs where `tpu.is_default` says so, and 'blockwise'
  elsewhere: docs/decoding.md.

  Raises:
    ValueError: no implementation of that name, or the heads or head sizes do not fit together.
  """
  if impl is not None and impl not in IMPLEMENTATIONS:
    known = sorted(IMPLEMENTATIONS)
    raise ValueError(f'unknown decode_attention implementation {impl!r}; known: {known}')
  _check(q, own)
  for region in shared:
    _check(q, region)

  def run(name):
    def call(q, own, shared, layer, positions, window):
      return IMPLEMENTATIONS[name](
          q, own, shared, layer=layer, positions=positions, scale=scale, window=window,
          softcap=softcap)
    return call

  arrays = q, own, tuple(shared), layer, positions, window
  if impl is not None or not tpu.is_default(q, own, shared):
    return run(impl or 'blockwise')(*arrays)
  return jax.lax.platform_dependent(*arrays, tpu=run('tpu'), default=run('blockwise'))


def _check(q: jax.Array, region: Own | Shared) -> None:
  for name, cache in (('k', region.k), ('v', region.v)):
    shape = cache.values.shape if isinstance(cache, Quantised) else cache.shape
    private = isinstance(region, Own)
    fits = len(shape) == (6 if private else 5) and (
        q.shape[1] % shape[-3] == 0 and q.shape[2] == shape[-1])
    if not fits or (private and q.shape[0] != shape[2]):
      raise ValueError(
          f'{type(region).__name__}.{name} of shape {shape} does not fit queries {q.shape}; '
          f'expected {"[L, C, R, K, B, H]" if private else "[L, G, K, P, H]"} with the R and H '
          'of the queries, and K dividing N')
