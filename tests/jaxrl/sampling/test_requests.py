"""What cannot be sampled is refused before anything is compiled, and costs nobody else a sample."""

import numpy as np
import pytest

from jaxrl.errors import InputError
from jaxrl.parallel.mesh import make_mesh
from jaxrl.sampling.generate import generate
from jaxrl.sampling.requests import Request, SamplingConfig, requests_for
from jaxrl.sampling.sizes import EngineConfig
from tests.tiny_engine import EOS, MAX_NEW, build, config, random_requests, run

INF, NAN = float('inf'), float('nan')


@pytest.mark.parametrize(('settings', 'message'), [
    ({'max_new_tokens': 0}, '--max_new_tokens: .*at least 1; found 0'),
    ({'top_p': -0.1}, r'--top_p: .*\[0, 1\]; found -0.1'),
    ({'top_p': 1.5}, '--top_p: .*found 1.5'),
    ({'top_p': NAN}, '--top_p: .*found nan'),
    ({'min_p': 1.1}, '--min_p: .*found 1.1'),
    ({'top_k': 0}, '--top_k: .*at least 1; found 0'),
    ({'min_new_tokens': 7}, '--min_new_tokens: .*--max_new_tokens=6; found 7'),
    ({'min_new_tokens': -1}, '--min_new_tokens: .*found -1'),
    ({'repetition_penalty': 0.0}, '--repetition_penalty: .*positive number; found 0'),
    ({'repetition_penalty': INF}, '--repetition_penalty: .*found inf'),
    ({'presence_penalty': NAN}, '--presence_penalty: .*finite number; found nan'),
    ({'logit_bias': ((1, 2.0), (1, 3.0))}, '--logit_bias: .*each token once'),
    ({'logit_bias': ((1, INF),)}, '--logit_bias: .*finite number or -inf'),
    ({'logit_bias': ((1, NAN),)}, '--logit_bias: .*finite number or -inf'),
    ({'stop_strings': ('a', '')}, "--stop: .*not empty; found ''"),
    ({'forced_ids': (1,) * 6}, '--forced_prefix: .*fewer than --max_new_tokens=6 tokens; found 6'),
    ({'forced_ids': (1, 2), 'stop_ids': (2,)}, r'--forced_prefix: .*stop_token_ids; found \[2\]'),
])
def test_settings_that_make_no_sense_are_refused(settings, message):
  with pytest.raises(InputError, match=message):
    SamplingConfig(**{'max_new_tokens': MAX_NEW} | settings)


@pytest.mark.parametrize(('changes', 'message'), [
    ({'sizes': config(slots=12), 'mesh': 8}, '--slots: .*multiple of 8; found 12'),
    ({'sizes': config(slots=0)}, '--slots: .*found 0'),
    ({'sizes': config(cadence=0)}, 'cadence: .*at least 1; found 0'),
    ({'sizes': config(prefill_tokens=0)}, 'prefill_tokens: .*found 0'),
    ({'sizes': EngineConfig(4, prompt_multiple=0)}, 'prompt_multiple: .*found 0'),
    ({'sizes': config(chunk=0)}, 'chunk: .*found 0'),
    ({'sizes': config(kv_cache='int4')}, "--kv_cache: .*'int8'; found int4"),
    ({'sizes': config(tensor=3), 'mesh': 8}, '--rollout_tensor: .*divisor of 8 devices; found 3'),
    ({'sizes': config(tensor=4), 'mesh': 8}, '--rollout_tensor.*: .*2 key heads .*; found 4'),
    ({'eos_ids': ()}, 'tokenizer: .*an EOS id; found none'),
    ({'max_prompt': 59}, r'--max_new_tokens: .*<= 64; found 59 \+ 6'),
    ({'header': (1,) * 8}, 'header: .*fewer than 8 ids; found 8'),
    ({'stop_strings': ('a',)}, '--stop: .*can decode; found none'),
    ({'stop_ids': (50,)}, '--stop_token_ids: .*0 to 49; found 50'),
    ({'forced_ids': (-1,)}, '--forced_prefix: .*0 to 49; found -1'),
    ({'forced_ids': (1, EOS[0])}, '--forced_prefix: .*no EOS id'),
    ({'logit_bias': ((50, 1.0),)}, '--logit_bias: .*0 to 49; found 50'),
    ({'logit_bias': tuple((token, -INF) for token in range(50))}, '--logit_bias: .*every token'),
    ({'logit_bias': tuple((token, -INF) for token in range(50) if token not in (*EOS, 9)),
      'stop_ids': (9,), 'min_new_tokens': 1}, '--logit_bias: .*every token .*--min_new_tokens'),
])
def test_engines_that_cannot_run_are_refused(changes, message):
  mesh = make_mesh() if changes.get('mesh') else None
  with pytest.raises(InputError, match=message):
    build(**changes | {'mesh': mesh})


