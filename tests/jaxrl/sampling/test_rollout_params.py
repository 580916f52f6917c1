"""Parameters for the engine: the same numbers, laid out for sampling, in bounded extra memory."""

import collections
import dataclasses
import gc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

from jaxrl.models.config import Lora
from jaxrl.models.lora import adapter_shardings, attach, init_adapter
from jaxrl.models.params import param_shardings
from jaxrl.models.storage import Int8, quantise
from jaxrl.parallel.mesh import make_mesh, rollout_mesh
from jaxrl.sampling import rollout_params as module
from jaxrl.sampling.rollout_params import rollout_params, rollout_specs
from tests.tiny_model import CONFIG, random_params

LAYOUTS = {
    'fsdp': {'fsdp': 8},
    'all': {'data': 2, 'fsdp': 2, 'tensor': 2},
    'data': {'data': 8, 'fsdp': 1},
}


def on_mesh(mesh, c=CONFIG, dtype=jnp.float32):
  params = jax.tree.map(lambda x: x.astype(dtype), random_params(c))
  return jax.device_put(params, param_shardings(c, mesh))


def is_int8(x):
  return isinstance(x, Int8)


def pointers(x):
  return [shard.data.unsafe_buffer_pointer() for shard in x.addressable_shards]


def check(found, params, c, mesh, dtype):
  """Values to the bit, and every array on `mesh` as the rules say."""
  specs = rollout_specs(params, c, mesh)
  for x, wanted, spec in zip(*map(jax.tree.leaves, (found, params, specs)), strict=True):
    kind = wanted.dtype if wanted.dtype == jnp.int8 else dtype
    assert x.dtype == kind and x.sharding == NamedSharding(mesh, spec)
    np.testing.assert_array_equal(
        np.asarray(x, np.float32), np.asarray(np.asarray(wanted).astype(kind), np.float32))


@pytest.mark.parametrize('layout', LAYOUTS)
@pytest.mark.parametrize('dtype', ['bfloat16', 'float32'])
def test_values_and_layout(layout, dtype):
  mesh = make_mesh(**LAYOUTS[layout])
  params = on_mesh(mesh)
  to = rollout_mesh(mesh)
  # Blocks of a quarter of a layer stack: more of them than layers, and none that divides evenly.
  found = rollout_params(params, CONFIG, to, dtype, block_bytes=500)
  check(found, params, CONFIG, to, jnp.dtype(dtype))
  whole = rollout_params(params, CONFIG, to, dtype)
  check(whole, params, CONFIG, to, jnp.dtype(dtype))


def test_heads_and_columns_are_split_and_an_odd_vocabulary_is_whole():
  mesh = make_mesh(**LAYOUTS['all'])
  c = dataclasses.replace(CONFIG, vocab_size=51)
  found = rollout_params(on_mesh(mesh, c), c, rollout_mesh(mesh), 'float32', block_bytes=700)
  check(found, random_params(c), c, rollout_mesh(mesh), jnp.float32)
  layers = found['layers']
  assert [layers[name].sharding.shard_shape(layers[name].shape) for name in ('q', 'k', 'down')] == [
      (2, 32, 2, 8), (2, 32, 1, 8), (2, 24, 32)]
  for name in ('embedding', 'head'):
    assert found[name].is_fully_replicated
  even = rollout_specs(random_params(), CONFIG, rollout_mesh(mesh))
  assert tuple(even['embedding']) == ('tensor', None) and tuple(even['head']) == (None, 'tensor')


def test_int8_stays_int8():
  mesh = make_mesh(**LAYOUTS['all'])
  with jax.set_mesh(mesh):
    params = jax.jit(lambda p: quantise(p, CONFIG))(on_mesh(mesh))
  to = rollout_mesh(mesh)
  found = rollout_params(params, CONFIG, to, 'bfloat16', block_bytes=500)
  specs = rollout_specs(params, CONFIG, to)
  seen = 0
  for x, wanted, spec in zip(*(jax.tree.leaves(tree, is_leaf=is_int8) for tree in (
      found, params, specs)), strict=True):
    if not is_int8(wanted):
      continue
    seen += 1
    assert x.values.dtype == jnp.int8 and x.scale.dtype == jnp.float32
    np.testing.assert_array_equal(x.values, wanted.values)
    np.testing.assert_array_equal(x.scale, wanted.scale)
    assert x.values.sharding == NamedSharding(to, spec.values)
    assert x.scale.sharding == NamedSharding(to, spec.scale)
  assert seen == 9
  # A scale per output channel: whole along what a product sums over, split with its heads.
  assert tuple(specs['layers']['q'].scale) == (None, None, 'tensor', None)
  assert tuple(specs['layers']['down'].values) == (None, 'tensor', None)
  assert tuple(specs['layers']['down'].scale) == (None, None, None)


def test_an_adapter_comes_along():
  c = dataclasses.replace(CONFIG, lora=Lora(2, 4.0, ('q', 'down')))
  mesh = make_mesh(**LAYOUTS['all'])
  adapter = jax.device_put(init_adapter(jax.random.key(0), c), adapter_shardings(c, mesh))
  params = attach(on_mesh(mesh), adapter)
  to = rollout_mesh(mesh)
  found = rollout_params(params, c, to, 'float32', block_bytes=100)
  check(found, params, c, to, jnp.float32)
  assert tuple(found['lora']['layers']['q']['b'].sharding.spec) == (None, None, 'tensor', None)


