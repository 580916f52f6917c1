"""Loading holds a few blocks on the host, reads every byte once, and makes no second model."""

import collections
import contextlib
import math
import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from benchmarks.load_checkpoint import config_of, measure_in_process, write_checkpoint
from jaxrl.models import load, model_folder
from jaxrl.models import params as params_lib
from jaxrl.models.config import Experts, ModelConfig
from jaxrl.models.hugging_face import load_params
from jaxrl.models.hugging_face_tensors import named_tensors, tensor_shapes
from jaxrl.parallel.mesh import make_mesh

MIB = 2**20
# Fused (rows of one tensor for several weights), experts, biases of 8 heads, and the plain one.
PHI3 = ModelConfig(
    family='phi3', vocab_size=24, d_model=32, n_layers=2, n_heads=8, n_kv=2, d_head=4, d_mlp=16,
    max_length=64)
MOE = ModelConfig(
    family='qwen3_moe', vocab_size=24, d_model=32, n_layers=2, n_heads=8, n_kv=2, d_head=4,
    d_mlp=16, max_length=64, qk_norm='head', experts=Experts(3, 2))
QWEN2 = ModelConfig(
    family='qwen2', vocab_size=24, d_model=32, n_layers=2, n_heads=8, n_kv=2, d_head=4, d_mlp=16,
    max_length=64, qkv_bias=True, tie_embeddings=True)
MODELS = {'phi3': PHI3, 'qwen3_moe': MOE, 'qwen2': QWEN2}


@pytest.fixture(scope='module', params=sorted(MODELS))
def checkpoint(request, tmp_path_factory):
  """(folder, configuration, stored tensors as float32 by name)."""
  c = MODELS[request.param]
  folder = tmp_path_factory.mktemp('streaming') / request.param
  write_checkpoint(folder, c)
  found = model_folder.find_tensors(folder)
  with model_folder.open_files(found) as read:
    return folder, c, {
        name: load._read_rows(
            read, name, load.FLOATS[x.dtype], math.prod(x.shape[1:]), (0, x.shape[0]),
            (0, math.prod(x.shape[1:]))).reshape(x.shape).astype(np.float32)
        for name, x in found.items()}


def spy_on_reads(monkeypatch):
  """Every (name, offset, bytes) that is read from now on."""
  reads = []

  @contextlib.contextmanager
  def spy(tensors):
    with model_folder.open_files(tensors) as read:
      def counted(name, offset, out):
        reads.append((name, offset, len(out)))
        read(name, offset, out)
      yield counted

  monkeypatch.setattr(load, 'open_files', spy)
  return reads


def bytes_read(reads):
  total = collections.Counter()
  for name, _, size in reads:
    total[name] += size
  return dict(total)


@pytest.mark.parametrize('sizes, block', [
    (None, 2**24), (None, 900), ((1, 8, 1), 900), ((2, 2, 2), 2**24), ((8, 1, 1), 2**24)])
def test_every_byte_is_read_once_and_comes_to_its_place(checkpoint, monkeypatch, sizes, block):
  """Also where rows are read a few at a time, and where replicas are on several devices."""
  folder, c, tensors = checkpoint
  monkeypatch.setattr(load, 'BLOCK_BYTES', block)
  reads = spy_on_reads(monkeypatch)
  mesh = None if sizes is None else make_mesh(data=sizes[0], fsdp=sizes[1], tensor=sizes[2])
  params = load_params(folder, c, mesh=mesh)
  loaded = dict(named_tensors(params, c))
  assert loaded.keys() == tensors.keys()
  for name, x in tensors.items():
    np.testing.assert_array_equal(loaded[name], x, err_msg=name)
  assert bytes_read(reads) == {name: 2 * math.prod(s) for name, s in tensor_shapes(c).items()}
  assert len(set(reads)) == len(reads)
  if mesh is not None:
    shardings = traverse_util.flatten_dict(params_lib.param_shardings(c, mesh))
    for path, x in traverse_util.flatten_dict(params).items():
      assert x.sharding == shardings[path]


def test_reads_are_bounded(checkpoint, monkeypatch):
  """A row (of all dimensions of a head) is the least that is read."""
  folder, c, _ = checkpoint
  monkeypatch.setattr(load, 'BLOCK_BYTES', 1024)
  reads = spy_on_reads(monkeypatch)
  load_params(folder, c)
  assert max(size for _, _, size in reads) <= 1024 // 2
  assert len(reads) > 1.5 * len(tensor_shapes(c))


def test_a_device_with_part_of_the_rows_needs_only_those(checkpoint, monkeypatch):
  """What one of two hosts would do: only the devices of half of the tensor axis are its own."""
  folder, c, _ = checkpoint
  mesh = make_mesh(tensor=2, devices=jax.devices()[:2])
  place = load.sharding.stored(mesh, ('layers', 'embed', 'mlp'))
  assert place.shard_shape((2, 32, 16)) == (2, 32, 8)
  monkeypatch.setattr(load, '_local_slices', first_of(load._local_slices))
  monkeypatch.setattr(load, '_put', lambda out, *args, **kwargs: out)
  reads = spy_on_reads(monkeypatch)
  load_params(folder, c, mesh=mesh)
  total, shapes = bytes_read(reads), tensor_shapes(c)
  by_rows = [
      name for name in shapes if name.endswith((
          'q_proj.weight', 'q_proj.bias', 'up_proj.weight', 'gate_proj.weight', 'qkv_proj.weight'))]
  assert by_rows
  for name in by_rows:
    assert total[name] == math.prod(shapes[name]), name          # half of 2 bytes each
  norm = 'model.norm.weight'
  assert total[norm] == 2 * math.prod(shapes[norm])


