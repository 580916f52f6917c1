"""A small run to kill: `run FOLDER PAUSE`, `each FOLDER`, or `compare FOLDER FOLDER`.

`each` runs it once for every call that changes or reads the file system, killed by SIGKILL just
before that call, lets it run again and compares what is left with a run that was never killed.
"""

import contextlib
import importlib
import json
import os
import pathlib
import shutil
import signal
import struct
import sys
import time
import traceback

sys.modules['torch'] = None   # tensorboardX imports it where it can, which takes seconds

from tensorboardX.proto.event_pb2 import Event

from jaxrl.runs import durable, tables
from jaxrl.runs.folder import open_run
from jaxrl.runs.metrics import MetricsLog

STEPS = 3


def run(folder, iterations=1, pause=0.0):
  with open_run(folder, flags={'seed': '1'}, versions={'jax': '0'}) as opened:
    with MetricsLog(opened.folder / 'metrics.jsonl') as log:
      for iteration in range(1, iterations + 1):
        stem = f'iteration_{iteration:02}'
        opened.stage(
            f'{stem}/reference',
            (f'{stem}/reference.parquet',),
            lambda scratch, i=iteration: write_reference(scratch, i, pause),
        )
        table = opened.path(f'{stem}/reference', f'{stem}/reference.parquet')
        opened.stage(
            f'{stem}/train',
            (f'{stem}/model', f'{stem}/summary.json'),
            lambda scratch, i=iteration, t=table: train(scratch, i, t, log, pause),
        )


def write_reference(scratch, iteration, pause):
  rows = [{'chosen_logps': [float(iteration)] * n, 'rejected_logps': []} for n in range(3)]
  tables.write_table(scratch / 'reference.parquet', rows, tables.REFERENCE)
  time.sleep(pause)
  return {'rows': len(rows)}


def train(scratch, iteration, table, log, pause):
  """Keeps its state after each step, as training does with checkpoints."""
  checkpoint = scratch / 'checkpoint.json'
  state = {'step': 0, 'total': tables.read_table(table, tables.REFERENCE).num_rows}
  if checkpoint.exists():
    state = json.loads(checkpoint.read_text())
  log.rewind(iteration, 'train', state['step'])
  while state['step'] < STEPS:
    state = {'step': state['step'] + 1, 'total': state['total'] * 3 + 1}
    values = {'total': state['total'], 'perf/seconds': time.monotonic()}
    log.write(iteration, 'train', state['step'], values)
    time.sleep(pause)
    log.sync()
    durable.write_file(checkpoint, json.dumps(state).encode())
  (scratch / 'model').mkdir(exist_ok=True)
  for part in range(2):
    (scratch / 'model' / f'part_{part}').write_text(f'{state["total"]} {part}')
  (scratch / 'summary.json').write_text(json.dumps(state))
  return {'steps': state['step']}


def read_events(folder):
  """(step, tag, value) of all TensorBoard events in the folder, without perf/ ones."""
  found = []
  for path in sorted(pathlib.Path(folder).iterdir()):
    content = path.read_bytes()
    while content:
      (length,) = struct.unpack('<Q', content[:8])
      event = Event.FromString(content[12:12 + length])
      content = content[16 + length:]
      found += [
          (event.step, value.tag, value.simple_value)
          for value in event.summary.value
          if '/perf/' not in value.tag
      ]
  return found


def read_run(folder):
  """Everything in the run folder that a kill must not change, by path."""
  found = {}
  for path in sorted(pathlib.Path(folder).rglob('*')):
    name = str(path.relative_to(folder))
    if name == 'manifest.json':
      content = json.loads(path.read_text())
      for entry in content['stages'].values():
        del entry['seconds']
    elif name == 'metrics.jsonl':
      lines = [json.loads(line) for line in path.read_text().splitlines()]
      content = [[(k, v) for k, v in line.items() if not k.startswith('perf/')] for line in lines]
    elif name == 'events':
      content = read_events(path)
    elif name.startswith('events/') or name == 'lock':
      continue
    else:
      content = path.read_bytes() if path.is_file() else None
    found[name] = content
  return found


def differences(a, b):
  return [name for name in sorted(a | b) if a.get(name, '') != b.get(name, '')]


def kill_before(call):
  """SIGKILL to this process just before its file system call number `call`, counted from 0."""
  count = [0]

  def step(*unused):
    count[0] += 1
    if count[0] == call + 1:   # only once: os.kill is audited as well
      os.kill(os.getpid(), signal.SIGKILL)

  def audit(event, arguments):
    if event == 'open' or event.startswith(('os.', 'shutil.')):
      step()

  def counted(function):
    def run_counted(*arguments):
      step()
      return function(*arguments)

    return run_counted

  for name in ('fsync', 'write', 'pwrite', 'ftruncate'):   # these raise no audit events
    setattr(os, name, counted(getattr(os, name)))
  sys.addaudithook(audit)


def in_child(work):
  """Exit status of `work` in a forked process; negative for a signal."""
  child = os.fork()
  if child == 0:
    status = 1
    try:
      work()
      status = 0
    except BaseException:
      traceback.print_exc()
    finally:
      os._exit(status)
  return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def kill_each(folder):
  for module in ('jaxrl.parallel.hosts', 'pandas'):   # to read them is no call of the run itself
    with contextlib.suppress(ImportError):
      importlib.import_module(module)
  assert in_child(lambda: run(f'{folder}/whole')) == 0
  whole = read_run(f'{folder}/whole')
  calls, status = 0, None
  while status != 0:
    victim = f'{folder}/killed'

    def run_killed(call=calls, victim=victim):
      kill_before(call)
      run(victim)

    status = in_child(run_killed)
    assert status in (0, -signal.SIGKILL), (calls, status)
    if calls % 3 == 0:   # a second kill, while the first one is being repaired
      again = in_child(lambda call=calls // 2, v=victim: (kill_before(call), run(v)))
      assert again in (0, -signal.SIGKILL), (calls, again)
    assert in_child(lambda v=victim: run(v)) == 0, calls
    assert not (other := differences(whole, read_run(victim))), (calls, other)
    shutil.rmtree(victim)
    calls += 1
  print(calls - 1)


if __name__ == '__main__':
  if sys.argv[1] == 'run':
    print('ready', flush=True)
    run(sys.argv[2], iterations=2, pause=float(sys.argv[3]))
  elif sys.argv[1] == 'each':
    kill_each(sys.argv[2])
  else:
    sys.exit('\n'.join(differences(*map(read_run, sys.argv[2:]))) or 0)
