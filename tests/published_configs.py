"""config.json in the form of published models (sizes, spelling and fields), and what it says.

The long factor lists of LongRoPE are replaced by others of the same length.
"""

_LLAMA3 = {
    'factor': 8.0, 'high_freq_factor': 4.0, 'low_freq_factor': 1.0,
    'original_max_position_embeddings': 8192, 'rope_type': 'llama3'}


def _factors(count, last):
  return [1.0 + (last - 1.0) * n / (count - 1) for n in range(count)]


def _qwen2(**fields):
  return dict(
      architectures=['Qwen2ForCausalLM'], attention_dropout=0.0, bos_token_id=151643,
      eos_token_id=151645, hidden_act='silu', hidden_size=3584, initializer_range=0.02,
      intermediate_size=18944, max_position_embeddings=32768, max_window_layers=28,
      model_type='qwen2', num_attention_heads=28, num_hidden_layers=28, num_key_value_heads=4,
      rms_norm_eps=1e-06, rope_theta=1000000.0, sliding_window=131072, tie_word_embeddings=False,
      torch_dtype='bfloat16', transformers_version='4.43.1', use_cache=True,
      use_sliding_window=False, vocab_size=152064) | fields


def _phi3(**fields):
  return dict(
      architectures=['Phi3ForCausalLM'], attention_bias=False, attention_dropout=0.0,
      bos_token_id=1, embd_pdrop=0.0, eos_token_id=32000, hidden_act='silu', hidden_size=3072,
      initializer_range=0.02, intermediate_size=8192, max_position_embeddings=4096,
      model_type='phi3', num_attention_heads=32, num_hidden_layers=32, num_key_value_heads=32,
      original_max_position_embeddings=4096, pad_token_id=32000, resid_pdrop=0.0,
      rms_norm_eps=1e-05, rope_scaling=None, rope_theta=10000.0, sliding_window=2047,
      tie_word_embeddings=False, torch_dtype='bfloat16', transformers_version='4.40.2',
      use_cache=True, vocab_size=32064) | fields


PHI3_CODE = {
    'AutoConfig': 'configuration_phi3.Phi3Config',
    'AutoModelForCausalLM': 'modeling_phi3.Phi3ForCausalLM'}

