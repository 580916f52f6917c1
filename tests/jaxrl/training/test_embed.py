"""Embeddings of responses: means over a plain forward pass, whatever stands beside a row."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl.data.batches import TokenRow
from jaxrl.errors import InputError
from jaxrl.models.decoder import forward
from jaxrl.models.params import param_shardings
from jaxrl.parallel.mesh import make_mesh
from jaxrl.runs.process import count_programs
from jaxrl.training.embed import embed_rows
from tests import tiny_training as tiny
from tests.tiny_model import CONFIG, random_params


def rows(count=9):
  rng = np.random.default_rng(0)
  return [tiny.random_row(rng) for _ in range(count)]


def embed(rows, *, lengths=(16,), batch_size=8, pad_id=0, mesh=None, **more):
  mesh = mesh or tiny.one_device()
  with jax.set_mesh(mesh):
    params = jax.device_put(random_params(), param_shardings(CONFIG, mesh))
    return embed_rows(params, rows, CONFIG, tiny.POLICY, mesh=mesh, lengths=lengths,
                      batch_size=batch_size, pad_id=pad_id, **more)


def assert_same(found, expected):
  assert found.shape == (len(expected), CONFIG.d_model) and found.dtype == np.float32
  np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


@pytest.fixture(scope='module')
def expected():
  """One row at a time: the states at the response ids themselves, not at the ids before them."""
  params = jax.tree.map(jnp.asarray, random_params())
  hidden = jax.jit(lambda ids: forward(params, ids[None], CONFIG)[0])
  out = []
  for row in rows():
    ids = np.zeros(20, np.int32)       # to compile once; what comes later is out of sight
    ids[:len(row)] = [*row.prompt_ids, *row.response_ids]
    mean = np.asarray(hidden(ids), np.float64)[len(row.prompt_ids):len(row)].mean(axis=0)
    out.append(mean / np.linalg.norm(mean))
  return np.array(out)


def test_means_of_a_plain_forward_pass(expected):
  found = embed(rows())
  assert_same(found, expected)
  np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-6)


def test_order_and_company_do_not_matter(expected):
  order = [3, 8, 3, 0, 1, 7, 6, 5, 4, 2, 3]
  assert_same(embed([rows()[n] for n in order]), expected[order])
  assert_same(embed([rows()[4]]), expected[[4]])
  assert embed([]).shape == (0, CONFIG.d_model)


def test_padding_and_devices_do_not_matter(expected):
  assert_same(embed(rows(), lengths=(6, 24), pad_id=13), expected)
  assert_same(embed(rows(), mesh=make_mesh(data=2, fsdp=2, tensor=2)), expected)


def test_a_row_that_just_fits_scoring_fits_here(expected):
  longest = max(len(row) for row in rows())
  assert_same(embed(rows(), lengths=(8, longest - 1)), expected)
  with pytest.raises(InputError, match=f'expected 1 to {longest - 1} ids; found {longest} ids'):
    embed(rows(), lengths=(longest - 2,))
  with pytest.raises(InputError, match='found 0 ids'):
    embed([TokenRow([], [])])


def test_a_response_without_ids_is_zero(expected):
  found = embed([TokenRow([1, 2], []), rows()[0]])
  assert_same(found, np.stack([np.zeros(CONFIG.d_model), expected[0]]))


def test_progress_and_programs():
  done = []
  embed(rows(9), on_rows=done.append)
  assert done == [8, 1]
  programs = count_programs()
  embed(rows(30)[20:])
  assert programs() == 0, 'a later call finds its programs compiled'
