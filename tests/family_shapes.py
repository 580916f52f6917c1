"""Small models of every family, as settings of their transformers configurations."""

SMALL = dict(
    vocab_size=101, hidden_size=32, intermediate_size=56, num_hidden_layers=3,
    num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256,
    bos_token_id=1, eos_token_id=2, pad_token_id=0)
LLAMA3_ROPE = {
    'rope_type': 'llama3', 'factor': 8.0, 'low_freq_factor': 1.0, 'high_freq_factor': 4.0,
    'original_max_position_embeddings': 32,
}
YARN = {'rope_type': 'yarn', 'factor': 4.0, 'original_max_position_embeddings': 64}
LINEAR = {'rope_type': 'linear', 'factor': 4.0}
LONGROPE = {
    'rope_type': 'longrope', 'original_max_position_embeddings': 128,
    'short_factor': [1.0, 1.1, 1.3, 1.6, 2.0, 3.0],
    'long_factor': [1.0, 2.0, 4.0, 6.0, 8.0, 12.0],
}
THREE_HEADS = dict(num_attention_heads=3, num_key_value_heads=1, hidden_size=36)
# Caps and a scale that matter for numbers of the size these models have.
GEMMA2 = dict(
    head_dim=8, query_pre_attn_scalar=20, attn_logit_softcapping=3.0, final_logit_softcapping=5.0)
GEMMA3 = dict(head_dim=8, query_pre_attn_scalar=20)
SPARSE = dict(intermediate_size=24, num_local_experts=4, num_experts_per_tok=2)
QWEN_SPARSE = dict(
    head_dim=16, moe_intermediate_size=24, num_experts=6, num_experts_per_tok=2,
    norm_topk_prob=True)

