"""config.json of every family: transformers is the oracle of what its fields mean."""

import copy
import json

import hypothesis
import jax.numpy as jnp
import numpy as np
import pytest
import transformers
from hypothesis import strategies as st

from jaxrl.errors import InputError
from jaxrl.models.config import Experts, Lora, ModelConfig, RopeScaling
from jaxrl.models.hugging_face_config import parse_config, write_config
from jaxrl.models.hugging_face_families import FAMILIES, REQUIRED
from jaxrl.models.rope import apply_rope, frequencies, rope_angles
from tests.family_shapes import CASES, LINEAR, LLAMA3_ROPE, LONGROPE, SHAPES, SMALL, YARN
from tests.published_configs import PUBLISHED

torch = pytest.importorskip('torch', reason='transformers needs PyTorch for its forward pass')


def theirs_of(family, **settings):
  return transformers.AutoConfig.for_model(family, **copy.deepcopy(SMALL | settings))


def saved(config):
  """The object that transformers writes to config.json."""
  return json.loads(config.to_json_string())


def skeleton(config):
  """The model without its weights; rotary tables are computed all the same."""
  with torch.device('meta'):
    model = transformers.AutoModelForCausalLM.from_config(config)
  rotary = type(model.model.rotary_emb)(config)
  return model, rotary


def their_rope(rotary, c):
  """(frequencies [K, R/2], factors [K]) as ours are ordered."""
  if not hasattr(rotary, 'inv_freq'):               # Gemma 3: by type of layer
    kinds = ['full_attention', 'sliding_attention'][:1 if c.local_rope_theta is None else 2]
    kinds = [x for x in kinds if hasattr(rotary, f'{x}_inv_freq')]
    return (np.stack([getattr(rotary, f'{x}_inv_freq').numpy() for x in kinds]),
            [getattr(rotary, f'{x}_attention_scaling') for x in kinds])
  return rotary.inv_freq.numpy()[None], [rotary.attention_scaling]


def check_against(config, c):
  """Every number that the modules of transformers hold is the one that `c` says."""
  model, rotary = skeleton(config)
  assert (model.config.vocab_size, model.config.hidden_size) == (c.vocab_size, c.d_model)
  assert model.config.tie_word_embeddings == c.tie_embeddings
  assert len(model.model.layers) == c.n_layers
  windows = c.windows or (None,) * c.n_layers
  is_mistral = c.family in ('mistral', 'mixtral', 'phi3')       # the window is in the mask there
  for layer, window in zip(model.model.layers, windows, strict=True):
    attention = layer.self_attn
    assert attention.scaling == (c.attention_scale or c.d_head ** -0.5)
    seen = config.sliding_window if is_mistral else getattr(attention, 'sliding_window', None)
    assert seen == window
    assert attention.head_dim == c.d_head
    assert attention.o_proj.weight.shape == (c.d_model, c.n_heads * c.d_head)
    assert (attention.o_proj.bias is not None) == c.o_bias
    if c.family != 'phi3':
      assert attention.k_proj.weight.shape == (c.n_kv * c.d_head, c.d_model)
      assert (attention.q_proj.bias is not None) == c.qkv_bias
    norm = layer.post_attention_layernorm
    assert getattr(norm, 'variance_epsilon', getattr(norm, 'eps', None)) == c.norm_eps
    assert hasattr(layer, 'input_layernorm') == (c.norm_placement != 'after')
    assert hasattr(layer, 'post_feedforward_layernorm') == (c.norm_placement != 'before')
    assert hasattr(attention, 'q_norm') == (c.qk_norm != 'none')
    if c.experts is None:
      assert layer.mlp.down_proj.weight.shape == (c.d_model, c.d_mlp)
    else:
      assert layer.mlp.experts.down_proj.shape == (c.experts.count, c.d_model, c.d_mlp)
      assert layer.mlp.gate.top_k == c.experts.per_token
      assert getattr(layer.mlp.gate, 'norm_topk_prob', True) == c.experts.normalise
  scale = getattr(model.model.embed_tokens, 'scalar_embed_scale', 1.0)
  assert scale == c.embedding_scale
  expected, factors = their_rope(rotary, c)
  np.testing.assert_allclose(frequencies(c)[:len(expected)], expected, rtol=5e-7)
  factor = 1.0 if c.rope_scaling is None else c.rope_scaling.attention_factor
  assert factors == [factor, 1.0][:len(factors)]


@pytest.mark.parametrize('family, shape', CASES)
def test_the_modules_of_transformers_hold_what_we_read(family, shape):
  config = theirs_of(family, **SHAPES[family][shape])
  check_against(config, parse_config(saved(config)))


