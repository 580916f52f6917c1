"""Adapter folders in and out, against `peft` on CPU, and folders that are refused."""

import dataclasses
import functools
import json
import shutil
import warnings

import jax
import numpy as np
import pytest
import safetensors.numpy

torch = pytest.importorskip('torch', reason='peft needs PyTorch')
peft = pytest.importorskip('peft', reason='the oracle of adapter folders')
import transformers

from jaxrl.errors import InputError
from jaxrl.models import decoder, lora, peft_folder
from jaxrl.models.config import Experts, Lora
from jaxrl.models.hugging_face import load_params, read_config
from jaxrl.models.params import is_spec
from tests.hugging_face_oracle import SMALL, torch_logits
from tests.tiny_model import CONFIG, QUICK

FAMILIES = {
    'llama': {}, 'qwen2': {},
    'phi3': {'attention_dropout': 0.0, 'resid_pdrop': 0.0, 'embd_pdrop': 0.0},
    'gemma2': {'head_dim': 8, 'query_pre_attn_scalar': 8, 'sliding_window': 8}}
TOKENS = np.random.default_rng(0).integers(3, 101, (2, 12)).astype(np.int32)
ATTENTION = {'phi3': ['qkv_proj', 'o_proj']}
MLP = {'phi3': ['gate_up_proj', 'down_proj']}


def modules_of(family):
  return (ATTENTION.get(family, ['q_proj', 'k_proj', 'v_proj', 'o_proj'])
          + MLP.get(family, ['gate_proj', 'up_proj', 'down_proj']))


def randomise(model, seed, names=''):
  generator = torch.Generator().manual_seed(seed)
  with torch.no_grad():
    for name, p in model.named_parameters():
      if names in name:
        noise = torch.randn(p.shape, generator=generator)
        p.copy_(1 + 0.2 * noise if p.ndim == 1 else noise / p.shape[1] ** 0.5)


@pytest.fixture(scope='module')
def bases(tmp_path_factory):
  """Random checkpoints by family: (folder, configuration, parameters)."""
  @functools.cache
  def base(family):
    folder = tmp_path_factory.mktemp(family) / 'model'
    settings = SMALL | {'num_hidden_layers': 2, 'attn_implementation': 'eager'} | FAMILIES[family]
    model = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.for_model(family, **settings))
    randomise(model, 0)
    model.save_pretrained(folder)
    c = read_config(folder)
    return folder, c, load_params(folder, c)

  return base


def torch_model(folder):
  return transformers.AutoModelForCausalLM.from_pretrained(
      folder, attn_implementation='eager', dtype=torch.float32).eval()


def peft_adapter(base, folder, **settings):
  """The logits of a random adapter, saved in `folder` by peft."""
  config = peft.LoraConfig(**({'r': 3, 'lora_alpha': 5, 'task_type': 'CAUSAL_LM'} | settings))
  model = peft.get_peft_model(torch_model(base), config).eval()
  randomise(model, 1, 'lora_')
  model.save_pretrained(folder)
  return torch_logits(model, TOKENS)


@functools.partial(jax.jit, static_argnums=1, compiler_options=QUICK)
def our_logits(params, c):
  return decoder.logits(params, decoder.forward(params, TOKENS, c), c)


def assert_close(found, expected):
  assert np.isfinite(expected).all()
  difference = np.abs(np.asarray(found) - expected).max() / np.abs(expected).max()
  assert difference < 2e-5, difference


def read_logits(base, folder):
  _, c, params = base
  wanted, adapter = peft_folder.read_adapter(folder, c)
  return our_logits(lora.attach(params, adapter), dataclasses.replace(c, lora=wanted)), wanted


@pytest.mark.parametrize('family', FAMILIES)
def test_an_adapter_of_peft_gives_its_logits(family, bases, tmp_path):
  base = bases(family)
  expected = peft_adapter(base[0], tmp_path, target_modules=modules_of(family))
  plain = torch_logits(torch_model(base[0]), TOKENS)
  assert np.abs(expected - plain).max() > 0.05 * np.abs(plain).max()
  found, wanted = read_logits(base, tmp_path)
  assert_close(found, expected)
  assert wanted == Lora(3, 5.0, lora.TARGETS)


SETTINGS = [
    {'target_modules': ['v_proj', 'down_proj'], 'use_rslora': True},
    {'target_modules': 'all-linear'},
    {'target_modules': r'.*\.1\.self_attn\.[qk]_proj'},
    {'target_modules': ['q_proj', 'o_proj'], 'layers_to_transform': [1]},
    {'target_modules': ['q_proj', 'up_proj', 'down_proj'],
     'exclude_modules': ['layers.0.mlp.up_proj'],
     'rank_pattern': {'q_proj': 2, r'layers\.1\.mlp\.up_proj': 5}, 'alpha_pattern': {'mlp.*': 7.5}},
    {'target_modules': ['k_proj', 'gate_proj'], 'use_rslora': True, 'rank_pattern': {'k_proj': 6},
     'init_lora_weights': 'gaussian', 'lora_dropout': 0.1},
]


