"""The TPU kernels interpreted on a CPU, against float64; their lists of work; their compilation."""

import contextlib
import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from jax.experimental import topologies
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import PartitionSpec as P
from jax.sharding import SingleDeviceSharding

from kernels.attention import (
  Spans,
  attention,
  blocks,
  causal,
  plan,
  ref,
  tpu,
  tpu_backward,
  tpu_work,
  visible,
  windowed,
)

CHIPS = {'v5e:2x2': 'v5litepod-4', 'v5p:2x2x1': 'v5p-8', 'v6e:2x2': 'v6e-4'}


@contextlib.contextmanager
def interpreted():
  """TPU kernels run on the CPU here, and two accesses in no order to one place are an error."""
  pltpu.reset_tpu_interpret_mode_state()
  from jax._src.pallas.mosaic.interpret import interpret_pallas_call as interpreter
  with pltpu.force_tpu_interpret_mode(pltpu.InterpretParams(detect_races=True)):
    yield
  assert not interpreter.races.races_found


def dense(q, k, v, d_out, keep, *, scale, softcap=None):
  """Output and dq, dk, dv in float64. keep [B, T, S]."""
  q, k, v, d_out = (np.asarray(x, np.float64) for x in (q, k, v, d_out))
  (b, t, n, h), groups = q.shape, k.shape[2]
  q, d_out = (x.reshape(b, t, groups, n // groups, h) for x in (q, d_out))
  score = np.einsum('btkgh,bskh->bkgts', q, k) * scale
  slope = 1.0
  if softcap is not None:
    score = softcap * np.tanh(score / softcap)
    slope = 1 - (score / softcap) ** 2
  keep = np.asarray(keep)[:, None, None]
  top = np.where(keep, score, -np.inf).max(-1, keepdims=True, initial=-1e300)
  p = np.where(keep, np.exp(np.where(keep, score - top, 0)), 0)
  p = p / np.maximum(p.sum(-1, keepdims=True), 1e-300)
  d_p = np.einsum('btkgh,bskh->bkgts', d_out, v)
  d_score = p * (d_p - (p * d_p).sum(-1, keepdims=True)) * slope * scale
  return (np.einsum('bkgts,bskh->btkgh', p, v).reshape(b, t, n, h),
          np.einsum('bkgts,bskh->btkgh', d_score, k).reshape(b, t, n, h),
          np.einsum('bkgts,btkgh->bskh', d_score, q), np.einsum('bkgts,btkgh->bskh', p, d_out))


def outputs(fn, q, k, v, d_out):
  """The output of fn and its gradients, one compiled program."""
  def both(q, k, v, d_out):
    out, pull = jax.vjp(fn, q, k, v)
    return out, *pull(d_out)
  return jax.block_until_ready(jax.jit(both)(q, k, v, d_out))


def in_small_blocks(q, k, v, spans, *, window=None, **options):
  spans = spans if window is None else windowed(spans, window)
  found = blocks.plan(spans, k.shape[1], block_q=128, block_k=128)
  return tpu.attention(q, k, v, spans, found, **options)


def draw(rng, b, t, s, n, kv, h, dtype=np.float32):
  shapes = (b, t, n, h), (b, s, kv, h), (b, s, kv, h), (b, t, n, h)
  return [jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes]


def draw_spans(rng, b, t, s):
  """Any intervals in order, a third of them empty; the first query sees nothing."""
  bounds = np.sort(rng.integers(0, s + 1, (4, b, t)), axis=0).astype(np.int32)
  bounds[1] = np.where(rng.random((b, t)) < 0.3, bounds[0], bounds[1])
  bounds[3] = np.where(rng.random((b, t)) < 0.3, bounds[2], bounds[3])
  bounds[:, 0, 0] = 0
  return Spans(*map(jnp.asarray, bounds))


def packed(*units):
  """One row of (prompt, response, ...) lengths: each prompt once, all responses after it."""
  rows, at = [], 0
  for prompt, *responses in units:
    first, at = at, at + prompt
    rows += [(0, 0, first, i + 1) for i in range(first, at)]
    for length in responses:
      rows += [(first, first + prompt, at, i + 1) for i in range(at, at + length)]
      at += length
  return Spans(*(jnp.asarray(x)[None] for x in np.array(rows, np.int32).T))


def rows_of(*rows):
  return Spans(*(jnp.concatenate(parts) for parts in zip(*(jax.tree.leaves(x) for x in rows))))


def check(fn, arrays, spans, *, window=None, **options):
  """Values and gradients of fn against float64."""
  with interpreted():
    found = outputs(
        lambda q, k, v: fn(q, k, v, spans, window=window, **options), *arrays)
  seen = spans if window is None else windowed(spans, window)
  keep = visible(seen, arrays[1].shape[1])
  for ours, theirs in zip(found, dense(*arrays, keep, **options)):
    assert ours.dtype == jnp.float32
    np.testing.assert_allclose(ours, theirs, rtol=2e-5, atol=1e-5)
  hidden = ~np.asarray(keep).any(-1)
  assert (np.asarray(found[0])[hidden] == 0).all() and (np.asarray(found[1])[hidden] == 0).all()


def test_packed_pairs_of_two_rows_with_a_window():
  """Rows of 150 tokens, which no block divides; queries of padding see nothing."""
  spans = rows_of(packed((60, 30, 40), (20,)), packed((11, 9), (40, 25, 25, 30), (10,)))
  rng = np.random.default_rng(0)
  check(in_small_blocks, draw(rng, 2, 150, 150, 4, 2, 64), spans, scale=0.2, window=45)


def test_any_intervals_of_more_keys_than_queries_in_several_chunks(monkeypatch):
  """dK and dV of 300 keys in chunks of 128; the block of the last ones is seen by nobody."""
  monkeypatch.setattr(tpu_backward, 'CHUNK', 128)
  rng = np.random.default_rng(1)
  spans = draw_spans(rng, 1, 140, 250)
  check(in_small_blocks, draw(rng, 1, 140, 300, 2, 2, 80), spans, scale=0.3, softcap=2.0)


def test_one_query_and_many_heads_of_one_key_head_by_name():
  """Heads beyond those written out are a loop; the public function chooses the blocks."""
  rng = np.random.default_rng(2)
  spans = Spans(*(jnp.full((1, 1), x, jnp.int32) for x in (3, 40, 60, 140)))
  check(functools.partial(attention, impl='tpu'), draw(rng, 1, 1, 150, 6, 1, 128), spans,
        scale=0.2)


def test_bfloat16_errs_at_most_half_more_than_the_plain_form():
  """Output and gradients of both against float64."""
  rng = np.random.default_rng(3)
  arrays = draw(rng, 1, 256, 256, 2, 1, 64, jnp.bfloat16)
  spans, options = packed((100, 80, 76)), {'scale': 0.125}
  expected = dense(*arrays, visible(spans, 256), **options)
  with interpreted(), jax.numpy_dtype_promotion('strict'):
    ours = outputs(lambda q, k, v: in_small_blocks(q, k, v, spans, **options), *arrays)
  plain = outputs(lambda q, k, v: ref.attention(q, k, v, spans, **options), *arrays)
  for x, y, exact in zip(ours, plain, expected):
    assert x.dtype == jnp.bfloat16
    error, allowed = (np.abs(np.asarray(a, np.float64) - exact).mean() for a in (x, y))
    assert error <= 1.5 * allowed < 0.02


@pytest.mark.slow
@hypothesis.settings(max_examples=40, deadline=None, derandomize=True)
@hypothesis.given(
    seed=st.integers(0, 2**32 - 1), t=st.integers(1, 300), s=st.integers(1, 300),
    rows=st.integers(1, 2), heads=st.sampled_from([(1, 1), (4, 2), (6, 1), (3, 3)]),
    head_size=st.sampled_from(tpu.HEAD_SIZES), window=st.sampled_from([None, 1, 50, 140, 1000]),
    softcap=st.sampled_from([None, 3.0]))
def test_any_shapes_and_intervals(seed, t, s, rows, heads, head_size, window, softcap):
  rng = np.random.default_rng(seed)
  check(in_small_blocks, draw(rng, rows, t, s, *heads, head_size), draw_spans(rng, rows, t, s),
        scale=head_size ** -0.5, window=window, softcap=softcap)


def items_of(row, count):
  """(query block, key block, bits) of each item of a list."""
  row = np.asarray(row)[:int(count)]
  return [(int(x) >> tpu_work.QUERY_SHIFT,
           int(x) >> tpu_work.KEY_SHIFT & tpu_work.MOST_KEYS - 1, int(x) & 15) for x in row]


@functools.partial(jax.jit, static_argnums=(1, 2, 3, 4))
def both_lists(spans, keys, block_q, block_k, chunk):
  found = blocks.plan(spans, keys, block_q=block_q, block_k=block_k)
  return tpu_work.work(found), tpu_work.work_by_keys(found, chunk)


@hypothesis.settings(max_examples=25, deadline=None, derandomize=True)
@hypothesis.given(seed=st.integers(0, 2**32 - 1), chunk=st.sampled_from([1, 5]))
def test_lists_hold_each_visible_pair_of_blocks_once(seed, chunk):
  """Bits too: first and last of a block of queries, and whether any key of it is hidden."""
  rng = np.random.default_rng(seed)
  b, t, s, block_q, block_k = 2, 21, 26, 4, 3
  spans = draw_spans(rng, b, t, s)
  if seed % 2:                         # long intervals: blocks without a hidden key
    spans = windowed(causal(b, t), int(rng.integers(4, 20)))
  keep = np.pad(np.asarray(visible(spans, s)), [(0, 0), (0, -t % block_q), (0, -s % block_k)])
  keep = keep.reshape(b, 6, block_q, 9, block_k)
  seen, whole = keep.any((2, 4)), keep.all((2, 4))
  expected = {(i * 6 + m, i * 9 + j): whole[i, m, j] for i, m, j in np.argwhere(seen)}

  def check_row(items, first_key):
    visited = {(m, j + first_key): bits for m, j, bits in items if bits & 12}
    assert {at: bool(bits & tpu_work.WHOLE) for at, bits in visited.items()} == {
        at: expected[at] for at in visited} and len(visited) == sum(
            bool(bits & 12) for *_, bits in items)
    of_queries = [m for m, *_ in items]
    assert of_queries == sorted(of_queries)
    for n, (m, _, bits) in enumerate(items):
      assert bool(bits & tpu_work.FIRST) == (n == 0 or of_queries[n - 1] != m)
      assert bool(bits & tpu_work.LAST) == (n == len(items) - 1 or of_queries[n + 1] != m)
    return set(visited)

  (lists, counts), by_keys = both_lists(spans, s, block_q, block_k, chunk)
  items = items_of(lists[0], counts[0])
  assert check_row(items, 0) == set(expected)
  assert {m for m, *_ in items} == set(range(12))      # every output is written
  lists, counts = by_keys
  assert lists.shape[0] == -(-18 // chunk) and (counts >= 1).all()
  parts = [check_row(items_of(row, count), n * chunk)
           for n, (row, count) in enumerate(zip(lists, counts))]
  assert set().union(*parts) == set(expected) and sum(map(len, parts)) == len(expected)


def test_work_of_a_packed_row_is_the_least_that_its_mask_allows():
  """Pairs of a prompt and two responses in one row: what is listed against the mask itself."""
  spans = packed((512, 256, 256), (300, 700, 650), (1100, 200, 128))
  length = spans.end.shape[1]
  found = plan(spans, length, group=4, impl='tpu')['tpu']
  keep = np.asarray(visible(spans, length))[0]
  padded = np.pad(keep, [(0, -length % found.block_q), (0, -length % found.block_k)])
  needed = padded.reshape(-1, found.block_q, padded.shape[1] // found.block_k, found.block_k)
  assert int(tpu_work.work(found)[1][0]) == needed.any((1, 3)).sum() < 0.6 * found.visited.size


def program(fn, platform, *arrays):
  return export.export(jax.jit(fn), platforms=[platform])(*arrays).mlir_module()


def test_the_platform_of_the_program_chooses():
  """Lowered on this host for TPUs and for CPUs, gradients too; short rows stay plain."""
  def total(q, k, v):
    return jnp.sum(attention(q, k, v, causal(1, q.shape[1]), scale=0.1))

  def count(length, platform, head_size=64):
    arrays = (jax.ShapeDtypeStruct((1, length, n, head_size), jnp.float32) for n in (4, 2, 2))
    return program(jax.grad(total, (0, 1, 2)), platform, *arrays).count('tpu_custom_call')

  assert count(256, 'tpu') == 2 and count(256, 'cpu') == 0 and count(128, 'tpu') == 0
  assert count(256, 'tpu', head_size=72) == 0          # there is no kernel for it: blockwise


def test_the_kernel_runs_once_where_its_output_is_kept():
  def text(policy):
    def layer(q, k, v):
      return attention(jnp.sin(q), k, v, causal(1, 256), scale=0.1)
    fn = jax.checkpoint(layer, policy=policy)
    arrays = [jax.ShapeDtypeStruct((1, 256, 1, 64), jnp.bfloat16)] * 3
    total = jax.value_and_grad(lambda *a: jnp.sum(fn(*a).astype(jnp.float32)), (0, 1, 2))
    return program(total, 'tpu', *arrays)

  assert text(jax.checkpoint_policies.save_only_these_names('attn')).count('tpu_custom_call') == 2
  assert text(jax.checkpoint_policies.nothing_saveable).count('tpu_custom_call') == 3


def test_sharded_by_rows_heads_and_queries_equals_unsharded():
  """Keys are whole on every device that has a part of the queries; their gradients are summed."""
  rng = np.random.default_rng(4)
  arrays = draw(rng, 1, 256, 256, 1, 1, 64)
  spans = packed((100, 80, 76))
  mesh = jax.make_mesh((2,), ('sequence',), axis_types=(jax.sharding.AxisType.Auto,))
  rows, keys = P(None, 'sequence'), P()

  def sharded(q, k, v):
    return jax.shard_map(
        functools.partial(in_small_blocks, scale=0.125), mesh=mesh,
        in_specs=(rows, keys, keys, rows), out_specs=rows, check_vma=False)(q, k, v, spans)

  with interpreted():
    found = outputs(sharded, *arrays)
  for ours, theirs in zip(found, dense(*arrays, visible(spans, 256), scale=0.125)):
    np.testing.assert_allclose(ours, theirs, rtol=2e-5, atol=1e-5)


def test_what_there_is_no_kernel_for_is_refused():
  def call(*shape, keys=None, dtype=jnp.float32, of_keys=jnp.float32):
    x, y = jnp.zeros(shape, dtype), jnp.zeros(keys or shape, of_keys)
    return attention(x, y, y, causal(*shape[:2]), scale=1.0, impl='tpu')

  with pytest.raises(ValueError, match="'tpu' cannot take this: head sizes are .*, not 72"):
    call(1, 8, 1, 72)
  with pytest.raises(ValueError, match='not float16, float16 and float16'):
    call(1, 8, 1, 64, dtype=jnp.float16, of_keys=jnp.float16)
  with pytest.raises(ValueError, match='not bfloat16, float32 and float32'):
    call(1, 8, 1, 64, dtype=jnp.bfloat16)
  with pytest.raises(ValueError, match='1 rows of 512 x 512 pairs of blocks'):
    jax.eval_shape(functools.partial(call, 1, 1 << 18, 1, 64))
  with pytest.raises(ValueError, match='multiples of 128 tokens, not 8 x 128'):
    x = jnp.zeros((1, 8, 1, 64))
    found = blocks.plan(causal(1, 8), 8, block_k=128)
    tpu.attention(x, x, x, causal(1, 8), found, scale=1.0)


@pytest.mark.parametrize('head_size', tpu.HEAD_SIZES)
def test_compiles_ahead_of_time(head_size, monkeypatch):
  """Each head size on another chip; benchmarks.attention_tpu has all of them at real shapes."""
  pytest.importorskip('libtpu')
  topology, kind = list(CHIPS.items())[tpu.HEAD_SIZES.index(head_size) % 3]
  for name, value in (('TPU_SKIP_MDS_QUERY', '1'), ('TPU_WORKER_HOSTNAMES', 'localhost'),
                      ('TPU_ACCELERATOR_TYPE', kind), ('ALLOW_MULTIPLE_LIBTPU_LOAD', '1')):
    monkeypatch.setenv(name, value)
  device = topologies.get_topology_desc(platform='tpu', topology_name=topology).devices[0]
  arrays = [jax.ShapeDtypeStruct((1, 300, n, head_size), jnp.bfloat16,
                                 sharding=SingleDeviceSharding(device)) for n in (2, 1, 1, 2)]

  def both(q, k, v, d_out):
    out, pull = jax.vjp(
        lambda q, k, v: attention(q, k, v, causal(1, 300), scale=0.1, softcap=30.0), q, k, v)
    return out, *pull(d_out)

  text = jax.jit(both).lower(*arrays).compile().as_text()
  assert text.count('custom_call_target="tpu_custom_call"') == 2
