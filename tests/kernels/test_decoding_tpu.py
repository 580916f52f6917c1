"""Decoding attention for TPUs: interpreted with races looked for, and compiled where libtpu is."""

import dataclasses
import functools
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import PartitionSpec as P

from kernels.decoding import Own, Shared, decode_attention, quantise, tpu, write_keys
from kernels.decoding.work import work_list

LAYERS, HEAD, SCALE = 2, 8, 0.4


@dataclasses.dataclass(frozen=True)
class Case:
  """Shapes and static options; each is one compiled program."""

  slots: int
  heads: int                  # of keys
  repeats: int                # query heads of one key head
  blocks: int
  block: int
  prompts: tuple[tuple[int, int, int], ...] = ()   # per region: groups, places, size
  softcap: float | None = None
  windowed: bool = False
  quantised: bool = False


REGIONS = Case(5, 2, 2, 3, 4, ((3, 2, 6), (1, 5, 5)), softcap=1.5, windowed=True)
INT8 = Case(4, 3, 1, 4, 4, ((3, 2, 8),), quantised=True)
PRIVATE = Case(4, 1, 3, 1, 6)
# Units of two blocks each, and prompts in two stretches of which the second is ragged.
STRETCHED = Case(3, 1, 2, 3, 256, ((2, 2, 300),), windowed=True)


def int32(x):
  return jnp.asarray(x, jnp.int32)


def draw(rng, case: Case, dtype=jnp.float32):
  """(q, own, shared), (layer, positions, window); slots that see nothing are among them."""
  def normal(*shape):
    x = jnp.asarray(rng.normal(size=shape), dtype)
    return quantise(x) if case.quantised and len(shape) > 3 else x

  r = case.slots
  live = rng.integers(0, rng.integers(0, case.blocks * case.block + 1) + 1, r)
  kv = (LAYERS, case.blocks, r, case.heads, case.block, HEAD)
  own = Own(normal(*kv), normal(*kv), int32(live))
  shared = []
  for groups, places, size in case.prompts:
    members, group = np.full((groups, places), r), np.full(r, -1)
    member = rng.integers(0, places, r)
    for slot in rng.permutation(r):
      free = np.argwhere(members == r)
      if len(free) and rng.random() < 0.8:
        group[slot], member[slot] = rng.choice(free)
        members[group[slot], member[slot]] = slot
    kv = (LAYERS, groups, case.heads, size, HEAD)
    shared.append(Shared(
        normal(*kv), normal(*kv), int32(rng.integers(0, size + 1, groups)),
        int32(rng.integers(0, 4, groups)), int32(members), int32(group), int32(member)))
  longest = max((size for _, _, size in case.prompts), default=0)
  positions = int32(live + rng.integers(0, longest + 8, r))
  window = int32(rng.integers(1, case.blocks * case.block + longest + 1))
  q = normal(r, case.heads * case.repeats, HEAD)
  return (q, own, tuple(shared)), (
      int32(rng.integers(LAYERS)), positions, window if case.windowed else None)


@functools.cache
def compiled(impl: str, case: Case):
  return jax.jit(lambda arrays, others: decode_attention(
      *arrays, layer=others[0], positions=others[1], window=others[2], scale=SCALE,
      softcap=case.softcap, impl=impl))


def run(case: Case, *drawn):
  """The kernel's result, interpreted; fails where two of its copies or reads race."""
  with pltpu.force_tpu_interpret_mode(pltpu.InterpretParams(detect_races=True)):
    out = np.asarray(compiled('tpu', case)(*drawn), np.float32)
  from jax._src.pallas.mosaic.interpret import interpret_pallas_call
  assert not interpret_pallas_call.races.races_found
  return out


