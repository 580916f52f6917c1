"""The sample stage keeps samples as they come, and goes on from whole ones and nothing else."""

import itertools
import json
import types

import pytest

from jaxrl.errors import InputError
from jaxrl.runs import sample_stage, tables
from jaxrl.runs.folder import open_run
from jaxrl.runs.metrics import MetricsLog, read_metrics
from jaxrl.runs.progress import Progress
from jaxrl.runs.sample_stage import Draws
from jaxrl.runs.session import Session
from jaxrl.sampling.requests import Sample, SamplingConfig
from jaxrl.tokens.prompts import EncodedPrompt

DRAWS = Draws(count=2, temperature=1.0, seed=0)
MODEL = types.SimpleNamespace(params={}, identity='m')
ENGINE = types.SimpleNamespace(
    config=types.SimpleNamespace(dtype='float32'), sampling=SamplingConfig(4))
OUTPUT = 'iteration_01/samples.parquet'
DRAWN = 'iteration_01/samples.partial/drawn.jsonl'


def prompts(*texts):
  return [EncodedPrompt(str(n), text, tuple(map(ord, text))) for n, text in enumerate(texts)]


PROMPTS = prompts('a', 'bc', 'd', 'e', 'f')


@pytest.fixture
def drawn(monkeypatch):
  """(prompt ids, draw) in the order drawn; a count under 'die' ends an attempt after so many."""
  seen = types.SimpleNamespace(asked=[], die=None, expected=[])

  def generate(engine, params, requests, *, seed, draws=None):
    seen.expected = [request.expected_tokens for request in requests]
    for n in reversed(range(len(requests))):          # completion order is any order
      if seen.die == len(seen.asked):
        raise KeyboardInterrupt
      request = requests[n]
      seen.asked.append((request.prompt_ids, request.draw))
      yield Sample(n, [*request.prompt_ids, request.draw], [-0.1] * (len(request.prompt_ids) + 1),
                   'eos', seed, request.key, request.draw, None)

  monkeypatch.setattr(sample_stage, 'generate', generate)
  monkeypatch.setattr(sample_stage, 'engine_params', lambda engine, params: params)
  monkeypatch.setattr(sample_stage, 'decode', lambda tokenizer, ids: ' '.join(map(str, ids)))
  return seen


def attempt(folder, asked=PROMPTS, draws=DRAWS, iteration=1):
  with open_run(folder, flags={}, versions={}) as run:
    with MetricsLog(run.folder / 'metrics.jsonl') as metrics:
      session = Session(run, metrics, Progress(), None, None, None, None, 0, lambda: 0)
      sample_stage.sample_stage(session, iteration, ENGINE, MODEL, asked, draws)
  return tables.read_table(folder / OUTPUT, tables.SAMPLES)


def interrupt(folder, drawn, after=3):
  drawn.die = after
  with pytest.raises(KeyboardInterrupt):
    attempt(folder)
  assert len(drawn.asked) == after
  drawn.asked, drawn.die = [], None
  return folder / DRAWN


def test_rows_stand_in_order_whatever_the_order_of_completion(tmp_path, drawn):
  rows = attempt(tmp_path).to_pylist()
  assert [(r['prompt_id'], r['sample_index']) for r in rows] == [
      (str(n), draw) for n in range(5) for draw in range(2)]
  for row in rows:
    assert row['response_ids'] == [*row['prompt_ids'], row['sample_index']]
    assert row['response'] == ' '.join(map(str, row['response_ids']))
    assert row['source_model'] == 'm' and row['iteration'] == 1 and row['temperature'] == 1.0


def test_only_what_is_missing_is_drawn_again(tmp_path, drawn):
  whole = attempt(tmp_path / 'whole')
  drawn.asked = []
  interrupt(tmp_path / 'cut', drawn)
  assert attempt(tmp_path / 'cut').equals(whole)
  assert len(drawn.asked) == 7
  assert (tmp_path / 'cut' / OUTPUT).read_bytes() == (tmp_path / 'whole' / OUTPUT).read_bytes()
  assert not (tmp_path / 'cut' / DRAWN).exists()


def test_a_torn_last_line_is_said_and_drawn_again(tmp_path, drawn, capsys):
  log = interrupt(tmp_path, drawn)
  log.write_bytes(log.read_bytes()[:-9])
  attempt(tmp_path)
  assert len(drawn.asked) == 8
  assert 'the last line was cut short' in capsys.readouterr().out


def test_a_damaged_line_is_named(tmp_path, drawn):
  log = interrupt(tmp_path, drawn)
  lines = log.read_text().splitlines(keepends=True)
  log.write_text(''.join([lines[0], '{"prompt_id"\n', *lines[2:]]))
  with pytest.raises(InputError, match=f'{log}, line 2: the line is damaged'):
    attempt(tmp_path)


@pytest.mark.parametrize(('asked', 'draws', 'field'), [
    (prompts('a', 'xy', 'd', 'e', 'f'), DRAWS, 'prompts'),
    (PROMPTS[:4], DRAWS, 'prompts'),
    (PROMPTS, Draws(count=3, temperature=1.0, seed=0), 'temperatures'),
    (PROMPTS, Draws(count=2, temperature=1.0, seed=1), 'seed'),
])
def test_samples_of_something_else_are_refused(tmp_path, drawn, asked, draws, field):
  log = interrupt(tmp_path, drawn)
  with pytest.raises(InputError, match=f'{log}: the file was begun with another {field}'):
    attempt(tmp_path, asked, draws)


def test_lengths_of_the_iteration_before_are_expected(tmp_path, drawn):
  attempt(tmp_path)
  assert drawn.expected == [None] * 10
  attempt(tmp_path, asked=[*PROMPTS[1:], *prompts('a', 'b', 'c', 'd', 'e', 'new')[-1:]],
          iteration=2)
  assert drawn.expected == [3, 3, 2, 2, 2, 2, 2, 2, None, None]


def test_log_probs_go_through_the_log_unchanged(tmp_path, drawn):
  """They are float32 in the table; JSON has them as the shortest decimal that is read back so."""
  rows = attempt(tmp_path).to_pylist()
  assert {x for row in rows for x in row['logprobs']} == {
      tables.SAMPLES.field('logprobs').type.value_type.to_pandas_dtype()(-0.1)}
  assert json.loads(json.dumps(-0.1)) == -0.1


def test_speed_counts_what_this_attempt_drew(tmp_path, drawn, monkeypatch):
  interrupt(tmp_path, drawn)
  clock = itertools.count()   # drawing takes a second
  monkeypatch.setattr(sample_stage, 'time', types.SimpleNamespace(
      perf_counter=lambda: next(clock)))
  attempt(tmp_path)
  record, = read_metrics(tmp_path / 'metrics.jsonl')
  assert (record['stage'], record['samples']) == ('sample', 10)
  # Drawn in this attempt: both draws of 'a', 'bc' and 'd', and one of 'e'.
  assert record['perf/tokens_per_second'] == 2 * (2 + 3 + 2) + 2