@pytest.mark.parametrize('family, shape', CASES)
def test_what_we_write_is_what_we_read_and_what_transformers_reads(family, shape):
  theirs = theirs_of(family, **SHAPES[family][shape])
  c = parse_config(saved(theirs))
  written = json.loads(json.dumps(write_config(c)))
  assert parse_config(written) == c
  again = transformers.AutoConfig.for_model(**copy.deepcopy(written))
  check_against(again, c)
  for field in ('hidden_act', 'hidden_activation', 'attn_logit_softcapping',
                'final_logit_softcapping', 'layer_types', 'max_position_embeddings'):
    if field != 'hidden_act' or c.family not in ('gemma2', 'gemma3_text'):
      assert getattr(again, field, None) == getattr(theirs, field, None), field


@pytest.mark.parametrize('family, shape', CASES)
def test_the_spelling_of_transformers_4_alone_says_the_same(family, shape):
  """What transformers 4 would find in our file, without what only transformers 5 reads."""
  c = parse_config(saved(theirs_of(family, **SHAPES[family][shape])))
  written = write_config(c)
  irregular = family == 'gemma2' or family == 'gemma3_text' and (
      'sliding_window_pattern' not in written) or shape == 'bias_windows_tied'
  for field in ('rope_parameters', *(() if irregular else ('layer_types',))):
    written.pop(field, None)
  assert parse_config(written) == c


@pytest.mark.parametrize('family', FAMILIES)
def test_absent_fields_have_the_defaults_of_transformers(family):
  theirs = transformers.AutoConfig.for_model(family)
  needed = {name: getattr(theirs, name) for name in REQUIRED}
  c = parse_config({'model_type': family, **needed})
  check_against(theirs, c)
  for name, value in FAMILIES[family].defaults.items():
    if value is not None and name != 'sliding_window':      # null without use_sliding_window
      assert getattr(theirs, name, value) == value, name


@pytest.mark.parametrize('name', PUBLISHED)
def test_published_configurations_are_read(name):
  config, expected = PUBLISHED[name]
  c = parse_config(copy.deepcopy(config))
  for field, value in expected.items():
    assert getattr(c, field) == value, field
  theirs = {k: v for k, v in config.items() if k not in ('auto_map', 'model_type')}
  theirs |= dict(num_hidden_layers=6, vocab_size=8, pad_token_id=None)     # small enough to build
  small = parse_config(copy.deepcopy(theirs | {'model_type': config['model_type']}))
  check_against(
      transformers.AutoConfig.for_model(config['model_type'], **copy.deepcopy(theirs)), small)
  assert parse_config(json.loads(json.dumps(write_config(c)))) == c


SCALED = {
    'default': {},
    'linear': LINEAR,
    'llama3': LLAMA3_ROPE | {'original_max_position_embeddings': 8192},
    'yarn': YARN | {'original_max_position_embeddings': 32768},
    'yarn with a given factor': YARN | {'attention_factor': 0.7},
    'yarn with magnitudes': YARN | {'mscale': 0.7, 'mscale_all_dim': 1.0},
    'yarn with one magnitude': YARN | {'mscale': 0.7},
    'yarn without rounding': YARN | {'truncate': False},
    'yarn with a short ramp': YARN | {'beta_fast': 2.0, 'beta_slow': 1.9},
    'yarn with the factor of the lengths': YARN | {'factor': None},
    'longrope': LONGROPE | {
        'short_factor': list(np.linspace(1, 3, 64)), 'long_factor': list(np.linspace(1, 60, 64))},
    'longrope with a factor': LONGROPE | {
        'short_factor': list(np.linspace(1, 3, 64)), 'long_factor': [2.0] * 64, 'factor': 8.0},
}


@pytest.mark.parametrize('theta', [1e4, 5e5])
@pytest.mark.parametrize('name', SCALED)
def test_frequencies_at_full_size(name, theta):
  settings = {'rope_type': 'default'} | SCALED[name] | {'rope_theta': theta}
  theirs = theirs_of(
      'llama', head_dim=128, max_position_embeddings=131_072, rope_parameters=settings)
  check_against(theirs, parse_config(saved(theirs)))


def test_longrope_is_used_up_to_the_length_where_its_factors_change():
  c = parse_config(saved(theirs_of('phi3', **SHAPES['phi3']['longrope_partial_tied'])))
  assert (c.max_length, c.rope_scaling.extended_length) == (128, 512)
  assert (c.d_head, c.d_rotary) == (16, 12)
  assert write_config(c)['max_position_embeddings'] == 512
  # transformers 4 takes these three fields and no other.
  assert set(write_config(c)['rope_scaling']) == {'type', 'short_factor', 'long_factor'}


