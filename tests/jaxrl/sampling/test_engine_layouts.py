"""The same requests give the same tokens wherever, whenever and beside whomever they are drawn."""

import dataclasses

import jax
import numpy as np
import pytest

from jaxrl.parallel.mesh import make_mesh
from jaxrl.sampling.generate import generate
from tests.tiny_engine import (
    MAX_NEW,
    MAX_PROMPT,
    build,
    check_against_naive,
    config,
    random_requests,
    run,
)
from tests.tiny_model import CONFIG

FILTERS = {'top_p': 0.95, 'repetition_penalty': 1.1}     # one that sums, one that remembers
CHUNKED = {'prompt_multiple': 2, 'chunk': 2}
HEADER = (7, 8, 9)
LAYOUTS = {
    'one_slot': lambda: build(config(1, cadence=1, prefill_tokens=1), **FILTERS),
    'slots_and_cadence': lambda: build(config(5, cadence=16, prefill_tokens=56), **FILTERS),
    'chunks': lambda: build(config(6, **CHUNKED), **FILTERS),
    'header': lambda: build(config(7), header=HEADER, **FILTERS),
    'eight_parts': lambda: build(config(16), make_mesh(), **FILTERS),
    'shrinking': lambda: build(
        config(32, cadence=1, shrink=True), make_mesh(devices=jax.devices()[:2]), **FILTERS),
    'tensor_of_training': lambda: build(
        config(16, cadence=2, prefill_tokens=4), make_mesh(data=2, fsdp=2, tensor=2), **FILTERS),
    'tensor_of_its_own': lambda: build(
        config(4, tensor=2, **CHUNKED), make_mesh(devices=jax.devices()[:4]), header=HEADER,
        **FILTERS),
}


@pytest.fixture(scope='module')
def base():
  return build(config(slots=8), **FILTERS)


def requests_of(rng, count=12, draws=3):
  """Random prompts, half of them after the header that some layouts have, of any length."""
  return [dataclasses.replace(
      r, prompt_ids=(HEADER * (r.key % 2) + r.prompt_ids)[:MAX_PROMPT],
      max_new_tokens=int(rng.integers(1, MAX_NEW + 1)))
          for r in random_requests(rng, count, draws=draws)]


@pytest.fixture(scope='module')
def answered(base):
  """(requests, their samples)."""
  requests = requests_of(np.random.default_rng(2))
  return requests, run(base, requests)


def assert_same(found, expected):
  assert [(s.response_ids, s.finish_reason) for s in found] == [
      (s.response_ids, s.finish_reason) for s in expected]
  for one, other in zip(found, expected, strict=True):
    np.testing.assert_allclose(one.logprobs, other.logprobs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('layout', LAYOUTS)
def test_slots_cadence_chunks_headers_and_devices_do_not_matter(answered, layout):
  """Nor does the order or the company."""
  requests, expected = answered
  rng = np.random.default_rng(3)
  order, strangers = rng.permutation(len(requests)), random_requests(rng, 4, temperature=1.0)
  found = run(LAYOUTS[layout](), strangers + [requests[n] for n in order])[len(strangers):]
  assert_same(found, [expected[n] for n in order])


def test_draws_alone_are_those_drawn_together(base, answered):
  requests, expected = answered
  assert_same([run(base, [request])[0] for request in requests], expected)


@pytest.mark.parametrize('draws', [None, 3])
def test_an_iterator_gives_what_a_list_gives(base, answered, draws):
  engine, params = base
  requests, expected = answered
  found = sorted(generate(engine, params, iter(requests), seed=0, draws=draws),
                 key=lambda s: s.request)
  assert_same(found, expected)


def test_an_iterator_is_read_as_slots_become_free(base):
  """Not all of it before the first sample, and requests may be without end."""
  engine, params = base
  read = 0

  def endless():
    nonlocal read
    rng = np.random.default_rng(4)
    while True:
      read += 1
      yield from random_requests(rng, 1, temperature=1.0)

  samples = generate(engine, params, endless(), seed=0)
  seen = sorted(next(samples).request for _ in range(100))
  samples.close()
  assert len(set(seen)) == 100
  assert read < 100 + 6 * engine.config.slots


def test_hints_of_lengths_change_the_order_alone(base, answered):
  requests, expected = answered
  guessed = [dataclasses.replace(r, expected_tokens=n % 5) for n, r in enumerate(requests)]
  assert_same(run(base, guessed), expected)


def test_a_vocabulary_that_does_not_divide_stays_whole():
  """Over two devices that share the parameters."""
  model = dataclasses.replace(CONFIG, vocab_size=51, tie_embeddings=True, qk_norm='width')
  split = build(config(4, tensor=2), make_mesh(devices=jax.devices()[:2]), model=model)
  check_against_naive(split, random_requests(np.random.default_rng(5), 6))


def test_shrinking_compiles_for_each_number_of_slots_once():
  """32 slots go on as 16 and then as 8."""
  engine, _ = built = build(config(32, cadence=1, shrink=True))
  programs = []
  for seed in range(3):
    requests = random_requests(np.random.default_rng(seed), 33, temperature=1.0)
    run(built, [dataclasses.replace(r, max_new_tokens=n % 6 + 1) for n, r in enumerate(requests)])
    programs.append(engine.compiled_programs())
  assert (engine.halve._cache_size(), engine.decode._cache_size()) == (2, 3)
  assert programs == programs[:1] * 3
