"""Folders in and out: bits, shards, placement, tokenizer files, and what a failed save leaves."""

import dataclasses
import json
import resource

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
import transformers

from jaxrl.errors import InputError
from jaxrl.models import params as params_lib
from jaxrl.models import save
from jaxrl.models.config import ModelConfig
from jaxrl.models.hugging_face import load_params, read_config, save_model, write_config
from jaxrl.models.hugging_face_names import TENSORS
from jaxrl.models.hugging_face_tensors import named_tensors
from jaxrl.models.identity import identity
from jaxrl.parallel.mesh import make_mesh
from tests import hugging_face_oracle as oracle
from tests.family_shapes import SHAPES

TINY = ModelConfig(
    family='llama', vocab_size=40, d_model=16, n_layers=2, n_heads=4, n_kv=2, d_head=6, d_mlp=24,
    max_length=64, tie_embeddings=True)


@pytest.fixture(scope='module')
def tiny_params():
  rng = np.random.default_rng(1)
  return jax.tree.map(
      lambda s: jnp.asarray(rng.normal(size=s.shape), jnp.float32),
      params_lib.decoder_specs(TINY), is_leaf=params_lib.is_spec)


def read_all(folder):
  """name -> (dtype, shape, bytes) of every tensor of a folder, without our reader."""
  tensors = {}
  for file in sorted(folder.glob('*.safetensors')):
    for name, x in safetensors.numpy.load_file(file).items():
      tensors[name] = (x.dtype, x.shape, x.tobytes())
  return tensors


def files_of(folder):
  """name -> bytes of the weights and of their index."""
  return {p.name: p.read_bytes() for p in folder.iterdir() if p.name.startswith('model')}


# Every family once in the type that checkpoints have; the kinds of tensors in the other types too.
ROUND_TRIPS = [(family, 'bfloat16') for family in sorted(TENSORS)] + [
    (family, name) for family in ('llama', 'phi3', 'mixtral') for name in ('float32', 'float16')]


@pytest.mark.parametrize('family, name', ROUND_TRIPS)
def test_round_trip_is_byte_identical(tmp_path, family, name):
  """The files themselves: header, order and bits are those of `save_pretrained`."""
  shape = next(iter(SHAPES[family].values())) | {'num_hidden_layers': 2}
  oracle.save_model(tmp_path / 'in', family, dtype=getattr(oracle.torch, name), **shape)
  c = read_config(tmp_path / 'in')
  params = load_params(tmp_path / 'in', c)
  assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype('float32')}
  save_model(tmp_path / 'out', params, c, tokenizer_from=None, like=tmp_path / 'in')
  assert files_of(tmp_path / 'out') == files_of(tmp_path / 'in')
  assert read_config(tmp_path / 'out') == c
  before, after = (json.loads((tmp_path / x / 'config.json').read_text()) for x in ('in', 'out'))
  assert after == dict.fromkeys(('bos_token_id', 'eos_token_id', 'pad_token_id')) | before


@pytest.mark.parametrize('name', ['float32', 'bfloat16', 'float16'])
def test_parameters_held_in_the_stored_type_keep_their_bits(tmp_path, name):
  oracle.save_model(
      tmp_path / 'in', 'llama', dtype=getattr(oracle.torch, name), tie_word_embeddings=True,
      num_hidden_layers=2, head_dim=10)
  c = read_config(tmp_path / 'in')
  params = load_params(tmp_path / 'in', c, dtype=jnp.dtype(name))
  assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype(name)}
  save_model(tmp_path / 'out', params, c, tokenizer_from=None, dtype=jnp.dtype(name))
  assert files_of(tmp_path / 'out') == files_of(tmp_path / 'in')


def test_each_tensor_keeps_its_own_type(tmp_path, tiny_params):
  """Checkpoints with norms in float32 among bfloat16 matrices, subnormal numbers included."""
  save_model(tmp_path / 'm', tiny_params, TINY, tokenizer_from=None)
  file = tmp_path / 'm' / 'model.safetensors'
  tensors = safetensors.numpy.load_file(file)
  for name, x in tensors.items():
    x = np.where(np.arange(x.size).reshape(x.shape) % 5, x, x * 1e-39).astype(np.float32)
    tensors[name] = x if 'norm' in name else x.astype(ml_dtypes.bfloat16)
  safetensors.numpy.save_file(tensors, file, metadata={'format': 'pt'})
  params = load_params(tmp_path / 'm', TINY)
  save_model(tmp_path / 'out', params, TINY, tokenizer_from=None, like=tmp_path / 'm')
  assert files_of(tmp_path / 'out') == files_of(tmp_path / 'm')
  config = json.loads((tmp_path / 'out' / 'config.json').read_text())
  assert config['torch_dtype'] == 'bfloat16'


