"""The tables at the end of a run: every figure is there, and 80 columns are enough to read them."""

import io
import types

import pytest
from rich.console import Console

from experiments import irpo_table
from jaxrl.runs.metrics import read_metrics
from jaxrl.runs.progress import Progress
from jaxrl.runs.stages import Run

COLUMNS = (
    'iteration', 'greedy %', '95% interval', 'majority %', 'length', 'pairs', 'all correct',
    'all wrong', 'logp chosen', 'logp rejected', 'sample tokens/s', 'train tokens/s', 'sample',
    'score', 'pair', 'reference', 'train', 'evaluate')


def session(folder, console):
  return types.SimpleNamespace(run=Run(folder), progress=Progress(console))


def shown(folder, *, width, terminal):
  file = io.StringIO()
  opened = session(folder, Console(
      file=file, width=width, force_terminal=terminal, color_system=None))
  irpo_table.show(opened, irpo_table.rows(opened))
  return file.getvalue()


@pytest.fixture
def folder(finished):
  from etils import epath
  return epath.Path(finished.folder)


def test_cells_are_those_of_the_records(folder):
  before, after = irpo_table.rows(session(folder, Console()))
  entries, records = Run(folder).entries, read_metrics(folder / 'metrics.jsonl')
  pairs = entries['iteration_01/pairs'].counts
  train = [r for r in records if (r['iteration'], r['stage']) == (1, 'train')][-1]
  assert after['pairs'] == str(pairs['pairs/count'])
  assert after['all wrong'] == str(pairs['pairs/prompts_all_wrong'])
  assert after['logp chosen'] == f'{train["logps/chosen"]:.1f}'
  assert after['logp rejected'] == f'{train["logps/rejected"]:.1f}'
  assert after['train'] == f'{entries["iteration_01/train"].seconds:.1f}'
  assert float(after['sample tokens/s']) > 0
  accuracy = entries['iteration_01/evaluation'].counts
  assert after['greedy %'] == f'{100 * accuracy["greedy_accuracy"]:.1f}'
  assert after['95% interval'] == (
      f'{100 * accuracy["greedy_low"]:.1f}-{100 * accuracy["greedy_high"]:.1f}')
  # The starting model was not trained on pairs; its own training is not shown as such.
  assert {key for key, cell in before.items() if cell != '-'} == {
      'iteration', 'greedy %', '95% interval', 'majority %', 'length', 'evaluate'}


@pytest.mark.parametrize('width', [80, 120])
def test_on_a_terminal(folder, width):
  text = shown(folder, width=width, terminal=True)
  lines = text.splitlines()
  assert all(len(line) <= width for line in lines[:-1])   # the last is a sentence
  words = {word for column in COLUMNS for word in column.split()}
  assert words <= set(text.replace('┃', ' ').split())     # no header is cut inside a word
  cells = set(text.replace('│', ' ').split())
  for row in irpo_table.rows(session(folder, Console())):
    assert {cell for cell in row.values() if cell != '-'} <= cells


def test_in_a_file(folder):
  lines = shown(folder, width=80, terminal=False).splitlines()
  for column in COLUMNS:
    assert any(column in line for line in lines)
  assert max(map(len, lines)) < 120
