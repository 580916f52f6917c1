"""The Hopper attention kernels: lowered for an H200 that is not there, and interpreted on a CPU."""

import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from kernels.attention import Spans, attention, blocks, causal, gpu, gpu_work, plan, ref, windowed
from tests.hopper_on_cpu import KERNEL, interpreted, lowered

STRUCT = jax.ShapeDtypeStruct


def abstract_inputs(b, t, s, n, kv, h, dtype='bfloat16'):
  return (STRUCT((b, t, n, h), dtype), *(STRUCT((b, s, kv, h), dtype),) * 2,
          Spans(*(STRUCT((b, t), jnp.int32),) * 4))


def gradients(fn):
  """Of the sum of squares, so that the forward pass is not dead code."""
  return jax.grad(lambda *args: jnp.sum(fn(*args).astype(jnp.float32) ** 2), argnums=(0, 1, 2))


@pytest.mark.parametrize('shape, softcap', [
    ((2, 4096, 4096, 32, 8, 128), None),         # 8B
    ((1, 32768, 32768, 64, 8, 128), None),       # 70B
    ((2, 500, 300, 8, 4, 256), 50.0),            # Gemma 2
    ((1, 1, 130, 4, 4, 64), 5.0),
    ((2, 300, 300, 6, 2, 96), None),
    ((1, 128, 128, 2, 1, 80), None),
])
def test_kernels_lower_for_an_h200(shape, softcap):
  """Within its shared memory. Four kernels where dK and dV do not fit the registers together."""
  h = shape[-1]
  text = lowered(gradients(functools.partial(
      attention, scale=h ** -0.5, softcap=softcap, impl='gpu')), *abstract_inputs(*shape))
  assert text.count(KERNEL) == (4 if h > 128 else 3)


def test_under_shard_map_with_heads_or_queries_split():
  """And a policy that saves the name 'attn' keeps the forward kernel from running twice."""
  arrays = abstract_inputs(4, 256, 256, 4, 2, 64)
  heads, rows, queries = P('data', None, 'other'), P('data'), P('data', 'other')
  for specs, out in ((heads, heads, heads, rows), heads), ((queries, rows, rows, queries), queries):
    call = jax.shard_map(
        lambda q, k, v, spans: attention(q, k, v, spans, scale=0.1, impl='gpu'),
        in_specs=specs, out_specs=out)
    saved = jax.checkpoint(
        call, policy=jax.checkpoint_policies.save_only_these_names('attn'))
    text = lowered(gradients(saved), *arrays, data=2, other=2)
    assert text.count(KERNEL) == 3
    assert text.count('all_reduce') == (0 if out == heads else 2)      # dK and dV


def test_what_the_kernels_cannot_do_is_an_error():
  q = jnp.zeros((1, 8, 2, 64), jnp.bfloat16)
  call = functools.partial(attention, spans=causal(1, 8), scale=0.1, impl='gpu')
  with pytest.raises(ValueError, match='bfloat16 or float16; got float32, float32 and float32'):
    call(*(q.astype(jnp.float32),) * 3)
  with pytest.raises(ValueError, match='one type.*got bfloat16, float16 and bfloat16'):
    call(q, q.astype(jnp.float16), q)
  with pytest.raises(ValueError, match='head sizes .*; got 32'):
    call(*(q[..., :32],) * 3)
  with pytest.raises(ValueError, match='a positive scale and softcap; got -1.0 and None'):
    call(q, q, q, scale=-1.0)
  with pytest.raises(ValueError, match='a positive scale and softcap; got 0.1 and 0.0'):
    call(q, q, q, softcap=0.0)
  with pytest.raises(ValueError, match="not for the attention implementation 'gpu'"):
    call(q, q, q, plan=plan(causal(1, 8), 8, group=1, impl='blockwise'))
  with pytest.raises(ValueError, match='in blocks of 128 and 128; got 8 and 8'):
    gpu.attention(q, q, q, causal(1, 8), blocks.plan(causal(1, 8), 8), scale=0.1)
  with pytest.raises(ValueError, match='make 1 x 2'):
    call(q, *(jnp.zeros((1, 200, 2, 64), jnp.bfloat16),) * 2,
         plan=plan(causal(1, 8), 8, group=1, impl='gpu'))