def test_a_type_to_keep_has_to_be_there(tmp_path, tiny_params):
  save_model(tmp_path / 'm', tiny_params, TINY, tokenizer_from=None)
  untied = dataclasses.replace(TINY, tie_embeddings=False)
  params = tiny_params | {'head': tiny_params['embedding'].T}
  with pytest.raises(InputError, match="'lm_head.weight' has no type to keep.*no such tensor"):
    save_model(tmp_path / 'out', params, untied, tokenizer_from=None, like=tmp_path / 'm')


def test_tied_weights_are_written_once(tmp_path, tiny_params):
  save_model(tmp_path / 'm', tiny_params, TINY, tokenizer_from=None)
  assert 'lm_head.weight' not in read_all(tmp_path / 'm')


@pytest.mark.parametrize('family', ['llama', 'phi3', 'qwen2', 'mixtral', 'gemma3_text'])
@pytest.mark.parametrize('shard_bytes', [1, 9000, 30_000])
def test_shards_and_index_are_those_of_transformers(tmp_path, family, shard_bytes):
  """Files byte for byte, the index included; tied, fused and experts among them."""
  shape = next(iter(SHAPES[family].values())) | {'num_hidden_layers': 2}
  model = oracle.make_model(family, **shape)
  model.save_pretrained(tmp_path / 'in', max_shard_size=shard_bytes)
  c = read_config(tmp_path / 'in')
  params = load_params(tmp_path / 'in', c)
  save_model(
      tmp_path / 'out', params, c, tokenizer_from=None, max_shard_bytes=shard_bytes)
  ours, theirs = files_of(tmp_path / 'out'), files_of(tmp_path / 'in')
  assert len(theirs) > 3
  assert ours.keys() == theirs.keys()
  assert [name for name in ours if ours[name] != theirs[name]] == []


def test_what_training_made_of_a_model_reloads_in_transformers(tmp_path, tiny_params):
  save_model(tmp_path / 'm', tiny_params, TINY, tokenizer_from=None, max_shard_bytes=6000)
  model, notes = transformers.LlamaForCausalLM.from_pretrained(
      tmp_path / 'm', output_loading_info=True)
  assert not any(notes.values()), notes
  assert model.lm_head.weight is model.model.embed_tokens.weight
  np.testing.assert_array_equal(
      model.model.norm.weight.detach().numpy(), np.asarray(tiny_params['final_norm']))


def test_saving_twice_gives_the_same_bytes(tmp_path, tiny_params):
  for name in ('a', 'b'):
    save_model(tmp_path / name, tiny_params, TINY, tokenizer_from=None, max_shard_bytes=9000)
  a, b = ({p.name: p.read_bytes() for p in (tmp_path / x).iterdir()} for x in 'ab')
  assert a == b


@pytest.mark.parametrize('family, sizes', [
    ('llama', (2, 2, 2)), ('phi3', (1, 8, 1)), ('qwen2', (1, 4, 2)),
    ('mixtral', (1, 4, 2))])
def test_a_model_on_a_mesh_is_exported_as_the_same_bytes(tmp_path, family, sizes):
  settings = dict(num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=2)
  settings |= next(iter(SHAPES[family].values())) | {'vocab_size': 101}
  oracle.save_model(tmp_path / 'm', family, dtype=oracle.torch.bfloat16, **settings)
  c = read_config(tmp_path / 'm')
  mesh = make_mesh(data=sizes[0], fsdp=sizes[1], tensor=sizes[2])
  params = load_params(tmp_path / 'm', c, mesh=mesh)
  assert len(params['embedding'].sharding.device_set) == 8
  save_model(tmp_path / 'out', params, c, tokenizer_from=None, like=tmp_path / 'm')
  assert files_of(tmp_path / 'out') == files_of(tmp_path / 'm')
  assert identity(params) == identity(load_params(tmp_path / 'm', c))


def test_a_mesh_that_does_not_divide_the_heads_is_an_error(tmp_path):
  oracle.save_llama(tmp_path / 'm')
  c = read_config(tmp_path / 'm')
  with pytest.raises(InputError, match="not divide parameter 'layers/k'.*'kv': 2.*'tensor': 4"):
    load_params(tmp_path / 'm', c, mesh=make_mesh(fsdp=2, tensor=4))


