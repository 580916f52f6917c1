"""Stored log-probs: those of a plain forward pass, whatever stands beside or after a row."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl.data.batches import TokenRow
from jaxrl.models.decoder import forward, output_matrix
from jaxrl.models.identity import identity as params_identity
from jaxrl.models.params import param_shardings
from jaxrl.parallel.mesh import make_mesh
from jaxrl.runs.process import count_programs
from jaxrl.training.score import identity, score_rows, score_stream
from tests import tiny_training as tiny
from tests.tiny_model import CONFIG, random_params


def rows(count=9):
  rng = np.random.default_rng(0)
  return [tiny.random_row(rng) for _ in range(count)]


def score(rows, *, lengths=(16,), batch_size=8, pad_id=0, mesh=None, **more):
  mesh = mesh or tiny.one_device()
  with jax.set_mesh(mesh):
    params = jax.device_put(random_params(), param_shardings(CONFIG, mesh))
    return score_rows(params, rows, CONFIG, tiny.POLICY, mesh=mesh, lengths=lengths,
                      batch_size=batch_size, pad_id=pad_id, **more)


def assert_same(found, expected):
  assert len(found) == len(expected)
  for a, b in zip(found, expected, strict=True):
    assert a.shape == b.shape and a.dtype == np.float32
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


@pytest.fixture(scope='module')
def expected():
  """One row at a time, without padding, through one whole softmax."""
  params = jax.tree.map(jnp.asarray, random_params())

  @jax.jit
  def logps(ids):
    hidden = forward(params, ids[None], CONFIG)
    return jax.nn.log_softmax(hidden[0] @ output_matrix(params, CONFIG))

  out = []
  for row in rows():
    ids = [*row.prompt_ids, *row.response_ids]
    padded = np.zeros(20, np.int32)       # to compile once; what comes later is out of sight
    padded[:len(ids)] = ids
    table = np.asarray(logps(padded))
    places = range(len(row.prompt_ids), len(ids))
    out.append(np.asarray([table[t - 1, ids[t]] for t in places], np.float32))
  return out


def test_log_probs_of_a_plain_forward_pass(expected):
  assert_same(score(rows()), expected)


def test_order_repeats_and_company_do_not_matter(expected):
  order = [3, 8, 3, 0, 1, 7, 6, 5, 4, 2, 3]
  assert_same(score([rows()[n] for n in order]), [expected[n] for n in order])
  assert_same(score([rows()[4]]), [expected[4]])
  assert score([]) == []


def test_padding_and_devices_do_not_matter(expected):
  assert_same(score(rows(), lengths=(6, 24), batch_size=8, pad_id=13), expected)
  assert_same(score(rows(), mesh=make_mesh(data=2, fsdp=2, tensor=2)), expected)


def test_a_response_without_ids_has_no_log_probs(expected):
  found = score([TokenRow([1, 2], []), rows()[0]])
  assert_same(found, [np.zeros(0, np.float32), expected[0]])


def test_progress_and_programs():
  done = []
  score(rows(9), on_rows=done.append)
  assert done == [8, 1]
  programs = count_programs()
  score(rows(30)[20:])
  assert programs() == 0, 'a later call finds its programs compiled'


def test_identity_changes_with_everything_the_log_probs_depend_on():
  base = [TokenRow([1, 2], [3, 4]), TokenRow([5], [6])]
  bfloat16 = dataclasses.replace(tiny.POLICY, dtype='bfloat16')
  variants = [
      identity('m', base, tiny.POLICY),
      identity('other', base, tiny.POLICY),
      identity('m', base, bfloat16),
      identity('m', base[:1], tiny.POLICY),
      identity('m', [], tiny.POLICY),
      identity('m', base[::-1], tiny.POLICY),
      identity('m', [base[0], TokenRow([5, 6], [])], tiny.POLICY),
      identity('m', [TokenRow([1], [2, 3, 4]), base[1]], tiny.POLICY),
      identity('m', [TokenRow([1, 2, 3], [4]), base[1]], tiny.POLICY),
      # The ids of the second row, and the lengths before it, at the end of the first response.
      identity('m', [TokenRow([1, 2], [3, 4, 1, 5, 6])], tiny.POLICY),
      identity('m', [TokenRow([1, 2], [3, 4, 1, 1, 5, 6])], tiny.POLICY),
  ]
  for n, row in enumerate(base):
    for side in ('prompt_ids', 'response_ids'):
      for place in range(len(getattr(row, side))):
        changed = list(getattr(row, side))
        changed[place] += 1
        others = [dataclasses.replace(row, **{side: changed}) if m == n else r
                  for m, r in enumerate(base)]
        variants.append(identity('m', others, tiny.POLICY))
  assert len(set(variants)) == len(variants)
  same = [TokenRow(tuple(r.prompt_ids), np.asarray(r.response_ids)) for r in base]
  assert identity('m', same, tiny.POLICY) == variants[0]


def test_the_identity_of_parameters_changes_with_any_of_them():
  params = random_params()
  seen = {params_identity(params), params_identity(jax.tree.map(
      lambda x: x.astype(jnp.bfloat16), params))}
  leaves, tree = jax.tree.flatten(params)
  for n, leaf in enumerate(leaves):
    changed = leaf.copy()
    changed.flat[-1] = np.nextafter(changed.flat[-1], np.float32(9))
    seen.add(params_identity(jax.tree.unflatten(tree, [*leaves[:n], changed, *leaves[n + 1:]])))
  assert len(seen) == len(leaves) + 2
  assert params_identity(jax.tree.map(jnp.asarray, params)) == params_identity(params)


def test_a_stream_gives_the_same_a_window_at_a_time(expected):
  taken = []

  def source():
    for row in rows():
      taken.append(row)
      yield row

  mesh = tiny.one_device()
  with jax.set_mesh(mesh):
    params = jax.device_put(random_params(), param_shardings(CONFIG, mesh))
    stream = score_stream(params, source(), CONFIG, tiny.POLICY, window=4, mesh=mesh, lengths=(16,),
                          batch_size=8, pad_id=0)
    first = next(stream)
    assert len(taken) == 4
    assert_same([first, *stream], expected)
