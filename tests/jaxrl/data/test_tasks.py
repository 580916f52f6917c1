"""Tasks: prompts, gold answers and gold solutions, on hand-written rows and on the real files."""

import json
import re

import pytest

from jaxrl.data.readers import read_problems
from jaxrl.data.rows import Row
from jaxrl.data.tasks import MARKER, TASKS, get_task, gsm8k_gold, gsm8k_solution, read_answer
from jaxrl.errors import InputError
from tests.shared_data import SHARED, needs_shared

REAL = [
    ('gsm8k', 'gsm8k/train.jsonl.gz', 7473), ('gsm8k', 'gsm8k/test.jsonl', 1119),
    ('math', 'math/test.jsonl.gz', 4900), ('arc', 'arc_challenge/train.jsonl', 1118),
    ('arc', 'arc_challenge/test.jsonl', 972),
]


def test_gsm8k_solution_takes_the_style_of_the_prompt():
  answer = 'He has 48/2=<<48/2=24>>24 left.\nHe needs $<<24+1=25>>25.\n#### 1,025'
  assert gsm8k_solution(answer) == 'He has 48/2=24 left.\nHe needs $25.\nFinal answer: 1,025'
  assert gsm8k_gold(answer, 'here') == '1,025'


@pytest.mark.parametrize('answer, gold', [
    ('18', '18'), ('$1,234.50', '$1,234.50'), (18, '18'), ('a\n#### 3\n#### 4', '4'), ('-3', '-3')])
def test_gsm8k_gold(answer, gold):
  assert gsm8k_gold(answer, 'here') == gold


@pytest.mark.parametrize('answer',
                         ['no mark 5 here', 'steps\n####', 'steps\n#### none', '12 apples'])
def test_bad_gsm8k_gold(answer):
  with pytest.raises(InputError, match='here: the gold .*#### N.*found .*Correct the row'):
    gsm8k_gold(answer, 'here')


def test_bare_number_has_no_gold_solution():
  assert gsm8k_solution('18') is None
  assert gsm8k_solution('#### 18') is None


def test_arc_maps_digits_to_letters():
  fields = {'question': 'Which?', 'answerKey': '3',
            'choices': {'label': ['1', '2', '3'], 'text': ['x', 'y ', 'z']}}
  read = read_answer(Row('f', 1, fields), TASKS['arc'])
  assert read == ('C', None, ('A', 'B', 'C'), '\n(A) x\n(B) y\n(C) z')


def test_templates_have_one_place_for_the_question():
  for task in TASKS.values():
    assert task.template.count('{question}') == 1
    assert '\\\n' not in task.template and '{{' not in task.template
  assert TASKS['world'].template == '{question}'
  for name in ('gsm8k', 'arc', 'math'):
    assert MARKER in TASKS[name].template


def test_math_examples_end_as_asked():
  """Four worked examples, each boxed, the marked line repeating the box."""
  boxes = re.findall(r'\\boxed\{(.*)\}\$\.\nFinal answer: \$(.*)\$\n', TASKS['math'].template)
  assert boxes == [(answer, answer) for answer in ('20', r'\frac{1}{4}', r'2\sqrt{10}', '9')]
  assert (31 + 9) / 2 == 20 and 3 * 3 / 36 == 1 / 4 and 2**2 + 6**2 == 2**2 * 10 and 7**50 % 10 == 9


def test_questions_full_of_braces_are_left_alone(tmp_path):
  path = tmp_path / 'p.jsonl'
  problem = r'What is \frac{1}{2} + {question} + {0}?'
  path.write_text(json.dumps({'problem': problem, 'answer': r'\frac{1}{2}'}))
  [read] = read_problems(path, TASKS['math'])
  assert f'Question: {problem}\n\nSolution:' in read.prompt
  assert read.gold == r'\frac{1}{2}' and read.gold_solution is None


def test_overrides(tmp_path):
  path = tmp_path / 'p.jsonl'
  path.write_text(json.dumps({'q': 'Why?', 'a': '5', 'key': 'k'}))
  task = get_task('world', prompt_field='q', answer_field='a', id_field='key',
                  template='Q: {question}\nA:')
  [problem] = read_problems(path, task)
  assert (problem.prompt_id, problem.prompt, problem.gold) == ('k', 'Q: Why?\nA:', '5')
  assert get_task('world') == TASKS['world']


@pytest.mark.parametrize('name, flags, parts', [
    ('nonesuch', {}, ('--task', 'unknown task', 'gsm8k, math, arc, world', "'nonesuch'", 'Choose')),
    ('gsm8k', {'template': 'no place'},
     ('--template', 'no place', '{question}', "'no place'", 'Write')),
    ('gsm8k', {'template': ''}, ('--template', 'no place', '{question}', "''", 'Write')),
    ('gsm8k', {'prompt_field': ' '}, ('--prompt_field', 'empty', 'field', "' '", 'Name a field')),
])
def test_bad_overrides(name, flags, parts):
  with pytest.raises(InputError) as error:
    get_task(name, **flags)
  assert all(part in str(error.value) for part in parts), error.value


@needs_shared
@pytest.mark.parametrize('name, file, count', REAL)
def test_real_files(name, file, count):
  problems = read_problems(SHARED / file, TASKS[name])
  assert len(problems) == count
  for problem in problems:
    assert problem.gold
    assert isinstance(problem.prompt, str) and '{question}' not in problem.prompt
    if name == 'gsm8k':
      assert '<<' not in problem.gold_solution and '####' not in problem.gold_solution
      assert problem.gold_solution.endswith(f'\n{MARKER} {problem.gold}')
      assert re.fullmatch(r'-?[\d,.]+', problem.gold)
    if name == 'arc':
      assert problem.gold in problem.labels
      assert all(f'\n({label}) ' in problem.prompt for label in problem.labels)


@needs_shared
def test_math_train_has_two_rows_without_gold():
  """The real file: an error by default, and two rows that scoring can count where they are kept."""
  with pytest.raises(InputError, match=r"train.jsonl.gz, row 885: field 'answer' is null"):
    read_problems(SHARED / 'math/train.jsonl.gz', TASKS['math'])
  kept = read_problems(SHARED / 'math/train.jsonl.gz', TASKS['math'], missing_gold='keep')
  assert len(kept) == 7456
  assert [p.prompt_id for p in kept if not p.gold] == ['math-train-0886', 'math-train-1009']