def test_old_frequency_tables_and_a_copy_of_the_tied_head_are_accepted(tmp_path, tiny_params):
  save_model(tmp_path / 'm', tiny_params, TINY, tokenizer_from=None)
  file = tmp_path / 'm' / 'model.safetensors'
  tensors = safetensors.numpy.load_file(file)
  tensors['model.layers.0.self_attn.rotary_emb.inv_freq'] = np.ones(3, np.float32)
  tensors['lm_head.weight'] = tensors['model.embed_tokens.weight']
  safetensors.numpy.save_file(tensors, file)
  assert identity(load_params(tmp_path / 'm', TINY)) == identity(tiny_params)


def test_linked_files_are_followed(tmp_path, tiny_params):
  """The hub's cache holds links to blobs outside the folder."""
  save_model(tmp_path / 'blobs', tiny_params, TINY, tokenizer_from=None, max_shard_bytes=6000)
  (tmp_path / 'm').mkdir()
  for file in (tmp_path / 'blobs').iterdir():
    (tmp_path / 'm' / file.name).symlink_to(f'../blobs/{file.name}')
  load_params(tmp_path / 'm', read_config(tmp_path / 'm'))


def write_tokenizer(folder, **config):
  folder.mkdir()
  files = {
      'tokenizer.json': {
          'added_tokens': [{'content': '<eos>', 'id': 3}, {'content': '<s>', 'id': 1}]},
      'tokenizer_config.json': {'eos_token': {'content': '<eos>'}, 'bos_token': '<s>'},
  } | config
  for name, value in files.items():
    (folder / name).write_text(json.dumps(value))
  (folder / 'chat_template.jinja').write_text('{{ messages }}')
  (folder / 'README.md').write_text('not part of a tokenizer')
  return folder


def test_tokenizer_and_token_ids_travel_with_the_model(tmp_path, tiny_params):
  source = write_tokenizer(tmp_path / 'tokenizer')
  save_model(tmp_path / 'm', tiny_params, TINY, tokenizer_from=source)
  assert {p.name for p in (tmp_path / 'm').iterdir()} == {
      'config.json', 'generation_config.json', 'model.safetensors', 'tokenizer.json',
      'tokenizer_config.json', 'chat_template.jinja'}
  for name in ('tokenizer.json', 'tokenizer_config.json', 'chat_template.jinja'):
    assert (tmp_path / 'm' / name).read_bytes() == (source / name).read_bytes()
  ids = {'bos_token_id': 1, 'eos_token_id': 3, 'pad_token_id': None}
  assert json.loads((tmp_path / 'm' / 'generation_config.json').read_text()) == ids
  assert ids.items() <= json.loads((tmp_path / 'm' / 'config.json').read_text()).items()


def test_token_ids_and_generation_settings_of_a_model_folder_win(tmp_path, tiny_params):
  settings = {'eos_token_id': [3, 5], 'temperature': 0.6, 'do_sample': True}
  source = write_tokenizer(tmp_path / 'source', **{
      'config.json': {'bos_token_id': 1, 'eos_token_id': [3, 5]},
      'generation_config.json': settings})
  save_model(tmp_path / 'm', tiny_params, TINY, tokenizer_from=source)
  assert json.loads((tmp_path / 'm' / 'generation_config.json').read_text()) == settings
  assert json.loads((tmp_path / 'm' / 'config.json').read_text())['eos_token_id'] == [3, 5]


def test_the_configuration_of_the_same_model_is_kept_as_it_is(tmp_path, tiny_params):
  extra = {'transformers_version': '4.44.0', 'use_cache': False, 'auto_map': {},
           'dtype': 'bfloat16'}
  source = write_tokenizer(tmp_path / 'source', **{
      'config.json': write_config(TINY) | extra | {'eos_token_id': 3}})
  save_model(tmp_path / 'm', tiny_params, TINY, tokenizer_from=source)
  config = json.loads((tmp_path / 'm' / 'config.json').read_text())
  assert config == write_config(TINY) | {
      'transformers_version': '4.44.0', 'eos_token_id': 3, 'use_cache': False, 'dtype': 'float32'}
  other = dataclasses.replace(TINY, norm_eps=1e-3)
  save_model(tmp_path / 'other', tiny_params, other, tokenizer_from=source)
  config = json.loads((tmp_path / 'other' / 'config.json').read_text())
  assert config == write_config(other) | {'eos_token_id': 3, 'torch_dtype': 'float32'}


