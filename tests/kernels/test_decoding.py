"""Decoding attention: the definition against loops in float64, blocks against the definition."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import PartitionSpec as P

from kernels.decoding import Own, Shared, blockwise, decode_attention, quantise, ref

LAYERS, HEAD, SCALE = 2, 8, 0.4


@dataclasses.dataclass(frozen=True)
class Case:
  """Shapes and static options; each is one compiled program."""

  slots: int
  heads: int                  # of keys
  repeats: int                # query heads of one key head
  keys: int                   # a slot's own
  pieces: int                 # blocks of it
  prompts: tuple[tuple[int, int, int], ...] = ()   # per region: groups, places, size
  block: int = 4
  softcap: float | None = None
  windowed: bool = False      # the window is an argument of the program


CASES = {
    'two regions, ragged blocks': Case(6, 2, 2, 12, 3, ((3, 3, 7), (1, 6, 5)), 5, 1.5, True),
    'one region': Case(5, 3, 1, 16, 4, ((4, 2, 8),)),
    'private only, one block': Case(4, 1, 3, 10, 1, windowed=True),
}


@functools.cache
def compiled(impl: str, case: Case):
  if impl == 'ref':
    function = ref.decode_attention
  else:
    function = functools.partial(blockwise.decode_attention, block=case.block)
  options = {'scale': SCALE, 'softcap': case.softcap}
  return jax.jit(lambda q, own, shared, layer, positions, window: function(
      q, own, shared, layer=layer, positions=positions, window=window, **options))


def int32(x):
  return jnp.asarray(x, jnp.int32)


def draw(rng: np.random.Generator, case: Case):
  """q, own, shared, layer, positions, window; about one slot in eight sees no private key."""
  def normal(*shape):
    return jnp.asarray(rng.normal(size=shape), jnp.float32)

  r, longest = case.slots, rng.integers(0, case.keys + 1)
  live = rng.integers(0, longest + 1, r)
  kv = (LAYERS, case.pieces, r, case.heads, case.keys // case.pieces, HEAD)
  own = Own(normal(*kv), normal(*kv), int32(live))
  shared = []
  for groups, places, size in case.prompts:
    members = np.full((groups, places), r)
    group, member = np.full(r, -1), rng.integers(0, places, r)
    for slot in rng.permutation(r):
      free = np.argwhere(members == r)
      if len(free) and rng.random() < 0.8:
        group[slot], member[slot] = rng.choice(free)
        members[group[slot], member[slot]] = slot
    kv = (LAYERS, groups, case.heads, size, HEAD)
    shared.append(Shared(
        normal(*kv), normal(*kv), int32(rng.integers(0, size + 1, groups)),
        int32(rng.integers(0, 4, groups)), int32(members), int32(group), int32(member)))
  positions = int32(live + rng.integers(0, 15, r))
  window = int32(rng.integers(1, 20)) if case.windowed else None
  q = normal(r, case.heads * case.repeats, HEAD)
  return q, own, tuple(shared), int32(rng.integers(LAYERS)), positions, window


def by_hand(q, own, shared, layer, positions, window, softcap=None):
  """Slot by slot and head by head in float64; keys are gathered by age and by index."""
  q, layer, size = np.asarray(q, np.float64), int(layer), own.k.shape[4]
  out = np.zeros(q.shape)
  for r, n in np.ndindex(q.shape[:2]):
    kv = n // (q.shape[1] // own.k.shape[3])
    seen = []                 # (position, key, value)
    for age in range(int(own.live[r])):
      piece, place = divmod(int(own.live[r]) - 1 - age, size)
      at = layer, piece, r, kv, place
      seen.append((positions[r] - age, own.k[at], own.v[at]))
    for region in shared:
      g = int(region.group[r])
      for j in range(int(region.length[g]) if g >= 0 else 0):
        seen.append((region.first[g] + j, region.k[layer, g, kv, j], region.v[layer, g, kv, j]))
    if window is not None:
      seen = [s for s in seen if s[0] > positions[r] - window]
    if seen:
      scores = SCALE * np.array([np.asarray(key, np.float64) @ q[r, n] for _, key, _ in seen])
      scores = scores if softcap is None else softcap * np.tanh(scores / softcap)
      weights = np.exp(scores - scores.max())
      out[r, n] = weights @ np.array([s[2] for s in seen], np.float64) / weights.sum()
  return out


@pytest.mark.parametrize('case', CASES.values(), ids=CASES.keys())
def test_the_definition_matches_float64(case):
  for seed in range(3):
    drawn = draw(np.random.default_rng(seed), case)
    out = compiled('ref', case)(*drawn)
    expected = by_hand(*jax.tree.map(np.asarray, drawn), softcap=case.softcap)
    np.testing.assert_allclose(out, expected, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize('case', CASES.values(), ids=CASES.keys())
@settings(deadline=None, max_examples=60, derandomize=True)
@given(seed=st.integers(0, 2**31), full=st.booleans())
def test_blocks_match_the_definition(case, seed, full):
  """Ragged lengths, windows, groups without members, prompts without keys."""
  q, own, *rest = draw(np.random.default_rng(seed), case)
  live = jnp.where(own.live > case.keys // 2, case.keys, own.live) if full else own.live
  own = dataclasses.replace(own, live=live)
  expected = compiled('ref', case)(q, own, *rest)
  out = compiled('blockwise', case)(q, own, *rest)
  np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-5)


def test_every_length_is_walked_once():
  case = CASES['one region']
  q, own, shared, layer, positions, _ = draw(np.random.default_rng(1), case)
  for live in range(case.keys + 1):
    now = dataclasses.replace(own, live=int32([live, 0, live, 1, max(live - 1, 0)]))
    args = q, now, shared, layer, positions, None
    np.testing.assert_allclose(
        compiled('blockwise', case)(*args), compiled('ref', case)(*args), rtol=1e-5, atol=1e-5)


def test_a_slot_has_the_same_bits_in_any_company():
  """What the others see, and in which slot it is, changes nothing."""
  case = CASES['one region']
  q, own, _, layer, positions, _ = draw(np.random.default_rng(6), case)
  run = functools.partial(compiled('blockwise', case), layer=layer, window=None)
  region = draw(np.random.default_rng(6), case)[2][0]
  nobody = dataclasses.replace(region, group=int32([-1] * case.slots),
                               members=jnp.full_like(region.members, case.slots))
  full = dataclasses.replace(own, live=int32([case.keys - 2] * case.slots))
  alone = dataclasses.replace(own, live=int32([0, case.keys - 2, 0, 3, 0]))
  turned = jax.tree.map(lambda x: jnp.roll(x, 2, axis=2), (own.k, own.v))
  other = dataclasses.replace(alone, k=turned[0], v=turned[1], live=jnp.roll(alone.live, 2))
  found = run(q, full, (nobody,), positions=positions)[1]
  np.testing.assert_array_equal(run(q, alone, (nobody,), positions=positions)[1], found)
  np.testing.assert_array_equal(
      run(jnp.roll(q, 2, axis=0), other, (nobody,), positions=jnp.roll(positions, 2))[3], found)


def test_slots_that_see_nothing_give_zeros_and_dead_keys_are_never_read():
  case = CASES['two regions, ragged blocks']
  q, own, shared, layer, positions, window = draw(np.random.default_rng(2), case)
  own = dataclasses.replace(own, live=int32([0, 4, 2, 0, 4, 1]))
  shared = tuple(dataclasses.replace(
      s, length=int32(np.full(s.length.shape, 2)), group=s.group.at[0].set(-1),
      members=jnp.where(s.members == 0, case.slots, s.members)) for s in shared)
  run = functools.partial(compiled('blockwise', case), layer=layer, positions=positions,
                          window=int32(30))
  clean = run(q, own, shared)
  assert (np.asarray(clean)[0] == 0).all() and (np.asarray(clean)[1:] != 0).any((1, 2)).all()
  dirty = dataclasses.replace(
      own, k=own.k.at[:, 1:].set(1e30), v=own.v.at[:, 1:].set(-1e30))
  filled = tuple(dataclasses.replace(
      s, k=s.k.at[:, :, :, 2:].set(1e30), v=s.v.at[:, :, :, 2:].set(-1e30)) for s in shared)
  np.testing.assert_array_equal(clean, run(q, dirty, filled))


def test_work_ends_at_the_longest_live_key():
  """Blocks beyond it hold NaN, which masking would not hide: they are not visited at all."""
  case = CASES['one region']
  q, own, shared, layer, positions, _ = draw(np.random.default_rng(3), case)
  own = dataclasses.replace(
      own, live=int32([3, 0, 1, 3, 2]),
      k=own.k.at[:, 1:].set(jnp.nan), v=own.v.at[:, 1:].set(jnp.nan))
  region = shared[0]
  nobody = int32(np.arange(4) == 2)[:, None]                     # group 2 is long and has no member
  region = dataclasses.replace(
      region, length=jnp.where(nobody[:, 0] > 0, 8, 3), v=region.v.at[:, :, :, 4:].set(jnp.nan),
      members=jnp.where(nobody > 0, case.slots, region.members),
      group=jnp.where(region.group == 2, -1, region.group))
  out = compiled('blockwise', case)(q, own, (region,), layer, positions, None)
  assert np.isfinite(out).all()


def test_large_scores_do_not_overflow():
  case = CASES['one region']
  q, own, shared, *rest = draw(np.random.default_rng(4), case)
  out = compiled('blockwise', case)(300 * q, own, shared, *rest)
  expected = compiled('ref', case)(300 * q, own, shared, *rest)
  np.testing.assert_allclose(out, expected, rtol=1e-4, atol=1e-4)


def test_int8_is_close_to_the_floats_it_came_from():
  """Scores move by at most half a scale per element, so the result moves in proportion."""
  case = CASES['one region']
  q, own, shared, *rest = draw(np.random.default_rng(5), case)
  whole = compiled('ref', case)(q, own, shared, *rest)
  own, region = (dataclasses.replace(x, k=quantise(x.k), v=quantise(x.v)) for x in (own, *shared))
  out = compiled('blockwise', case)(q, own, (region,), *rest)
  np.testing.assert_allclose(
      out, compiled('ref', case)(q, own, (region,), *rest), rtol=1e-5, atol=1e-5)
  error = np.abs(np.asarray(out) - np.asarray(whole)).max()
  assert 1e-4 < error < 0.03


def test_quantising_is_symmetric_and_keeps_zeros():
  x = jnp.asarray(np.random.default_rng(6).normal(size=(5, 3, HEAD)), jnp.float32).at[0].set(0)
  stored = quantise(x)
  assert stored.values.dtype == jnp.int8 and stored.scale.shape == (5, 3)
  assert (np.abs(np.asarray(stored.values)).max(-1)[1:] == 127).all()
  error = np.abs(np.asarray(stored.values * stored.scale[..., None] - x))
  assert (error <= 0.5001 * np.asarray(stored.scale)[..., None]).all()


def test_bfloat16_keeps_its_type_and_its_statistics_in_float32():
  case = CASES['two regions, ragged blocks']
  q, own, shared, *rest = draw(np.random.default_rng(7), case)
  cast = functools.partial(jax.tree.map, lambda x: (
      x.astype(jnp.bfloat16) if x.dtype == jnp.float32 else x))
  q, own, shared = cast((q, own, shared))
  with jax.numpy_dtype_promotion('strict'):
    out = compiled('blockwise', case)(q, own, shared, *rest)
  assert out.dtype == jnp.bfloat16
  wide = jax.tree.map(lambda x: x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x,
                      (q, own, shared))
  np.testing.assert_allclose(
      np.asarray(out, np.float32), compiled('ref', case)(*wide, *rest), atol=0.02, rtol=0.02)


@pytest.mark.parametrize('checked', [True, False])
def test_on_a_mesh_inside_loops_over_steps_and_layers(checked):
  """Two devices, two key heads each, in a while loop around a scan, equal one device's result."""
  case = Case(4, 2, 2, 8, 2, ((2, 2, 5),), windowed=True)
  q, own, shared, _, positions, _ = draw(np.random.default_rng(8), case)

  def steps(q, own, shared, positions):
    def layer(q, index):
      return decode_attention(q, own, shared, layer=index, positions=positions, scale=SCALE,
                              window=6 + index), None

    def body(carry):
      n, q = carry
      return n + 1, jax.lax.scan(layer, q, jnp.arange(LAYERS, dtype=jnp.int32))[0]

    return jax.lax.while_loop(lambda carry: carry[0] < 3, body, (jnp.int32(0), q))[1]

  by_head, own_keys, whole = P(None, None, 'heads'), P(None, None, None, 'heads'), P()
  mesh = jax.make_mesh((2,), ('heads',))
  specs = (
      P(None, 'heads'), Own(own_keys, own_keys, whole),
      (Shared(by_head, by_head, *[whole] * 5),), whole)
  sharded = jax.jit(jax.shard_map(
      steps, mesh=mesh, in_specs=specs, out_specs=P(None, 'heads'), check_vma=checked))
  args = jax.device_put((q, own, shared, positions), jax.tree.map(
      lambda spec: jax.sharding.NamedSharding(mesh, spec), specs))
  np.testing.assert_allclose(
      sharded(*args), jax.jit(steps)(q, own, shared, positions), rtol=1e-6, atol=1e-6)


