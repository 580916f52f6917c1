"""The engine against a forward pass without a cache, and against itself laid out otherwise."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import special, stats

from jaxrl.data.batches import TokenRow
from jaxrl.errors import InputError
from jaxrl.models.decoder import forward, output_matrix
from jaxrl.parallel.mesh import make_mesh
from jaxrl.sampling.engine import EngineConfig, make_engine, prompt_widths
from jaxrl.sampling.generate import engine_params, generate
from jaxrl.sampling.requests import Request, SamplingConfig
from jaxrl.training.logps import ComputePolicy
from jaxrl.training.score import score_rows
from tests.tiny_model import CONFIG, random_params

EOS = (3, 17, 41)
MAX_PROMPT, MAX_NEW = 8, 6
PAD = 0
TOP_K = 15


def one_device():
  return make_mesh(devices=jax.devices()[:1])


def build(config, mesh=None, *, max_new_tokens=MAX_NEW, **filters):
  """(engine, its parameters)."""
  mesh = mesh or one_device()
  engine = make_engine(
      CONFIG, SamplingConfig(max_new_tokens, **filters), config, mesh, max_prompt=MAX_PROMPT,
      eos_ids=EOS, pad_id=PAD)
  return engine, engine_params(engine, random_params())


def config(slots, cadence=3, prefill_tokens=16, **others):
  return EngineConfig(
      slots, cadence, prefill_tokens, prompt_multiple=4, dtype='float32', **others)


@pytest.fixture(scope='module')
def base():
  return build(config(slots=8))


@pytest.fixture(scope='module')
def one_token():
  return build(config(slots=64), max_new_tokens=1, top_k=TOP_K)


def run(built, requests, seed=0):
  """Samples in the order of the requests; each is answered exactly once."""
  engine, params = built
  samples = sorted(generate(engine, params, requests, seed=seed), key=lambda s: s.request)
  assert [s.request for s in samples] == list(range(len(requests)))
  return samples


def random_requests(rng, count, draws=1, temperature=None):
  """`count` prompts of 1 to MAX_PROMPT ids, `draws` of each."""
  made = []
  for key in range(count):
    ids = tuple(rng.integers(0, CONFIG.vocab_size, rng.integers(1, MAX_PROMPT + 1)).tolist())
    t = rng.choice([0.0, 0.7, 1.0, 1.5]) if temperature is None else temperature
    made += [Request(key, draw, ids, float(t)) for draw in range(draws)]
  return made


@functools.cache
def next_logits():
  """(ids padded to a fixed length, index) -> logits of the next token, by a whole forward."""
  params = jax.tree.map(jnp.asarray, random_params())

  @jax.jit
  def logits(ids, last):
    hidden = forward(params, ids[None], CONFIG)
    return hidden[0, last] @ output_matrix(params, CONFIG)

  def of(ids):
    padded = np.zeros(MAX_PROMPT + MAX_NEW, np.int32)
    padded[:len(ids)] = ids
    return logits(jnp.asarray(padded), jnp.int32(len(ids) - 1))

  return of


def test_greedy_is_the_argmax_of_the_forward_pass(base):
  requests = random_requests(np.random.default_rng(1), 20, temperature=0.0)
  for request, sample in zip(requests, run(base, requests), strict=True):
    ids, logps = list(request.prompt_ids), []
    while len(logps) < MAX_NEW and (not logps or ids[-1] not in EOS):
      logits = next_logits()(ids)
      ids.append(int(jnp.argmax(logits)))
      logps.append(float(jax.nn.log_softmax(logits)[ids[-1]]))
    assert sample.response_ids == ids[len(request.prompt_ids):]
    np.testing.assert_allclose(sample.logprobs, logps, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('layout', ['slots', 'mesh'])
def test_samples_do_not_depend_on_where_and_when_they_are_drawn(base, layout):
  """Other slots, cadence, prefill, order, company and devices: the same tokens."""
  other = {
      'slots': lambda: build(config(slots=5, cadence=16, prefill_tokens=56)),
      'mesh': lambda: build(config(slots=16, cadence=2, prefill_tokens=4),
                            make_mesh(data=2, fsdp=2, tensor=2)),
  }[layout]()
  rng = np.random.default_rng(2)
  requests = random_requests(rng, 12, draws=3)
  expected = run(base, requests)
  order = rng.permutation(len(requests))
  strangers = random_requests(rng, 4, temperature=1.0)
  found = run(other, strangers + [requests[n] for n in order])[len(strangers):]
  for n, sample in zip(order, found, strict=True):
    assert sample.response_ids == expected[n].response_ids
    assert sample.finish_reason == expected[n].finish_reason
    np.testing.assert_allclose(sample.logprobs, expected[n].logprobs, rtol=1e-5, atol=1e-5)


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
  logits = np.asarray(next_logits()(prompt), np.float64)
  kept = np.argsort(-logits)[:TOP_K]
  counts = np.bincount([s.response_ids[0] for s in samples], minlength=CONFIG.vocab_size)[kept]
  assert counts.sum() == draws, 'nothing outside of the top k was drawn'
  expected = draws * special.softmax(logits[kept] / 0.8)
  assert stats.chisquare(counts, expected).pvalue > 1e-3


def test_programs_do_not_grow_with_the_requests(base):
  engine, _ = base
  rng = np.random.default_rng(7)
  run(base, random_requests(rng, 20))
  programs = engine.compiled_programs()
  assert programs <= len(prompt_widths(MAX_PROMPT, engine.config)) + 3
  for count in (1, 7, 8, 9, 100, 150):
    run(base, random_requests(rng, count, draws=int(rng.integers(1, 3))))
  assert engine.compiled_programs() == programs


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


def test_prompt_widths():
  assert prompt_widths(8, 4) == (4, 8)
  assert prompt_widths(9, 4) == (4, 8, 16)
  assert prompt_widths(3, 4) == (4,)


@pytest.mark.parametrize(('changes', 'message'), [
    ({'config': config(slots=12), 'mesh': 8}, '--slots: .*multiple of 8; found 12'),
    ({'config': config(slots=0)}, '--slots: .*found 0'),
    ({'config': config(slots=4, cadence=0)}, 'cadence: .*at least 1; found 0'),
    ({'config': config(slots=4, prefill_tokens=0)}, 'prefill_tokens: .*found 0'),
    ({'config': EngineConfig(4, prompt_multiple=0)}, 'prompt_multiple: .*found 0'),
    ({'eos_ids': ()}, 'tokenizer: .*an EOS id; found none'),
    ({'max_prompt': 59}, r'--max_new_tokens: .*<= 64; found 59 \+ 6'),
])
def test_what_cannot_run_is_refused_when_the_engine_is_made(changes, message):
  arguments = {'config': config(slots=4), 'max_prompt': 58, 'eos_ids': EOS, 'pad_id': PAD} | changes
  mesh = make_mesh() if arguments.pop('mesh', 1) == 8 else one_device()
  with pytest.raises(InputError, match=message):
    make_engine(CONFIG, SamplingConfig(MAX_NEW), mesh=mesh, **arguments)


@pytest.mark.parametrize(('prompt', 'temperature', 'message'), [
    ((), 1.0, 'request 1: .*at least one id'),
    ((1,) * 9, 1.0, 'request 1: .*at most 8 ids; found 9'),
    ((1,), -0.5, 'request 1: .*>= 0; found -0.5'),
    ((1,), float('nan'), 'request 1: .*>= 0; found nan'),
])
def test_bad_requests_are_refused_before_anything_is_compiled(prompt, temperature, message):
  engine, params = build(config(slots=4))
  requests = [Request(0, 0, (1,), 1.0), Request(1, 0, prompt, temperature)]
  with pytest.raises(InputError, match=message):
    list(generate(engine, params, requests, seed=0))
  assert engine.compiled_programs() == 0
