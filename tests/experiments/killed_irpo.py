"""`killed_irpo.py HOW PATH [FLAGS...]`: experiments.irpo, killed by SIGKILL at one moment.

HOW is `before` (a file or folder of that path is opened, made, renamed or removed), `half` (half
of the file has reached the disk), or `full`: it is not killed but finds the disk full. PATH is a
regular expression; the first match counts, with `half:2` or `full:2` the second.
"""

import errno
import os
import re
import runpy
import signal
import sys


def die() -> None:
  os.kill(os.getpid(), signal.SIGKILL)


def watch(how: str, pattern: str) -> None:
  search = re.compile(pattern).search
  how, _, turn = how.partition(':')
  waits = [None] * (int(turn or 1) - 1)

  def audit(event, arguments):
    if event == 'open' or event.startswith(('os.mkdir', 'os.re', 'shutil.')):
      if any(isinstance(a, str | os.PathLike) and search(os.fspath(a)) for a in arguments):
        die()

  def fsync(descriptor):
    if search(os.readlink(f'/proc/self/fd/{descriptor}')):
      if waits:
        return system_fsync(waits.pop() or descriptor)
      if how == 'full':
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
      os.ftruncate(descriptor, os.fstat(descriptor).st_size // 2)
      die()
    system_fsync(descriptor)

  if how == 'before':
    sys.addaudithook(audit)
  else:
    system_fsync, os.fsync = os.fsync, fsync


if __name__ == '__main__':
  watch(*sys.argv[1:3])
  sys.argv[1:] = sys.argv[3:]
  runpy.run_module('experiments.irpo', run_name='__main__', alter_sys=True)