def test_rotary_tables_hold_the_attention_factor_for_global_layers_only():
  c = parse_config(saved(theirs_of('gemma3_text', **SHAPES['gemma3_text']['yarn'])))
  rotary = rope_angles(jnp.arange(5, dtype=jnp.int32)[None], c)
  assert rotary.cos.shape == rotary.sin.shape == (2, 1, 5, c.d_rotary // 2)
  np.testing.assert_allclose(
      rotary.cos[:, 0, 0, 0], [c.rope_scaling.attention_factor, 1], rtol=1e-7)
  norms = np.asarray(rotary.cos ** 2 + rotary.sin ** 2)
  np.testing.assert_allclose(norms[0], c.rope_scaling.attention_factor ** 2, rtol=1e-6)
  np.testing.assert_allclose(norms[1], 1, rtol=1e-6)


def test_dimensions_that_are_not_rotated_pass_through():
  x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 2, 3, 8)), jnp.float32)
  angles = jnp.asarray([[[0.3, 1.0], [0.0, 2.0]]], jnp.float32)
  out = apply_rope(x, jnp.cos(angles), jnp.sin(angles))
  np.testing.assert_array_equal(out[..., 4:], x[..., 4:])
  a, b = x[0, 0, 0, 1], x[0, 0, 0, 3]
  np.testing.assert_allclose(
      out[0, 0, 0, 1::2][:2], [a * np.cos(1) - b * np.sin(1), b * np.cos(1) + a * np.sin(1)],
      rtol=1e-6)


REFUSED = {
    'activation': ('llama', dict(hidden_act='relu'), "'hidden_act'.*expected silu.*'relu'"),
    'bias of an mlp': ('llama', dict(mlp_bias=True), "'mlp_bias' changes"),
    'bias that mistral ignores': ('mistral', dict(attention_bias=True), "'attention_bias' changes"),
    'unknown': ('qwen3', dict(logit_scale=0.1), "'logit_scale' is not known.*found 0.1"),
    'quantised': ('qwen2', dict(quantization_config={'bits': 4}), "'quantization_config'"),
    'window in llama': ('llama', dict(sliding_window=8), "'sliding_window' changes.*found 8"),
    'looking ahead': (
        'gemma2', dict(use_bidirectional_attention=True), "'use_bidirectional_attention'"),
    'two activations': ('gemma2', dict(hidden_act='silu'), "'hidden_act'.*found 'silu'"),
    'dense layers': ('qwen3_moe', dict(mlp_only_layers=[1]), "'mlp_only_layers'"),
    'sparse steps': ('qwen3_moe', dict(decoder_sparse_step=2), "'decoder_sparse_step'"),
    'noise': ('mixtral', dict(router_jitter_noise=0.1), "'router_jitter_noise'"),
    'too few experts': ('mixtral', dict(num_experts_per_tok=9), 'expected at most 4; found 9'),
    'two counts': ('qwen3_moe', dict(num_local_experts=5), 'given twice.*=6.*=5'),
    'partial rotation': ('qwen2', dict(partial_rotary_factor=0.5), "'partial_rotary_factor'"),
    'two partial rotations': (
        'phi3', dict(partial_rotary_factor=1.0, rope_parameters={'partial_rotary_factor': 0.5}),
        'contradict'),
    'theta of one': ('qwen3', dict(rope_theta=1.0), 'rope_theta above 1'),
    'scale that is no whole number': (
        'gemma2', dict(query_pre_attn_scalar=20.5), "'query_pre_attn_scalar' is malformed"),
    'odd rotation': ('phi3', dict(partial_rotary_factor=0.4), 'even number.*found 3'),
    'dynamic': (
        'llama', dict(rope_scaling={'rope_type': 'dynamic', 'factor': 2.0}), "found 'dynamic'"),
    'yarn without a factor': (
        'qwen3', dict(rope_scaling={'rope_type': 'yarn'}), "'factor' is missing"),
    'yarn upside down': (
        'qwen3', dict(rope_scaling=YARN | {'beta_fast': 1, 'beta_slow': 2}), 'not above beta_slow'),
    'yarn key': ('qwen3', dict(rope_scaling=YARN | {'temperature': 2}), 'temperature=2'),
    'longrope lists': (
        'llama', dict(rope_scaling=LONGROPE | {'short_factor': [1.0]}), 'list of 4 positive'),
    'two thetas': (
        'qwen2', dict(rope_theta=1e4, rope_parameters={'rope_theta': 1e6}), 'contradict'),
    'two scalings': (
        'qwen2', dict(rope_scaling=YARN, rope_parameters=LINEAR), 'contradict'),
    'scaling of local layers': (
        'gemma3_text', dict(rope_parameters={'sliding_attention': LINEAR}),
        "expected rope_type 'default'"),
    'flat settings of gemma 3': (
        'gemma3_text', dict(rope_parameters={'rope_theta': 1e6}), "'rope_parameters' is malformed"),
    'yarn of gemma 3': (
        'gemma3_text', dict(rope_scaling=YARN | {'truncate': False}), "'truncate' has no effect"),
    'layer types': (
        'qwen3', dict(layer_types=['full_attention']), "'layer_types' is malformed"),
    'layer types that mistral ignores': (
        'mistral', dict(layer_types=['full_attention'] * 3), "'layer_types' contradicts"),
    'window without a width': (
        'qwen3', dict(layer_types=['sliding_attention'] * 3), 'no width.*sliding_window'),
    'windows from a layer on': (
        'qwen3_moe', dict(use_sliding_window=True, max_window_layers=1), "'max_window_layers'"),
    'other code': (
        'phi3', dict(auto_map={'AutoModelForCausalLM': 'modeling_phi4.Phi4ForCausalLM'}),
        "'auto_map'"),
    'cap of the wrong family': (
        'gemma3_text', dict(attn_logit_softcapping=50.0), "'attn_logit_softcapping'"),
}


