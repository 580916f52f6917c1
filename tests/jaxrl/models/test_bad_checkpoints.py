"""Every way a model folder can be wrong is an InputError that says where and what."""

import json
import os
import re

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from etils import epath

from jaxrl.errors import InputError
from jaxrl.models import load as load_file
from jaxrl.models import model_folder
from jaxrl.models import params as params_lib
from jaxrl.models.config import Experts, ModelConfig
from jaxrl.models.hugging_face import load_params, read_config, save_model

GOOD = ModelConfig(
    family='llama', vocab_size=20, d_model=8, n_layers=2, n_heads=2, n_kv=1, d_head=4, d_mlp=12,
    max_length=64)
NORM = 'model.norm.weight'
Q1 = 'model.layers.1.self_attn.q_proj.weight'


def params_of(c):
  rng = np.random.default_rng(0)
  return jax.tree.map(
      lambda s: jnp.asarray(rng.normal(size=s.shape), jnp.float32),
      params_lib.decoder_specs(c), is_leaf=params_lib.is_spec)


@pytest.fixture
def folder(tmp_path):
  save_model(tmp_path / 'model', params_of(GOOD), GOOD, tokenizer_from=None)
  return tmp_path / 'model'


@pytest.fixture
def sharded(tmp_path):
  save_model(
      tmp_path / 'model', params_of(GOOD), GOOD, tokenizer_from=None, max_shard_bytes=1500)
  return tmp_path / 'model'


def load(folder):
  return load_params(folder, read_config(folder))


def weights(folder):
  return folder / 'model.safetensors'


def edit_tensors(folder, edit):
  tensors = safetensors.numpy.load_file(weights(folder))
  edit(tensors)
  safetensors.numpy.save_file(tensors, weights(folder))


def edit_object(path, edit):
  value = json.loads(path.read_text())
  edit(value)
  path.write_text(json.dumps(value))


def edit_header(folder, edit):
  data = weights(folder).read_bytes()
  size = int.from_bytes(data[:8], 'little')
  header = json.loads(data[8:8 + size])
  edit(header)
  text = header if isinstance(header, bytes) else json.dumps(header).encode()
  weights(folder).write_bytes(len(text).to_bytes(8, 'little') + text + data[8 + size:])


def set_bytes(path, change):
  path.write_bytes(change(path.read_bytes()))


def poison(value, dtype=np.float32):
  def edit(tensors):
    for name in tensors:
      tensors[name] = tensors[name].astype(dtype)
    tensors[Q1][3, 2] = value
  return edit


def swap_for_pickle(folder):
  weights(folder).rename(folder / 'pytorch_model.bin')


