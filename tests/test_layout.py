"""Imports point the way docs/architecture.md says, and the name `kernels` disturbs nobody."""

import ast
import graphlib
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.version import Version
from transformers.utils import import_utils

ROOT = Path(__file__).resolve().parents[1]
TOP = ('kernels', 'jaxrl', 'experiments', 'launch')
ANYWHERE = {'jaxrl.errors', 'jaxrl.objects'}
FILES = sorted(p for top in TOP for p in (ROOT / top).rglob('*.py'))
STANDARD = frozenset(sys.stdlib_module_names)


def module_of(path):
  parts = path.relative_to(ROOT).with_suffix('').parts
  return '.'.join(parts[:-1] if parts[-1] == '__init__' else parts)


MODULES = {module_of(p) for p in FILES}


def room_of(module):
  """'jaxrl.models.rope' is in 'models', 'kernels.attention' in 'kernels'."""
  parts = module.split('.')
  return parts[1] if parts[0] == 'jaxrl' and len(parts) > 1 else parts[0]


def imports_of(source, module=''):
  """Every module that `source` imports, at its top or inside a function."""
  for node in ast.walk(ast.parse(source)):
    if isinstance(node, ast.Import):
      yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
      assert node.level == 0, f'{module} imports relatively'
      for alias in node.names:
        inner = f'{node.module}.{alias.name}'
        yield inner if inner in MODULES or node.module in ('absl', 'jaxrl') else node.module


IMPORTS = {module_of(p): set(imports_of(p.read_text(), module_of(p))) for p in FILES}


def rooms_table():
  """{room: rooms it may import} as the architecture page gives it, closed downwards."""
  page = (ROOT / 'docs' / 'architecture.md').read_text()
  section = page.split('## Rooms')[1].split('\n## ')[0]
  direct = {}
  for row in re.findall(r'^\| (`.*)\|$', section, re.MULTILINE):
    names, _, allowed = (cell.strip() for cell in row.split('|'))
    for name in re.findall(r'`(?:jaxrl/)?(\w+)/`', names):
      direct[name] = allowed
  rooms = set(direct)
  below = {}

  def close(name):
    if name not in below:
      text = direct[name]
      if text.startswith('everything'):
        below[name] = rooms - ({'experiments', 'launch'} if 'in jaxrl' in text else set())
      else:
        named = set(re.findall(r'\w+', text)) & rooms
        below[name] = named.union(*(close(n) for n in named))
    return below[name]

  for name in rooms:
    close(name)
  return below


def test_the_page_names_every_room():
  on_disk = {room_of(m) for m in MODULES - ANYWHERE} - {'jaxrl'}
  assert on_disk == set(rooms_table())
  assert rooms_table()['losses'] == {'tokens', 'parallel', 'kernels'}
  assert rooms_table()['kernels'] == set()
  assert 'models' in rooms_table()['rewards'] and 'rewards' not in rooms_table()['models']


def test_imports_point_downwards():
  table = rooms_table()
  upwards = {
      (module, imported)
      for module in MODULES - {'jaxrl'} - ANYWHERE
      for imported in IMPORTS[module] - ANYWHERE
      if imported.split('.')[0] in TOP
      and room_of(imported) not in table[room_of(module)] | {room_of(module)}}
  assert not upwards


def test_imports_have_no_cycles():
  edges = {module: IMPORTS[module] & MODULES for module in MODULES}
  list(graphlib.TopologicalSorter(edges).static_order())


def test_what_all_may_import_imports_nothing_of_ours():
  assert {m.split('.')[0] for m in IMPORTS['jaxrl.errors']} <= STANDARD
  ours = {m for m in IMPORTS['jaxrl.objects'] if m.split('.')[0] in TOP}
  assert ours == {'jaxrl.errors'}


def test_kernels_know_jax_only():
  for module in MODULES:
    if room_of(module) == 'kernels':
      assert {m.split('.')[0] for m in IMPORTS[module]} <= STANDARD | {'jax', 'kernels'}, module