def test_work_lists_hold_each_visible_pair_of_blocks_once():
  """From both sides; an odd entry has no hidden pair."""
  rng = np.random.default_rng(1)
  for window in (None, 150):
    spans = draw_spans(rng, 2, 700, 500)
    spans = spans if window is None else windowed(spans, window)
    keep = np.asarray(jnp.pad(ref.visible(spans, 500), ((0, 0), (0, 68), (0, 12))))
    keep = keep.reshape(2, 6, 128, 4, 128)
    some, every = keep.any((2, 4)), keep.all((2, 4))
    found = gpu_work.work(blocks.plan(spans, 500, block_q=128, block_k=128))
    for lists, counts, axes in (
        (found.keys, found.key_counts, (0, 1, 2)), (found.queries, found.query_counts, (0, 2, 1))):
      for row, block in np.ndindex(counts.shape):
        entries = np.asarray(lists[row, block, :counts[row, block]])
        seen, whole = (x.transpose(axes)[row, block] for x in (some, every))
        assert (entries // 2 == np.flatnonzero(seen)).all()
        assert (entries % 2 == whole[entries // 2]).all()


def draw_spans(rng, b, t, s):
  """Packed prompts with two responses each; some queries see nothing.

  Keys beyond the number of queries come first, and queries of prompts see them too.
  """
  bounds = np.zeros((4, b, t), np.int32)
  for row in range(b):
    at = 0
    while at < t:
      prompt, *responses = rng.integers(1, 90, 3)
      first, at = at, at + prompt
      bounds[2:, row, first:at] = [np.full(len(range(t)[first:at]), first),
                                   np.arange(t)[first:at] + 1]
      for response in responses:
        inside = np.arange(t)[at:at + response]
        bounds[:, row, inside] = np.stack(np.broadcast_arrays(
            first, first + prompt, at, inside + 1))
        at += response
      at += rng.integers(0, 4)
  earlier = max(s - t, 0)
  sees = bounds[3] > 0
  bounds = np.where(sees, bounds + earlier, 0)
  prompts = sees & (bounds[1] == bounds[0])
  bounds[0] = np.where(prompts, 0, bounds[0])
  bounds[1] = np.where(prompts, earlier, bounds[1])
  return Spans(*(jnp.asarray(x, jnp.int32) for x in np.minimum(bounds, s)))


def check(b, t, s, n, kv, h, *, seed=0, window=None, softcap=None):
  """Interpreted values and gradients against the definition in float32, whose own error is small.

  Errors are at most 1.5 times those of the definition in bfloat16; queries that see nothing are
  exactly zero, and so are their gradients.
  """
  rng = np.random.default_rng(seed)
  shapes = (b, t, n, h), (b, s, kv, h), (b, s, kv, h), (b, t, n, h)
  *arrays, d_out = (jnp.asarray(rng.normal(size=shape), jnp.bfloat16) for shape in shapes)
  spans = draw_spans(rng, b, t, s)
  options = dict(spans=spans, scale=h ** -0.5, window=window, softcap=softcap)

  def outputs(fn, dtype):
    def both(q, k, v, d_out):
      out, pull = jax.vjp(functools.partial(fn, **options), q, k, v)
      return out, *pull(d_out)
    found = jax.jit(both)(*(x.astype(dtype) for x in (*arrays, d_out)))
    return [np.asarray(x, np.float32) for x in found]

  with interpreted():
    ours = outputs(functools.partial(attention, impl='gpu'), jnp.bfloat16)
  expected, plain = (outputs(ref.attention, dtype) for dtype in (jnp.float32, jnp.bfloat16))
  for found, exact, rounded in zip(ours, expected, plain):
    error, allowed = (np.sqrt(np.mean((x - exact) ** 2)) for x in (found, rounded))
    # A query of one key has no gradient, and the plain form no error there: hence the last terms.
    assert error <= 1.5 * allowed + 1e-5, (error, allowed)
    assert np.abs(found - exact).max() < 0.01 * np.abs(exact).max() + 1e-4
  hidden = ~np.asarray(ref.visible(spans, s)).any(-1)
  assert (ours[0][hidden] == 0).all() and (ours[1][hidden] == 0).all()


def test_packed_pairs_interpreted():
  """Prompts with two responses, rows that end within a block, soft-capping, shared key heads.

  Three steps of two buffers, and in the gradients of keys and values six of four.
  """
  check(1, 100, 300, 3, 1, 128, softcap=5.0)


@pytest.mark.slow
@pytest.mark.parametrize('shape', [(1, 270, 130, 1, 1, 128), (1, 130, 200, 2, 1, 256),
                                   (2, 1, 300, 2, 2, 80), (1, 140, 140, 1, 1, 96)])
def test_head_sizes_interpreted(shape):
  check(*shape)


@pytest.mark.slow
@hypothesis.settings(max_examples=6, deadline=None, derandomize=True)
@hypothesis.given(
    t=st.integers(1, 300), s=st.integers(1, 300), heads=st.sampled_from([(1, 1), (2, 1), (2, 2)]),
    h=st.sampled_from([64, 128]), window=st.sampled_from([None, 1, 70]),
    softcap=st.sampled_from([None, 2.0, 30.0]), seed=st.integers(0, 999))
def test_any_shapes_interpreted(t, s, heads, h, window, softcap, seed):
  check(1, t, s, *heads, h, seed=seed, window=window, softcap=softcap)