# name -> (config.json, fields of ModelConfig)
PUBLISHED = {
    'Llama-2-7b-hf': (dict(
        _name_or_path='meta-llama/Llama-2-7b-hf', architectures=['LlamaForCausalLM'],
        bos_token_id=1, eos_token_id=2, hidden_act='silu', hidden_size=4096,
        initializer_range=0.02, intermediate_size=11008, max_position_embeddings=4096,
        model_type='llama', num_attention_heads=32, num_hidden_layers=32, num_key_value_heads=32,
        pretraining_tp=1, rms_norm_eps=1e-05, rope_scaling=None, tie_word_embeddings=False,
        torch_dtype='float16', transformers_version='4.31.0.dev0', use_cache=True,
        vocab_size=32000), dict(n_kv=32, d_head=128, rope_theta=1e4, norm_eps=1e-5)),
    'Llama-3.1-8B': (dict(
        architectures=['LlamaForCausalLM'], attention_bias=False, attention_dropout=0.0,
        bos_token_id=128000, eos_token_id=[128001, 128008, 128009], hidden_act='silu',
        hidden_size=4096, initializer_range=0.02, intermediate_size=14336,
        max_position_embeddings=131072, mlp_bias=False, model_type='llama',
        num_attention_heads=32, num_hidden_layers=32, num_key_value_heads=8, pretraining_tp=1,
        rms_norm_eps=1e-05, rope_scaling=_LLAMA3, rope_theta=500000.0, tie_word_embeddings=False,
        torch_dtype='bfloat16', transformers_version='4.43.0.dev0', use_cache=True,
        vocab_size=128256), dict(n_kv=8, rope_theta=5e5, max_length=131072)),
    'Llama-3.2-1B': (dict(
        architectures=['LlamaForCausalLM'], attention_bias=False, attention_dropout=0.0,
        bos_token_id=128000, eos_token_id=128001, head_dim=64, hidden_act='silu',
        hidden_size=2048, initializer_range=0.02, intermediate_size=8192,
        max_position_embeddings=131072, mlp_bias=False, model_type='llama',
        num_attention_heads=32, num_hidden_layers=16, num_key_value_heads=8, pretraining_tp=1,
        rms_norm_eps=1e-05, rope_scaling=_LLAMA3 | {'factor': 32.0}, rope_theta=500000.0,
        tie_word_embeddings=True, torch_dtype='bfloat16', transformers_version='4.45.0.dev0',
        use_cache=True, vocab_size=128256), dict(tie_embeddings=True, d_head=64)),
    'SmolLM2-135M': ({
        'architectures': ['LlamaForCausalLM'], 'attention_bias': False, 'attention_dropout': 0.0,
        'bos_token_id': 1, 'eos_token_id': 2, 'hidden_act': 'silu', 'hidden_size': 576,
        'initializer_range': 0.041666666666666664, 'intermediate_size': 1536,
        'is_llama_config': True, 'max_position_embeddings': 8192, 'mlp_bias': False,
        'model_type': 'llama', 'num_attention_heads': 9, 'num_hidden_layers': 30,
        'num_key_value_heads': 3, 'pad_token_id': 2, 'pretraining_tp': 1, 'rms_norm_eps': 1e-05,
        'rope_interleaved': False, 'rope_scaling': None, 'rope_theta': 100000,
        'tie_word_embeddings': True, 'torch_dtype': 'bfloat16',
        'transformers.js_config': {'kv_cache_dtype': {'q4f16': 'float16'}},
        'transformers_version': '4.42.3', 'use_cache': True, 'vocab_size': 49152,
    }, dict(n_heads=9, n_kv=3, d_head=64, rope_theta=1e5)),
    'Mistral-7B-v0.1': (dict(
        architectures=['MistralForCausalLM'], bos_token_id=1, eos_token_id=2, hidden_act='silu',
        hidden_size=4096, initializer_range=0.02, intermediate_size=14336,
        max_position_embeddings=32768, model_type='mistral', num_attention_heads=32,
        num_hidden_layers=32, num_key_value_heads=8, rms_norm_eps=1e-05, rope_theta=10000.0,
        sliding_window=4096, tie_word_embeddings=False, torch_dtype='bfloat16',
        transformers_version='4.34.0.dev0', use_cache=True, vocab_size=32000),
                        dict(windows=(4096,) * 32)),
    'Mistral-7B-v0.3': (dict(
        architectures=['MistralForCausalLM'], attention_dropout=0.0, bos_token_id=1,
        eos_token_id=2, hidden_act='silu', hidden_size=4096, initializer_range=0.02,
        intermediate_size=14336, max_position_embeddings=32768, model_type='mistral',
        num_attention_heads=32, num_hidden_layers=32, num_key_value_heads=8, rms_norm_eps=1e-05,
        rope_theta=1000000.0, sliding_window=None, tie_word_embeddings=False,
        torch_dtype='bfloat16', transformers_version='4.42.0.dev0', use_cache=True,
        vocab_size=32768), dict(windows=(), rope_theta=1e6)),
    'Qwen2.5-7B-Instruct': (_qwen2(), dict(windows=(), qkv_bias=True, o_bias=False, n_heads=28)),
    'Qwen2.5-7B-Instruct with YaRN': (_qwen2(rope_scaling={
        'factor': 4.0, 'original_max_position_embeddings': 32768, 'type': 'yarn'}), dict()),
    'Qwen3-8B': (dict(
        architectures=['Qwen3ForCausalLM'], attention_bias=False, attention_dropout=0.0,
        bos_token_id=151643, eos_token_id=151645, head_dim=128, hidden_act='silu',
        hidden_size=4096, initializer_range=0.02, intermediate_size=12288,
        max_position_embeddings=40960, max_window_layers=36, model_type='qwen3',
        num_attention_heads=32, num_hidden_layers=36, num_key_value_heads=8, rms_norm_eps=1e-06,
        rope_scaling=None, rope_theta=1000000, sliding_window=None, tie_word_embeddings=False,
        torch_dtype='bfloat16', transformers_version='4.51.0', use_cache=True,
        use_sliding_window=False, vocab_size=151936), dict(qk_norm='head', windows=())),
    'Qwen3-30B-A3B': (dict(
        architectures=['Qwen3MoeForCausalLM'], attention_bias=False, attention_dropout=0.0,
        bos_token_id=151643, decoder_sparse_step=1, eos_token_id=151645, head_dim=128,
        hidden_act='silu', hidden_size=2048, initializer_range=0.02, intermediate_size=6144,
        max_position_embeddings=40960, max_window_layers=48, mlp_only_layers=[],
        model_type='qwen3_moe', moe_intermediate_size=768, norm_topk_prob=True,
        num_attention_heads=32, num_experts=128, num_experts_per_tok=8, num_hidden_layers=48,
        num_key_value_heads=4, output_router_logits=False, rms_norm_eps=1e-06, rope_scaling=None,
        rope_theta=1000000.0, router_aux_loss_coef=0.001, sliding_window=None,
        tie_word_embeddings=False, torch_dtype='bfloat16', transformers_version='4.51.0',
        use_cache=True, use_sliding_window=False, vocab_size=151936),
                      dict(d_mlp=768, d_head=128, windows=())),
    'gemma-2-2b': (dict(
        architectures=['Gemma2ForCausalLM'], attention_bias=False, attention_dropout=0.0,
        attn_logit_softcapping=50.0, bos_token_id=2, cache_implementation='hybrid',
        eos_token_id=1, final_logit_softcapping=30.0, head_dim=256,
        hidden_act='gelu_pytorch_tanh', hidden_activation='gelu_pytorch_tanh', hidden_size=2304,
        initializer_range=0.02, intermediate_size=9216, max_position_embeddings=8192,
        model_type='gemma2', num_attention_heads=8, num_hidden_layers=26, num_key_value_heads=4,
        pad_token_id=0, query_pre_attn_scalar=256, rms_norm_eps=1e-06, rope_theta=10000.0,
        sliding_window=4096, torch_dtype='float32', transformers_version='4.42.4', use_cache=True,
        vocab_size=256000),
                   dict(windows=(4096, None) * 13, tie_embeddings=True, attention_softcap=50.0,
                        final_softcap=30.0, attention_scale=1 / 16, embedding_scale=48.0,
                        norm_offset=True, activation='gelu_tanh')),
    'gemma-3-1b-it': (dict(
        architectures=['Gemma3ForCausalLM'], attention_bias=False, attention_dropout=0.0,
        attn_logit_softcapping=None, bos_token_id=2, cache_implementation='hybrid',
        eos_token_id=[1, 106], final_logit_softcapping=None, head_dim=256,
        hidden_activation='gelu_pytorch_tanh', hidden_size=1152, initializer_range=0.02,
        intermediate_size=6912, max_position_embeddings=32768, model_type='gemma3_text',
        num_attention_heads=4, num_hidden_layers=26, num_key_value_heads=1, pad_token_id=0,
        query_pre_attn_scalar=256, rms_norm_eps=1e-06, rope_local_base_freq=10000,
        rope_scaling=None, rope_theta=1000000, sliding_window=512, sliding_window_pattern=6,
        torch_dtype='bfloat16', transformers_version='4.50.0.dev0', use_cache=True,
        vocab_size=262144),
                      dict(windows=((512,) * 5 + (None,)) * 4 + (512, 512), rope_theta=1e6,
                           local_rope_theta=1e4, final_softcap=None)),
    'Phi-3-mini-4k-instruct': (
        _phi3(auto_map=PHI3_CODE), dict(windows=(2047,) * 32, d_head=96, rotary_fraction=1.0)),
    'Phi-3-mini-128k-instruct': (_phi3(
        auto_map=PHI3_CODE, max_position_embeddings=131072, sliding_window=262144,
        rope_scaling={'long_factor': _factors(48, 64.0), 'short_factor': _factors(48, 2.0),
                      'type': 'longrope'}), dict(max_length=4096, d_rotary=96)),
    'Phi-4-mini-instruct': (_phi3(
        auto_map=PHI3_CODE | {'AutoTokenizer': 'Xenova/gpt-4o'}, bos_token_id=199999,
        eos_token_id=199999, full_attn_mod=1, interpolate_factor=1, lm_head_bias=False,
        max_position_embeddings=131072, mlp_bias=False, num_attention_heads=24,
        num_key_value_heads=8, pad_token_id=199999, partial_rotary_factor=0.75,
        rope_scaling={'long_factor': _factors(48, 64.0), 'short_factor': [1.0] * 48,
                      'type': 'longrope'},
        sliding_window=262144, tie_word_embeddings=True, vocab_size=200064),
                            dict(max_length=4096, d_head=128, d_rotary=96)),
    'phi-4': (_phi3(
        bos_token_id=100257, eos_token_id=100265, hidden_size=5120, intermediate_size=17920,
        max_position_embeddings=16384, num_attention_heads=40, num_hidden_layers=40,
        num_key_value_heads=10, original_max_position_embeddings=16384, pad_token_id=100349,
        rope_theta=250000, sliding_window=None, vocab_size=100352),
              dict(windows=(), max_length=16384, rope_theta=25e4)),
    'OLMo-2-1124-7B': (dict(
        architectures=['Olmo2ForCausalLM'], attention_bias=False, attention_dropout=0.0,
        eos_token_id=100257, hidden_act='silu', hidden_size=4096, initializer_range=0.02,
        intermediate_size=11008, max_position_embeddings=4096, model_type='olmo2',
        num_attention_heads=32, num_hidden_layers=32, num_key_value_heads=32,
        pad_token_id=100277, rms_norm_eps=1e-06, rope_scaling=None, rope_theta=500000,
        tie_word_embeddings=False, torch_dtype='float32', transformers_version='4.47.0.dev0',
        use_cache=False, vocab_size=100352), dict(norm_placement='after', qk_norm='width')),
    'Mixtral-8x7B-v0.1': (dict(
        architectures=['MixtralForCausalLM'], attention_dropout=0.0, bos_token_id=1,
        eos_token_id=2, hidden_act='silu', hidden_size=4096, initializer_range=0.02,
        intermediate_size=14336, max_position_embeddings=32768, model_type='mixtral',
        num_attention_heads=32, num_experts_per_tok=2, num_hidden_layers=32,
        num_key_value_heads=8, num_local_experts=8, output_router_logits=False,
        rms_norm_eps=1e-05, rope_theta=1000000.0, router_aux_loss_coef=0.02, sliding_window=None,
        tie_word_embeddings=False, torch_dtype='bfloat16', transformers_version='4.36.0.dev0',
        use_cache=True, vocab_size=32000), dict(d_mlp=14336, windows=())),
}
