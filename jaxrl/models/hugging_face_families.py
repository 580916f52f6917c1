"""What is particular to each family of models, and which fields of `config.json` mean nothing.

The source of `transformers` is the definition: a family reads the fields in `REQUIRED` and those it
has a default for. A field that it does not read may only hold a value under which it does nothing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal


@dataclasses.dataclass(frozen=True)
class Family:
  """What is particular to one `model_type`."""

  architecture: str
  # The optional fields that the family reads, with what transformers takes where one is absent.
  # None stands for a value that follows from other fields.
  defaults: Mapping[str, Any]
  # Fields of `ModelConfig` that are the same for every model of the family.
  fixed: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  # Which layers have a window where `layer_types` does not say: none of them, all, those from
  # `max_window_layers` on, or all but every n-th.
  windows: Literal['none', 'all', 'from', 'pattern'] = 'none'

  def reads(self, field: str) -> bool:
    return field in REQUIRED or field in self.defaults


REQUIRED = (
    'vocab_size', 'hidden_size', 'num_hidden_layers', 'num_attention_heads', 'intermediate_size')
ALL: dict[str, Any] = {
    'num_key_value_heads': None,
    'head_dim': None,
    'hidden_act': 'silu',
    'rms_norm_eps': 1e-6,
    'rope_theta': 10_000.0,
    'rope_scaling': None,
    'rope_parameters': None,
    'original_max_position_embeddings': None,
    'layer_types': None,
    'tie_word_embeddings': False,
    'initializer_range': 0.02,
}
QWEN: dict[str, Any] = {
    'max_position_embeddings': 32_768,
    'use_sliding_window': False,
    'sliding_window': 4096,
    'max_window_layers': 28,
}
GEMMA: dict[str, Any] = {name: x for name, x in ALL.items() if name != 'hidden_act'} | {
    'num_key_value_heads': 4,
    'head_dim': 256,
    'hidden_activation': 'gelu_pytorch_tanh',
    'query_pre_attn_scalar': 256,
    'attention_bias': False,
    'sliding_window': 4096,
    'tie_word_embeddings': True,
}
GEMMA_FIXED = {'norm_offset': True, 'norm_placement': 'around'}

FAMILIES: Mapping[str, Family] = {
    'llama': Family(
        'LlamaForCausalLM',
        ALL | {'max_position_embeddings': 2048, 'attention_bias': False}),
    'mistral': Family(
        'MistralForCausalLM',
        ALL | {
            'num_key_value_heads': 8, 'max_position_embeddings': 131_072, 'sliding_window': 4096},
        windows='all'),
    'qwen2': Family(
        'Qwen2ForCausalLM', ALL | QWEN | {'num_key_value_heads': 32},
        {'qkv_bias': True}, windows='from'),
    'qwen3': Family(
        'Qwen3ForCausalLM',
        ALL | QWEN | {'num_key_value_heads': 32, 'head_dim': 128, 'attention_bias': False},
        {'qk_norm': 'head'}, windows='from'),
    'gemma2': Family(
        'Gemma2ForCausalLM',
        GEMMA | {
            'max_position_embeddings': 8192,
            'attn_logit_softcapping': 50.0,
            'final_logit_softcapping': 30.0,
        },
        GEMMA_FIXED, windows='pattern'),
    'gemma3_text': Family(
        'Gemma3ForCausalLM',
        GEMMA | {
            'max_position_embeddings': 131_072,
            'final_logit_softcapping': None,
            'rope_theta': 1_000_000.0,
            'rope_local_base_freq': 10_000.0,
            'sliding_window_pattern': 6,
        },
        GEMMA_FIXED | {'qk_norm': 'head'}, windows='pattern'),
    'phi3': Family(
        'Phi3ForCausalLM',
        ALL | {
            'rms_norm_eps': 1e-5,
            'max_position_embeddings': 4096,
            'original_max_position_embeddings': 4096,
            'partial_rotary_factor': 1.0,
            'sliding_window': None,
        },
        windows='all'),
    'olmo2': Family(
        'Olmo2ForCausalLM',
        ALL | {'rms_norm_eps': 1e-5, 'max_position_embeddings': 2048, 'attention_bias': False},
        {'norm_placement': 'after', 'qk_norm': 'width'}),
    'mixtral': Family(
        'MixtralForCausalLM',
        ALL | {
            'num_key_value_heads': 8,
            'rms_norm_eps': 1e-5,
            'max_position_embeddings': 131_072,
            'rope_theta': 1_000_000.0,
            'sliding_window': None,
            'num_local_experts': 8,
            'num_experts_per_tok': 2,
        },
        windows='all'),
    'qwen3_moe': Family(
        'Qwen3MoeForCausalLM',
        ALL | QWEN | {
            'num_key_value_heads': 4,
            'max_window_layers': 0,
            'attention_bias': False,
            'moe_intermediate_size': 768,
            'num_experts': 128,
            'num_experts_per_tok': 8,
            'norm_topk_prob': False,
        },
        {'qk_norm': 'head'}, windows='all'),
}

# The values under which a field does nothing in a family that does not read it.
NEUTRAL: Mapping[str, tuple] = {
    'add_cross_attention': (False, None),
    'attention_bias': (False, None),
    'attention_dropout': (0, None),
    'attn_logit_softcapping': (None,),
    'auto_map': (None, {}),
    'chunk_size_feed_forward': (0, None),
    'cross_attention_hidden_size': (None,),
    'decoder_sparse_step': (1,),
    'embd_pdrop': (0, None),
    'final_logit_softcapping': (None,),
    'full_attn_mod': (1, None),
    'hidden_act': (None,),
    'interpolate_factor': (1, None),
    'is_encoder_decoder': (False, None),
    'lm_head_bias': (False, None),
    'mlp_bias': (False, None),
    'mlp_only_layers': ([], None),
    'partial_rotary_factor': (1, None),
    'per_layer_config': (None, {}),
    'pretraining_tp': (1, None),
    'pruned_heads': (None, {}),
    'quantization_config': (None,),
    'query_pre_attn_scalar': (None,),
    'resid_pdrop': (0, None),
    'rope_interleaved': (False, None),
    'router_jitter_noise': (0, None),
    'sliding_window': (None,),
    'tie_encoder_decoder': (False, None),
    'use_bidirectional_attention': (False, None),
    'use_sliding_window': (False, None),
}

# Phi-3 was first published with its own code, which transformers has since taken over.
PHI3_CODE = {
    'AutoConfig': 'configuration_phi3.Phi3Config',
    'AutoModelForCausalLM': 'modeling_phi3.Phi3ForCausalLM',
}

# What says how a model was made, is called or is to be sampled from, and nothing about its numbers.
HARMLESS = frozenset((
    # identity
    '_name_or_path', 'name_or_path', '_commit_hash', 'architectures', 'model_type',
    'transformers_version', 'transformers.js_config', 'is_llama_config', 'unsloth_fixed',
    'unsloth_version',
    # storage and programs
    'dtype', 'torch_dtype', 'torchscript', 'use_bfloat16', 'use_cache', 'cache_implementation',
    'attn_implementation', '_attn_implementation', '_attn_implementation_autoset',
    '_sliding_window_pattern',       # what layer_types was made from
    'experts_implementation', '_experts_implementation', 'use_flash_attention_2', 'use_flash_attn',
    'gradient_checkpointing', 'is_decoder', 'tf_legacy_loss',
    # tokens
    'bos_token_id', 'eos_token_id', 'pad_token_id', 'unk_token_id', 'sep_token_id', 'cls_token_id',
    'mask_token_id', 'decoder_start_token_id', 'forced_bos_token_id', 'forced_eos_token_id',
    'suppress_tokens', 'begin_suppress_tokens', 'bad_words_ids', 'tokenizer_class', 'prefix',
    'model_max_length', 'max_sequence_length',
    # other outputs and tasks
    'return_dict', 'return_dict_in_generate', 'output_scores', 'output_attentions',
    'output_hidden_states', 'output_router_logits', 'router_aux_loss_coef',
    'tie_last_hidden_states', 'id2label', 'label2id', 'num_labels', 'problem_type',
    'finetuning_task', 'task_specific_params',
    # sampling
    'do_sample', 'temperature', 'top_k', 'top_p', 'typical_p', 'max_length', 'min_length',
    'max_new_tokens', 'num_beams', 'num_beam_groups', 'num_return_sequences', 'early_stopping',
    'diversity_penalty', 'length_penalty', 'repetition_penalty', 'no_repeat_ngram_size',
    'encoder_no_repeat_ngram_size', 'exponential_decay_length_penalty', 'remove_invalid_values',
))
