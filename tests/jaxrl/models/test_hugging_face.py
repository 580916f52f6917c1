"""Folders in and out: bits, shards, placement, tokenizer files, and what a failed save leaves."""

import contextlib
import json
import resource

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import transformers
from flax import traverse_util

from jaxrl.errors import InputError
from jaxrl.models import model_folder
from jaxrl.models import params as params_lib
from jaxrl.models.config import ModelConfig
from jaxrl.models.hugging_face import load_params, read_config, save_model
from jaxrl.models.hugging_face_tensors import named_tensors, tensor_shapes
from jaxrl.parallel.mesh import make_mesh
from tests import hugging_face_oracle as oracle

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


@pytest.mark.parametrize('name', ['float32', 'bfloat16', 'float16'])
@pytest.mark.parametrize('tied', [False, True])
def test_round_trip_is_bit_identical(tmp_path, name, tied):
  oracle.save_llama(
      tmp_path / 'in', dtype=getattr(oracle.torch, name), tie_word_embeddings=tied, head_dim=10)
  c = read_config(tmp_path / 'in')
  for compute in {'float32', name}:
    params = load_params(tmp_path / 'in', c, dtype=jnp.dtype(compute))
    assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype(compute)}
    save_model(tmp_path / compute, params, c, tokenizer_from=None, dtype=jnp.dtype(name))
    assert read_all(tmp_path / compute) == read_all(tmp_path / 'in')


def test_tied_weights_are_written_once(tmp_path, tiny_params):
  save_model(tmp_path / 'm', tiny_params, TINY, tokenizer_from=None)
  assert 'lm_head.weight' not in read_all(tmp_path / 'm')


@pytest.mark.parametrize('shard', ['6KB', '20KB'])
def test_sharded_checkpoints_are_read(tmp_path, shard):
  oracle.save_llama(tmp_path / 'one')
  oracle.save_llama(tmp_path / 'many', shard=shard)
  assert len(list((tmp_path / 'many').glob('*.safetensors'))) > 2
  c = read_config(tmp_path / 'one')
  one, many = (load_params(tmp_path / x, c) for x in ('one', 'many'))
  assert params_lib.identity(one) == params_lib.identity(many)


def test_shards_and_index_are_named_as_transformers_names_them(tmp_path, tiny_params):
  save_model(tmp_path / 'm', tiny_params, TINY, tokenizer_from=None, max_shard_bytes=6000)
  index = json.loads((tmp_path / 'm' / 'model.safetensors.index.json').read_text())
  files = sorted(p.name for p in (tmp_path / 'm').glob('*.safetensors'))
  n = len(files)
  assert n > 2
  assert files == [f'model-{i:05d}-of-{n:05d}.safetensors' for i in range(1, n + 1)]
  assert set(index['weight_map']) == set(tensor_shapes(TINY))
  assert set(index['weight_map'].values()) == set(files)
  assert index['metadata'] == {
      'total_size': 4 * params_lib.count_params(TINY),
      'total_parameters': params_lib.count_params(TINY)}
  sizes = [(tmp_path / 'm' / f).stat().st_size for f in files]
  assert max(sizes) < 6000 + 1500                      # headers come on top
  for file in files:
    with safetensors.safe_open(tmp_path / 'm' / file, 'np') as f:
      assert f.metadata() == {'format': 'pt'}
  save_model(tmp_path / 'whole', tiny_params, TINY, tokenizer_from=None)
  assert read_all(tmp_path / 'm') == read_all(tmp_path / 'whole')
  _, notes = transformers.LlamaForCausalLM.from_pretrained(
      tmp_path / 'm', output_loading_info=True)
  assert not any(notes.values()), notes


def test_saving_twice_gives_the_same_bytes(tmp_path, tiny_params):
  for name in ('a', 'b'):
    save_model(tmp_path / name, tiny_params, TINY, tokenizer_from=None, max_shard_bytes=9000)
  a, b = ({p.name: p.read_bytes() for p in (tmp_path / x).iterdir()} for x in 'ab')
  assert a == b


@pytest.mark.parametrize('sizes', [(8, 1, 1), (1, 8, 1), (2, 2, 2), (1, 4, 2)])
@pytest.mark.parametrize('tied', [False, True])
def test_loading_on_a_mesh_gives_the_same_values_in_their_resting_place(tmp_path, sizes, tied):
  data, fsdp, tensor = sizes
  oracle.save_llama(tmp_path / 'm', tie_word_embeddings=tied, head_dim=10)
  c = read_config(tmp_path / 'm')
  mesh = make_mesh(data=data, fsdp=fsdp, tensor=tensor)
  whole, spread = load_params(tmp_path / 'm', c), load_params(tmp_path / 'm', c, mesh=mesh)
  shardings = traverse_util.flatten_dict(params_lib.param_shardings(c, mesh))
  for path, x in traverse_util.flatten_dict(spread).items():
    assert x.sharding == shardings[path]
  assert params_lib.identity(whole) == params_lib.identity(spread)
  save_model(tmp_path / 'out', spread, c, tokenizer_from=None)
  assert read_all(tmp_path / 'out') == read_all(tmp_path / 'm')


def test_only_the_slice_of_a_device_is_read(tmp_path, monkeypatch):
  """With 8 devices on fsdp no read is larger than an eighth of a matrix."""
  oracle.save_llama(tmp_path / 'm')
  c = read_config(tmp_path / 'm')
  reads = []

  @contextlib.contextmanager
  def spy(tensors):
    with model_folder.open_tensors(tensors) as read:
      def counted(name, index):
        x = read(name, index)
        reads.append((name, x.size))
        return x
      yield counted

  monkeypatch.setattr('jaxrl.models.hugging_face.open_tensors', spy)
  load_params(tmp_path / 'm', c, mesh=make_mesh(fsdp=8))
  whole = {name: int(np.prod(shape)) for name, shape in tensor_shapes(c).items()}
  assert reads and all(8 * size == whole[name] for name, size in reads)


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
  assert params_lib.identity(load_params(tmp_path / 'm', TINY)) == params_lib.identity(tiny_params)


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
  def save_file(*args, **kwargs):
    raise OSError(28, 'No space left on device')

  monkeypatch.setattr(safetensors.numpy, 'save_file', save_file)
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