# family -> name -> settings on top of SMALL; the first of each is the plainest.
SHAPES = {
    'llama': {
        'gqa_2': {},
        'mha_of_llama_2': dict(num_key_value_heads=4, rms_norm_eps=1e-5),
        'mqa_odd_heads': THREE_HEADS | dict(head_dim=10),
        'heads_wider_than_model': dict(num_key_value_heads=4, head_dim=24, attention_bias=True),
        'llama3_rope': dict(rope_parameters=LLAMA3_ROPE | {'rope_theta': 500_000.0}),
        'llama3_rope_tied': dict(
            rope_parameters=LLAMA3_ROPE | {'rope_theta': 10_000.0}, tie_word_embeddings=True,
            num_attention_heads=6, hidden_size=24, head_dim=16, vocab_size=131),
        'linear_rope': dict(rope_parameters=LINEAR | {'rope_theta': 1e4}),
        'smollm_tied': dict(
            num_attention_heads=9, num_key_value_heads=3, hidden_size=72, tie_word_embeddings=True,
            rope_parameters={'rope_type': 'default', 'rope_theta': 100_000.0}, vocab_size=49),
    },
    'mistral': {
        'window': dict(sliding_window=7),
        'no_window_odd_heads': THREE_HEADS | dict(sliding_window=None, head_dim=16, vocab_size=131),
        'window_tied_yarn': dict(
            sliding_window=33, tie_word_embeddings=True, num_key_value_heads=4,
            rope_parameters=YARN | {'rope_theta': 1e6}),
    },
    'qwen2': {
        'tied': dict(tie_word_embeddings=True, rope_parameters={
            'rope_type': 'default', 'rope_theta': 1e6}),
        'window_in_later_layers': dict(
            use_sliding_window=True, sliding_window=9, max_window_layers=1,
            num_attention_heads=7, num_key_value_heads=1, hidden_size=42, vocab_size=131),
        'yarn': dict(rope_parameters=YARN | {'rope_theta': 1e6}),
    },
    'qwen3': {
        'wide_heads': dict(head_dim=16, rope_parameters={
            'rope_type': 'default', 'rope_theta': 1e6}),
        'bias_windows_tied': dict(
            head_dim=12, attention_bias=True, tie_word_embeddings=True, use_sliding_window=True,
            sliding_window=5, num_attention_heads=6, vocab_size=131,
            layer_types=['sliding_attention', 'full_attention', 'sliding_attention']),
        'odd_heads_yarn_not_truncated': THREE_HEADS | dict(head_dim=16, rope_parameters=YARN | {
            'rope_theta': 1e6, 'truncate': False, 'beta_fast': 16.0, 'beta_slow': 2.0,
            'mscale': 1.0, 'mscale_all_dim': 0.5}),
    },
    'gemma2': {
        'alternating_windows': GEMMA2 | dict(sliding_window=6),
        'odd_heads_untied': THREE_HEADS | GEMMA2 | dict(
            head_dim=16, sliding_window=6, tie_word_embeddings=False, attention_bias=True,
            layer_types=['full_attention', 'sliding_attention', 'sliding_attention']),
        'published_caps': dict(
            head_dim=12, query_pre_attn_scalar=12, num_key_value_heads=4, vocab_size=131),
    },
    'gemma3_text': {
        'local_and_global_rope': GEMMA3 | dict(
            sliding_window=6, sliding_window_pattern=2, num_hidden_layers=4),
        'linear_rope_odd_heads': THREE_HEADS | GEMMA3 | dict(
            sliding_window=9, final_logit_softcapping=4.0, vocab_size=131, rope_parameters={
                'full_attention': LINEAR | {'rope_theta': 1e6},
                'sliding_attention': {'rope_type': 'default', 'rope_theta': 3e3}},
            layer_types=['sliding_attention', 'sliding_attention', 'full_attention']),
        'yarn': GEMMA3 | dict(
            sliding_window=6, rope_parameters={
                'full_attention': YARN | {'rope_theta': 1e5},
                'sliding_attention': {'rope_type': 'default', 'rope_theta': 1e4}},
            layer_types=['full_attention', 'sliding_attention', 'full_attention']),
        'untied_full_attention': GEMMA3 | dict(
            head_dim=16, tie_word_embeddings=False, attention_bias=True,
            layer_types=['full_attention'] * 3),
    },
    'phi3': {
        'plain': {},
        'window_odd_heads': THREE_HEADS | dict(sliding_window=11, vocab_size=131),
        'longrope_partial_tied': dict(
            hidden_size=64, tie_word_embeddings=True, original_max_position_embeddings=128,
            max_position_embeddings=512,
            rope_parameters=LONGROPE | {'rope_theta': 1e4, 'partial_rotary_factor': 0.75}),
    },
    'olmo2': {
        'gqa_2': {},
        'odd_heads_tied': dict(
            num_attention_heads=3, num_key_value_heads=3, hidden_size=36, vocab_size=131,
            tie_word_embeddings=True),
        'bias_linear_rope': dict(
            attention_bias=True, num_key_value_heads=1,
            rope_parameters=LINEAR | {'rope_theta': 5e5}),
    },
    'mixtral': {
        'two_of_four': SPARSE,
        'window_odd_heads': THREE_HEADS | SPARSE | dict(
            sliding_window=8, num_local_experts=5, num_experts_per_tok=3, vocab_size=131),
        'one_of_four_tied': SPARSE | dict(num_experts_per_tok=1, tie_word_embeddings=True),
    },
    'qwen3_moe': {
        'normalised': QWEN_SPARSE,
        'not_normalised_odd_heads': THREE_HEADS | QWEN_SPARSE | dict(
            norm_topk_prob=False, num_experts_per_tok=3, attention_bias=True, vocab_size=131),
        'window_tied_yarn': QWEN_SPARSE | dict(
            use_sliding_window=True, sliding_window=8, tie_word_embeddings=True,
            rope_parameters=YARN | {'rope_theta': 1e6}),
    },
}
CASES = [(family, name) for family, shapes in SHAPES.items() for name in shapes]
