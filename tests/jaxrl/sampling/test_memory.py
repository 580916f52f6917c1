"""Bytes of a slot against the arrays of a real engine, and what decides how many there are."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import pytest

from jaxrl.errors import InputError
from jaxrl.models.config import Lora
from jaxrl.parallel.mesh import make_mesh, rollout_mesh
from jaxrl.sampling import memory
from jaxrl.sampling.engine import make_engine
from jaxrl.sampling.generate import engine_params
from jaxrl.sampling.memory import choose_slots, parameter_bytes, slot_bytes, state_bytes
from jaxrl.sampling.requests import SamplingConfig
from jaxrl.sampling.sizes import EngineConfig
from tests.tiny_model import CONFIG, random_params

GIB = 2**30
# Long enough for two blocks of every slot.
MODEL = dataclasses.replace(CONFIG, max_length=256)
PLAIN = SamplingConfig(100)
SIZES = EngineConfig(prompt_multiple=4, dtype='bfloat16')


def on(devices, tensor=1):
  return rollout_mesh(make_mesh(tensor=tensor, devices=jax.devices()[:devices]))


def choose(mesh=None, *, sampling=PLAIN, config=SIZES, draws=4, **others):
  return choose_slots(MODEL, sampling, config, mesh or on(1), max_prompt=9, draws=draws,
                      **{'memory': GIB} | others)


def held(tree):
  """Bytes on the first device."""
  return sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(tree))


@pytest.mark.parametrize('mesh, settings, sizes', [
    (on(1), {}, {}),
    (on(2), {'repetition_penalty': 1.2}, {'kv_cache': 'int8'}),
    (on(4, 2), {'presence_penalty': 0.5}, {'dtype': 'float32', 'chunk': 4}),
])
def test_bytes_are_those_of_the_engine(mesh, settings, sizes):
  sampling, parts = SamplingConfig(100, **settings), mesh.shape['data']
  config = dataclasses.replace(SIZES, slots=16 * parts, **sizes)
  engine = make_engine(MODEL, sampling, config, mesh, max_prompt=9, eos_ids=(3,), pad_id=0)
  made = held(engine.empty(4)())
  assert state_bytes(MODEL, sampling, config, 9, 4, mesh, slots=16) == made
  # One slot of many: all of them, but for the row of the prompt region that is always to spare.
  prompts, tables = 2 * 2 * 2 * 8 * 8 * (2 if sizes.get('dtype') is None else 4), 4 * 6
  if 'kv_cache' in sizes:
    prompts = 2 * 2 * 2 * 8 * (8 + 4)
  one = slot_bytes(MODEL, sampling, config, 9, 4, mesh) - 3 * 4 * MODEL.vocab_size
  assert made == 16 * one + prompts // mesh.shape['tensor'] + tables


def test_bytes_of_a_slot_by_hand():
  """Two layers, two heads of 8, keys and values: 128 keys of its own, 2 rows of 8 for 4 slots."""
  key = 2 * 2 * 2 * 8 * 2
  buffers, numbers = 100 * (4 + 4), 9 * 4 + 2
  tables = (4 * 4 + 4 + 4) / 2
  found = slot_bytes(MODEL, PLAIN, SIZES, 9, 4, on(1))
  assert found == 128 * key + 4 * key + buffers + numbers + tables + 12 * 50
  # Alone with its prompt, a slot has a row of its own.
  alone = slot_bytes(MODEL, PLAIN, SIZES, 9, 1, on(1))
  assert alone == 128 * key + 8 * key + buffers + numbers + 12 + 12 * 50


@pytest.mark.parametrize('tensor, dtype', [(1, 'bfloat16'), (2, 'float32')])
def test_bytes_of_parameters_are_those_of_the_copy(tensor, dtype):
  mesh = on(2, tensor)
  engine = make_engine(MODEL, PLAIN, EngineConfig(4, dtype=dtype), mesh, max_prompt=9,
                       eos_ids=(3,), pad_id=0)
  assert parameter_bytes(MODEL, mesh, dtype) == held(engine_params(engine, random_params(MODEL)))
  with_adapter = dataclasses.replace(MODEL, lora=Lora(3, 1.0, ('q',)))
  extra = 2 * 3 * (32 + 32 // tensor) * jnp.dtype(dtype).itemsize
  assert parameter_bytes(with_adapter, mesh, dtype) == parameter_bytes(MODEL, mesh, dtype) + extra


def test_memory_limits_slots_to_what_fits():
  mesh = on(2)
  one, parameters = slot_bytes(MODEL, PLAIN, SIZES, 9, 4, mesh), parameter_bytes(
      MODEL, mesh, 'bfloat16')
  # One slot and a half more, for the row that the prompt region has beyond their shares.
  room = int((parameters + 33.5 * one) / memory.FRACTION)
  choice = choose(mesh, memory=room)
  assert choice.slots == 2 * 32 and 'memory holds no more' in choice.why
  assert choose(mesh, memory=room + 1000, held=1000).slots == 2 * 32
  assert choose(mesh, memory=int((parameters + 31 * one) / memory.FRACTION)).slots == 2 * 24
  assert choose(mesh, memory=int((parameters + 7.5 * one) / memory.FRACTION)).slots == 2 * 7
  int8 = dataclasses.replace(SIZES, kv_cache='int8')
  assert choose(mesh, memory=room, config=int8).slots > 2 * 32


def test_the_sentence_states_slot_memory_and_limit():
  assert choose().why == (
      '64 slots of 17.9 KiB; a device has 1 GiB at hand, of which parameters take 36.6 KiB; more '
      'would hardly be faster')
  assert choose(on(2), requests=10).why == (
      '10 slots (5 in each of 2 parts of the mesh) of 18.4 KiB; a device has 1 GiB at hand, of '
      'which parameters take 36.6 KiB; 10 samples need no more')


@pytest.mark.parametrize('requests, parts, slots', [
    (1, 1, 1), (5, 1, 5), (30, 1, 24), (64, 1, 32), (100, 1, 48), (128, 1, 64), (10**6, 1, 64),
    (3, 2, 2), (5, 4, 4), (1, 4, 4), (200, 4, 4 * 32), (400, 4, 4 * 48)])
def test_requests_limit_slots(requests, parts, slots):
  assert choose(on(parts), requests=requests).slots == slots


def test_accelerators_have_more(monkeypatch):
  device = types.SimpleNamespace(platform='gpu')
  mesh = types.SimpleNamespace(
      shape={'data': 2, 'tensor': 1}, devices=types.SimpleNamespace(flat=[device, device]))
  assert choose(mesh).slots == 2 * 512
  assert choose(mesh, requests=200).slots == 2 * 96
  assert choose(mesh, requests=600).slots == 2 * 144


def test_not_even_one_slot_is_an_error():
  with pytest.raises(InputError, match=(
      r'rollouts: the memory of a device does not hold the parameters and one slot; '
      r'expected .* KiB of 80% of what is at hand, 36.6 KiB of it parameters; '
      r'found 50 KiB at hand\. Lower --max_new_tokens or ')):
    choose(memory=50 * 1024)
  with pytest.raises(InputError, match='found 0 B at hand'):
    choose(memory=GIB, held=GIB)


def test_a_device_that_tells_is_believed():
  def device(limit, used):
    return types.SimpleNamespace(
        process_index=0, memory_stats=lambda: {'bytes_limit': limit, 'bytes_in_use': used})

  mesh = types.SimpleNamespace(
      devices=types.SimpleNamespace(flat=[device(100, 30), device(100, 45)]))
  assert memory.memory_at_hand(mesh) == 55


def test_devices_of_a_cpu_share_what_is_available(monkeypatch):
  monkeypatch.setattr(memory, '_available_memory', lambda: 8000)
  assert memory.memory_at_hand(on(8)) == 1000


@pytest.mark.parametrize('group, expected', [
    ({}, 2048 * 1024),
    ({'memory.max': 'max', 'memory.current': '5'}, 2048 * 1024),
    ({'memory.max': '1000', 'memory.current': '400'}, 600),
    ({'memory.max': '1000', 'memory.current': '400',
      'memory.stat': 'anon 7\ninactive_file 150\n'}, 750),
    ({'memory.max': '1000', 'memory.current': '1200'}, 0),
    ({'memory/memory.limit_in_bytes': '1000', 'memory/memory.usage_in_bytes': '100',
      'memory/memory.stat': 'inactive_file 1\ntotal_inactive_file 50\n'}, 950),
])
def test_available_memory_of_the_system(group, expected, tmp_path):
  (tmp_path / 'proc').mkdir()
  (tmp_path / 'proc' / 'meminfo').write_text('MemTotal: 4096 kB\nMemAvailable:   2048 kB\n')
  for name, text in group.items():
    path = tmp_path / 'sys/fs/cgroup' / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
  assert memory._available_memory(tmp_path) == expected


def test_without_proc_half_of_the_physical_memory_counts(tmp_path):
  assert memory._available_memory(tmp_path) > 2**26