def test_losses_see_arrays_only():
  """No model, no text, no file."""
  outside = {'csv', 'gzip', 'io', 'json', 'logging', 'os', 'pathlib', 'pickle', 'shutil', 'socket',
             'sqlite3', 'subprocess', 'tempfile', 'urllib'}
  allowed = STANDARD - outside | {'jax', 'jaxrl', 'kernels', 'numpy'}
  for path in FILES:
    if room_of(module_of(path)) == 'losses':
      assert {m.split('.')[0] for m in IMPORTS[module_of(path)]} <= allowed, path
      calls = {n.func.id for n in ast.walk(ast.parse(path.read_text()))
               if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)}
      assert not calls & {'open', 'print', 'input'}, path


def test_flags_are_read_in_scripts_only():
  readers = {m for m in MODULES if any(i.startswith('absl.flags') for i in IMPORTS[m])}
  assert {m.split('.')[0] for m in readers} <= {'experiments', 'launch'}


def test_files_are_short_and_utils_free():
  for path in FILES:
    assert len(path.read_text().splitlines()) <= 500, path
    assert path.stem not in ('utils', 'helpers', 'misc'), path


def test_the_walk_sees_what_it_looks_for():
  source = '''
from absl import flags
import absl.flags as g
def f():
  from jaxrl.models import decoder
  from jaxrl import errors
'''
  assert list(imports_of(source)) == [
      'absl.flags', 'absl.flags', 'jaxrl.models.decoder', 'jaxrl.errors']


# transformers looks for the hub's package `kernels` with
# transformers.utils.import_utils.is_kernels_available: it finds our package, asks for the version
# of the distribution that ships it and falls back to `kernels.__version__`.

FORWARD = '''
import sys
import kernels, torch, transformers
from transformers.utils import is_kernels_available
assert kernels.__file__.startswith(sys.path[0]), kernels.__file__
config = transformers.LlamaConfig(
    vocab_size=11, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
logits = transformers.LlamaForCausalLM(config)(torch.zeros(1, 3, dtype=torch.long)).logits
assert logits.isfinite().all()
print(is_kernels_available())
'''


def our_version():
  return tomllib.loads((ROOT / 'pyproject.toml').read_text())['project']['version']


def run_beside(site, tmp_path):
  """Runs FORWARD with `site` first on the path; what it printed last."""
  script = f'import sys; sys.path.insert(0, {str(site)!r})\n{FORWARD}'
  done = subprocess.run(
      [sys.executable, '-c', script], cwd=tmp_path, capture_output=True, text=True, timeout=300)
  assert done.returncode == 0, done.stderr
  return done.stdout.split()[-1]


def test_transformers_works_where_jaxrl_is_installed(tmp_path):
  """As an installed wheel: our distribution is found to ship `kernels`, in a version too old."""
  pytest.importorskip('torch')
  site = tmp_path / 'site'
  info = site / f'jaxrl-{our_version()}.dist-info'
  info.mkdir(parents=True)
  (info / 'METADATA').write_text(f'Metadata-Version: 2.1\nName: jaxrl\nVersion: {our_version()}\n')
  (info / 'top_level.txt').write_text('\n'.join(TOP))
  (site / 'kernels').symlink_to(ROOT / 'kernels')
  assert run_beside(site, tmp_path) == 'False'


def test_transformers_works_in_the_source_tree():
  """Without an installed distribution; this process has imported our package already."""
  import kernels
  assert Path(kernels.__file__) == ROOT / 'kernels' / '__init__.py'
  assert not import_utils.is_kernels_available()


@pytest.mark.parametrize('version', [our_version(), __import__('kernels').__version__])
def test_no_version_of_ours_is_one_that_transformers_accepts(version):
  """jaxrl has to stay below it: at 0.18.2 transformers would take our package for the hub's."""
  assert Version(version) < Version(import_utils.KERNELS_MIN_VERSION)
