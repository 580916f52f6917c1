"""Killed anywhere and resumed with what is missing: every (prompt, draw) once, the same samples."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxrl.runs.sample_log import open_log, read_log
from jaxrl.sampling.generate import generate
from jaxrl.sampling.requests import Request
from tests.tiny_engine import MAX_PROMPT, build, config, run
from tests.tiny_model import CONFIG

HEADER = {'model': 'tiny', 'seed': 5}
TEXTS = ['abcde'[token % 5] for token in range(CONFIG.vocab_size)]
SETTINGS = {'stop_ids': (10, 11, 12), 'stop_strings': ('ba', 'cad'), 'presence_penalty': 0.5}


def text_of(ids):
  return ''.join(TEXTS[token] for token in ids)


@pytest.fixture(scope='module')
def engines():
  """Two machines that a job may land on, of other sizes."""
  return [build(sizes, decode_text=text_of, **SETTINGS)
          for sizes in (config(4, cadence=2), config(7, cadence=5, prefill_tokens=4))]


prompts = st.lists(
    st.lists(st.integers(0, CONFIG.vocab_size - 1), min_size=1, max_size=MAX_PROMPT).map(tuple),
    min_size=1, max_size=5)
attempts = st.lists(st.tuples(
    st.integers(0, 1),                          # on which machine
    st.integers(0, 12),                         # samples until the kill
    st.integers(1, 4),                          # samples written at a time
    st.floats(0, 1),                            # where the kill cuts the file
), max_size=4)


def requests_of(prompts, draws, temperature):
  """By (prompt id, draw); prompts may be the same text under two ids."""
  return {(f'p{n}', draw): Request(n, draw, ids, temperature)
          for n, ids in enumerate(prompts) for draw in range(draws)}


def resume(built, wanted, path, samples=None, together=1):
  """Draws what the file does not have; ends as a kill does after so many samples."""
  engine, params = built
  with open_log(path, HEADER) as log:
    missing = {name: r for name, r in wanted.items() if name not in log}
    names, rows = [*missing], []
    stream = generate(engine, params, [*missing.values()], seed=5)
    for sample in stream:
      if samples is not None and samples == 0:
        break
      samples = None if samples is None else samples - 1
      prompt_id, index = names[sample.request]
      rows.append({'prompt_id': prompt_id, 'sample_index': index} | answer(sample))
      if len(rows) == together:
        log.append(rows)
        rows = []
    else:
      log.append(rows)
    stream.close()              # what is in flight, and not yet written, is lost


def answer(sample):
  return {'ids': sample.response_ids, 'logprobs': sample.logprobs, 'reason': sample.finish_reason}


@settings(max_examples=20, deadline=None)
@given(prompts=prompts, draws=st.integers(1, 4), temperature=st.sampled_from([0.0, 1.0, 2.0]),
       attempts=attempts)
def test_every_pair_is_there_once_after_any_kills(
    engines, tmp_path_factory, prompts, draws, temperature, attempts):
  """Machines of other sizes take turns; a kill loses what was in flight and tears the file."""
  path = tmp_path_factory.mktemp('log') / 'samples.jsonl'
  wanted = requests_of(prompts, draws, temperature)
  for machine, samples, together, share in attempts:
    resume(engines[machine], wanted, path, samples, together)
    written = path.read_bytes()
    path.write_bytes(written[:round(share * len(written))])
  resume(engines[0], wanted, path)
  rows = list(read_log(path))
  names = [(row['prompt_id'], row['sample_index']) for row in rows]
  assert sorted(names) == sorted(wanted)
  uninterrupted = run(engines[1], [*wanted.values()], seed=5)
  expected = dict(zip(wanted, map(answer, uninterrupted), strict=True))
  for name, row in zip(names, rows, strict=True):
    assert row['ids'] == expected[name]['ids'] and row['reason'] == expected[name]['reason']
    assert row['logprobs'] == pytest.approx(expected[name]['logprobs'], rel=1e-5, abs=1e-5)


def test_a_resumed_engine_begins_anew(engines):
  """Closing the stream leaves nothing behind: the next call draws as if it were the first."""
  engine, params = engines[0]
  requests = [*requests_of([(1, 2), (3,), (4, 5, 6)], 4, 1.0).values()]
  expected = run(engines[0], requests)
  for samples in (1, 3, 7):
    stream = generate(engine, params, requests, seed=0)
    for _ in range(samples):
      next(stream)
    stream.close()
  assert run(engines[0], requests) == expected
