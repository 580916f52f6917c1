"""The engine against a forward pass without a cache: tokens, log-probs, ends, frequencies."""

import dataclasses

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import special, stats

from jaxrl.data.batches import TokenRow
from jaxrl.sampling.requests import Request
from jaxrl.sampling.sizes import prompt_rows, prompt_widths, region_length
from jaxrl.training.logps import ComputePolicy
from jaxrl.training.score import score_rows
from tests.tiny_engine import (
  EOS,
  MAX_NEW,
  MAX_PROMPT,
  PAD,
  build,
  config,
  next_logits,
  one_device,
  random_requests,
  run,
)
from tests.tiny_model import CONFIG, random_params

TOP_K = 15


@pytest.fixture(scope='module')
def base():
  return build(config(slots=8))


@pytest.fixture(scope='module')
def one_token():
  return build(config(slots=64), max_new_tokens=1, top_k=TOP_K)


def test_greedy_is_the_argmax_of_the_forward_pass(base):
  requests = random_requests(np.random.default_rng(1), 20, temperature=0.0)
  for request, sample in zip(requests, run(base, requests), strict=True):
    ids, logps = list(request.prompt_ids), []
    while len(logps) < MAX_NEW and (not logps or ids[-1] not in EOS):
      logits = next_logits(ids)
      ids.append(int(np.argmax(logits)))
      logps.append(special.log_softmax(logits)[ids[-1]])
    assert sample.response_ids == ids[len(request.prompt_ids):]
    np.testing.assert_allclose(sample.logprobs, logps, rtol=1e-5, atol=1e-5)


def test_the_same_call_gives_the_same_bits(base):
  requests = random_requests(np.random.default_rng(3), 6, draws=3)
  assert run(base, requests) == run(base, requests)


def test_draws_keys_and_seeds_give_different_responses(base):
  prompt = (5, 6, 7)
  groups = (
      run(base, [Request(0, draw, prompt, 1.0) for draw in range(32)]),
      run(base, [Request(key, 0, prompt, 1.0) for key in range(32)]),
      [run(base, [Request(0, 0, prompt, 1.0)], seed=seed)[0] for seed in range(16)],
  )
  for group in groups:
    long = [tuple(s.response_ids) for s in group if len(s.response_ids) == MAX_NEW]
    assert len(long) > 4 and len(set(long)) == len(long)


def test_recorded_log_probs_are_those_the_trainer_computes(base):
  requests = random_requests(np.random.default_rng(4), 16, draws=2)
  samples = run(base, requests)
  mesh = one_device()
  with jax.set_mesh(mesh):
    scored = score_rows(
        random_params(), [TokenRow(r.prompt_ids, s.response_ids) for r, s in zip(
            requests, samples, strict=True)],
        CONFIG, ComputePolicy('float32', chunk=8), mesh=mesh, lengths=(16,), batch_size=32,
        pad_id=PAD)
  for sample, logps in zip(samples, scored, strict=True):
    np.testing.assert_allclose(sample.logprobs, logps, rtol=1e-5, atol=1e-5)


def check_ends(sample, max_new_tokens=MAX_NEW):
  """EOS is the last id where the reason says so, and nowhere else."""
  ids = sample.response_ids
  assert 1 <= len(ids) == len(sample.logprobs) <= max_new_tokens
  assert not set(ids[:-1]) & set(EOS)
  assert sample.finish_reason == ('eos' if ids[-1] in EOS else 'length')
  assert sample.finish_reason == 'eos' or len(ids) == max_new_tokens
  assert all(logp <= 0 for logp in sample.logprobs)


def test_finish_reasons(base):
  samples = run(base, random_requests(np.random.default_rng(5), 100, temperature=1.5))
  for sample in samples:
    check_ends(sample)
  ends = {(s.finish_reason, len(s.response_ids)) for s in samples}
  assert ends >= {('eos', 1), ('eos', MAX_NEW), ('length', MAX_NEW)}


