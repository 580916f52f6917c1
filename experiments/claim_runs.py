"""What the commands share that run an experiment over several seeds: their flags and their runs."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from absl import flags
from etils import epath

from jaxrl.errors import InputError
from jaxrl.runs.folder import FLAGS as FLAGS_FILE
from jaxrl.runs.folder import decode_flags
from jaxrl.runs.manifest import read_manifest

FLAGS = flags.FLAGS
Number = TypeVar('Number', int, float)

flags.DEFINE_list('seeds', ['0', '1', '2'], 'Seeds of the world, the models and the draws.')
flags.DEFINE_multi_string(
    'with_flag', [], 'A flag for every run, as --with_flag=--iterations=1; may be repeated.')
flags.DEFINE_multi_string(
    'with_world_flag', [], 'A flag for the runs that make a world, as '
    '--with_world_flag=--world_test=100; may be repeated.')


def seeds() -> list[int]:
  """The seeds of --seeds.

  Raises:
    InputError: none, not whole numbers, or one twice.
  """
  return different('seeds', int, 'whole numbers')


def different(flag: str, kind: Callable[[str], Number], expected: str) -> list[Number]:
  """The numbers of a list flag.

  Raises:
    InputError: none, not what is `expected`, or one twice.
  """
  values: list[str] = FLAGS[flag].value or []
  text = ','.join(values)
  try:
    found: list[Number] = [kind(number) for number in values]
  except ValueError:
    raise InputError('the list cannot be read', where=f'--{flag}', expected=expected,
                     found=text) from None
  if not found or len({*found}) < len(found):
    raise InputError('the list cannot be used', where=f'--{flag}',
                     expected='at least one, each once', found=text)
  return found


def start_run(
    experiment: str, folder: epath.Path, arguments: Sequence[str], *, makes_world: bool = False
) -> None:
  """One `experiments.EXPERIMENT` in its own process; its output is shown as it comes.

  Raises:
    InputError: the run ended with an error.
  """
  command = [sys.executable, '-m', f'experiments.{experiment}', f'--run_dir={folder}', *arguments,
             *(FLAGS.with_world_flag if makes_world else ()), *FLAGS.with_flag]
  print('$', ' '.join(command[1:]), flush=True)
  if (status := subprocess.run(command).returncode) != 0:
    raise InputError('a run failed', where=folder, expected='exit status 0', found=status,
                     fix='See its message above; the same command goes on from there')


def without_world(path: Path) -> list[str]:
  """Flags of a file for a run that is given its model, and so has no world to make."""
  return [line for line in path.read_text().splitlines()
          if line.startswith('--') and not line.startswith(('--world_', '--seed_'))]


def is_finished(folder: epath.Path) -> bool:
  """Whether a run has evaluated its last model, which is all that claims are read from."""
  if not (folder / FLAGS_FILE).exists():
    return False
  last = int(decode_flags(folder / FLAGS_FILE).get('iterations', 1))
  return f'iteration_{last:02d}/evaluation' in read_manifest(folder)