@pytest.mark.parametrize('case', REFUSED)
def test_a_field_that_would_change_the_numbers_is_refused(case):
  family, changes, message = REFUSED[case]
  plain = next(iter(SHAPES[family].values()))
  names = ('layer_types', 'rope_parameters', 'use_sliding_window', 'sliding_window_pattern')
  config = {'model_type': family, **SMALL, **plain, 'sliding_window': 8}
  config = {k: v for k, v in config.items() if k not in names}
  if not FAMILIES[family].reads('sliding_window'):
    del config['sliding_window']
  parse_config(copy.deepcopy(config))
  with pytest.raises(InputError, match=message):
    parse_config(config | copy.deepcopy(changes))


VALUES = st.one_of(
    st.none(), st.booleans(), st.integers(-2, 300), st.just(10 ** 400), st.floats(),
    st.sampled_from(['yarn', 'longrope', 'gelu', '']), st.lists(st.integers(0, 3), max_size=3),
    st.sampled_from([{}, YARN, LINEAR, LLAMA3_ROPE, LONGROPE, {'rope_type': []}, {'factor': 0}]),
    st.dictionaries(st.sampled_from(['full_attention', 'rope_type']), st.none(), max_size=2))


@hypothesis.settings(max_examples=300, deadline=None, derandomize=True, database=None)
@hypothesis.given(st.data())
def test_any_value_of_any_field_is_read_or_refused(data):
  name = data.draw(st.sampled_from(sorted(PUBLISHED)))
  config = copy.deepcopy(PUBLISHED[name][0])
  fields = sorted({*config, *FAMILIES[config['model_type']].defaults} - {'model_type'})
  for field in data.draw(st.lists(st.sampled_from(fields), min_size=1, max_size=2)):
    config[field] = copy.deepcopy(data.draw(VALUES))
  try:
    c = parse_config(config)
  except InputError:
    return
  assert parse_config(json.loads(json.dumps(write_config(c)))) == c
  assert np.isfinite(frequencies(c)).all()


def config_of(family, **fields):
  return ModelConfig(**(dict(
      family=family, vocab_size=40, d_model=16, n_layers=2, n_heads=4, n_kv=2, d_head=6, d_mlp=24,
      max_length=64) | fields))


@pytest.mark.parametrize('family, fields, named', [
    ('llama', dict(windows=(4, None)), 'windows'),
    ('mistral', dict(windows=(4, None)), 'windows'),
    ('llama', dict(qkv_bias=True), 'o_bias'),
    ('llama', dict(qk_norm='head'), 'qk_norm'),
    ('qwen2', dict(), 'qkv_bias'),
    ('llama', dict(experts=Experts(4, 2)), 'experts'),
    ('mistral', dict(rotary_fraction=0.5), 'rotary_fraction'),
    ('llama', dict(final_softcap=3.0), 'final_softcap'),
])
def test_what_a_family_cannot_say_is_not_written(family, fields, named):
  with pytest.raises(InputError, match=f'{family}.*cannot express .{named}'):
    write_config(config_of(family, **fields))


def test_adapters_are_no_part_of_a_configuration():
  plain = config_of('llama')
  adapted = config_of('llama', lora=Lora(4, 8.0, ('q',)))
  assert write_config(adapted) == write_config(plain)


def test_factors_that_phi3_cannot_say_in_transformers_4_are_kept():
  scaling = RopeScaling(
      'longrope', 2.0, original_length=64, extended_length=256, attention_factor=1.3,
      short_factor=(1.0,) * 3, long_factor=(2.0,) * 3)
  c = config_of('phi3', rope_scaling=scaling)
  assert len(write_config(c)['rope_scaling']) == 5