def check(case: Case, seed: int):
  drawn = draw(np.random.default_rng(seed), case)
  np.testing.assert_allclose(
      run(case, *drawn), compiled('ref', case)(*drawn), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('case', [REGIONS, INT8], ids=['regions', 'int8'])
def test_it_is_the_definition(case):
  for seed in range(3):
    check(case, seed)


@pytest.mark.slow
def test_members_beyond_a_result_are_rows_of_their_own(monkeypatch):
  """The second region's five members make three rows, the last with a place left over."""
  monkeypatch.setattr(tpu, 'RESULT_BYTES', 2 * REGIONS.repeats * REGIONS.heads * (HEAD + 128) * 4)
  case = dataclasses.replace(REGIONS, softcap=3.0)           # compiled anew
  check(case, 1)


@pytest.mark.slow
@pytest.mark.parametrize('case', [REGIONS, INT8, PRIVATE, STRETCHED],
                         ids=['regions', 'int8', 'private', 'stretched'])
@settings(deadline=None, max_examples=30, derandomize=True)
@given(seed=st.integers(0, 2**31))
def test_it_is_the_definition_for_any_lengths(case, seed):
  check(case, seed)


@pytest.mark.parametrize('dtype', ['float32', pytest.param('int8', marks=pytest.mark.slow)])
def test_dead_keys_are_never_read(dtype):
  """Blocks beyond a slot's keys and before its window, other layers, groups without members: NaN
  everywhere, which no mask would hide."""
  case = dataclasses.replace(
      PRIVATE, blocks=6, block=4, prompts=((3, 2, 8),), windowed=True, quantised=dtype == 'int8')
  (q, own, (region,)), _ = draw(np.random.default_rng(5), case)
  live = np.array([23, 0, 13, 6])
  own = dataclasses.replace(own, live=int32(live))
  region = dataclasses.replace(
      region, group=int32([0, -1, -1, 0]), member=int32([1, 0, 0, 0]), length=int32([8, 8, 5]),
      first=int32([0, 0, 0]), members=int32([[3, 0], [4, 4], [4, 4]]))
  others = int32(1), int32(live + 7), int32(9)
  age = live[:, None] - 1 - np.arange(24)
  is_dead = ((age < 0) | (age >= 9)).reshape(4, 6, 4).all(-1).T            # [C, R]

  def poison(x, dead):        # scales where there are such, for int8 has no NaN
    if dtype == 'int8':
      return dataclasses.replace(x, scale=poison_array(x.scale, dead))
    return poison_array(x, dead)

  def poison_array(x, dead):
    x = np.array(x)
    x[0] = np.nan
    x[1][dead] = np.nan
    return jnp.asarray(x)

  bad = dataclasses.replace(own, k=poison(own.k, is_dead), v=poison(own.v, is_dead))
  unread = np.array([False, True, True])
  filled = dataclasses.replace(region, k=poison(region.k, unread), v=poison(region.v, unread))
  found = run(case, (q, bad, (filled,)), others)
  assert is_dead.sum() == 16 and (found[1] == 0).all()
  expected = compiled('ref', case)((q, own, (region,)), others)
  np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_a_slot_has_the_same_bits_in_any_company():
  """What others hold, and in which slot it is, changes nothing; nor does nobody's being there."""
  case = dataclasses.replace(PRIVATE, blocks=4, block=4)
  (q, own, _), (layer, positions, _) = draw(np.random.default_rng(6), case)
  others = layer, positions, None
  full = dataclasses.replace(own, live=int32([14, 14, 16, 3]))
  alone = dataclasses.replace(own, live=int32([0, 14, 0, 0]))
  turned = dataclasses.replace(
      own, k=jnp.roll(own.k, 2, axis=2), v=jnp.roll(own.v, 2, axis=2), live=int32([1, 0, 0, 14]))
  found = run(case, (q, full, ()), others)
  np.testing.assert_array_equal(run(case, (q, alone, ()), others)[1], found[1])
  np.testing.assert_array_equal(
      run(case, (jnp.roll(q, 2, axis=0), turned, ()), others)[3], found[1])
  nobody = dataclasses.replace(own, live=jnp.zeros_like(own.live))
  assert not run(case, (q, nobody, ()), others).any()


def test_bfloat16_errors_are_those_of_plain_bfloat16():
  case = dataclasses.replace(PRIVATE, slots=6, blocks=4, block=8, prompts=((2, 3, 16),))
  drawn = draw(np.random.default_rng(7), case, jnp.bfloat16)
  (q, own, (region,)), (layer, _, _) = drawn
  size = own.k.shape[1] * own.k.shape[4]

  def joined(x):              # [R, K, S, H]
    return jnp.moveaxis(x[layer], 0, 2).reshape(case.slots, case.heads, size, HEAD)

  def plain(dtype):
    """Scores and weights in `dtype`, with one softmax over all keys."""
    group = jnp.maximum(region.group, 0)
    k, v = (jnp.concatenate([joined(a), b[layer][group]], 2).astype(dtype) for a, b in (
        (own.k, region.k), (own.v, region.v)))
    seen = jnp.concatenate([
        jnp.arange(size)[None] < own.live[:, None],
        (jnp.arange(16)[None] < region.length[group][:, None]) & (region.group >= 0)[:, None]], 1)
    queries = q.astype(dtype).reshape(case.slots, case.heads, case.repeats, HEAD)
    scores = jnp.einsum('rkxh,rksh->rkxs', queries, k) * dtype(SCALE)
    scores = jnp.where(seen[:, None, None], scores, -jnp.inf)
    out = jnp.einsum('rkxs,rksh->rkxh', jax.nn.softmax(scores, where=seen[:, None, None]), v)
    return np.asarray(out.reshape(q.shape), np.float64)

  with jax.enable_x64(True):
    exact = plain(jnp.float64)
  sees = (np.asarray(own.live) > 0) | (np.asarray(region.group) >= 0) & (
      np.asarray(region.length)[np.maximum(np.asarray(region.group), 0)] > 0)
  found = run(case, *drawn)
  error, allowed = (np.sqrt(np.mean((x[sees] - exact[sees]) ** 2)) for x in (
      found, plain(jnp.bfloat16)))
  assert compiled('tpu', case).eval_shape(*drawn).dtype == jnp.bfloat16
  assert 0 < error <= 1.5 * allowed, (error, allowed)


listed = jax.jit(work_list, static_argnames=('keys', 'size'))


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.lists(st.tuples(st.integers(0, 40), st.integers(0, 40)), min_size=6, max_size=6),
       st.sampled_from([1, 7, 40, 41]))