FOLDER_CASES = {
    'no config': (lambda f: (f / 'config.json').unlink(), 'no config.json.*model.safetensors'),
    'config cut short': (
        lambda f: set_bytes(f / 'config.json', lambda b: b[:-20]), 'config.json.*not valid JSON'),
    'config not text': (
        lambda f: (f / 'config.json').write_bytes(b'\xff\xfe\x00{'), 'not valid JSON'),
    'config a list': (lambda f: (f / 'config.json').write_text('[1]'), 'JSON object.*found list'),
    'no weights': (lambda f: weights(f).unlink(), 'no weights.*model.safetensors or'),
    'only pickle': (swap_for_pickle, 'pickle.*run any code.*pytorch_model.bin.*safe_serialization'),
    'two sets': (
        lambda f: (f / 'model.safetensors.index.json').write_text('{}'), 'two sets of weights'),
    'empty file': (lambda f: weights(f).write_bytes(b''), 'header does not fit.*found 0 bytes'),
    'not safetensors': (
        lambda f: weights(f).write_bytes(b'PK\x03\x04' * 99), 'header does not fit in the file'),
    'truncated data': (
        lambda f: set_bytes(weights(f), lambda b: b[:-5]), "ends before tensor '.*' does"),
    'truncated header': (
        lambda f: set_bytes(weights(f), lambda b: b[:100]), 'header does not fit in the file'),
    'trailing bytes': (
        lambda f: set_bytes(weights(f), lambda b: b + b'x'), 'longer than its tensors'),
    'header not JSON': (
        lambda f: set_bytes(weights(f), lambda b: b[:8] + b'!' + b[9:]),
        'header is not valid JSON'),
    'header names a tensor twice': (
        lambda f: set_bytes(weights(f), lambda b: b.replace(b'layers.1.', b'layers.0.')),
        'not valid JSON; found a name occurs twice'),
    'offsets beyond the file': (
        lambda f: edit_header(f, lambda h: h[NORM].update(data_offsets=[10**9, 10**9 + 32])),
        f"ends before tensor '{NORM}' does.*expected at least 10000"),
    'negative offsets': (
        lambda f: edit_header(f, lambda h: h[NORM].update(data_offsets=[-32, 0])),
        f"entry of tensor '{NORM}' is malformed"),
    'offsets of another tensor': (
        lambda f: edit_header(f, lambda h: h[NORM].update(data_offsets=[0, 32])),
        'overlaps another or follows a hole'),
    'size does not match shape': (
        lambda f: edit_header(f, lambda h: h[NORM].update(shape=[2**40])),
        f"lies about the size of tensor '{NORM}'.*expected {2**42} bytes.*found 32 bytes"),
    'shape of fractions': (
        lambda f: edit_header(f, lambda h: h[NORM].update(shape=[8.0])), 'is malformed'),
    'entry without dtype': (
        lambda f: edit_header(f, lambda h: h[NORM].pop('dtype')), 'is malformed'),
    'unknown type': (
        lambda f: edit_header(f, lambda h: h[NORM].update(dtype='Q4_K')),
        f"'{NORM}' has an unsupported type.*found Q4_K"),
    'missing tensor': (
        lambda f: edit_tensors(f, lambda t: t.pop(Q1)), f"'{Q1}' is missing.*found 1 of them"),
    'missing output matrix': (
        lambda f: edit_tensors(f, lambda t: t.pop('lm_head.weight')),
        "'lm_head.weight' is missing.*tie_word_embeddings"),
    'extra tensor': (
        lambda f: edit_tensors(
            f, lambda t: t.update({Q1.replace('weight', 'bias'): np.zeros(8, np.float32)})),
        'q_proj.bias. is not part of the model'),
    'a layer too many': (
        lambda f: edit_object(f / 'config.json', lambda c: c.update(num_hidden_layers=1)),
        'model.layers.1.* is not part of the model'),
    'a layer too few': (
        lambda f: edit_object(f / 'config.json', lambda c: c.update(num_hidden_layers=3)),
        "'model.layers.2.self_attn.q_proj.weight' is missing"),
    'wrong shape': (
        lambda f: edit_tensors(f, lambda t: t.update({Q1: np.zeros((8, 9), np.float32)})),
        rf"'{Q1}' has the wrong shape; expected \[8, 8\]; found \[8, 9\]"),
    'transposed': (
        lambda f: edit_tensors(f, lambda t: t.update({'lm_head.weight': np.ascontiguousarray(
            t['lm_head.weight'].T)})), r'expected \[20, 8\]; found \[8, 20\]'),
    'integer type': (
        lambda f: edit_tensors(f, lambda t: t.update({Q1: np.zeros((8, 8), np.int8)})),
        f"'{Q1}' has an unsupported type.*found I8"),
    'double type': (
        lambda f: edit_tensors(f, lambda t: t.update({Q1: np.zeros((8, 8), np.float64)})),
        f"'{Q1}' has an unsupported type.*found F64"),
    'NaN': (lambda f: edit_tensors(f, poison(np.nan)), f"'{Q1}' holds NaN or inf.*found 1 that"),
    'inf in bfloat16': (
        lambda f: edit_tensors(f, poison(-np.inf, ml_dtypes.bfloat16)), f"'{Q1}' holds NaN or inf"),
    'tied with another output matrix': (
        lambda f: edit_object(f / 'config.json', lambda c: c.update(tie_word_embeddings=True)),
        "ties the output matrix.*'lm_head.weight' differs"),
}


