"""The sample stage goes on from whole parts, and from nothing else."""

import itertools
import types

import pytest

from jaxrl.errors import InputError
from jaxrl.runs import sample_stage, tables
from jaxrl.runs.folder import open_run
from jaxrl.runs.metrics import MetricsLog, read_metrics
from jaxrl.runs.progress import Progress
from jaxrl.runs.sample_stage import Draws
from jaxrl.runs.session import Session
from jaxrl.tokens.prompts import EncodedPrompt

DRAWS = Draws(count=2, temperature=1.0, seed=0, part_prompts=2)
MODEL = types.SimpleNamespace(params={}, identity='m')
ENGINE = types.SimpleNamespace(
    config=types.SimpleNamespace(dtype='float32'), sampling=types.SimpleNamespace(top_p=1.0))
OUTPUT = 'iteration_01/samples.parquet'


def prompts(*texts):
  return [EncodedPrompt(str(n), text, tuple(map(ord, text))) for n, text in enumerate(texts)]


PROMPTS = prompts('a', 'bc', 'd', 'e', 'f')


@pytest.fixture
def drawn(monkeypatch):
  """Prompt ids in the order in which they were drawn; 'die' ends an attempt at that prompt."""
  seen = []

  def draw_rows(session, engine, params, group, draws, bar):
    rows = []
    for prompt in group:
      seen.append(prompt.prompt_id)
      if prompt.text == 'die':
        raise KeyboardInterrupt
      rows += [{
          'prompt_id': prompt.prompt_id, 'sample_index': n, 'prompt': prompt.text,
          'response': prompt.text, 'prompt_ids': list(prompt.ids), 'response_ids': [n, 7],
          'logprobs': [-1.0, -2.0], 'finish_reason': 'eos'} for n in range(draws.count)]
    return rows

  monkeypatch.setattr(sample_stage, 'draw_rows', draw_rows)
  monkeypatch.setattr(sample_stage, 'rollout_params', lambda params, mesh, dtype: params)
  return seen


def attempt(folder, asked):
  with open_run(folder, flags={}, versions={}) as run:
    with MetricsLog(run.folder / 'metrics.jsonl') as metrics:
      session = Session(run, metrics, Progress(), None, None, None, None, 0, lambda: 0)
      sample_stage.sample_stage(session, 1, ENGINE, MODEL, asked, DRAWS)
  return tables.read_table(folder / OUTPUT, tables.SAMPLES)


def interrupt(folder, drawn):
  with pytest.raises(KeyboardInterrupt):
    attempt(folder, prompts('a', 'bc', 'd', 'die'))
  assert drawn == ['0', '1', '2', '3']
  drawn.clear()
  return folder / 'iteration_01/samples.partial/part_00000000.parquet'


def test_whole_parts_are_kept(tmp_path, drawn):
  whole = attempt(tmp_path / 'whole', PROMPTS)
  drawn.clear()
  interrupt(tmp_path / 'cut', drawn)
  assert attempt(tmp_path / 'cut', PROMPTS).equals(whole)
  assert drawn == ['2', '3', '4']
  assert (tmp_path / 'cut' / OUTPUT).read_bytes() == (tmp_path / 'whole' / OUTPUT).read_bytes()


def test_a_damaged_part_is_named_and_drawn_again(tmp_path, drawn, capsys):
  part = interrupt(tmp_path, drawn)
  part.write_bytes(part.read_bytes()[:-9])
  attempt(tmp_path, PROMPTS)
  assert drawn == ['0', '1', '2', '3', '4']
  assert f'{part}: the table is damaged' in capsys.readouterr().out


@pytest.mark.parametrize('changed', [('a', 'xy'), ('a',), ('a', 'b', 'c')])
def test_a_part_of_other_prompts_is_refused(tmp_path, drawn, changed):
  part = interrupt(tmp_path, drawn)
  with pytest.raises(InputError, match=f'{part}: the prompts have changed'):
    attempt(tmp_path, prompts(*changed))


def test_speed_counts_what_this_attempt_drew(tmp_path, drawn, monkeypatch):
  interrupt(tmp_path, drawn)
  clock = itertools.count()   # each of the two parts that are left takes a second
  monkeypatch.setattr(
      sample_stage, 'time', types.SimpleNamespace(perf_counter=lambda: next(clock)))
  attempt(tmp_path, PROMPTS)
  record, = read_metrics(tmp_path / 'metrics.jsonl')
  assert (record['stage'], record['samples'], record['tokens']) == ('sample', 10, 20)
  assert record['perf/tokens_per_second'] == 12 / 2