def test_no_layer_of_the_cache_is_copied():
  """Every array that the compiled program makes is smaller than one layer of keys."""
  case = Case(4, 2, 2, 64, 8, ((2, 2, 32),), block=8)
  q, own, shared, layer, positions, _ = draw(np.random.default_rng(9), case)
  text = compiled('blockwise', case).lower(
      q, own, shared, layer, positions, None).compile().as_text()
  made = [(line, shape) for line in text.splitlines()
          for shape in re.findall(r'= f32\[([\d,]+)\]', line)
          if ' parameter(' not in line and ' get-tuple-element(' not in line]
  assert made
  for line, shape in made:
    assert np.prod([int(d) for d in shape.split(',')]) < 4 * 2 * 32 * HEAD, line


def test_what_does_not_fit_is_refused():
  case = CASES['one region']
  q, own, shared, layer, positions, _ = draw(np.random.default_rng(10), case)
  run = functools.partial(decode_attention, layer=layer, positions=positions, scale=1.0)
  with pytest.raises(ValueError, match="unknown decode_attention implementation 'fast'.*blockwise"):
    run(q, own, shared, impl='fast')
  with pytest.raises(ValueError, match=r'Own\.k of shape .* does not fit queries \(4, 3, 8\)'):
    run(q[:4], own, shared)
  with pytest.raises(ValueError, match=r'Shared\.k of shape'):
    run(q, own, [dataclasses.replace(shared[0], k=shared[0].k[:, :, :2])])


def test_blocks_are_the_default():
  args = draw(np.random.default_rng(11), CASES['one region'])[:5]

  def program(impl):
    return str(jax.make_jaxpr(lambda q, own, shared, layer, positions: decode_attention(
        q, own, shared, layer=layer, positions=positions, scale=1.0, impl=impl))(*args))

  assert program(None) == program('blockwise') != program('ref')
