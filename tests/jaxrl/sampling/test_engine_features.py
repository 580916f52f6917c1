"""Every setting of sampling, against a loop over whole forward passes in numpy."""

import dataclasses

import numpy as np
import pytest

from jaxrl.sampling.generate import generate
from jaxrl.sampling.requests import Request
from tests.tiny_engine import (
    EOS,
    MAX_NEW,
    build,
    check_against_naive,
    config,
    random_requests,
    run,
)
from tests.tiny_model import CONFIG

BANNED = (7, 30, 3)
BIASES = ((5, 2.0), (6, -3.0), *((token, -np.inf) for token in BANNED))
STOPS = (10, 11, 12, 20, 21)
SETTINGS = {
    'repetition': {'repetition_penalty': 1.4},
    'presence': {'presence_penalty': 1.5},
    'rewarded_repetition': {'repetition_penalty': 0.7, 'presence_penalty': -1.0},
    'biases_and_bans': {'logit_bias': BIASES},
    'stop_ids': {'stop_ids': STOPS},
    'min_new_tokens': {'min_new_tokens': 4, 'stop_ids': STOPS},
    'forced_ids': {'forced_ids': (4, 8, 4)},
    'top_k_top_p_min_p': {'top_k': 12, 'top_p': 0.8, 'min_p': 0.05},
    'all_at_once': {
        'repetition_penalty': 1.4, 'presence_penalty': 1.5, 'logit_bias': BIASES,
        'stop_ids': STOPS, 'min_new_tokens': 3, 'forced_ids': (4, 8), 'top_p': 0.9, 'top_k': 40},
}


def mixed_requests(count=20):
  """Greedy and warm draws; some prompts repeat a token, and all refill the slots more than once."""
  rng = np.random.default_rng(1)
  requests = random_requests(rng, count)
  return [dataclasses.replace(r, prompt_ids=(r.prompt_ids * 2)[:8]) if r.key % 4 == 0 else r
          for r in requests]


@pytest.fixture(scope='module')
def plain():
  return build()


@pytest.mark.parametrize('name', SETTINGS)
def test_a_setting_does_what_numpy_says(plain, name):
  requests = mixed_requests()
  found = check_against_naive(build(**SETTINGS[name]), requests)
  without = run(plain, requests)
  assert sum(a.response_ids != b.response_ids for a, b in zip(found, without, strict=True)) > 2
  ids = [s.response_ids for s in found]
  settings = SETTINGS[name]
  ends = {*EOS, *settings.get('stop_ids', ())}
  forced = settings.get('forced_ids', ())
  for response in ids:
    assert tuple(response[:len(forced)]) == forced
    assert not ends & {*response[:max(len(response) - 1, settings.get('min_new_tokens', 0))]}
    assert 'logit_bias' not in settings or not {*BANNED} & {*response}
  reasons = {s.finish_reason for s in found}
  assert reasons >= ({'stop', 'length'} if 'stop_ids' in settings else {'eos', 'length'})


def test_each_request_has_its_own_most_tokens(plain):
  requests = [dataclasses.replace(r, max_new_tokens=most) for r, most in zip(
      mixed_requests(28), [*range(1, MAX_NEW + 1), None] * 4, strict=True)]
  samples = check_against_naive(plain, requests)
  reached = {r.max_new_tokens for r, s in zip(requests, samples, strict=True)
             if s.finish_reason == 'length'}
  assert reached == {*range(1, MAX_NEW + 1), None}


def test_samples_say_what_they_came_from(plain):
  requests = [Request(2**32 - 1, 5, (1, 2), 1.0), Request(3, 2**32 - 1, (4,), 0.0)]
  for request, sample in zip(requests, run(plain, requests, seed=9, step=40), strict=True):
    assert (sample.seed, sample.key, sample.draw, sample.step) == (
        9, request.key, request.draw, 40)


TEXTS = [['a', 'b', 'ba', 'c', ' a'][token % 5] for token in range(CONFIG.vocab_size)]


def text_of(ids):
  return ''.join(TEXTS[token] for token in ids)


def stopping(slots, cadence, shrink=False):
  sizes = config(slots, cadence=cadence, shrink=shrink)
  return build(sizes, max_new_tokens=16, decode_text=text_of,
               stop_strings=('abc', 'ca c', 'bab'))


@pytest.mark.parametrize(
    ('slots', 'cadence', 'shrink'), [(6, 1, False), (6, 5, False), (32, 3, True)])
def test_stop_strings_end_at_the_token_that_completes_one(slots, cadence, shrink):
  """On text across tokens; whether the host looks after each token or when a few are too many."""
  built = stopping(slots, cadence, shrink)
  requests = mixed_requests(30 + slots)
  samples = check_against_naive(built, requests)
  stopped = [s for s in samples if s.finish_reason == 'stop']
  assert {s.finish_reason for s in samples} == {'eos', 'stop', 'length'}
  assert (built[0].halve._cache_size() > 0) == shrink
  assert {len(s.response_ids) for s in stopped} > {2, 3, 4}
  for sample in stopped:
    before = text_of(sample.response_ids[:-1])
    assert not any(stop in before for stop in built[0].sampling.stop_strings)


def test_what_has_stopped_is_decoded_no_longer():
  """The host sees a stop string, and takes the slot from the device before the next steps."""
  # As many slots as requests: what is busy on the device is what has not been answered.
  (engine, params), requests, answered = stopping(30, 2), mixed_requests(30), 0
  busy = []

  def decode(params, slots, *others):
    busy.append(int(slots.busy.sum()))
    assert busy[-1] <= len(requests) - answered
    return engine.decode(params, slots, *others)

  for _ in generate(dataclasses.replace(engine, decode=decode), params, requests, seed=0):
    answered += 1
  assert answered == len(requests) and busy[0] == 30
