"""The code that a run is started from: one commit, packed by git, and the command to run on it."""

from __future__ import annotations

import dataclasses
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from absl import flags

from jaxrl.errors import InputError
from launch.commands import capture, must, say
from launch.naming import check_bucket_path

ROOT = Path(__file__).resolve().parents[1]


@dataclasses.dataclass(frozen=True)
class Source:
  """What is shipped: the tree of a commit, which git can show again."""

  root: Path
  commit: str        # what is packed, 40 hex digits
  head: str          # the same, or where changes that are not committed are shipped, their base

  @property
  def name(self) -> str:
    """For files, folders and labels."""
    return self.head[:12] if self.commit == self.head else (
        f'{self.head[:12]}-changed-{self.commit[:12]}')


def source_of(root: Path, *, allow_dirty: bool) -> Source:
  """HEAD; with `allow_dirty` also what is changed and not committed, as a commit of its own.

  That commit is made by `git stash create`: it is in no branch, and the tree is left as it is.
  Files that git does not track are never shipped.

  Raises:
    InputError: this is no repository, or there are changes and `allow_dirty` is False.
  """
  git = ['git', '-C', str(root)]
  found = capture([*git, 'rev-parse', '--verify', 'HEAD'])
  if found.status:
    raise InputError('what is shipped is a commit, and there is none', where=root,
                     expected='a git repository with a commit', found=found.reason)
  head = found.out.strip()
  changed: list[str] = []
  unknown: list[str] = []
  for line in must([*git, 'status', '--porcelain']).splitlines():
    (unknown if line.startswith('??') else changed).append(line[3:])
  if unknown:
    say(f'files that git does not track are not shipped: {_some(unknown)}')
  if not changed:
    return Source(root, head, head)
  if not allow_dirty:
    raise InputError(
        'the tree has changes that are not committed, so no commit says what would run',
        where=root, found=_some(changed),
        fix='Commit them, or give --allow_dirty to ship and record them as they are')
  made = must([*git, 'stash', 'create']).strip()
  return Source(root, made or head, head)


def _some(paths: Sequence[str]) -> str:
  return ', '.join(paths[:3]) + (f' and {len(paths) - 3} more' if len(paths) > 3 else '')


def archive_command(source: Source, archive: Path) -> list[str]:
  return ['git', '-C', str(source.root), 'archive', '--format=tar.gz', f'--output={archive}',
          source.commit]


def check_command(command: Sequence[str], source: Source, *, buckets: bool) -> None:
  """What hosts are to run: `-m MODULE FLAGS`, all of which they can find.

  `buckets`: the hosts are machines of a cloud, and everything on their disks goes with them.

  Raises:
    InputError: the module or a flag file is not in the commit; a path is one of this machine; the
      run folder is not where it survives.
  """
  if len(command) < 2 or command[0] != '-m' or command[1].startswith('-'):
    raise InputError('there is nothing to run', where='launch',
                     expected='a module after --, as in -- -m experiments.irpo --run_dir=...',
                     found=' '.join(command) or 'nothing')
  module = command[1]
  if not re.fullmatch(r'[A-Za-z_]\w*(\.[A-Za-z_]\w*)*', module):
    raise InputError('this is no module', where='-m', found=module,
                     expected='a name such as experiments.irpo')
  base = module.replace('.', '/')
  if not any(_has(source, path) for path in (f'{base}.py', f'{base}/__main__.py')):
    raise InputError('the commit has no such module', where=f'-m {module}',
                     expected=f'{base}.py in {source.name}')
  for word in command[2:]:
    name, _, value = word.lstrip('-').partition('=')
    if name == 'flagfile':
      _check_flag_file(source, value)
    if '://' in value:
      check_bucket_path(value, where=f'--{name}')
    elif buckets and value.startswith(('/', '~')) and name != 'run_dir':
      raise InputError('the path is one of this machine', where=f'--{name}',
                       expected='gs://BUCKET/FOLDER, or a path in the repository', found=value)
  if buckets:
    check_bucket_path(run_dir_of(command), where='--run_dir')


def run_dir_of(command: Sequence[str]) -> str:
  """The run folder that the command names; '' where it does not."""
  given = [word.partition('=')[2] for word in command
           if re.match('--?run_dir=', word)]
  return given[-1] if given else ''


def _check_flag_file(source: Source, path: str) -> None:
  if not path or Path(path).is_absolute() or '..' in Path(path).parts or not _has(source, path):
    raise InputError('the commit has no such flag file', where='--flagfile',
                     expected=f'a path in {source.name}, from the top of the repository',
                     found=path or 'nothing')


def _has(source: Source, path: str) -> bool:
  found = capture(['git', '-C', str(source.root), 'cat-file', '-e', f'{source.commit}:{path}'])
  return not found.status


# Runs the module up to where it has read its flags, and not further.
_READ_FLAGS = '''
import runpy, sys
from absl import app, flags
def stop(main, argv=None, flags_parser=None):
  (flags_parser or flags.FLAGS)(sys.argv)
  sys.exit(0)
app.run = stop
sys.argv = sys.argv[1:]
runpy.run_module(sys.argv[0], run_name='__main__', alter_sys=True)
'''


def check_flags(command: Sequence[str], root: Path) -> None:
  """Has the module read its flags here, so that hosts do not find out that it cannot.

  Raises:
    InputError: what the module says of them.
  """
  done = capture([sys.executable, '-c', _READ_FLAGS, *command[1:]], cwd=root,
                 extra={'JAX_PLATFORMS': 'cpu'})
  if done.status:
    raise InputError(f'the flags are refused: {done.reason.removeprefix("error: ")}',
                     where=command[1], fix='--nocheck_flags leaves this out')


def define_flags(poll: float) -> None:
  """Those of every launcher of clusters; `poll` is the default of the flag."""
  flags.DEFINE_string('name', None, 'Name of the run, for everything that is created.')
  flags.DEFINE_bool('dry_run', False, 'Print what would be done, and stop.')
  flags.DEFINE_bool('allow_dirty', False, 'Ship changes of the tree that are not committed.')
  flags.DEFINE_bool('check_flags', True, 'Have the experiment read its flags here first.')
  flags.DEFINE_bool('keep', False, 'Leave what was created for the run; see docs/launching.md.')
  flags.DEFINE_float('poll', poll, 'Seconds between looks at the state.', lower_bound=0.01)
  flags.DEFINE_integer('max_restarts', 50, 'Interruptions after which to give up.', lower_bound=0)


def define_slice_flags() -> None:
  """Those of launchers that ask for slices of TPUs."""
  flags.DEFINE_string('topology', None, 'One slice: v5p:4x4x4, or its accelerator type, v5p-128.')
  flags.DEFINE_integer('slices', 1, 'Slices, joined by the network of the data centre.',
                       lower_bound=1, upper_bound=256)
  flags.DEFINE_bool('spot', False, 'Cheaper machines that may be taken away; the run resumes.')


def source_from_flags(command: Sequence[str], *, buckets: bool) -> Source:
  """What the flags above say is shipped, once the command and its flags are known to be good."""
  source = source_of(ROOT, allow_dirty=flags.FLAGS.allow_dirty)
  check_command(command, source, buckets=buckets)
  if flags.FLAGS.check_flags:
    check_flags(command, source.root)
  return source


def required(name: str, expected: str) -> str:
  value = flags.FLAGS[name].value
  if value is None:
    raise InputError('the flag is missing', where=f'--{name}', expected=expected)
  return value
