"""FLOPs of the decoder by formula, from its configuration and the lengths of the rows.

A product of [m, k] by [k, n] is 2 m k n. Counted are matrix products alone; the embedding is looked
up and costs nothing; the output matrix is met at positions that are scored; padding is no work.
XLA's own cost analysis cannot serve: it counts the body of a scan once.

Attention is counted in two conventions, which differ by up to a factor of 2 in it: `causal`, the
keys that a query sees; `full`, every key of its sequence (Chowdhery et al. 2022, appendix B), as
many published figures have it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from jaxrl.models.config import ModelConfig
from jaxrl.models.decoder import REMAT
from jaxrl.models.lora import lora_specs
from jaxrl.models.params import is_spec, layer_specs

# Dense bfloat16 TFLOP/s of a device by its `device_kind`.
PEAK_TFLOPS = {
    'TPU v5 lite': 197.0,             # cloud.google.com/tpu/docs/v5e
    'TPU v5e': 197.0,
    'TPU v5': 459.0,                  # cloud.google.com/tpu/docs/v5p
    'TPU v5p': 459.0,
    'TPU v6 lite': 918.0,             # cloud.google.com/tpu/docs/v6e
    'TPU v6e': 918.0,
    'NVIDIA H100 80GB HBM3': 989.0,   # NVIDIA H100 data sheet, SXM, without sparsity
    'NVIDIA H200': 989.0,             # NVIDIA H200 data sheet, SXM, without sparsity
}


@dataclasses.dataclass(frozen=True)
class Segments:
  """Tokens of one row that belong together: a prefix stored once, and what continues it.

  A plain sequence has no prefix and one segment. Each segment sees the prefix and itself.
  """

  prefix: int
  segments: tuple[int, ...]
  scored: int                 # positions that the output matrix is applied to

  @property
  def tokens(self) -> int:
    return self.prefix + sum(self.segments)


@dataclasses.dataclass(frozen=True)
class Flops:
  """FLOPs by where they arise; the two attentions are conventions, of which one is counted."""

  matrices: float = 0.0       # projections, MLP or chosen experts, router
  adapter: float = 0.0
  head: float = 0.0
  causal: float = 0.0         # attention, over keys that are seen
  full: float = 0.0           # attention, over all keys of a sequence

  def __add__(self, other: Flops) -> Flops:
    return Flops(*(a + b for a, b in zip(dataclasses.astuple(self), dataclasses.astuple(other))))

  def total(self) -> tuple[float, float]:
    """(causal, full)."""
    rest = self.matrices + self.adapter + self.head
    return rest + self.causal, rest + self.full


def plain_row(length: int, scored: int) -> Segments:
  """A sequence of `length` tokens, by itself in its row or packed beside others."""
  return Segments(0, (length,), scored)


def units_of(batch: Mapping[str, np.ndarray]) -> list[Segments]:
  """What a batch holds, of padded rows (`data.batches`) or packed ones (`data.packing`).

  Scored positions of packed units are all put on the first, for only their sum is known.
  """
  mask = np.asarray(batch['mask'], bool)
  if 'end' in batch:
    return _packed_units(batch, int(mask.sum()))
  flat = mask.reshape(-1, mask.shape[-1])      # a padded row ends with its last response token
  lengths = np.max(np.where(flat, np.arange(1, flat.shape[1] + 1), 0), axis=1)
  return [plain_row(int(n), int(s)) for n, s in zip(lengths, flat.sum(axis=1), strict=True)]


def _packed_units(batch: Mapping[str, np.ndarray], scored: int) -> list[Segments]:
  """Units from the keys that each token sees; tokens that see alike are of one segment."""
  units = []
  for row in range(len(batch['end'])):
    real = batch['end'][row] > 0
    bounds = np.stack([batch[name][row][real] for name in ('prefix_start', 'prefix_end', 'start')])
    pieces, counts = np.unique(bounds, axis=1, return_counts=True)
    found: dict[int, tuple[int, list[int]]] = {}     # where a unit starts -> prefix, segments
    for (first, last, start), n in zip(pieces.T.tolist(), counts.tolist(), strict=True):
      if last > first:
        found.setdefault(first, (last - first, []))[1].append(n)
      else:
        found.setdefault(start, (n, []))
    units += [(p, s) if s else (0, [p]) for p, s in found.values()]
  return [Segments(p, tuple(s), 0 if k else scored) for k, (p, s) in enumerate(units)]


def layer_weights(c: ModelConfig) -> int:
  """Weights of one layer's matrices that each token meets: of a mixture, the chosen experts'."""
  total = 0
  for name, s in layer_specs(c).items():
    if s.summed:
      count = math.prod(s.shape)
      if c.experts is not None and name.startswith('expert_'):
        count = count // c.experts.count * c.experts.per_token
      total += count
  return total


def adapter_weights(c: ModelConfig) -> int:
  """Weights of the adapters of one layer; 0 without."""
  if c.lora is None:
    return 0
  return sum(math.prod(s.shape[1:]) for s in _leaves(lora_specs(c)))


def visible_keys(unit: Segments, window: int | None, *, causal: bool) -> int:
  """Sum over queries of the keys each sees in one layer; all of its sequence unless `causal`.

  With a window a query sees at most so many keys, itself included.
  """
  p = unit.prefix
  if not causal:
    def capped(keys):
      return keys if window is None else min(keys, window)
    return p * capped(p) + sum(s * capped(p + s) for s in unit.segments)
  total = _causal(p, window)
  for s in unit.segments:
    total += _causal(s, window)
    if window is None:
      total += p * s
    else:   # min(p, window - q) keys of the prefix are left to the q-th query
      total += _causal(window - 1, p) - _causal(window - 1 - min(s, window), p)
  return total


def forward_flops(c: ModelConfig, units: Iterable[Segments]) -> Flops:
  """One forward pass over these units, with log-probs at their scored positions."""
  units = list(units)
  tokens, scored = sum(u.tokens for u in units), sum(u.scored for u in units)
  windows = c.windows or (None,) * c.n_layers
  # Scores and their weighted sum of values: two products of d_head per query, key and head.
  per_key = 4 * c.n_heads * c.d_head

  def attention(causal: bool) -> float:
    by_window = {w: sum(visible_keys(u, w, causal=causal) for u in units) for w in set(windows)}
    return float(per_key * sum(by_window[w] for w in windows))

  return Flops(
      matrices=2.0 * tokens * c.n_layers * layer_weights(c),
      adapter=2.0 * tokens * c.n_layers * adapter_weights(c),
      head=2.0 * scored * c.d_model * c.vocab_size,
      causal=attention(True), full=attention(False))


def train_flops(c: ModelConfig, units: Iterable[Segments]) -> Flops:
  """Model FLOPs of a forward and backward pass over these units.

  The backward pass has two products for each of the forward pass, one for the inputs and one for
  the weights; with an adapter (`c.lora`) the frozen matrices and the output matrix have only the
  first.
  """
  f = forward_flops(c, units)
  frozen = 2 if c.lora is not None else 3
  return Flops(frozen * f.matrices, 3 * f.adapter, frozen * f.head, 3 * f.causal, 3 * f.full)


def recompute_flops(c: ModelConfig, units: Sequence[Segments], remat: str) -> Flops:
  """What the hardware computes besides `train_flops` because it was not kept.

  Under every policy `remat` of `decoder.REMAT`: logits in the backward pass of the log-probs, and
  scores in that of attention. All of a layer's products besides, but those whose results are kept
  or read by nothing.
  """
  f = forward_flops(c, units)
  always = Flops(head=f.head, causal=f.causal / 2, full=f.full / 2)
  if remat == 'all':
    return always
  kept, parked = REMAT[remat]
  spared, spared_adapter = _spared_weights(c, {*kept, *parked})
  uses = 2.0 * sum(u.tokens for u in units) * c.n_layers
  again = Flops(f.matrices - uses * spared, f.adapter - uses * spared_adapter)
  if 'attn' not in {*kept, *parked}:
    again += Flops(causal=f.causal, full=f.full)
  return always + again


def peak_tflops(device_kind: str) -> float | None:
  """Dense bfloat16 TFLOP/s of a device, from `jax.Device.device_kind`; None if not known."""
  return PEAK_TFLOPS.get(device_kind)


def _causal(n: int, window: int | None) -> int:
  """Sum of min(q, window) for q from 1 to n."""
  w = n if window is None else min(window, n)
  return w * (w + 1) // 2 + (n - w) * w


def _spared_weights(c: ModelConfig, kept: set[str]) -> tuple[int, int]:
  """Weights of a layer (of the model, of its adapter) whose products are not computed again.

  A product followed by a norm is read by the norm's own backward pass, and the outputs of experts
  by that of the weights they are added with.
  """
  names = {'v', 'gate', 'up'} & kept
  if c.qk_norm == 'none':
    names |= {'q', 'k'} & kept
  if c.norm_placement == 'before':
    names |= {'down', 'o'} if 'mid' in kept else {'down'}
  layer = layer_specs(c)
  names &= set(layer)         # experts have no gate, up and down of these names
  spared = sum(math.prod(layer[name].shape) for name in names)
  if c.lora is None:
    return spared, 0
  adapters = lora_specs(c)['layers']   # x A is read by the gradient of B
  return spared, sum(
      math.prod(adapters[name]['b'].shape[1:]) for name in names if name in adapters)


def _leaves(specs) -> list:
  if is_spec(specs):
    return [specs]
  return [leaf for child in specs.values() for leaf in _leaves(child)]
