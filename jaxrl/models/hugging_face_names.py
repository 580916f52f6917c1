"""The name and layout of every tensor of a checkpoint, one table per family.

A layout such as 'dnh->(nh)d' reads: our dimensions d, n, h are stored as a matrix with rows n * h
and columns d. Checkpoints hold one tensor per layer and expert where we hold one array for all;
'{layer}' and '{expert}' in a name stand for those leading axes, which layouts leave out. A row
that the configuration has no weight for is passed over. The order of the rows is the one in which
transformers fills shards.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping


@dataclasses.dataclass(frozen=True)
class Stored:
  """Where one parameter lies in a checkpoint."""

  name: str
  layout: str
  # Ours that make up one tensor, in their order along its first dimension.
  fused: tuple[str, ...] = ()


LAYER = 'model.layers.{layer}'
EXPERT = f'{LAYER}.block_sparse_moe.experts.{{expert}}'                  # Mixtral
FUSED_QKV = ('layers/q', 'layers/k', 'layers/v')
FUSED_MLP = ('layers/gate', 'layers/up')

BEGIN = {'embedding': Stored('model.embed_tokens.weight', 'vd->vd')}
END = {
    'final_norm': Stored('model.norm.weight', 'd->d'),
    'head': Stored('lm_head.weight', 'dv->vd'),
}
ATTENTION = {
    'layers/q': Stored(f'{LAYER}.self_attn.q_proj.weight', 'dnh->(nh)d'),
    'layers/q_bias': Stored(f'{LAYER}.self_attn.q_proj.bias', 'nh->(nh)'),
    'layers/k': Stored(f'{LAYER}.self_attn.k_proj.weight', 'dkh->(kh)d'),
    'layers/k_bias': Stored(f'{LAYER}.self_attn.k_proj.bias', 'kh->(kh)'),
    'layers/v': Stored(f'{LAYER}.self_attn.v_proj.weight', 'dkh->(kh)d'),
    'layers/v_bias': Stored(f'{LAYER}.self_attn.v_proj.bias', 'kh->(kh)'),
    'layers/o': Stored(f'{LAYER}.self_attn.o_proj.weight', 'nhd->d(nh)'),
    'layers/o_bias': Stored(f'{LAYER}.self_attn.o_proj.bias', 'd->d'),
}
HEAD_NORMS = {
    'layers/q_norm': Stored(f'{LAYER}.self_attn.q_norm.weight', 'h->h'),
    'layers/k_norm': Stored(f'{LAYER}.self_attn.k_norm.weight', 'h->h'),
}
WIDTH_NORMS = {
    'layers/q_norm': Stored(f'{LAYER}.self_attn.q_norm.weight', 'nh->(nh)'),
    'layers/k_norm': Stored(f'{LAYER}.self_attn.k_norm.weight', 'kh->(kh)'),
}
MLP = {
    'layers/gate': Stored(f'{LAYER}.mlp.gate_proj.weight', 'df->fd'),
    'layers/up': Stored(f'{LAYER}.mlp.up_proj.weight', 'df->fd'),
    'layers/down': Stored(f'{LAYER}.mlp.down_proj.weight', 'fd->df'),
}
NORMS_BEFORE = {
    'layers/attention_norm': Stored(f'{LAYER}.input_layernorm.weight', 'd->d'),
    'layers/mlp_norm': Stored(f'{LAYER}.post_attention_layernorm.weight', 'd->d'),
}
NORMS_AFTER = {
    'layers/attention_out_norm': Stored(f'{LAYER}.post_attention_layernorm.weight', 'd->d'),
    'layers/mlp_out_norm': Stored(f'{LAYER}.post_feedforward_layernorm.weight', 'd->d'),
}
NORMS_AROUND = {
    'layers/attention_norm': NORMS_BEFORE['layers/attention_norm'],
    'layers/attention_out_norm': NORMS_AFTER['layers/attention_out_norm'],
    'layers/mlp_norm': Stored(f'{LAYER}.pre_feedforward_layernorm.weight', 'd->d'),
    'layers/mlp_out_norm': NORMS_AFTER['layers/mlp_out_norm'],
}
PHI3 = {
    'layers/o': ATTENTION['layers/o'],
    'layers/q': Stored(f'{LAYER}.self_attn.qkv_proj.weight', 'dnh->(nh)d', FUSED_QKV),
    'layers/k': Stored(f'{LAYER}.self_attn.qkv_proj.weight', 'dkh->(kh)d', FUSED_QKV),
    'layers/v': Stored(f'{LAYER}.self_attn.qkv_proj.weight', 'dkh->(kh)d', FUSED_QKV),
    'layers/gate': Stored(f'{LAYER}.mlp.gate_up_proj.weight', 'df->fd', FUSED_MLP),
    'layers/up': Stored(f'{LAYER}.mlp.gate_up_proj.weight', 'df->fd', FUSED_MLP),
    'layers/down': MLP['layers/down'],
}
MIXTRAL_EXPERTS = {
    'layers/expert_down': Stored(f'{EXPERT}.w2.weight', 'fd->df'),
    'layers/expert_gate': Stored(f'{EXPERT}.w1.weight', 'df->fd'),
    'layers/expert_up': Stored(f'{EXPERT}.w3.weight', 'df->fd'),
    'layers/router': Stored(f'{LAYER}.block_sparse_moe.gate.weight', 'de->ed'),
}
QWEN_EXPERTS = {
    'layers/expert_down': Stored(f'{LAYER}.mlp.experts.{{expert}}.down_proj.weight', 'fd->df'),
    'layers/expert_gate': Stored(f'{LAYER}.mlp.experts.{{expert}}.gate_proj.weight', 'df->fd'),
    'layers/expert_up': Stored(f'{LAYER}.mlp.experts.{{expert}}.up_proj.weight', 'df->fd'),
    'layers/router': Stored(f'{LAYER}.mlp.gate.weight', 'de->ed'),
}


def _mixture(experts: Mapping[str, Stored]) -> dict[str, Stored]:
  """transformers sorts the names of mixtures, as it spells them in memory."""
  attention = (
      'k_norm', 'k_bias', 'k', 'o_bias', 'o', 'q_norm', 'q_bias', 'q', 'v_bias', 'v')
  return {
      'head': END['head'],
      **BEGIN,
      'layers/attention_norm': NORMS_BEFORE['layers/attention_norm'],
      **experts,
      'layers/mlp_norm': NORMS_BEFORE['layers/mlp_norm'],
      **{f'layers/{x}': (ATTENTION | HEAD_NORMS)[f'layers/{x}'] for x in attention},
      'final_norm': END['final_norm'],
  }


LLAMA = BEGIN | ATTENTION | MLP | NORMS_BEFORE | END
TENSORS: Mapping[str, Mapping[str, Stored]] = {
    'llama': LLAMA,
    'mistral': LLAMA,
    'qwen2': LLAMA,
    'qwen3': BEGIN | ATTENTION | HEAD_NORMS | MLP | NORMS_BEFORE | END,
    'gemma2': BEGIN | ATTENTION | MLP | NORMS_AROUND | END,
    'gemma3_text': BEGIN | ATTENTION | HEAD_NORMS | MLP | NORMS_AROUND | END,
    'phi3': BEGIN | PHI3 | NORMS_BEFORE | END,
    'olmo2': BEGIN | ATTENTION | WIDTH_NORMS | MLP | NORMS_AFTER | END,
    'mixtral': _mixture(MIXTRAL_EXPERTS),
    'qwen3_moe': _mixture(QWEN_EXPERTS),
}