@pytest.mark.parametrize('case', FOLDER_CASES)
def test_bad_folder(folder, case):
  spoil, message = FOLDER_CASES[case]
  load(folder)
  spoil(folder)
  with pytest.raises(InputError, match=message) as e:
    load(folder)
  assert str(folder) in str(e.value)


def name_shard(shard):
  def edit(index):
    index['weight_map'][NORM] = shard
  return edit


INDEX_CASES = {
    'missing shard': (name_shard('model-00009-of-00009.safetensors'), 'a shard that is missing'),
    'path upwards': (name_shard('../other.safetensors'), r"outside the folder.*'\.\./other"),
    'absolute path': (name_shard('/etc/passwd'), "outside the folder.*'/etc/passwd'"),
    'backslashes': (name_shard('..\\other.safetensors'), 'outside the folder'),
    'the folder itself': (name_shard('..'), 'outside the folder'),
    'tensor in another shard': (
        name_shard('model-00001-of-00004.safetensors'), f"disagree about tensor '{NORM}'"),
    'tensor the index does not name': (
        lambda index: index['weight_map'].pop(Q1), f"disagree about tensor '{Q1}'.*shard alone"),
    'no map': (lambda index: index.pop('weight_map'), 'no weight_map'),
    'map of a list': (lambda index: index.update(weight_map=[1]), 'no weight_map'),
}


@pytest.mark.parametrize('case', INDEX_CASES)
def test_bad_index(sharded, case):
  edit, message = INDEX_CASES[case]
  load(sharded)
  (sharded.parent / 'other.safetensors').write_bytes(b'never read')
  edit_object(sharded / 'model.safetensors.index.json', edit)
  with pytest.raises(InputError, match=message):
    load(sharded)


def test_no_such_folder(tmp_path):
  with pytest.raises(InputError, match='not a model folder.*found nothing there'):
    read_config(tmp_path / 'nowhere')
  with pytest.raises(InputError, match='not a model folder.*found nothing there'):
    load_params(tmp_path / 'nowhere', GOOD)


def test_remote_folders_are_not_written():
  for folder in ('gs://bucket/model', epath.Path('gs://bucket/model')):
    with pytest.raises(InputError, match='gs://bucket/model: .*local disk'):
      save_model(folder, params_of(GOOD), GOOD, tokenizer_from=None)


def test_a_file_is_not_a_folder(folder):
  for call in (read_config, lambda f: load_params(f, GOOD)):
    with pytest.raises(InputError, match='not a model folder.*found a file'):
      call(weights(folder))


def test_a_pickle_is_never_opened(folder):
  """Also where it is a named pipe, which would block whoever opened it."""
  weights(folder).unlink()
  os.mkfifo(folder / 'pytorch_model-00001-of-00002.bin')
  with pytest.raises(InputError, match='pickle'):
    load(folder)


def test_values_too_large_for_the_type_are_an_error(folder):
  edit_tensors(folder, poison(70_000.0))
  load(folder)
  with pytest.raises(InputError, match=f"'{Q1}' holds NaN or inf; expected .* finite as float16"):
    load_params(folder, GOOD, dtype=jnp.float16)


FUSED = ModelConfig(
    family='phi3', vocab_size=20, d_model=8, n_layers=2, n_heads=2, n_kv=1, d_head=4, d_mlp=12,
    max_length=64)
EXPERTS = ModelConfig(
    family='mixtral', vocab_size=20, d_model=8, n_layers=2, n_heads=2, n_kv=1, d_head=4, d_mlp=12,
    max_length=64, experts=Experts(3, 2))
QKV1 = 'model.layers.1.self_attn.qkv_proj.weight'
GATE_UP0 = 'model.layers.0.mlp.gate_up_proj.weight'
W2 = 'model.layers.1.block_sparse_moe.experts.2.w2.weight'