BAD = {
    'empty': (Request(1, 0, (), 1.0), 'at least one id'),
    'long': (Request(1, 0, (1,) * 9, 1.0), 'at most 8 ids; found 9'),
    'unknown': (Request(1, 0, (1, 50), 1.0), 'ids from 0 to 49; found 1 to 50'),
    'negative': (Request(1, 0, (-1, 4), 1.0), 'ids from 0 to 49; found -1 to 4'),
    'cold': (Request(1, 0, (1,), -0.5), '>= 0; found -0.5'),
    'not_warm': (Request(1, 0, (1,), NAN), '>= 0; found nan'),
    'hot': (Request(1, 0, (1,), INF), '>= 0; found inf'),
    'key': (Request(2**32, 0, (1,), 1.0), 'key out of range.*found 4294967296'),
    'draw': (Request(1, -1, (1,), 1.0), 'draw out of range.*found -1'),
    'nothing': (Request(1, 0, (1,), 1.0, max_new_tokens=0), "from 3 to the engine's 6; found 0"),
    'forced': (Request(1, 0, (1,), 1.0, max_new_tokens=2), "from 3 to the engine's 6; found 2"),
    'much': (Request(1, 0, (1,), 1.0, max_new_tokens=7), "from 3 to the engine's 6; found 7"),
}


@pytest.fixture(scope='module')
def forcing():
  """With a forced prefix: a request for fewer tokens than that contradicts it."""
  return build(config(), forced_ids=(5, 6))


@pytest.mark.parametrize('kind', [list, iter])
@pytest.mark.parametrize('name', BAD)
def test_the_first_bad_request_is_an_error(name, kind):
  engine, params = build(forced_ids=(5, 6))
  bad, message = BAD[name]
  with pytest.raises(InputError, match=f'request 1: .*{message}'):
    list(generate(engine, params, kind([Request(0, 0, (1,), 1.0), bad]), seed=0))
  assert engine.compiled_programs() == 0


@pytest.mark.parametrize('kind', [list, iter])
def test_bad_requests_among_good_ones_lose_nobody(forcing, kind):
  engine, params = forcing
  good = random_requests(np.random.default_rng(1), 3 * len(BAD))
  expected = run(forcing, good)
  requests, places = [], []
  for n, (bad, _) in enumerate(BAD.values()):
    places += range(len(requests), len(requests) + 3)
    requests += [*good[3 * n:3 * n + 3], bad]
  refused = {}
  found = sorted(generate(engine, params, kind(requests), seed=0, on_refused=refused.__setitem__),
                 key=lambda s: s.request)
  assert [s.request for s in found] == places
  assert [s.response_ids for s in found] == [s.response_ids for s in expected]
  assert [*refused] == [n for n in range(len(requests)) if n not in places]
  for n, error in refused.items():
    assert str(error).startswith(f'request {n}: ')


def test_nothing_but_bad_requests_compiles_nothing():
  engine, params = build()
  refused = []
  requests = [Request(0, 0, (), 1.0)] * 3
  for kind in (list, iter):
    assert list(generate(
        engine, params, kind(requests), seed=0, on_refused=lambda n, e: refused.append(n))) == []
  assert list(generate(engine, params, [], seed=0)) == []
  assert refused == [0, 1, 2] * 2 and engine.compiled_programs() == 0


def test_requests_for():
  made = list(requests_for([[1, 2], [3]], 2, temperature=0.5, keys=[7, 8]))
  assert made == [Request(7, 0, (1, 2), 0.5), Request(7, 1, (1, 2), 0.5),
                  Request(8, 0, (3,), 0.5), Request(8, 1, (3,), 0.5)]


@pytest.mark.parametrize('n', [0, -1])
def test_no_draws_at_all_are_refused(n):
  with pytest.raises(InputError, match=f'--n: .*at least 1; found {n}'):
    list(requests_for([[1]], n, temperature=1.0, keys=[0]))