@example([(0, 0)] * 6, 7)
@example([(0, 0), (0, 40), *[(0, 0)] * 4], 7)
def test_a_work_list_has_every_stretch_that_is_seen_once(rows, size):
  low, high = (int32(x) for x in zip(*rows))
  work = jax.tree.map(np.asarray, listed(low, high, keys=40, size=size))
  units = [(int(work.row[u]), u - int(work.begin[work.row[u]])) for u in range(int(work.total))]
  expected = [(r, n) for r, (start, end) in enumerate(rows)
              for n in range(start // size, -(-end // size)) if start < end]
  assert units == expected and len(work.row) >= len(units)
  first, second = units[:int(work.border)], units[int(work.border):]
  assert int(work.longest) == max(len(first), len(second))
  assert {r for r, _ in first}.isdisjoint(r for r, _ in second)
  most = max((sum(r == n for n, _ in units) for r in range(len(rows))), default=0)
  assert abs(len(first) - len(second)) <= most            # the parts are even but for a row


def lowered(platform: str, impl: str | None, dtype=jnp.float32, head: int = 128, block: int = 32):
  """The text of a program of two regions, unrolled for a platform that need not be there."""
  def normal(*shape):
    return jnp.zeros(shape, dtype)

  own = Own(normal(1, 2, 2, 1, block, head), normal(1, 2, 2, 1, block, head), int32([3, 16]))
  region = Shared(normal(1, 1, 1, 8, head), normal(1, 1, 1, 8, head), int32([8]), int32([0]),
                  int32([[0, 1]]), int32([0, 0]), int32([0, 1]))
  traced = jax.jit(lambda q: decode_attention(
      q, own, (region,), layer=int32(0), positions=own.live + 8, scale=1.0, impl=impl)).trace(
          normal(2, 2, head))
  return traced.lower(lowering_platforms=(platform,)).as_text()


def test_programs_for_tpus_take_it_where_none_is_named():
  assert lowered('tpu', None).count('tpu_custom_call') == 2
  assert 'tpu_custom_call' not in lowered('cpu', None) + lowered('cuda', None)
  assert 'tpu_custom_call' not in lowered('tpu', None, head=64)     # the cache would be copied
  assert 'tpu_custom_call' not in lowered('tpu', None, block=8)     # less than a tile of int8
  assert 'tpu_custom_call' not in lowered('tpu', 'blockwise')
  assert lowered('tpu', 'tpu', head=64).count('tpu_custom_call') == 2


def test_types_it_does_not_take_are_refused():
  with pytest.raises(ValueError, match="'tpu' takes float32 and bfloat16, and int8.*float16"):
    lowered('tpu', 'tpu', jnp.float16)
  assert 'tpu_custom_call' not in lowered('tpu', None, jnp.float16)


@pytest.mark.parametrize('checked', [True, False])
def test_on_a_mesh_each_device_has_its_own_list(checked):
  """Lowered under shard_map with heads split over two devices, in a scan over layers."""
  (q, own, shared), (_, positions, _) = draw(
      np.random.default_rng(8), Case(4, 2, 2, 2, 4, ((2, 2, 8),)))
  by_head, own_keys, whole = P(None, None, 'heads'), P(None, None, None, 'heads'), P()
  specs = (P(None, 'heads'), Own(own_keys, own_keys, whole),
           (Shared(by_head, by_head, *[whole] * 5),), whole)

  def layers(q, own, shared, positions):
    def one(q, layer):
      return decode_attention(q, own, shared, layer=layer, positions=positions, scale=SCALE,
                              window=6 + layer if checked else 6, impl='tpu'), None
    return jax.lax.scan(one, q, jnp.arange(LAYERS, dtype=jnp.int32))[0]

  mesh = jax.make_mesh((2,), ('heads',), axis_types=(jax.sharding.AxisType.Auto,))
  sharded = jax.jit(jax.shard_map(
      layers, mesh=mesh, in_specs=specs, out_specs=P(None, 'heads'),
      check_vma=checked))
  text = sharded.trace(q, own, shared, positions).lower(lowering_platforms=('tpu',)).as_text()
  assert text.count('tpu_custom_call') == 2


@pytest.mark.parametrize('dtype, room', [
    ('float32', (2, 16)),     # blocks of two tiles
    *(pytest.param(dtype, room, marks=pytest.mark.slow) for dtype, room in (
        ('bfloat16', (2, 16)), ('float32', (3, 4)), ('int8', (1, 64)), ('scales', (2, 16))))])
def test_new_keys_are_written_and_nothing_else(dtype, room):
  rng, (blocks, block) = np.random.default_rng(9), room
  size = blocks * block
  shape = (LAYERS, blocks, 5, 2, block, *(() if dtype == 'scales' else (HEAD,)))
  x, new = (jnp.asarray(rng.integers(-99, 99, s), 'float32' if dtype == 'scales' else dtype)
            for s in (shape, (5, 2, *shape[5:])))
  place = int32([0, size, size - 1, size // 2 + 1, 3])        # the second is not written
  with pltpu.force_tpu_interpret_mode(pltpu.InterpretParams(detect_races=True)):
    out = np.asarray(jax.jit(write_keys)(x, new, int32(1), place))
  from jax._src.pallas.mosaic.interpret import interpret_pallas_call
  assert not interpret_pallas_call.races.races_found
  expected = np.array(x)
  for slot in (0, 2, 3, 4):
    number, offset = divmod(int(place[slot]), block)
    expected[1, number, slot, :, offset] = new[slot]
  np.testing.assert_array_equal(out, expected)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec('libtpu') is None,
                    reason='libtpu, which compiles for TPUs, is not installed')
@pytest.mark.parametrize('chip', ['v5e:2x2', 'v5p:2x2x1', 'v6e:2x2'])
@pytest.mark.parametrize('quantised', [False, True])
def test_it_compiles_without_copying_the_cache(chip, quantised):
  from benchmarks.decode_attention_tpu import Setting, compile_case
  found = compile_case(chip, Setting(slots=16, heads=2, repeats=4, new=512, quantised=quantised))
  assert found.temporary < found.arguments / 4          # a copy of own keys would be a third
  assert set(found.fast_memory) == {'decode_own', 'decode_shared'}
  assert 0 < max(found.fast_memory.values()) < tpu.FAST_MEMORY
