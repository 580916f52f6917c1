"""Worker processes: right answers, and hostile ones that must not hang, kill or infect a batch."""

import os
import resource
import signal
import subprocess
import sys
import threading
import time

import pytest

from jaxrl.errors import InputError
from jaxrl.rewards import math_equivalence
from jaxrl.rewards.checking import AnswerRule, check_answers
from jaxrl.rewards.math_equivalence import are_equivalent, close_workers

PATIENT = 30.0   # seconds; for comparisons that take milliseconds unless the machine is overloaded


@pytest.fixture(autouse=True, scope='module')
def no_worker_left_behind():
  yield
  close_workers()


def idle_process():
  """The worker that served last and waits for more."""
  return math_equivalence._idle[-1]._process


@pytest.mark.parametrize('gold, answer, expected', [
    ('x+1', '1+x', True),
    (r'\frac{\sqrt2+\sqrt6}{4}', r'\frac{\sqrt6}{4}+\frac{\sqrt2}{4}', True),
    (r'1\frac{1}{4}', r'\frac54', True),
    ('-5, 1, 4', '1,4,-5', True),
    (r'\begin{pmatrix} 1/2 \\ 1 \end{pmatrix}', r'\begin{pmatrix} 0.5 \\ 1 \end{pmatrix}', True),
    (r'\text{(E)}', 'E', True),
    ('8', r'8 \text{cm}^2', True),
    ('(1,2)', '(2,1)', False),
    ('(1,2)', '[1,2]', False),
    ('5', '5 or 6', False),
    ('-2', '2', False),
    (r'\text{Evelyn}', 'Frank', False),
    ('2', 'garbage } {{ \\frac', False),
    ('1', '', False),
    ('1', '\x00\ud800', False),
])
def test_equivalence(gold, answer, expected):
  assert are_equivalent([(gold, answer)], seconds=PATIENT) == [expected]


@pytest.mark.timeout(120)
def test_hostile_answers_time_out_and_leave_the_others_alone():
  hostile = ['9^{9^{9^9}}', '100000000!', '(' * 900 + ')' * 900, r'\binom{10^9}{5*10^8}']
  rule = AnswerRule('math', symbolic=True, timeout=1.0, workers=2)
  responses = [f'\\boxed{{{answer}}}' for bad in hostile for answer in (bad, f'1+x+{len(bad)}')]
  golds = [f'x+1+{len(bad)}' for bad in hostile for _ in range(2)]
  start = time.monotonic()
  verdicts = [check.verdict for check in check_answers(rule, responses, golds)]
  assert verdicts[0::2] == ['timeout'] * len(hostile)
  assert verdicts[1::2] == ['correct'] * len(hostile)
  assert time.monotonic() - start < 60   # 4 s of limits and 6 starts of a worker


def test_a_late_worker_is_dead_when_the_verdict_is_given():
  are_equivalent([('x+1', '1+x')], seconds=PATIENT)
  late = idle_process().pid
  assert are_equivalent([('x+1', '100000000!')], seconds=0.5) == [None]
  with pytest.raises(ProcessLookupError):
    os.kill(late, 0)


@pytest.mark.timeout(60)
@pytest.mark.parametrize('answer', [
    r'\frac{1}{' * 5000 + '2' + '}' * 5000,
    'x' * 10**6,
    '{' * 10**6,
    r'\sqrt{' * 300 + '2' + '}' * 300,
    r'\text{' * 500 + 'a' + '}' * 500,
    '((a+)+)+' * 200,
    '$' * 1000 + 'a' + '$' * 1000,
    r'\boxed{' * 250,
])
def test_monstrous_text_gets_a_verdict(answer):
  rule = AnswerRule('math', symbolic=True, timeout=2.0)
  for response in (f'\\boxed{{{answer}}}', f'\\boxed{{{answer}', f'Final answer: {answer}'):
    assert check_answers(rule, [response], ['x+1'])[0].verdict != 'correct'


