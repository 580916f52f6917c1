"""Packed batches: every id in its place, few shapes, and the loss and gradients of padded rows."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks import packing_fill
from jaxrl.data import packing
from jaxrl.data.batches import (
    LabelledRow,
    Pair,
    TokenRow,
    WeakRow,
    labelled_arrays,
    pair_arrays,
    sequence_arrays,
    shuffled_batches,
    weak_arrays,
)
from jaxrl.errors import InputError
from jaxrl.losses.pairs import PairOptions
from jaxrl.parallel.mesh import make_mesh
from jaxrl.training import objectives
from jaxrl.training.step import train_step
from tests import tiny_training as tiny
from tests.tiny_model import CONFIG, QUICK

PAD = tiny.PAD
ids = st.lists(st.integers(1, 30), min_size=1, max_size=7)


@st.composite
def units(draw):
  responses = draw(st.integers(1, 3))
  return [
      packing.Unit(draw(ids), [draw(ids | st.just([])) for _ in range(responses)], {}, {})
      for _ in range(draw(st.integers(1, 6)))]


@settings(max_examples=60, deadline=None)
@given(units(), st.integers(1, 3))
def test_every_response_id_is_predicted_by_what_comes_before_it(made, rows):
  """Read back through spans and places alone: context, position and target of every response id."""
  shape = packing.needed(made, rows)
  batch = packing.packed_arrays(made, shape, PAD)
  if shape.responses == 1:
    batch |= {name: batch[name][:, :, None] for name in ('places', 'mask')}
  members = packing.spread(made, rows)
  assert sorted(map(id, made)) == sorted(id(unit) for row in members for unit in row)
  for row, row_units in enumerate(members):
    for number, unit in enumerate(row_units):
      for n, response in enumerate(unit.responses):
        assert batch['mask'][row, number, n].sum() == len(response)
        for place, target in enumerate(response):
          m = batch['places'][row, number, n, place]
          i = batch['picked'][row, m]
          assert batch['targets'][row, m] == target
          seen = [*range(batch['prefix_start'][row, i], batch['prefix_end'][row, i]),
                  *range(batch['start'][row, i], batch['end'][row, i])]
          context = [*unit.prompt_ids, *response[:place]]
          assert batch['inputs'][row, seen].tolist() == context and seen[-1] == i
          assert batch['positions'][row, seen].tolist() == list(range(len(context)))
    assert batch['mask'][row, len(row_units):].sum() == 0
  assert (batch['end'] > 0).sum() == sum(unit.size for unit in made)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=9), st.integers(1, 3),
       st.sampled_from([1, 4]))
def test_lengths_hold_all_with_the_least_padding(totals, count, multiple):
  found = packing.fitting_lengths(totals, count=count, multiple=multiple)

  def padded(lengths):
    return sum(min(n for n in lengths if n >= t) for t in totals)

  assert len(found) <= count and all(n % multiple == 0 for n in found)
  candidates = {-(-t // multiple) * multiple for t in totals}
  rounds = [{max(candidates)}]
  for _ in range(count - 1):
    rounds = [a | {b} for a in rounds for b in candidates]
  assert padded(found) == min(map(padded, rounds))


def test_rows_are_about_equally_long():
  rng = np.random.default_rng(0)
  made = [packing.Unit([1], [[2] * int(n)], {}, {}) for n in rng.integers(20, 90, 64)]
  sizes = [sum(unit.size for unit in row) for row in packing.spread(made, 4)]
  assert max(sizes) - min(sizes) <= 20


def shared_prompts(pairs):
  return [Pair(p.chosen, TokenRow(p.chosen.prompt_ids, p.rejected.response_ids), p.chosen_ref,
               p.rejected_ref, p.weight) for p in pairs]


PAIRS = shared_prompts(tiny.random_pairs(8))
LABELLED = [LabelledRow(p.chosen, n % 2 == 0, p.rejected, p.chosen_ref, p.rejected_ref)
            for n, p in enumerate(PAIRS)]
WEAK = [WeakRow(p.chosen, p.chosen_ref, [-x for x in p.chosen_ref]) for p in PAIRS]
POLICY = tiny.POLICY
DPO = {'dpo': (1.0, {'beta': 0.1})}
# name -> (rows, padded collation, unit, objective)
CASES = {
    'sft': ([p.chosen for p in PAIRS], sequence_arrays, packing.sequence_unit,
            lambda: objectives.sft_objective(CONFIG, POLICY)),
    'dpo': (PAIRS, pair_arrays, packing.pair_unit,
            lambda: objectives.mixed_objective(DPO, CONFIG, POLICY)),
    'irpo, nll by token': (
        PAIRS, pair_arrays, packing.pair_unit, lambda: objectives.preference_objective(
            'irpo', {'beta': 0.1, 'alpha': 1.0, 'nll_reduction': 'token'}, CONFIG, POLICY)),
    'simpo': (PAIRS, pair_arrays, packing.pair_unit,
              lambda: objectives.preference_objective('simpo', {}, CONFIG, POLICY)),
    'aot': (PAIRS, pair_arrays, packing.pair_unit,
            lambda: objectives.preference_objective('aot', {}, CONFIG, POLICY)),
    'bco': (PAIRS, pair_arrays, packing.pair_unit,
            lambda: objectives.preference_objective('bco', {}, CONFIG, POLICY)),
    'wpo': (PAIRS, pair_arrays, packing.pair_unit, lambda: objectives.mixed_objective(
        DPO, CONFIG, POLICY, pair_options=PairOptions(wpo=True))),
    'moving reference': (PAIRS, pair_arrays, packing.pair_unit, lambda: objectives.mixed_objective(
        DPO, CONFIG, POLICY, moving=objectives.MovingReference(1, 0.5))),
    'kto': (LABELLED, labelled_arrays, packing.labelled_units,
            lambda: objectives.kto_objective({}, CONFIG, POLICY)),
    'wspo': (WEAK, weak_arrays, packing.weak_unit,
             lambda: objectives.wspo_objective({}, CONFIG, POLICY)),
}


@pytest.mark.parametrize('case', CASES)
def test_packed_rows_give_the_loss_and_the_gradients_of_padded_ones(case):
  """And so over micro-batches, and on devices that split rows, heads and lengths."""
  rows, collate, unit, make = CASES[case]
  objective = make()
  step = jax.jit(
      functools.partial(train_step, objective=objective, tx=tiny.MOMENTUM),
      static_argnames='micro_batches', compiler_options=QUICK)

  def take(batch, mesh, micro_batches=1):
    state = tiny.start_state(mesh, None)
    with jax.set_mesh(mesh):
      loss_state = objective.initial_state(state.params)
      state = dataclasses.replace(state, loss_state=loss_state)
      for _ in range(2):      # the second step has a reference that moved
        state, metrics = step(state, tiny.put_batch(batch, mesh), np.float32(0.1),
                              micro_batches=micro_batches)
    return jax.tree.map(np.asarray, (state.params, state.loss_state)), metrics

  one = tiny.one_device()
  expected, metrics = take(collate(rows, tiny.LENGTHS, PAD), one)
  setups = [(4, make_mesh(data=2, tensor=2, devices=jax.devices()[:4]), 2)]
  if case in ('dpo', 'kto'):
    setups += [(1, one, 1), (2, make_mesh(fsdp=2, tensor=2, sequence=2), 1)]
  for into, mesh, micro_batches in setups:
    (batch, *_), shapes = _packed(rows, unit, into, picks=mesh.shape['sequence'] == 1)
    found, packed_metrics = take(batch, mesh, micro_batches)
    assert len(shapes) == 1
    assert packed_metrics['row_finite'].all()
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
      np.testing.assert_allclose(a, b, atol=3e-6, rtol=2e-5)
    for name in metrics.keys() - {'padding', 'row_finite'}:
      np.testing.assert_allclose(packed_metrics[name].value(), metrics[name].value(),
                                 rtol=2e-4, atol=2e-5, err_msg=name)


def _packed(rows, unit, into, steps=1, picks=True):
  """Batches of all rows at once, in whatever order."""
  made = packing.pack_batches(
      rows, unit, batch_size=len(rows), seed=0, steps=steps, into=into, shapes=2, multiple=4,
      pad_id=PAD, picks=picks)
  return [made.batches[k] for k in range(steps)], made.shapes


def test_a_packed_batch_holds_the_rows_of_the_padded_one():
  rows = shared_prompts(tiny.random_pairs(10))
  options = dict(batch_size=4, seed=3)
  made = packing.pack_batches(
      rows, packing.pair_unit, **options, steps=7, into=1, shapes=2, multiple=4, pad_id=PAD)
  packed, shapes = made.batches, made.shapes
  padded = shuffled_batches(rows, **options, collate=functools.partial(
      pair_arrays, lengths=(24,), pad_id=PAD))
  assert 1 <= len(shapes) <= 2
  for k in range(7):
    assert sorted(packed[k]['weights'][packed[k]['weights'] > 0]) == sorted(padded[k]['weights'])
    assert packed[k]['mask'].sum() == padded[k]['mask'].sum()
    assert packed[k]['inputs'].shape in {(s[''].rows, s[''].length) for s in shapes}
    again = packed[k]
    assert all((again[name] == packed[k][name]).all() for name in again)
  held = sum((packed[k]['end'] > 0).sum() for k in range(7))
  assert made.filled == pytest.approx(held / sum(packed[k]['end'].size for k in range(7)))


@pytest.mark.parametrize(('pairs', 'rows', 'shapes'), [(8, 1, 6), (16, 1, 4), (128, 16, 2)])
def test_few_shapes_fill_95_percent_of_the_places_at_the_lengths_of_gsm8k(pairs, rows, shapes):
  made = packing_fill.packed(pairs, rows, shapes)
  assert len(made.shapes) <= shapes and made.filled >= 0.95, made


def test_responses_with_different_prompts_are_refused():
  pair = tiny.random_pairs(1)[0]
  with pytest.raises(InputError, match='different prompts.*--layout=padded'):
    packing.pair_unit(pair)


def test_rows_without_a_prompt_are_refused():
  unit = packing.Unit([], [[1]], {}, {})
  with pytest.raises(InputError, match='no prompt'):
    packing.packed_arrays([unit], packing.Shape(1, 4, 4, 1, 4, 1), PAD)


def test_a_shape_that_is_too_small_is_refused():
  unit = packing.Unit([1, 2], [[1, 2, 3]], {}, {})
  with pytest.raises(InputError, match='does not fit'):
    packing.packed_arrays([unit], packing.Shape(1, 3, 3, 1, 3, 1), PAD)
