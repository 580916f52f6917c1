"""What the evaluation stage reports beyond right answers: the cells of logic-grid puzzles."""

import contextlib
import json
import types

from jaxrl.data.grid_rows import cell_names
from jaxrl.data.readers import Problem
from jaxrl.rewards.checking import AnswerRule
from jaxrl.runs import evaluation_stage
from jaxrl.runs.tables import EVALUATION, read_table

CELLS = cell_names(2, ('Name', 'Pet'))
GRID = Problem('a', 'Who?', '[["Bob", "cat"], ["Eric", "dog"]]', None, CELLS)
HALF = json.dumps({'solution': {'House 1': {'Name': 'Bob', 'Pet': 'cat'}}})


def evaluate(monkeypatch, folder, problem, rule, responses):
  """The stage's summary, with `responses` in place of what a model would draw."""
  def draw_rows(session, engine, params, prompts, draws, bar):
    drawn = responses if draws.temperature else responses[:1]
    return [{'prompt_id': problem.prompt_id, 'sample_index': n, 'prompt': problem.prompt,
             'response': text, 'finish_reason': 'eos', 'response_ids': [1]}
            for n, text in enumerate(drawn)]

  monkeypatch.setattr(evaluation_stage, 'draw_rows', draw_rows)
  monkeypatch.setattr(evaluation_stage, 'engine_params', lambda engine, params: params)
  (folder / 'iteration_00').mkdir()
  session = types.SimpleNamespace(
      progress=types.SimpleNamespace(stage=lambda *_: contextlib.nullcontext()),
      programs=lambda: 0, record=lambda *_: None,
      run=types.SimpleNamespace(
          stage=lambda name, outputs, produce, together: types.SimpleNamespace(
              counts=produce(folder, together(folder)))))
  asked = evaluation_stage.Evaluation(
      {problem.prompt_id: problem}, ['one'], rule, votes=len(responses), vote_temperature=1.0,
      vote_seed=0)
  return evaluation_stage.evaluation_stage(
      session, 0, None, types.SimpleNamespace(params={}), asked)


def test_cells_of_the_greedy_answer_count(monkeypatch, tmp_path):
  rule = AnswerRule('grid', marker=None)
  whole = json.dumps({'solution': {
      f'House {n}': dict(zip(('Name', 'Pet'), row, strict=True))
      for n, row in enumerate(json.loads(GRID.gold), 1)}})
  found = evaluate(monkeypatch, tmp_path, GRID, rule, [HALF, whole, whole])
  assert (found['greedy_accuracy'], found['majority_accuracy']) == (0.0, 1.0)
  assert (found['cell_accuracy'], found['easy_puzzles'], found['easy_accuracy']) == (0.5, 1, 0.0)
  rows = read_table(tmp_path / 'evaluation.parquet', EVALUATION).to_pylist()
  assert {row['gold'] for row in rows} == {'[["bob","cat"],["eric","dog"]]'}


def test_other_answers_have_no_cells(monkeypatch, tmp_path):
  problem = Problem('a', 'How many?', '7', None, None)
  found = evaluate(monkeypatch, tmp_path, problem, AnswerRule('number'), ['Final answer: 7'])
  assert found['greedy_accuracy'] == 1.0 and not any('cell' in key for key in found)