def test_a_text_too_long_to_parse_reaches_no_worker(monkeypatch):
  monkeypatch.setattr(math_equivalence, '_take_worker', lambda: pytest.fail('a worker was asked'))
  too_long = 'x+' * (math_equivalence.MAX_CHARACTERS // 2) + 'x'
  assert are_equivalent([('x', too_long), (too_long, 'x')], seconds=1.0) == [False, False]


def test_a_worker_serves_call_after_call():
  assert are_equivalent([('x+1', '1+x')], seconds=PATIENT) == [True]
  first = idle_process().pid
  assert are_equivalent([('y+1', '1+y')], seconds=PATIENT) == [True]
  assert idle_process().pid == first


def test_a_worker_that_died_between_calls_is_replaced():
  are_equivalent([('x+1', '1+x')], seconds=PATIENT)
  killed = idle_process().pid
  os.kill(killed, signal.SIGKILL)
  assert are_equivalent([('x+1', '1+x'), ('x', 'y')], seconds=PATIENT) == [True, False]
  assert idle_process().pid != killed


def test_an_answer_that_kills_even_a_fresh_worker_is_undecided(monkeypatch, tmp_path):
  close_workers()
  suicidal = tmp_path / 'worker.py'
  suicidal.write_text('print(\'"ready"\', flush=True)\ninput()\n')
  monkeypatch.setattr(math_equivalence, '_PROGRAM', suicidal)
  assert are_equivalent([('x', 'y'), ('x', 'z')], seconds=PATIENT) == [None, None]


def test_a_worker_is_replaced_before_its_caches_fill_the_memory(monkeypatch):
  monkeypatch.setattr(math_equivalence, 'COMPARISONS_PER_WORKER', 1)
  close_workers()
  assert are_equivalent([('x', 'y'), ('x+1', '1+x')], seconds=PATIENT) == [False, True]
  assert not math_equivalence._idle


@pytest.mark.skipif(not hasattr(resource, 'prlimit'), reason='needs Linux to read foreign limits')
def test_a_worker_limits_its_memory_and_processor_time():
  are_equivalent([('x+1', '1+x')], seconds=PATIENT)
  pid = idle_process().pid
  assert resource.prlimit(pid, resource.RLIMIT_AS)[0] == math_equivalence.MEMORY_BYTES
  assert PATIENT < resource.prlimit(pid, resource.RLIMIT_CPU)[0] < PATIENT + 120


def test_memory_beyond_the_limit_costs_one_answer_only(monkeypatch):
  close_workers()
  monkeypatch.setattr(math_equivalence, 'MEMORY_BYTES', 256 * 2**20)
  answers = [r'(x+y+z+1)^{600}', '1+x']
  first, second = are_equivalent([('x+1', answer) for answer in answers], seconds=PATIENT)
  assert not first and second
  close_workers()


def test_from_a_thread_that_is_not_the_main_one():
  results = []
  thread = threading.Thread(
      target=lambda: results.extend(are_equivalent([('x+1', '1+x')], seconds=PATIENT)))
  thread.start()
  thread.join()
  assert results == [True]


def test_a_worker_never_imports_jax():
  done = subprocess.run(
      [sys.executable, '-X', 'importtime', '-P', math_equivalence._PROGRAM, str(2**31)],
      input='["1+x", "x+1", 30.0]\n', capture_output=True, text=True, check=True,
  )
  assert done.stdout.split() == ['"ready"', 'true']
  imported = {line.rpartition('|')[2].strip() for line in done.stderr.splitlines()}
  assert 'math_verify' in imported
  assert not {name for name in imported if name.partition('.')[0] in ('jax', 'jaxlib', 'jaxrl')}


def test_without_math_verify_the_error_says_so(monkeypatch, tmp_path):
  close_workers()
  (tmp_path / 'math_verify.py').write_text('raise ImportError("no such package")\n')
  monkeypatch.setenv('PYTHONPATH', str(tmp_path))
  with pytest.raises(InputError, match='math-verify.*no such package.*pip install math-verify'):
    are_equivalent([('x', 'y'), ('x', 'z')], seconds=PATIENT, workers=2)