def first_of(local_slices):
  return lambda shape, place: local_slices(shape, place)[:1]


def test_columns_of_a_page_or_more_are_read_alone(checkpoint, monkeypatch):
  folder, c, _ = checkpoint
  monkeypatch.setattr(load, '_local_slices', first_of(load._local_slices))
  monkeypatch.setattr(load, '_put', lambda out, *args, **kwargs: out)
  mesh = make_mesh(fsdp=2, devices=jax.devices()[:2])
  embedding, whole = 'model.embed_tokens.weight', 2 * 24 * 32
  for page, expected in ((4096, whole), (32, whole // 2)):
    monkeypatch.setattr(load, 'PAGE_BYTES', page)
    reads = spy_on_reads(monkeypatch)
    load_params(folder, c, mesh=mesh)
    assert bytes_read(reads)[embedding] == expected
    monkeypatch.setattr(load, 'open_files', model_folder.open_files)


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16', 'float16'])
def test_no_model_is_initialised_first(checkpoint, monkeypatch, dtype):
  def refuse(*args, **kwargs):
    raise AssertionError('an initialised model was made')

  folder, c, tensors = checkpoint
  monkeypatch.setattr(params_lib, 'init_params', refuse)
  monkeypatch.setattr(jax.random, 'normal', refuse)
  monkeypatch.setattr(load, 'count_not_finite', lambda *_: 0)   # of float16, much is too large
  params = load_params(folder, c, dtype=jnp.dtype(dtype))
  assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype(dtype)}
  name = 'model.norm.weight'
  with np.errstate(over='ignore'):
    np.testing.assert_array_equal(params['final_norm'], tensors[name].astype(jnp.dtype(dtype)))


LAYERED = ModelConfig(
    family='llama', vocab_size=64, d_model=64, n_layers=24, n_heads=4, n_kv=2, d_head=16,
    d_mlp=512, max_length=64)


@pytest.mark.parametrize('dtype, sizes', [
    ('float32', None), ('bfloat16', None), ('float32', (1, 2, 1))])
def test_the_host_holds_blocks_not_parameters(tmp_path, monkeypatch, dtype, sizes):
  """One weight of all layers is 3 MiB in float32, a layer of it 128 KiB, a block 64 KiB."""
  write_checkpoint(tmp_path, LAYERED)
  monkeypatch.setattr(load, 'BLOCK_BYTES', 64 * 1024)
  mesh = None if sizes is None else make_mesh(
      data=sizes[0], fsdp=sizes[1], tensor=sizes[2], devices=jax.devices()[:2])
  load_params(tmp_path, LAYERED, mesh=mesh, dtype=jnp.dtype(dtype))      # compiles
  tracemalloc.start()                                                    # counts NumPy's memory
  try:
    load_params(tmp_path, LAYERED, mesh=mesh, dtype=jnp.dtype(dtype))
    _, peak = tracemalloc.get_traced_memory()
  finally:
    tracemalloc.stop()
  assert peak < 1 * MIB, peak


@pytest.mark.parametrize('stored', ['float32', 'bfloat16', 'float16'])
@pytest.mark.parametrize('dtype', ['float32', 'bfloat16', 'float16'])
def test_a_block_is_put_in_place_without_a_copy_of_the_parameter(stored, dtype):
  out = jnp.zeros((8, 256, 64), load._placed_dtype(np.dtype(jnp.dtype(dtype))))
  block = jnp.zeros((1, 64, 64), stored)
  compiled = load._put_on_one.lower(
      out, block, np.zeros(3, np.int32), (0, 1, 2), np.dtype(jnp.dtype(dtype))).compile()
  memory = compiled.memory_analysis()
  assert memory.alias_size_in_bytes == out.nbytes
  assert memory.temp_size_in_bytes <= 4 * block.size
  # Nor is all of it rewritten, in a wider type, for a block.
  if out.dtype != np.float32:
    assert 'f32[8,256,64]' not in compiled.as_text()


@pytest.mark.slow
def test_host_memory_on_two_gigabytes(tmp_path):
  """The issue's bound, of a process that did nothing else; most of it is what XLA compiles with."""
  c = config_of(2e9, layers=16)
  assert write_checkpoint(tmp_path, c) >= 2e9
  largest = max(2 * math.prod(shape) for shape in tensor_shapes(c).values())
  for dtype in ('float32', 'bfloat16'):
    found = measure_in_process(f'load {dtype}', tmp_path)
    peak = found['peak_beyond_parameters']
    print(f'{dtype}: {peak / MIB:.0f} MiB, largest tensor {largest / MIB:.0f} MiB')
    assert found['parameters'] >= 2e9
    assert peak <= 3 * largest + 300 * MIB