@pytest.mark.parametrize('devices', [1, 8])
def test_nothing_is_copied_that_already_fits(devices):
  mesh = make_mesh(data=devices, fsdp=1, devices=jax.devices()[:devices])
  params = on_mesh(mesh)
  found = rollout_params(params, CONFIG, rollout_mesh(mesh), 'float32', block_bytes=500)
  for x, given in zip(jax.tree.leaves(found), jax.tree.leaves(params), strict=True):
    assert pointers(x) == pointers(given) and x.sharding.mesh == rollout_mesh(mesh)


def test_norms_stay_and_all_arrays_are_on_one_mesh():
  """Where only some are laid out anew, one program must still take them all."""
  mesh = make_mesh(**LAYOUTS['all'])
  c = dataclasses.replace(CONFIG, qk_norm='head')
  params = on_mesh(mesh, c)
  found = rollout_params(params, c, rollout_mesh(mesh), 'float32')
  assert pointers(found['layers']['q_norm']) == pointers(params['layers']['q_norm'])
  assert {x.sharding.mesh for x in jax.tree.leaves(found)} == {rollout_mesh(mesh)}


def test_parameters_of_the_host_are_laid_out():
  to = rollout_mesh(make_mesh(**LAYOUTS['all']))
  params = random_params()
  check(rollout_params(params, CONFIG, to, 'bfloat16'), params, CONFIG, to, jnp.bfloat16)


class Memory:
  """Most bytes that a device holds beyond what it held before and the copy so far."""

  def __init__(self, monkeypatch):
    gc.collect()
    self.before, self.peak = self.held(), 0
    self.copy = self.made = 0                # bytes of finished arrays, and of the one in work
    self.programs = {}
    for name in ('_zeros', '_as_bits', '_block', '_fill', '_exchanged'):
      monkeypatch.setattr(module, name, self.watch(name, getattr(module, name)))
    monkeypatch.setattr(module, '_moved', self.finish(module._moved))

  def held(self):
    buffers = {
        (shard.device.id, shard.data.unsafe_buffer_pointer()): shard.data.nbytes
        for x in jax.live_arrays() for shard in x.addressable_shards}
    total = np.zeros(len(jax.devices()), int)
    for (device, _), size in buffers.items():
      total[device] += size
    return total

  def note(self, extra=0):
    now = int((self.held() - self.before).max()) - self.copy - self.made + extra
    self.peak = max(self.peak, now)

  def finish(self, moved):
    def run(x, *arguments):
      result = moved(x, *arguments)
      self.made = 0
      if pointers(result) != pointers(x):
        self.copy += result.addressable_shards[0].data.nbytes
      self.note()
      return result

    return run

  def watch(self, name, program):
    def run(*arguments):
      if any(isinstance(x, jax.core.Tracer) for x in arguments):
        return program(*arguments)
      traced = {'_block': 1, '_fill': 2}.get(name)     # `start`: one program for all of them
      key = (name, *(
          (x.shape, x.dtype.name, x.sharding) if isinstance(x, jax.Array) else x
          for n, x in enumerate(arguments) if n != traced))
      if key not in self.programs:
        compiled = program.lower(*arguments).compile()
        self.programs[key] = compiled.memory_analysis(), compiled.as_text()
      sizes = self.programs[key][0]
      assert sizes.alias_size_in_bytes == (sizes.output_size_in_bytes if name == '_fill' else 0)
      piece = sizes.output_size_in_bytes if name in ('_as_bits', '_block') else 0
      self.note(sizes.temp_size_in_bytes + piece)
      result = program(*arguments)
      if name in ('_zeros', '_exchanged'):
        self.made = result.addressable_shards[0].data.nbytes
      self.note()
      return result

    return run


@pytest.mark.parametrize('layout', ['fsdp', 'all'])
@pytest.mark.parametrize('dtype', ['bfloat16', 'float32'])
def test_extra_memory_is_bounded(layout, dtype, monkeypatch):
  c = dataclasses.replace(CONFIG, d_model=64, d_mlp=192, n_layers=8, vocab_size=512)
  mesh = make_mesh(**LAYOUTS[layout])
  params = jax.device_put(
      jax.tree.map(jnp.asarray, random_params(c)), param_shardings(c, mesh))
  to, item = rollout_mesh(mesh), jnp.dtype(dtype).itemsize
  block_bytes = 2 * 64 * 192 * item             # two layers of the widest matrix
  memory = Memory(monkeypatch)
  found = rollout_params(params, c, to, dtype, block_bytes=block_bytes)
  # Embedding and output matrix are split both ways where there is a tensor axis.
  bound = 2 * max(block_bytes, item * 512 * 64 if layout == 'all' else 0)
  assert 0.3 * bound < memory.peak <= bound
  assert memory.copy >= sum(
      x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(found)) - 4 * 17 * 64
  kinds = collections.Counter(name for name, *_ in memory.programs)
  assert kinds['_fill'] >= 2 and kinds['_exchanged'] >= 2
  # What travels between devices has been cast.
  texts = [text for (name, *_), (_, text) in memory.programs.items()
           if name in ('_fill', '_exchanged')]
  assert any('all-gather' in text for text in texts)
  for line in (line for text in texts for line in text.split('\n') if 'all-gather(' in line):
    assert f'= u{8 * item}[' in line
  for (name, *_), (_, text) in memory.programs.items():
    if name in ('_block', '_as_bits'):
      assert 'all-' not in text and 'collective' not in text
