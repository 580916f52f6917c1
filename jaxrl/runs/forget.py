"""python -m jaxrl.runs.forget RUN_DIR STAGE: have a damaged stage, and what follows it, redone."""

from __future__ import annotations

import argparse
import os
import sys

from etils import epath

from jaxrl.errors import InputError
from jaxrl.runs.lock import hold_lock
from jaxrl.runs.stages import Run


def forget_stage(run_dir: str | os.PathLike[str], stage: str) -> tuple[str, ...]:
  """Forgets `stage` and those finished after it in a run that no process has open."""
  folder = epath.Path(run_dir)
  if not (folder / 'flags.flags').exists():
    raise InputError('this is not a run folder', where=folder, expected='a file flags.flags in it')
  with hold_lock(folder / 'lock'):
    return Run(folder).forget(stage)


def main(arguments: list[str] | None = None) -> int:
  parser = argparse.ArgumentParser(prog='python -m jaxrl.runs.forget', description=__doc__)
  parser.add_argument('run_dir', help='the run folder')
  parser.add_argument('stage', help='a finished stage, such as iteration_01/samples')
  options = parser.parse_args(arguments)
  try:
    forgotten = forget_stage(options.run_dir, options.stage)
  except InputError as error:
    print(error, file=sys.stderr)
    return 1
  print('will be redone: ' + ', '.join(forgotten))
  return 0


if __name__ == '__main__':
  sys.exit(main())
