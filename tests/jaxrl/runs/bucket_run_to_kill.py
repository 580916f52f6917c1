"""`bucket_run_to_kill.py EVERY`: the run of run_to_kill.py on a bucket, killed at changes of that.

Once for each EVERYth object that it puts or deletes, by SIGKILL just before that (every other time
the change still takes place), on a disk that is lost each time; then it runs again, and the bucket
is compared with that of a run that was never killed.
"""

import contextlib
import importlib
import json
import os
import signal
import sys
import tempfile
import threading
import traceback

from tests import bucket as stand_in
from tests.jaxrl.runs import run_to_kill


def contents(bucket):
  """What a kill must not change."""
  found = {}
  for name in bucket.names():
    content = bucket.content(name)
    if name.endswith('manifest.json'):
      content = json.loads(content)
      for entry in content['stages'].values():
        del entry['seconds']
    elif name.endswith('metrics.jsonl'):
      content = [{k: v for k, v in json.loads(line).items() if not k.startswith('perf/')}
                 for line in content.splitlines()]
    elif '/events/' in name or '/lock/' in name:
      continue
    found[name] = content
  return found


def run_in_child(bucket, kill_at=None):
  """(status of the run in a process of its own, its changes); killed ahead of change `kill_at`."""
  changes, child, started = [], [0], threading.Event()

  def before(verb, name):
    if verb in ('PUT', 'DELETE') and '/lock/' not in name:
      changes.append((verb, name))
      if len(changes) - 1 == kill_at:
        started.wait()
        os.kill(child[0], signal.SIGKILL)
        os.waitid(os.P_PID, child[0], os.WEXITED | os.WNOWAIT)   # it is not to see an answer
        if kill_at % 2:     # what was asked for last arrives, or not
          raise ConnectionResetError

  bucket.before = before
  with tempfile.TemporaryDirectory() as disk:
    child[0] = os.fork()
    if child[0] == 0:
      status = 1
      try:
        tempfile.tempdir = disk
        run_to_kill.run(f'{bucket.url}/run')
        status = 0
      except BaseException:
        traceback.print_exc()
      os._exit(status)
    started.set()
    status = os.waitstatus_to_exitcode(os.waitpid(child[0], 0)[1])
  return status, changes


def main(every):
  with stand_in.serve() as (bucket, environment):
    os.environ.update(environment)
    for module in ('gcsfs', 'jaxrl.parallel.hosts', 'pandas'):   # once, not in every child
      with contextlib.suppress(ImportError):
        importlib.import_module(module)
    status, changes = run_in_child(bucket)
    assert status == 0
    whole = contents(bucket)
    for kill_at in range(0, len(changes), every):
      bucket.objects.clear()
      status, _ = run_in_child(bucket, kill_at)
      assert status == -signal.SIGKILL, (kill_at, status)
      left = bucket.names()
      status, _ = run_in_child(bucket)
      found = contents(bucket)
      other = [name for name in sorted(whole | found) if whole.get(name) != found.get(name)]
      assert status == 0 and not other, (kill_at, changes[kill_at], left, status, other)
  print(len(changes))


if __name__ == '__main__':
  main(int(sys.argv[1]))