@pytest.mark.parametrize('settings', SETTINGS)
def test_settings_of_peft_mean_the_same(settings, bases, tmp_path):
  base = bases('llama')
  expected = peft_adapter(base[0], tmp_path, **settings)
  assert_close(read_logits(base, tmp_path)[0], expected)


def random_adapter(c, seed=2):
  rng = np.random.default_rng(seed)
  return jax.tree.map(
      lambda s: rng.normal(scale=0.2, size=s.shape).astype(np.float32), lora.lora_specs(c),
      is_leaf=is_spec)


OURS = [
    *((family, Lora(3, 5.0, lora.TARGETS)) for family in FAMILIES),
    ('phi3', Lora(2, 3.0, ('q', 'v', 'down'), rank_stabilised=True)),
    ('phi3', Lora(2, 3.0, ('k', 'up'))),
    ('llama', Lora(4, 4.5, ('v', 'gate'), rank_stabilised=True)),
]


@pytest.mark.parametrize('family, wanted', OURS)
def test_peft_gives_the_logits_of_our_folder(family, wanted, bases, tmp_path):
  folder, c, params = bases(family)
  c = dataclasses.replace(c, lora=wanted)
  adapter = random_adapter(c)
  peft_folder.write_adapter(tmp_path / 'a', adapter, c)
  with warnings.catch_warnings():
    warnings.simplefilter('error', UserWarning)   # peft only warns of missing tensors
    model = peft.PeftModel.from_pretrained(torch_model(folder), tmp_path / 'a').eval()
  expected = np.asarray(our_logits(lora.attach(params, adapter), c))
  assert_close(torch_logits(model, TOKENS), expected)
  assert_close(read_logits(bases(family), tmp_path / 'a')[0], expected)


def test_what_is_written_is_read_back_bit_for_bit(bases, tmp_path):
  _, c, _ = bases('llama')
  c = dataclasses.replace(c, lora=Lora(3, 5.0, ('q', 'o', 'down')))
  adapter = random_adapter(c)
  for name in 'ab':
    peft_folder.write_adapter(tmp_path / name, adapter, c)
  found, again = peft_folder.read_adapter(tmp_path / 'a', dataclasses.replace(c, lora=None))
  assert found == c.lora
  jax.tree.map(np.testing.assert_array_equal, again, adapter)
  for file in (peft_folder.CONFIG, peft_folder.WEIGHTS):
    assert (tmp_path / 'a' / file).read_bytes() == (tmp_path / 'b' / file).read_bytes()
  with pytest.raises(InputError, match='already exists'):
    peft_folder.write_adapter(tmp_path / 'a', adapter, c)
  adapter['layers']['o']['b'][1, 0, 0] = np.inf
  with pytest.raises(InputError, match=r'layers\.1\.self_attn\.o_proj\.lora_B.*NaN or inf'):
    peft_folder.write_adapter(tmp_path / 'c', adapter, c)
  assert not (tmp_path / 'c').exists() and not (tmp_path / 'c.saving').exists()


# Folders that are refused. `CONFIG` is a Llama, so none of this needs a checkpoint.


@pytest.fixture(scope='module')
def good(tmp_path_factory):
  folder = tmp_path_factory.mktemp('adapter') / 'good'
  c = dataclasses.replace(CONFIG, lora=Lora(2, 4.0, ('q', 'v')))
  peft_folder.write_adapter(folder, random_adapter(c), c)
  return folder


@pytest.fixture
def folder(good, tmp_path):
  shutil.copytree(good, tmp_path / 'adapter')
  return tmp_path / 'adapter'


def edit_config(folder, **values):
  path = folder / peft_folder.CONFIG
  path.write_text(json.dumps(json.loads(path.read_text()) | values))


BAD_FIELDS = [
    ('use_dora', True), ('bias', 'all'), ('modules_to_save', ['lm_head']),
    ('fan_in_fan_out', True), ('init_lora_weights', 'pissa'), ('init_lora_weights', 'olora'),
    ('init_lora_weights', 'pissa_niter_16'), ('init_lora_weights', 'loftq'),
    ('init_lora_weights', 'corda'), ('peft_type', 'IA3'), ('peft_type', None),
    ('task_type', 'SEQ_CLS'), ('r', 0), ('r', '2'), ('r', True), ('lora_alpha', None),
    ('lora_alpha', float('nan')), ('target_modules', None), ('target_modules', [1]),
    ('target_modules', '(q_proj'), ('layers_to_transform', ['0']), ('layers_pattern', 'h'),
    ('rank_pattern', {'q_proj': 0}), ('rank_pattern', {'q_proj': 1.5}), ('rank_pattern', {'(': 1}),
    ('alpha_pattern', ['q_proj']), ('layer_replication', [[0, 1]]), ('lora_bias', True),
    ('trainable_token_indices', [1]), ('use_qalora', True), ('target_parameters', ['w']),
    ('alora_invocation_tokens', [1]), ('a_field_of_tomorrow', 0.5),
]