def test_every_chat_template_travels(tmp_path, tiny_params):
  source = write_tokenizer(tmp_path / 'source')
  (source / 'additional_chat_templates').mkdir()
  (source / 'additional_chat_templates' / 'tools.jinja').write_text('{{ tools }}')
  save_model(tmp_path / 'm', tiny_params, TINY, tokenizer_from=source)
  copied = tmp_path / 'm' / 'additional_chat_templates' / 'tools.jinja'
  assert copied.read_text() == '{{ tools }}'


def test_a_tokenizer_that_does_not_fit_is_an_error(tmp_path, tiny_params):
  source = write_tokenizer(tmp_path / 'source', **{'config.json': {'eos_token_id': 40}})
  with pytest.raises(InputError, match='eos_token_id.*below vocab_size 40; found 40'):
    save_model(tmp_path / 'm', tiny_params, TINY, tokenizer_from=source)
  (tmp_path / 'empty').mkdir()
  with pytest.raises(InputError, match='no tokenizer to copy'):
    save_model(tmp_path / 'm', tiny_params, TINY, tokenizer_from=tmp_path / 'empty')
  assert not (tmp_path / 'm').exists()


def test_an_existing_folder_is_not_touched(tmp_path, tiny_params):
  (tmp_path / 'm').mkdir()
  with pytest.raises(InputError, match='already exists'):
    save_model(tmp_path / 'm', tiny_params, TINY, tokenizer_from=None)
  assert list((tmp_path / 'm').iterdir()) == []


def test_what_a_killed_save_left_is_replaced(tmp_path, tiny_params):
  (tmp_path / 'm.saving').mkdir()
  (tmp_path / 'm.saving' / 'model-00001-of-00009.safetensors').write_bytes(b'half')
  save_model(tmp_path / 'm', tiny_params, TINY, tokenizer_from=None)
  assert {p.name for p in tmp_path.iterdir()} == {'m'}
  assert not list((tmp_path / 'm').glob('model-*'))


def test_a_full_disk_is_an_input_error_and_leaves_nothing(tmp_path, tiny_params):
  """A limit on file size stands in for the disk: writing stops in the middle of the weights."""
  limits = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (8000, limits[1]))
  try:
    with pytest.raises(InputError, match='cannot be written.*room for .* bytes'):
      save_model(tmp_path / 'm', tiny_params, TINY, tokenizer_from=None)
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
  assert list(tmp_path.iterdir()) == []


def test_no_space_left_is_called_a_full_disk(tmp_path, tiny_params, monkeypatch):
  def write_file(*args, **kwargs):
    raise OSError(28, 'No space left on device')

  monkeypatch.setattr(save, 'write_file', write_file)
  with pytest.raises(InputError, match='the disk is full'):
    save_model(tmp_path / 'm', tiny_params, TINY, tokenizer_from=None)
  assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize('dtype, value', [('float32', np.nan), ('float16', 1e6)])
def test_weights_that_are_not_finite_are_not_written(tmp_path, tiny_params, dtype, value):
  params = dict(tiny_params, final_norm=tiny_params['final_norm'].at[3].set(value))
  with pytest.raises(InputError, match="'model.norm.weight' holds NaN or inf"):
    save_model(tmp_path / 'm', params, TINY, tokenizer_from=None, dtype=jnp.dtype(dtype))
  assert list(tmp_path.iterdir()) == []


def test_saving_as_integers_is_an_error(tmp_path, tiny_params):
  with pytest.raises(InputError, match='float32 or bfloat16 or float16; found int8'):
    save_model(tmp_path / 'm', tiny_params, TINY, tokenizer_from=None, dtype=jnp.int8)


def test_layouts_follow_the_convention_of_linear_layers(tiny_params):
  """x @ W^T of every stored matrix equals our einsum, head by head."""
  stored = dict(named_tensors(tiny_params, TINY))
  x = np.random.default_rng(0).normal(size=16).astype(np.float32)
  q = np.asarray(tiny_params['layers']['q'])[1]
  np.testing.assert_allclose(
      (stored['model.layers.1.self_attn.q_proj.weight'] @ x).reshape(4, 6),
      np.einsum('d,dnh->nh', x, q), rtol=1e-5, atol=1e-6)
  heads = np.random.default_rng(1).normal(size=(4, 6)).astype(np.float32)
  o = np.asarray(tiny_params['layers']['o'])[0]
  np.testing.assert_allclose(
      stored['model.layers.0.self_attn.o_proj.weight'] @ heads.reshape(24),
      np.einsum('nh,nhd->d', heads, o), rtol=1e-5, atol=1e-6)
