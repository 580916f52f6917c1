"""The command that writes puzzles, and its file read as a task."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from experiments.logic_puzzles import parse_sizes, puzzle_rows
from jaxrl.data.logic_grid import parse_puzzle, solution_table
from jaxrl.data.readers import read_problems
from jaxrl.data.tasks import TASKS
from jaxrl.errors import InputError
from jaxrl.rewards.checking import AnswerRule, canonical_gold
from jaxrl.runs.score_stage import check_gold, check_rows


def run(*arguments):
  return subprocess.run([sys.executable, '-m', 'experiments.logic_puzzles', *arguments],
                        cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False)


def test_the_file_is_read_as_a_task_and_its_solutions_are_proved(tmp_path):
  path = tmp_path / 'p.jsonl'
  done = run('--sizes=2x2,3x4', '--count=3', '--seed=5', f'--output={path}')
  assert done.returncode == 0, done.stderr
  assert done.stdout == f'6 puzzles of 2 sizes in {path}\n'
  rows = [json.loads(line) for line in path.read_text().splitlines()]
  assert rows == list(puzzle_rows([(2, 2), (3, 4)], 3, 5))
  for row in rows:
    puzzle = parse_puzzle(row['puzzle'])
    assert [solution_table(puzzle, a) for a in puzzle.arrangements()] == [row['solution']]
  problems = read_problems(path, TASKS['zebralogic'])
  assert [p.prompt_id for p in problems] == [row['id'] for row in rows]
  assert [len(p.labels) for p in problems] == [4] * 3 + [12] * 3
  rule = AnswerRule('grid', marker=None)
  assert check_gold(problems, rule, 'here') == set()
  samples = [{'prompt_id': p.prompt_id, 'sample_index': 0, 'response': ''} for p in problems]
  scored = check_rows(samples, {p.prompt_id: p for p in problems}, rule)
  assert {r['verdict'] for r in scored} == {'unparseable_answer'}
  assert [r['gold'] for r in scored] == [canonical_gold(rule, p.gold) for p in problems]


@pytest.mark.parametrize('flag, message', [
    ('--sizes=2x9', '--sizes: unknown size'),
    ('--output=/no/such/folder/p.jsonl', '--output: the file cannot be written')])
def test_what_cannot_be_used_is_one_sentence_and_exit_code_2(flag, message, tmp_path):
  done = run(f'--output={tmp_path / "p.jsonl"}', '--count=1', flag)
  assert done.returncode == 2 and not list(tmp_path.iterdir())
  assert done.stderr.startswith(f'logic_puzzles: {message}') and 'Traceback' not in done.stderr


def test_sizes():
  assert parse_sizes('2x6, 6x2') == [(2, 6), (6, 2)]
  for text in ('', '2*2', '2x2,2x2', '1x2', '2x7'):
    with pytest.raises(InputError, match='^--sizes: '):
      parse_sizes(text)
