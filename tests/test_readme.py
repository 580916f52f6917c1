"""The README's two commands are what CI and a newcomer run."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def _command(name):
  readme = (ROOT / 'README.md').read_text()
  match = re.search(rf'<!-- {name} command -->\n```bash\n(.*?)\n```', readme, re.DOTALL)
  assert match, f'README.md has no {name} command'
  return match[1]


def test_the_run_command_is_the_main_job():
  assert _command('run').endswith('python -m experiments.irpo')


def test_ci_runs_the_test_command_as_written():
  assert 'pytest' in _command('test')
  assert 'README.md' in (ROOT / '.ci' / 'run').read_text()


def test_named_files_exist():
  text = (ROOT / 'README.md').read_text()
  for path in re.findall(r'\]\(([^)]+)\)', text):
    assert (ROOT / path).exists(), path
  for module in re.findall(r'python -m ((?:experiments|jaxrl)[\w.]*)', text):
    assert (ROOT / f'{module.replace(".", "/")}.py').exists(), module
