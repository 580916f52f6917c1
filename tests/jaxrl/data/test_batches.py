"""Masks from spans, static shapes, and batches that are a pure function of (seed, step)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxrl.data.batches import (
    Pair,
    TokenRow,
    buckets,
    pair_arrays,
    sequence_arrays,
    shuffled_batches,
)
from jaxrl.errors import InputError
from jaxrl.losses.preference import pref_loss

ids = st.integers(0, 9)      # pad (0) and EOS (2) of the tests are among them, also in the middle
rows = st.builds(
    TokenRow, st.lists(ids, min_size=1, max_size=6), st.lists(ids, min_size=1, max_size=6))


@given(rows=st.lists(rows, min_size=1, max_size=5), pad_id=st.sampled_from([0, 2, 31]))
def test_the_mask_marks_exactly_the_response_targets(rows, pad_id):
  batch = sequence_arrays(rows, (5, 11), pad_id)
  assert {x.shape for x in batch.values()} == {(len(rows), batch['mask'].shape[1])}
  assert [batch[k].dtype for k in ('inputs', 'targets', 'mask')] == [np.int32, np.int32, bool]
  for n, row in enumerate(rows):
    inputs, targets, mask = (batch[k][n] for k in ('inputs', 'targets', 'mask'))
    assert targets[mask].tolist() == list(row.response_ids)
    (places,) = np.nonzero(mask)
    everything = [*row.prompt_ids, *row.response_ids]
    for place in places:       # a target is predicted from the ids before it and no others
      assert [*inputs[:place + 1], targets[place]] == everything[:place + 2]
    assert places[0] == len(row.prompt_ids) - 1
    assert (inputs[len(row) - 1:] == pad_id).all() and (targets[len(row) - 1:] == pad_id).all()


IRPO = jax.jit(lambda batch: pref_loss('irpo', batch)[0])


def loss_of(batch, table):
  """IRPO where the log-prob of a target depends on nothing but input and target id."""
  policy = table[batch['inputs'], batch['targets']]
  arrays = {'policy': policy, 'ref': batch['ref_logps'], 'mask': batch['mask']}
  names = {'policy': 'policy_{}', 'ref': 'ref_{}', 'mask': '{}_mask'}
  sides = {
      names[name].format(side): jnp.asarray(x[:, n])
      for name, x in arrays.items() for n, side in enumerate(('chosen', 'rejected'))}
  return float(IRPO(sides | {'weights': jnp.asarray(batch['weights'])}))


@st.composite
def pairs(draw):
  chosen, rejected = draw(rows), draw(rows)
  logp = st.floats(-8, 0, width=32)
  refs = [
      draw(st.lists(logp, min_size=len(r.response_ids), max_size=len(r.response_ids)))
      for r in (chosen, rejected)]
  return Pair(chosen, rejected, *refs, weight=draw(st.sampled_from([0.5, 1.0, 2.0])))


@given(pairs=st.lists(pairs(), min_size=3, max_size=3), pad_id=st.sampled_from([2, 31]))
@settings(deadline=None, max_examples=40)
def test_the_loss_depends_on_neither_pad_id_nor_padding(pairs, pad_id):
  table = -np.random.default_rng(0).random((32, 32)).astype(np.float32)
  expected = loss_of(pair_arrays(pairs, (11,), 0), table)
  assert loss_of(pair_arrays(pairs, (11,), pad_id), table) == expected
  np.testing.assert_allclose(
      loss_of(pair_arrays(pairs, (16,), pad_id), table), expected, rtol=1e-5)


def test_layout_of_pairs():
  pairs = [
      Pair(TokenRow([1, 2], [3, 4]), TokenRow([1, 2], [5]), [-0.1, -0.2], [-0.3]),
      Pair(TokenRow([6], [7]), TokenRow([6], [8, 9, 0]), [-0.4], [-0.5, -0.6, -0.7], weight=0.5)]
  batch = pair_arrays(pairs, (4,), 31)
  assert batch['inputs'].tolist() == [
      [[1, 2, 3, 31], [1, 2, 31, 31]], [[6, 31, 31, 31], [6, 8, 9, 31]]]
  assert batch['targets'].tolist() == [
      [[2, 3, 4, 31], [2, 5, 31, 31]], [[7, 31, 31, 31], [8, 9, 0, 31]]]
  assert batch['mask'].astype(int).tolist() == [
      [[0, 1, 1, 0], [0, 1, 0, 0]], [[1, 0, 0, 0], [1, 1, 1, 0]]]
  np.testing.assert_allclose(batch['ref_logps'], np.asarray([
      [[0, -0.1, -0.2, 0], [0, -0.3, 0, 0]], [[-0.4, 0, 0, 0], [-0.5, -0.6, -0.7, 0]]], np.float32))
  assert batch['weights'].tolist() == [1.0, 0.5]
  assert {batch[k].dtype for k in ('ref_logps', 'weights')} == {np.dtype(np.float32)}


@pytest.mark.parametrize('chosen_ref', [[-0.1], [-0.1, -0.2, -0.3]])
def test_reference_log_probs_of_another_length_are_refused(chosen_ref):
  pair = Pair(TokenRow([1], [2, 3]), TokenRow([1], [4]), chosen_ref, [-0.5])
  with pytest.raises(ValueError):
    pair_arrays([pair], (4,), 0)


@given(lengths=st.lists(st.integers(1, 500), min_size=1, max_size=60), count=st.integers(1, 5),
       multiple=st.sampled_from([1, 8, 32]))
def test_buckets_cover_every_length(lengths, count, multiple):
  found = buckets(lengths, count=count, multiple=multiple)
  assert 1 <= len(found) <= count and list(found) == sorted(set(found))
  assert all(length % multiple == 0 for length in found)
  assert max(lengths) <= found[-1] < max(lengths) + multiple


def test_rows_take_the_smallest_length_that_holds_them():
  row = TokenRow([1, 2], [3, 4, 5])                       # four inputs
  assert [sequence_arrays([row], lengths, 0)['mask'].shape[1] for lengths in (
      (4, 8), (8, 4), (3, 5), (16,))] == [4, 4, 5, 16]


def test_rows_that_fit_nowhere_are_errors():
  with pytest.raises(InputError, match='expected at most 4 ids; found 5 ids'):
    sequence_arrays([TokenRow([1], [2]), TokenRow([1, 2], [3, 4, 5])], (2, 3), 0)
  with pytest.raises(InputError, match='row 1 of a batch: the row has no prompt'):
    sequence_arrays([TokenRow([1], [2]), TokenRow([], [3])], (4,), 0)
  with pytest.raises(InputError, match='no rows'):
    buckets([], count=2, multiple=8)


def dataset(n, batch_size, seed):
  return shuffled_batches(
      list(range(n)), batch_size=batch_size, seed=seed,
      collate=lambda rows: {'rows': np.asarray(rows)})


@given(n=st.integers(1, 30), batch_size=st.integers(1, 9), seed=st.integers(0, 2**32 - 1))
@settings(max_examples=20, deadline=None)
def test_every_epoch_holds_every_row_once(n, batch_size, seed):
  data = dataset(n, batch_size, seed)
  steps = -(-3 * n // batch_size)
  drawn = [row for k in range(steps) for row in data[k]['rows']]
  assert drawn == [row for k in range(steps) for row in data[k]['numbers']]
  assert len(drawn) == steps * batch_size
  for epoch in range(3):
    assert sorted(drawn[epoch * n:(epoch + 1) * n]) == list(range(n))


@given(n=st.integers(1, 40), k=st.integers(0, 2000), seed=st.integers(0, 2**32 - 1))
@settings(max_examples=40, deadline=None)
def test_batch_k_does_not_depend_on_what_was_read_before(n, k, seed):
  read = dataset(n, 4, seed)
  for step in range(k, max(k - 5, -1), -1):
    read[step]
  assert (dataset(n, 4, seed)[k]['rows'] == read[k]['rows']).all()


def test_epochs_and_seeds_differ():
  first, second = (dataset(50, 50, seed) for seed in (1, 2))
  orders = [tuple(data[k]['rows']) for data in (first, second) for k in range(4)]
  assert len(set(orders)) == len(orders)
