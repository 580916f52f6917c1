"""Agreement of our verdicts with the correctness that public sets of responses record."""

import functools
import gzip
import json
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import pytest

from experiments.check_answers import SETS, check_recorded, disagreements, read_recorded
from jaxrl.errors import InputError
from jaxrl.rewards.canonical import canonical_math
from jaxrl.rewards.checking import Verdict
from jaxrl.rewards.extraction import extract_math
from tests.shared_data import SHARED, needs_shared

# Read one by one; docs/answer_checking.md says what each record and each text says.
KNOWN = {
    'gsm8k model_responses': {
        ('gsm8k-test-0355', 'Yi-1.5-34B-Chat'),
        ('gsm8k-test-0707', 'Mixtral-8x7B-Instruct-v0.1'),
        ('gsm8k-test-0896', 'Yi-1.5-34B-Chat'),
        ('gsm8k-test-1001', 'Qwen2-7B-Instruct'),
        ('gsm8k-test-1001', 'Mistral-Nemo-Instruct-2407'),
        ('gsm8k-test-1001', 'Yi-1.5-9B-Chat'),
        ('gsm8k-test-1001', 'Yi-1.5-34B-Chat'),
    },
    'gsm8k example_model_solutions': set(),
    'math_votes': {('math-votes-72', 'sample-7')},
}


@functools.cache
def checked(name):
  recorded = read_recorded(SHARED, SETS[name])
  return recorded, check_recorded(SETS[name].rule, recorded)


@needs_shared
@pytest.mark.parametrize('name, n', [
    ('gsm8k model_responses', 6714), ('gsm8k example_model_solutions', 4476), ('math_votes', 400),
])
def test_verdicts_agree_with_the_recorded_correctness(name, n):
  recorded, checks = checked(name)
  assert len(checks) == n
  differing = disagreements(recorded, checks)
  assert 1 - len(differing) / n >= 0.99
  assert {(record.id, record.model) for record, _ in differing} == KNOWN[name]
  assert not {check.verdict for check in checks} & {Verdict.UNPARSEABLE_GOLD, Verdict.TIMEOUT}


@needs_shared
def test_extracted_math_answers_are_the_recorded_predictions():
  """The origin's extraction and ours write numbers differently; the box they read is the same."""
  for record, check in zip(*checked('math_votes'), strict=True):
    if record.answer == '9999.857142857143':   # the origin rounds what the response writes in full
      assert abs(Fraction(check.answer) - Fraction(record.answer)) < 1e-9
    else:
      assert check.answer == canonical_math(record.answer)


@needs_shared
@pytest.mark.slow
def test_level_5_responses_all_get_a_verdict():
  recorded, checks = checked('math model_responses_level5')
  verdicts = [check.verdict for check in checks]
  assert len(checks) == 4914
  assert verdicts.count(Verdict.UNPARSEABLE_GOLD) == verdicts.count(Verdict.TIMEOUT) == 0
  # Most of these records are of a parser that stops at the first closing brace.
  assert 1 - len(disagreements(recorded, checks)) / len(checks) >= 0.97


@needs_shared
def test_worked_solutions_give_the_gold_of_their_problem():
  """extract_math on the solution text and canonical_gold on the bare answer are one function."""
  with gzip.open(SHARED / 'math' / 'test.jsonl.gz', 'rt', encoding='utf-8') as lines:
    rows = [json.loads(line) for line in lines]
  differ = [row['id'] for row in rows
            if extract_math(row['solution']) != canonical_math(row['answer'])]
  assert len(rows) == 4900
  assert differ == []


def run_check_answers(*arguments):
  return subprocess.run([sys.executable, '-m', 'experiments.check_answers', *arguments],
                        cwd=Path(__file__).parents[3], capture_output=True, text=True, check=False)


def test_a_folder_without_the_records_is_one_sentence_and_exit_code_2(tmp_path):
  done = run_check_answers(f'--data_dir={tmp_path}')
  assert done.returncode == 2
  assert done.stderr.startswith('check_answers: ')
  assert 'the file is absent' in done.stderr and '--data_dir' in done.stderr
  assert 'Traceback' not in done.stderr


def test_a_damaged_line_is_named(tmp_path):
  path = tmp_path / SETS['math_votes'].path
  path.parent.mkdir()
  path.write_text('{"idx": 1}\n', encoding='utf-8')
  with pytest.raises(InputError, match=r'math_cot_8_responses.jsonl:1: the line cannot be read'):
    read_recorded(tmp_path, SETS['math_votes'])