def put(name, at, value, dtype=np.float32):
  def edit(tensors):
    tensors[name] = tensors[name].astype(dtype)
    tensors[name][at] = value
  return edit


# (model, change of its tensors, message)
TENSOR_CASES = {
    'NaN in the rows of v': (
        FUSED, put(QKV1, (13, 2), np.nan), f"'{QKV1}' holds NaN or inf.*1 that are not in rows 12"),
    'inf in up': (
        FUSED, put(GATE_UP0, (23, 7), np.inf, ml_dtypes.bfloat16), f"'{GATE_UP0}' holds NaN"),
    'a fused tensor that is too short': (
        FUSED, lambda t: t.update({QKV1: t[QKV1][:-1].copy()}),
        rf"'{QKV1}' has the wrong shape; expected \[16, 8\]; found \[15, 8\]"),
    'a fused tensor missing': (FUSED, lambda t: t.pop(GATE_UP0), f"'{GATE_UP0}' is missing"),
    'parts of a fused tensor': (
        FUSED, lambda t: t.update({Q1: np.zeros((8, 8), np.float32)}),
        f"'{Q1}' is not part of the model"),
    'NaN in one expert': (EXPERTS, put(W2, (7, 11), np.nan), f"'{W2}' holds NaN or inf"),
    'an expert missing': (EXPERTS, lambda t: t.pop(W2), f"'{W2}' is missing.*found 1 of them"),
    'an expert too many': (
        EXPERTS, lambda t: t.update({W2.replace('.2.', '.3.'): t[W2]}),
        r'experts\.3\.w2.* is not part'),
    'an expert of another width': (
        EXPERTS, lambda t: t.update({W2: np.zeros((8, 10), np.float32)}),
        rf"'{W2}' has the wrong shape; expected \[8, 12\]; found \[8, 10\]"),
    'an expert in eight bits, with scales': (
        EXPERTS, lambda t: t.update({
            W2: t[W2].astype(ml_dtypes.float8_e4m3fn), W2 + '_scale_inv': np.ones(1, np.float32)}),
        f"'{W2}' has an unsupported type; expected F32 or BF16 or F16; found F8_E4M3"),
}


@pytest.mark.parametrize('case', TENSOR_CASES)
def test_bad_fused_tensors_and_experts(tmp_path, case):
  c, change, message = TENSOR_CASES[case]
  folder = tmp_path / 'model'
  save_model(folder, params_of(c), c, tokenizer_from=None)
  edit_tensors(folder, change)
  with pytest.raises(InputError, match=message) as e:
    load(folder)
  assert str(folder) in str(e.value)


def test_wrong_tensors_are_found_before_anything_is_compiled(folder, monkeypatch):
  def refuse(*args, **kwargs):
    raise AssertionError('a program was compiled')

  monkeypatch.setattr(load_file, '_zeros', refuse)
  monkeypatch.setattr(load_file, '_put', refuse)
  with pytest.raises(AssertionError):
    load(folder)
  edit_tensors(folder, lambda t: t.pop(Q1))
  with pytest.raises(InputError, match='missing'):
    load(folder)


def test_a_file_cut_short_while_it_is_read(folder, monkeypatch):
  stored = model_folder.find_tensors(folder)
  os.truncate(weights(folder), weights(folder).stat().st_size - 8)
  monkeypatch.setattr(load_file, 'find_tensors', lambda _: stored)
  with pytest.raises(InputError, match="the file ends before tensor '.*' does.*changed while"):
    load(folder)