def test_first_tokens_follow_the_filtered_softmax(one_token):
  """Many draws of one new token, over many refills of the slots, against the forward pass."""
  prompt, draws = (9, 2, 30, 4), 1500
  samples = run(one_token, [Request(7, draw, prompt, 0.8) for draw in range(draws)])
  for sample in samples:
    check_ends(sample, max_new_tokens=1)
  assert {s.finish_reason for s in samples} == {'eos', 'length'}
  logits = next_logits(prompt)
  kept = np.argsort(-logits)[:TOP_K]
  counts = np.bincount([s.response_ids[0] for s in samples], minlength=CONFIG.vocab_size)[kept]
  assert counts.sum() == draws, 'nothing outside of the top k was drawn'
  expected = draws * special.softmax(logits[kept] / 0.8)
  assert stats.chisquare(counts, expected).pvalue > 1e-3


@pytest.fixture
def compiled():
  """Seconds of every compilation so far."""
  seconds = []

  def listen(event, duration, **labels):
    if event == '/jax/core/compile/backend_compile_duration':
      seconds.append(duration)

  jax.monitoring.register_event_duration_secs_listener(listen)
  yield seconds
  jax.monitoring.unregister_event_duration_listener(listen)


def test_a_thousand_requests_compile_what_the_first_ones_did(compiled):
  """Whatever the lengths of prompts, with one and with up to four draws of each."""
  header = (7, 8, 9)
  sizes = config(16, cadence=4, prefill_tokens=8, prompt_multiple=2, chunk=4)
  built = build(sizes, max_prompt=14, header=header, max_new_tokens=3)
  engine, rng = built[0], np.random.default_rng(7)
  assert engine.compiled_programs() == 0

  def some(count, draws):
    return [dataclasses.replace(
        r, prompt_ids=(header + r.prompt_ids)[:14] if r.key % 3 == 0 else r.prompt_ids,
        max_new_tokens=int(rng.integers(1, 4)))
            for r in random_requests(rng, count, draws, longest=14)]

  for draws in (1, 4):
    run(built, some(30, draws), draws=draws)
  programs, readers_in_use = engine.compiled_programs(), 2
  assert programs == readers_in_use * (len(prompt_widths(13, engine.config)) + 4) + 1
  assert len(compiled) >= programs, 'they are counted'
  compiled.clear()
  answered = 0
  while answered < 1000:
    draws = int(rng.choice([1, 3, 4]))
    requests = some(int(rng.integers(1, 100)), draws)
    run(built, requests, draws=draws)
    answered += len(requests)
  assert engine.compiled_programs() == programs
  assert not compiled, 'nor did anything outside of the engine'


prompts = st.lists(st.integers(0, CONFIG.vocab_size - 1), min_size=1, max_size=MAX_PROMPT)
requests_strategy = st.lists(st.builds(
    Request, key=st.integers(0, 2**32 - 1), draw=st.integers(0, 2**31),
    prompt_ids=prompts.map(tuple),
    temperature=st.sampled_from([0.0, 0.5, 1.0, 3.0])), max_size=30)


@given(requests=requests_strategy, seed=st.integers(0, 2**32 - 1))
@settings(max_examples=25, deadline=None)
def test_every_request_is_answered_once(base, requests, seed):
  for sample in run(base, requests, seed):
    check_ends(sample)


@pytest.mark.parametrize(('longest', 'multiple', 'chunk', 'widths', 'length'), [
    (8, 4, 512, (4, 8), 8), (9, 4, 512, (4, 8, 16), 16), (3, 4, 512, (4,), 4), (0, 4, 512, (4,), 4),
    (8, 4, 8, (4, 8), 8), (9, 4, 8, (4, 8), 16), (17, 4, 8, (4, 8), 24), (9, 4, 6, (4, 6), 12),
    (9, 8, 2, (2,), 10)])
def test_prompts_are_padded_to_few_widths(longest, multiple, chunk, widths, length):
  sizes = config(prompt_multiple=multiple, chunk=chunk)
  assert prompt_widths(longest, sizes) == widths
  assert region_length(longest, sizes) == length


def test_rows_of_the_prompt_region():
  """Enough for full slots, twice over: prompts in their last draws hold theirs."""
  assert prompt_rows(64, 1) == 64
  assert prompt_rows(64, 8) == 17
  assert prompt_rows(4, 4) == 3
  assert prompt_rows(2, 2) == 2
