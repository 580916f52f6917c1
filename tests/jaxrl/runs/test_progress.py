"""Progress on a terminal and in a file."""

import io
import re

import pytest
from rich.console import Console

from jaxrl.runs.progress import Progress, duration, visible


class Clock:
  def __init__(self):
    self.now = 0.0

  def __call__(self):
    return self.now


def make(is_terminal, width=100):
  file, clock = io.StringIO(), Clock()
  console = Console(file=file, force_terminal=is_terminal, width=width, height=50, no_color=True)
  return Progress(console, clock=clock), file, clock


def test_a_file_gets_one_line_at_the_start_and_one_at_the_end():
  progress, file, clock = make(False)
  with progress.stage('iteration_01/samples', 400, 'prompts') as bar:
    for _ in range(4):
      clock.now += 2.0
      bar.advance(100)
    progress.line('note')
  assert file.getvalue() == (
      'iteration_01/samples: 400 prompts\n'
      'note\n'
      'iteration_01/samples: 400 prompts in 8.0 s, 50 prompts/s\n'
  )


def test_a_file_gets_the_same_when_the_total_is_not_known_or_nothing_was_done():
  progress, file, clock = make(False)
  with progress.stage('s', None, 'rows') as bar:
    bar.advance()
    clock.now += 90
  with progress.stage('s', 0, 'rows'):
    pass
  assert file.getvalue() == (
      's: rows\ns: 1 rows in 1:30, 0.0111 rows/s\ns: 0 rows\ns: 0 rows in 0.0 s\n'
  )


def test_an_error_ends_the_stage_with_what_was_done():
  progress, file, clock = make(False)
  with pytest.raises(KeyboardInterrupt), progress.stage('s', 3, 'rows') as bar:
    bar.advance()
    clock.now += 1
    raise KeyboardInterrupt
  assert file.getvalue() == 's: 3 rows\ns: stopped after 1 rows in 1.0 s, 1 rows/s\n'


def test_a_terminal_shows_rate_and_time_left_and_keeps_one_line():
  progress, file, clock = make(True)
  with progress.stage('samples', 400, 'prompts') as bar:
    for _ in range(3):
      clock.now += 1.0
      bar.advance(50)
    progress.line('a line above the bar')
  shown = file.getvalue()
  plain = re.sub(r'\x1b\[[0-9;?]*[a-zA-Z]', '', shown)
  assert '150/400' in plain
  assert '50 prompts/s' in plain   # 50 in each second
  assert '0:00:05' in plain   # 250 to go
  assert 'a line above the bar' in plain
  assert '\x1b[2K' in shown   # the bar is taken away
  assert plain.rstrip().endswith('samples: 150 prompts in 3.0 s, 50 prompts/s')


@pytest.mark.parametrize('is_terminal', [True, False])
def test_text_is_shown_as_it_is(is_terminal):
  progress, file, _ = make(is_terminal)
  hostile = '[red]x[/red] [/] \\[b] :smile: https://a.b \x1b[2J\x07\u202e\r\n{task.total}'
  with progress.stage(hostile, 1, '[b]') as bar:
    bar.advance()
  progress.line(hostile)
  progress.table(hostile, [hostile], [[hostile]])
  shown = file.getvalue()
  expected = '[red]x[/red] [/] \\[b] :smile: https://a.b \\x1b[2J\\x07\\u202e\\r\\n{task.total}'
  assert shown.count(expected) >= 4
  assert '\x1b[2J' not in shown and '\u202e' not in shown and '\r\n' not in shown


def test_lines_are_not_wrapped():
  progress, file, _ = make(False, width=20)
  progress.line('word ' * 20)
  assert file.getvalue() == 'word ' * 20 + '\n'


def test_a_table_in_a_file_is_as_wide_as_it_needs():
  progress, file, _ = make(False, width=20)
  progress.table('result', ['method', 'accuracy'], [['x' * 150, 0.123456], ['y', 1]])
  rows = file.getvalue().splitlines()
  assert any('x' * 150 + ' │   0.1235' in row for row in rows)
  assert any(re.search('y +│ +1 │', row) for row in rows)
  assert rows[0].strip() == 'result'
  progress.line('z' * 30)
  progress.table('empty', ['a'], [])
  assert 'empty' in file.getvalue()


def test_a_table_on_a_terminal_folds_its_cells_and_loses_nothing():
  progress, file, _ = make(True, width=40)
  progress.table('result', ['method'], [[''.join(chr(97 + i % 26) for i in range(100))]])
  letters = ''.join(re.findall('│ ([a-z]+) *│', re.sub(r'\x1b\[[0-9;]*m', '', file.getvalue())))
  assert letters == ''.join(chr(97 + i % 26) for i in range(100))


def test_durations():
  shown = [duration(s) for s in (0, 59.94, 59.96, 60, 3599.4, 3599.6, 7325)]
  assert shown == ['0.0 s', '59.9 s', '1:00', '1:00', '59:59', '1:00:00', '2:02:05']
  assert visible('é 漢 \U0001f600') == 'é 漢 \U0001f600'