@pytest.mark.parametrize('field, value', BAD_FIELDS)
def test_a_field_that_is_not_honoured_is_named(field, value, folder):
  edit_config(folder, **{field: value})
  with pytest.raises(InputError, match=rf"adapter_config\.json: the field '{field}' cannot be"):
    peft_folder.read_adapter(folder, CONFIG)


@pytest.mark.parametrize('targets, message', [
    (['q_proj'], r"layers\.0\.self_attn\.v_proj' is not among target_modules"),
    (['q_proj', 'v_proj', 'up_proj'], r"layers\.0\.mlp\.up_proj' has no tensors"),
    (['q_proj', 'v_proj', 'lm_head'], 'embedding and output matrix.*found lm_head'),
    (['q_proj', 'v_proj', 'embed_tokens'], 'embedding and output matrix.*found model.embed_tokens'),
])
def test_configuration_and_weights_must_agree(targets, message, folder):
  edit_config(folder, target_modules=targets)
  with pytest.raises(InputError, match=message):
    peft_folder.read_adapter(folder, CONFIG)


Q = 'base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight'


def without(tensors):
  del tensors[Q]


def renamed(tensors):
  tensors[Q.replace('q_proj', 'query')] = tensors.pop(Q)


def shaped(tensors):
  tensors[Q] = np.ascontiguousarray(tensors[Q].T)


def counted(tensors):
  tensors[Q] = tensors[Q].astype(np.int32)


def spoilt(tensors):
  tensors[Q][1, 3] = np.nan


@pytest.mark.parametrize('edit, message', [
    (without, r"q_proj\.lora_A\.weight' is missing"),
    (renamed, r"query\.lora_A\.weight' does not belong"),
    (shaped, r"q_proj\.lora_A\.weight' has the wrong shape; expected \[2, 32\]; found \[32, 2\]"),
    (counted, r"q_proj\.lora_A\.weight' has an unsupported type.*found I32"),
    (spoilt, r"q_proj\.lora_A\.weight' holds NaN or inf.*found 1 that"),
    (lambda tensors: tensors.clear(), 'the adapter has no tensors'),
])
def test_a_bad_tensor_is_named(edit, message, folder):
  path = folder / peft_folder.WEIGHTS
  tensors = safetensors.numpy.load_file(path)
  edit(tensors)
  safetensors.numpy.save_file(tensors, path)
  with pytest.raises(InputError, match=f'adapter_model.safetensors: .*{message}'):
    peft_folder.read_adapter(folder, CONFIG)


def test_an_adapter_of_another_model_is_refused(folder):
  with pytest.raises(InputError, match='lora_A.weight. has the wrong shape'):
    peft_folder.read_adapter(folder, dataclasses.replace(CONFIG, d_model=40))
  with pytest.raises(InputError, match='layers.1.*does not belong to an adapter of this model'):
    peft_folder.read_adapter(folder, dataclasses.replace(CONFIG, n_layers=1))


def test_an_adapter_on_experts_is_refused(folder):
  mixture = dataclasses.replace(CONFIG, family='qwen3_moe', experts=Experts(2, 1))
  assert peft_folder.read_adapter(folder, mixture)[0].targets == ('q', 'v')
  path = folder / peft_folder.WEIGHTS
  tensors = safetensors.numpy.load_file(path)
  tensors['base_model.model.model.layers.0.mlp.experts.1.up_proj.lora_A.weight'] = np.ones((2, 32))
  safetensors.numpy.save_file(tensors, path)
  with pytest.raises(InputError, match='experts.1.up_proj.*does not belong'):
    peft_folder.read_adapter(folder, mixture)


def test_damaged_and_foreign_folders(folder, tmp_path):
  path = folder / peft_folder.WEIGHTS
  whole = path.read_bytes()
  path.write_bytes(whole[:-8])
  with pytest.raises(InputError, match='adapter_model.safetensors: the file ends before tensor'):
    peft_folder.read_adapter(folder, CONFIG)
  path.rename(folder / 'adapter_model.bin')
  with pytest.raises(InputError, match='pickle file.*found adapter_model.bin'):
    peft_folder.read_adapter(folder, CONFIG)
  (folder / 'adapter_model.bin').unlink()
  with pytest.raises(InputError, match='has no adapter; expected adapter_model.safetensors'):
    peft_folder.read_adapter(folder, CONFIG)
  (folder / peft_folder.CONFIG).unlink()
  with pytest.raises(InputError, match='adapter_config.json: the file cannot be read'):
    peft_folder.read_adapter(folder, CONFIG)
  with pytest.raises(InputError, match='expected a Hugging Face folder|nothing there'):
    peft_folder.read_adapter(tmp_path / 'nowhere', CONFIG)
