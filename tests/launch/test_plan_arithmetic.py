"""Plans by arithmetic: topologies, bytes per device, estimates, and what to change."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from jaxrl.errors import InputError
from jaxrl.models.config import ModelConfig
from jaxrl.models.flops import train_flops, units_of
from jaxrl.models.params import abstract_params, count_params
from jaxrl.parallel.mesh import make_mesh
from jaxrl.sampling.requests import SamplingConfig
from jaxrl.sampling.sizes import EngineConfig
from jaxrl.training.logps import ComputePolicy
from jaxrl.training.optimizer import OptimizerConfig
from launch.planning.advice import advice
from launch.planning.chips import CHIPS, link_bandwidth, parse_topology
from launch.planning.device_bytes import optimizer_bytes, parameter_bytes
from launch.planning.layout import Layout
from launch.planning.programs import lower_state
from launch.planning.published import PUBLISHED, model_config
from launch.planning.search import estimates, refused, rollout_tensors
from launch.planning.setting import Given, Lengths, Setting
from launch.planning.workload import (
    prefill_shape,
    score_length,
    step_flops,
    training_arrays,
    training_rows,
)

SMALL = ModelConfig('llama', 512, 64, 3, 4, 2, 16, 128, 1024)
OPEN = Given(None, None, None, None, None)
FSDP = Layout(1, 4, 1, 1, 1, 'attn', 8)


def setting(model=SMALL, **fields):
  made = Setting(
      model, None, ComputePolicy(), 'float32', OptimizerConfig(1e-6), False, 'dpo', {'beta': 0.1},
      'packed', 16, 64, (128, 256), 8, SamplingConfig(64), EngineConfig(), 64, 4, False,
      Lengths(64, 64))
  return dataclasses.replace(made, **fields)


@pytest.mark.parametrize('text, slices, message', [
    ('v9:2x2', 1, '--topology: the topology cannot be read; expected a chip of v5e'),
    ('v5p:2xtwo', 1, 'the topology cannot be read'),
    ('v5p:4x4', 1, 'a v5p has another number of sides; expected 3'),
    ('v5e:2x2x2', 1, 'another number of sides; expected 2'),
    ('h100:2x8', 2, '--num_slices: GPUs have no slices'),
])
def test_topologies_that_there_are_not(text, slices, message):
  with pytest.raises(InputError, match=message):
    parse_topology(text, slices)


def test_chips_of_a_topology():
  pod = parse_topology('v5p:4x4x8', 2)
  assert (pod.slice_chips, pod.chips, pod.compiles) == (128, 256, True)
  assert str(pod) == '2 slices of v5p:4x4x8'
  assert not parse_topology('h200:2x8', 1).compiles


def test_bandwidth_counts_the_sides_that_a_group_reaches_over():
  cube, link = parse_topology('v5p:4x4x4', 1), CHIPS['v5p'].link
  line = [(0, x, 0, 0) for x in range(4)]
  assert link_bandwidth(cube, line) == 2 * link              # a side of 4 is closed
  assert link_bandwidth(cube, line[:2]) == link              # a part of it is not
  plane = [(0, x, y, 0) for x in range(4) for y in range(4)]
  assert link_bandwidth(cube, plane) == 4 * link
  flat = parse_topology('v5e:4x4', 1)
  assert link_bandwidth(flat, [(0, x, 0, 0) for x in range(4)]) == CHIPS['v5e'].link
  two = parse_topology('v5p:4x4x4', 2)
  assert link_bandwidth(two, [(0, 0, 0, 0), (1, 0, 0, 0)]) == CHIPS['v5p'].network


@pytest.mark.parametrize('optimizer', ['adamw', 'adamw8bit', 'adafactor'])
@pytest.mark.parametrize('sizes', [dict(data=2, fsdp=4), dict(fsdp=2, tensor=2, sequence=2)])
def test_resting_bytes_are_those_of_the_shapes_on_a_mesh(optimizer, sizes):
  """Not a byte more or less than what the shards of one device take."""
  s = setting(optimizer=OptimizerConfig(
      1e-6, optimizer=optimizer, moment_block=16 if optimizer == 'adamw8bit' else 256))
  mesh = make_mesh(**sizes)
  layout = dict(mesh.shape)
  params = abstract_params(SMALL, mesh)

  def on_one(tree):
    return sum(x.dtype.itemsize * jnp.prod(jnp.array(x.sharding.shard_shape(x.shape)), dtype=int)
               for x in jax.tree.leaves(tree))

  assert parameter_bytes(SMALL, 'float32', layout) == on_one(params)
  found, exact = optimizer_bytes(s, layout), on_one(lower_state(s, mesh, params).opt_state)
  assert abs(found - exact) <= (0 if optimizer == 'adamw' else 0.1 * exact)


def test_published_sizes():
  """Parameters as the model cards have them."""
  assert count_params(model_config('meta-llama/Llama-3.1-8B')) == 8_030_261_248
  assert count_params(model_config('Llama-2-70b-chat-hf')) == 68_976_648_192
  assert {model_config(name).n_kv for name in PUBLISHED} == {8, 32}
  with pytest.raises(InputError, match='--model: there is no such model; .*Llama-3.1-8B'):
    model_config('Llama-9')


def test_rows_are_as_the_run_packs_them():
  rows = training_rows(setting(), FSDP)
  assert (rows.count, rows.length) == (4, 4 * 192)         # 4 pairs of 63 + 2 x 64, up to 64
  assert rows.tokens == 16 * (63 + 2 * 64)
  model, hardware = step_flops(setting(), FSDP, rows)
  assert model < hardware < 2 * model
  parts = dataclasses.replace(FSDP, fsdp=3, sequence=2)      # rows that are not all full
  for s in (setting(), setting(layout='padded'), setting(lengths=Lengths(7, 30))):
    for layout in (FSDP, parts):
      arrays, rows = training_arrays(s, layout), training_rows(s, layout)
      assert arrays['inputs'].size == rows.places
      assert arrays['inputs'].shape[-1] == rows.length
      found = train_flops(SMALL, units_of(arrays))
      assert found.total() == train_flops(SMALL, rows.units).total()
  assert score_length(setting()) == 128
  assert prefill_shape(setting()) == (8, 64, False)
  longer = setting(engine=EngineConfig(chunk=32))
  assert prefill_shape(longer) == (16, 32, True)


@pytest.mark.parametrize('change, message', [
    (dict(fsdp=8), '8 devices of 4'),
    (dict(fsdp=1, tensor=4), 'key heads'),
    (dict(micro_batches=8), 'fewer than the 32 rows'),
    (dict(score_batch=6), 'no multiple of 4'),
])
def test_layouts_that_the_run_would_refuse(change, message):
  topology = parse_topology('v5e:2x2', 1)
  assert refused(setting(), topology, FSDP) is None
  assert message in refused(setting(), topology, dataclasses.replace(FSDP, **change))


def test_estimates_are_those_the_flags_leave_open():
  topology = parse_topology('v5e:2x2', 1)
  found = estimates(setting(), OPEN, topology)
  assert [e.seconds for e in found] == sorted(e.seconds for e in found)
  assert len({e.layout for e in found}) == len(found)
  assert {e.layout.tensor for e in found} == {1, 2}
  given = Given((1, 2, 1, 2), 2, 'nothing', None, 2)
  (only,) = estimates(setting(), given, topology)
  assert only.layout.flags() == [
      '--mesh=1,2,2', '--micro_batches=2', '--remat=nothing', '--score_batch=8']
  assert rollout_tensors(SMALL, given, topology) == [2]
  assert rollout_tensors(SMALL, OPEN, topology) == [1, 2]
  with pytest.raises(InputError, match='--rollout_tensor: .* a divisor of 1, the chips of'):
    rollout_tensors(SMALL, given, parse_topology('h100:8x1', 1))
  with pytest.raises(InputError, match='--mesh: .* found --mesh: 8 devices of 4'):
    estimates(setting(), dataclasses.replace(given, mesh=(1, 8, 1, 1)), topology)


def test_slices_share_nothing_but_rows():
  topology = parse_topology('v5e:2x2', 2)
  assert {e.layout.data % 2 for e in estimates(setting(), OPEN, topology)} == {0}


def test_keeping_less_and_splitting_more_need_less():
  topology, big = parse_topology('v5p:4x4x4', 1), setting(model_config('Llama-2-70b-chat-hf'))

  def total(**fields):
    given = dataclasses.replace(OPEN, mesh=(1, 16, 1, 4), micro_batches=1, **fields)
    return estimates(big, given, topology)[0].bytes.total

  sizes = [total(remat=name) for name in ('nothing', 'attn', 'qkv_attn', 'minimal', 'all')]
  assert sizes == sorted(sizes)
  eight = dataclasses.replace(
      big, optimizer=dataclasses.replace(big.optimizer, optimizer='adamw8bit'))
  assert optimizer_bytes(eight, dict(data=1, fsdp=64, sequence=1, tensor=1)) < (
      0.3 * optimizer_bytes(big, dict(data=1, fsdp=64, sequence=1, tensor=1)))


def test_advice_names_what_would_fit():
  """8B on 4 v6e: 20 bytes per parameter are 40 GB of 33 on each; without moments 24."""
  s = setting(model_config('Llama-3.1-8B'), buckets=(2048,), lengths=Lengths(512, 512))
  found = advice(s, OPEN, parse_topology('v6e:2x2', 1))
  assert found[0].startswith('--offload_optimizer')
  assert found[-1] == 'take v6e:2x4'


@pytest.mark.parametrize(('name', 'chips'), [
    ('v5e:2x4', 8), ('v5e:4x4', 4), ('v6e:2x2', 4), ('v5p:2x2x1', 4), ('v5p:4x4x4', 4),
    ('h100:4x8', 8)])
def test_a_process_has_the_chips_of_its_host(name, chips):
  assert parse_topology(name, 1).process_chips == chips
