"""experiments.irpo, of which one process may kill itself: `killed_irpo.py PROCESS WHAT N [FLAGS]`.

WHAT is `sample` (its N-th sample has come) or `train` (it is about to be fed step N, from 1).
"""

import os
import runpy
import signal
import sys

from jaxrl.parallel.hosts import PROCESS_ID
from jaxrl.runs.sample_log import SampleLog
from jaxrl.training import embed, loop, score

# They feed the devices too, by the name that they have imported before it is changed here.
assert embed.put_batch is score.put_batch is loop.put_batch


def kill_at(owner, name, count):
  call, calls = getattr(owner, name), []

  def counted(*arguments, **options):
    calls.append(None)
    if len(calls) == count:
      os.kill(os.getpid(), signal.SIGKILL)
    return call(*arguments, **options)

  setattr(owner, name, counted)


if __name__ == '__main__':
  process, what, count = sys.argv[1:4]
  if process == os.environ[PROCESS_ID]:
    kill_at(*{'sample': (SampleLog, 'append'), 'train': (loop, 'put_batch')}[what], int(count))
  sys.argv[1:] = sys.argv[4:]
  runpy.run_module('experiments.irpo', run_name='__main__', alter_sys=True)
