"""The Hopper decoding kernel: lowered for an H200 that is not there, and interpreted on a CPU."""

import functools

import hypothesis
import hypothesis.strategies as st
import jax.numpy as jnp
import numpy as np
import pytest

from kernels import hopper
from kernels.decoding import Own, Shared, decode_attention, gpu, quantise, ref
from tests.hopper_on_cpu import KERNEL, interpreted, lowered


def int32(x):
  return jnp.asarray(x, jnp.int32)


def draw(rng, slots, kv, repeats, h, *, blocks, block=64, regions=()):
  """q, own, shared and positions; one slot sees no private key, one all that there is room for.

  Regions are of (groups, places, keys); every fourth slot is in no group, some places are empty.
  """
  def normal(*shape):
    return jnp.asarray(rng.normal(size=shape), jnp.bfloat16)

  live = rng.integers(0, blocks * block + 1, slots)
  live[0], live[-1] = 0, blocks * block
  shape = 2, blocks, slots, kv, block, h
  own = Own(normal(*shape), normal(*shape), int32(live))
  shared = []
  for groups, places, size in regions:
    members, group = np.full((groups, places), slots), np.full(slots, -1)
    member = rng.integers(0, places, slots)
    for slot in rng.permutation(slots):
      free = np.argwhere(members == slots)
      if len(free) and slot % 4 != 3:
        group[slot], member[slot] = free[rng.integers(len(free))]
        members[group[slot], member[slot]] = slot
    shape, length = (2, groups, kv, size, h), rng.integers(1, size + 1, groups)
    length[0] = size
    shared.append(Shared(
        normal(*shape), normal(*shape), int32(length),
        int32(rng.integers(0, 4, groups)), int32(members), int32(group), int32(member)))
  return normal(slots, kv * repeats, h), own, shared, int32(live + rng.integers(0, 90, slots))


def attend(fn, q, own, shared, positions, layer=1, **options):
  return fn(q, own, shared, layer=jnp.int32(layer), positions=positions,
            scale=q.shape[-1] ** -0.5, **options)


@pytest.mark.parametrize('kv, repeats, h, softcap', [
    (8, 4, 128, None), (8, 8, 128, None), (4, 2, 256, 50.0), (2, 1, 64, 5.0), (2, 3, 96, None),
    (1, 64, 80, None)])
def test_the_kernel_lowers_for_an_h200(kv, repeats, h, softcap):
  """Of 8B, 70B and others: one for private keys and one for each shared region."""
  arguments = draw(np.random.default_rng(0), 4, kv, repeats, h, blocks=2,
                   regions=((2, 3, 32), (1, 4, 512)))
  text = lowered(
      lambda window, *args: attend(gpu.decode_attention, *args, window=window, softcap=softcap),
      int32(100), *arguments)
  assert text.count(KERNEL) == 3


def test_two_blocks_of_threads_find_room_on_a_multiprocessor():
  for lanes in (128, 160, 192, 256):                       # bytes of a key: head sizes up to 128
    depth = gpu._depth(lanes)
    used = depth * 2 * gpu.TILE * lanes + hopper.ROWS * 2 * lanes
    assert depth >= 2 and 2 * used < hopper.SHARED_MEMORY - hopper.SMALL
  assert gpu._depth(512) == 2


def check(slots, kv, repeats, h, *, seed=0, window=None, softcap=None, **regions):
  arguments = draw(np.random.default_rng(seed), slots, kv, repeats, h, **regions)
  with interpreted():
    found = attend(functools.partial(decode_attention, impl='gpu'), *arguments,
                   window=window, softcap=softcap)
  assert found.dtype == jnp.bfloat16
  # The definition computes in float32, whatever it is given: its own error is rounding the result.
  expected = attend(ref.decode_attention, arguments[0].astype(jnp.float32), *arguments[1:],
                    window=window, softcap=softcap)
  error = np.abs(np.asarray(found, np.float32) - expected)
  largest = float(jnp.max(jnp.abs(expected)))
  assert error.max() < 0.008 * largest and np.sqrt(np.mean(error ** 2)) < 0.0015 * largest
  return np.asarray(found, np.float32), arguments


def test_private_keys_and_a_shared_prompt_interpreted():
  """Ragged lengths, a window, soft-capping; the prompt's last tile overlaps the one before."""
  check(2, 1, 4, 64, blocks=1, regions=((1, 3, 104),), window=90, softcap=5.0)


def test_a_slot_that_sees_nothing_interpreted():
  found, arguments = check(2, 1, 1, 64, blocks=1)
  assert int(arguments[1].live[0]) == 0 and (found[0] == 0).all()


@pytest.mark.slow
@hypothesis.settings(max_examples=6, deadline=None, derandomize=True)
@hypothesis.given(
    slots=st.integers(2, 5), repeats=st.sampled_from([1, 3, 24]), h=st.sampled_from([64, 80, 128]),
    blocks=st.integers(1, 9), size=st.sampled_from([24, 64, 72, 328]),
    window=st.sampled_from([None, 40, 200]), softcap=st.sampled_from([None, 5.0]),
    seed=st.integers(0, 99))
def test_any_shapes_interpreted(slots, repeats, h, blocks, size, window, softcap, seed):
  """Several parts of a row's keys, and members that do not fit one row."""
  check(slots, 1, repeats, h, blocks=blocks, regions=((2, 3, size),), window=window,
        softcap=softcap, seed=seed)


def test_what_the_kernel_cannot_do_is_an_error():
  def call(slots=2, kv=1, repeats=2, h=64, block=64, size=64, change=lambda *x: x, **options):
    q, own, shared, positions = draw(
        np.random.default_rng(0), slots, kv, repeats, h, blocks=1, block=block,
        regions=((1, 2, size),))
    q, own = change(q, own)
    return attend(functools.partial(decode_attention, impl='gpu'), q, own, shared, positions,
                  **options)

  with pytest.raises(ValueError, match='no int8 cache'):
    call(change=lambda q, own: (q, Own(quantise(own.k), quantise(own.v), own.live)))
  with pytest.raises(ValueError, match='of one type.*got bfloat16, float32'):
    call(change=lambda q, own: (q.astype(jnp.float32), own))
  with pytest.raises(ValueError, match='head sizes .*; got 32'):
    call(h=32)
  with pytest.raises(ValueError, match='multiple of 64 keys .*; got 48 keys'):
    call(block=48)
  with pytest.raises(ValueError, match='at most 64 query heads .*and 65 heads'):
    call(repeats=65)
  with pytest.raises(ValueError, match=r'at most 64 keys or a multiple of 8; got \[100\]'):
    call(size=100)
  with pytest.raises(ValueError, match='positive scale and softcap'):
    call(softcap=0.0)
