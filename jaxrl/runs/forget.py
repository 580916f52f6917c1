"""python -m jaxrl.runs.forget RUN_DIR STAGE: have a damaged stage, and what follows it, redone."""

from __future__ import annotations

import argparse
import os
import sys

from jaxrl.errors import InputError
from jaxrl.runs.folder import FLAGS, hold_run, read_run
from jaxrl.runs.stages import Run


def forget_stage(run_dir: str | os.PathLike[str], stage: str) -> tuple[str, ...]:
  """Forgets `stage` and those finished after it in a run that no process has open."""
  with read_run(run_dir) as folder:
    if not (folder / FLAGS).exists():
      raise InputError('this is not a run folder', where=folder, expected=f'a file {FLAGS} in it')
    with hold_run(folder):
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