CONFIG_CASES = {
    'other family': (dict(model_type='gpt_neox'), "model_type.*expected llama.*found gpt_neox"),
    'no family': (dict(model_type=None), 'model_type'),
    'other architecture': (
        dict(architectures=['LlamaForSequenceClassification']), 'LlamaForSequenceClassification'),
    'bias of text': (dict(attention_bias='yes'), "'attention_bias' is malformed.*found 'yes'"),
    'unknown field': (dict(logit_scale=2.0), "'logit_scale' is not known"),
    'bias in mlp': (dict(mlp_bias=True), "'mlp_bias'"),
    'activation': (dict(hidden_act='relu'), "'hidden_act'.*expected silu.*found 'relu'"),
    'dropout': (dict(attention_dropout=0.1), "'attention_dropout'"),
    'split products': (dict(pretraining_tp=2), "'pretraining_tp'.*expected 1; found 2"),
    'quantised': (
        dict(quantization_config={'quant_method': 'gptq', 'bits': 4}),
        "'quantization_config'.*gptq"),
    'partial rotary': (dict(partial_rotary_factor=0.5), "'partial_rotary_factor'"),
    'layers that differ': (dict(per_layer_config={'0': {'head_dim': 8}}), "'per_layer_config'"),
    'custom code': (dict(auto_map={'AutoModel': 'x.py'}), "'auto_map'"),
    'unknown rotary scaling': (
        dict(rope_parameters=None, rope_scaling={'rope_type': 'ntk', 'factor': 4.0}),
        "'rope_scaling' has an unknown rope_type.*found 'ntk'"),
    'dynamic rotary scaling, old key': (
        dict(rope_parameters=None, rope_scaling={'type': 'dynamic', 'factor': 4.0}),
        "found 'dynamic'"),
    'rotary key': (
        dict(rope_parameters={'rope_type': 'linear', 'factor': 2.0, 'attention_factor': 1.2}),
        'attention_factor=1.2'),
    'partial rotary inside': (
        dict(rope_parameters={'rope_type': 'default', 'partial_rotary_factor': 0.25}),
        'partial_rotary_factor=0.25'),
    'no rotary factor': (
        dict(rope_parameters={'rope_type': 'linear'}), "field 'factor' is missing"),
    'rotary bounds': (
        dict(rope_parameters={'rope_type': 'llama3', 'factor': 8.0, 'low_freq_factor': 4.0,
                              'high_freq_factor': 1.0}), 'high_freq_factor is not above'),
    'two thetas': (dict(rope_theta=5e5), 'contradict each other.*500000'),
    'two scalings': (
        dict(rope_scaling={'type': 'linear', 'factor': 2.0}), 'contradict each other'),
    'two original lengths': (
        dict(original_max_position_embeddings=4096, rope_parameters={
            'rope_type': 'llama3', 'factor': 8.0, 'low_freq_factor': 1.0, 'high_freq_factor': 4.0,
            'original_max_position_embeddings': 8192}), 'given twice.*4096 and.*8192'),
    'rotary list': (dict(rope_parameters=[1]), "'rope_parameters' is malformed"),
    'missing size': (dict(hidden_size=None), "'hidden_size' is missing"),
    'size of text': (dict(vocab_size='20'), "'vocab_size' is malformed.*found '20'"),
    'size zero': (dict(intermediate_size=0), "'intermediate_size' is malformed.*found 0"),
    'size true': (dict(num_hidden_layers=True), "'num_hidden_layers' is malformed"),
    'eps NaN': (dict(rms_norm_eps=float('nan')), "'rms_norm_eps' is malformed"),
    'heads and kv': (dict(num_attention_heads=3, num_key_value_heads=2), 'not a multiple.*3 and 2'),
    'heads and size': (
        dict(num_attention_heads=3, num_key_value_heads=3, head_dim=None), 'hidden_size.*8 and 3'),
    'odd head': (dict(head_dim=5), 'even head_dim; found 5'),
    'tie of text': (dict(tie_word_embeddings='no'), "'tie_word_embeddings' is malformed"),
}


@pytest.mark.parametrize('case', CONFIG_CASES)
def test_bad_config(folder, case):
  changes, message = CONFIG_CASES[case]
  edit_object(folder / 'config.json', lambda c: c.update(changes))
  with pytest.raises(InputError, match=message) as e:
    read_config(folder)
  assert re.match(rf'{re.escape(str(folder))}/config.json: .*\.$', str(e.value))
