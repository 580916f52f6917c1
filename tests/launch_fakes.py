"""Stand-ins for gcloud, kubectl, sbatch and the like that record their calls and imitate states.

`install` puts them in front of PATH. Machines are folders: what would run on a host runs here, in a
home folder of its own and with the variables by which a host knows its number. What happens is in
plan.json, one entry for each attempt: `states` before the run, the status of each host (or 'hang'),
and the state that the machines are in afterwards.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TOOLS = ('gcloud', 'kubectl', 'sbatch', 'squeue', 'scancel', 'scontrol', 'srun')
EXPERIMENT = '''
import json, os, sys, time
from pathlib import Path
fake = Path(os.environ['FAKE'])
host = int(os.environ['FAKE_HOST'])
plan = json.loads((fake / 'plan.json').read_text())[int((fake / 'attempt').read_text())]
print(f'host {host} of {os.environ.get("JAXRL_COORDINATOR")} got {sys.argv[1:]}')
what = plan['hosts'][host]
(fake / f'pid{host}').write_text(str(os.getpid()))
while what == 'hang':
  time.sleep(0.02)
if what:
  print('NO', what, file=sys.stderr)
sys.exit(what)
'''


def install(folder: Path, plan: list, patch) -> Path:
  """Puts the tools in front of PATH; the folder where they keep what they know."""
  tools = folder / 'bin'
  tools.mkdir()
  for tool in TOOLS:
    path = tools / tool
    path.write_text(f'#!/bin/sh\nexec {sys.executable} -S {Path(__file__)} {tool} "$@"\n')
    path.chmod(0o755)
  # That of hosts; the one on PATH may be a script that waits for locks.
  (tools / 'python3').write_text(f'#!/bin/sh\nexec {sys.executable} -S "$@"\n')
  (tools / 'python3').chmod(0o755)
  fake = folder / 'fake'
  fake.mkdir()
  (fake / 'plan.json').write_text(json.dumps(plan))
  (fake / 'attempt').write_text('-1')
  patch.setenv('PATH', f'{tools}{os.pathsep}{os.environ["PATH"]}')
  patch.setenv('FAKE', str(fake))
  return fake


def repository(folder: Path) -> Path:
  """A repository with the launcher and one experiment, and all of it in one commit."""
  root = folder / 'repository'
  for name in ('launch', 'jaxrl', 'jaxrl/parallel', 'experiments/flags'):
    (root / name).mkdir(parents=True)
  for path in [*sorted((ROOT / 'launch').glob('*.py')), ROOT / 'jaxrl/errors.py',
               ROOT / 'jaxrl/parallel/hosts.py']:
    shutil.copy(path, root / path.relative_to(ROOT))
  (root / 'experiments/tiny.py').write_text(EXPERIMENT)
  (root / 'experiments/flags/tiny.flags').write_text('--seed=1\n')
  git = ['git', '-c', 'user.name=a', '-c', 'user.email=a@b', '-C', str(root)]
  for words in (['init', '--quiet'], ['add', '--all'], ['commit', '--quiet', '--message=one']):
    subprocess.run([*git, *words], check=True, stdin=subprocess.DEVNULL)
  return root


def calls(fake: Path) -> list[list[str]]:
  path = fake / 'calls'
  return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def verbs(fake: Path) -> list[str]:
  """The calls without looks at a state: ['create', 'scp', 'ssh', ...]."""
  return [words[4] if words[:3] == ['gcloud', 'compute', 'tpus'] else ' '.join(words[:3])
          for words in calls(fake) if 'describe' not in words and words[0] != 'squeue']


class Fake:
  def __init__(self) -> None:
    self.folder = Path(os.environ['FAKE'])

  @property
  def attempt(self) -> int:
    return int((self.folder / 'attempt').read_text())

  @property
  def plan(self) -> dict:
    return json.loads((self.folder / 'plan.json').read_text())[max(self.attempt, 0)]

  @property
  def states(self) -> list:
    path = self.folder / 'states'
    return json.loads(path.read_text()) if path.exists() else []

  def put(self, states: list) -> None:
    (self.folder / 'states').write_text(json.dumps(states))

  def next_attempt(self) -> None:
    (self.folder / 'attempt').write_text(str(self.attempt + 1))
    self.put(self.plan.get('states', ['ACTIVE']))

  def look(self) -> str | None:
    """The state, which is the next one from then on; the last one stays."""
    states = self.states
    if len(states) > 1:
      self.put(states[1:])
    return states[0] if states else None

  def on_all(self, script: str, variables, home: str = 'home') -> int:
    """Runs a script of the shell on all hosts at once; the first status that is not 0."""
    running = []
    for host in range(len(self.plan['hosts'])):
      folder = self.folder / f'{home}{host}'
      folder.mkdir(exist_ok=True)
      running.append(subprocess.Popen(
          ['bash', '-c', script], cwd=folder,
          env={**os.environ, 'FAKE_HOST': str(host), **variables(host)}))
    return next((status for status in [child.wait() for child in running] if status), 0)


def gcloud(fake: Fake, words: list[str]) -> int:
  if words[:2] == ['storage', 'cp']:
    shutil.copy(words[2], fake.folder / 'uploaded.tar.gz')
    return 0
  if words[0] == 'storage' or 'accelerator-types' in words:
    refused = fake.plan.get('refused')
    if refused and refused in words:
      print(f'ERROR: (gcloud) NOT_FOUND: {refused} is not there.', file=sys.stderr)
      return 1
    return 0
  verb = words[3]
  if verb == 'create':
    if fake.plan.get('cannot_create'):
      print('ERROR: (gcloud) Quota exceeded.', file=sys.stderr)
      return 1
    fake.next_attempt()
  elif verb == 'describe':
    state = fake.look()
    if state is None:
      print('ERROR: (gcloud) NOT_FOUND: Resource was not found', file=sys.stderr)
      return 1
    print(json.dumps({'name': 'x', 'state': {'state': state} | (
        {'failedData': {'error': {'message': 'no quota'}}} if state == 'FAILED' else {})}))
  elif verb == 'delete':
    fake.put([])
    for home in fake.folder.glob('home*'):    # a machine's disk goes with it
      shutil.rmtree(home)
  elif verb == 'scp':
    for host in range(len(fake.plan['hosts'])):
      home = fake.folder / f'home{host}'
      home.mkdir(exist_ok=True)
      shutil.copy(words[4], home / words[5].partition(':')[2])
  elif verb == 'ssh':
    script = next(word for word in words if word.startswith('--command=')).partition('=')[2]
    if ' uv ' in script:      # the first three steps unpack; the others need a network
      unpack = ' && '.join(script.split(' && ')[:3])
      return fake.on_all(f'{unpack} && mkdir -p jaxrl-python/bin && '
                         f'ln -sf {sys.executable} jaxrl-python/bin/python', lambda host: {})
    slices = fake.plan.get('slices', 1)
    each = len(fake.plan['hosts']) // slices
    status = fake.on_all(script, lambda host: {
        'TPU_WORKER_ID': str(host % each), 'MEGASCALE_SLICE_ID': str(host // each)})
    if 'then' in fake.plan and '--stop' not in script:
      fake.put(fake.plan['then'])
    elif status == 255:
      fake.next_attempt()
    return status
  return 0


def kubectl(fake: Fake, words: list[str]) -> int:
  words = [word for word in words if not word.startswith(('--namespace', '--context'))]
  if words[0] == 'create':
    (fake.folder / 'manifest.json').write_text(sys.stdin.read())
    fake.next_attempt()
  elif words[0] == 'get':
    if '--ignore-not-found' in words:
      print('jobset.jobset.x-k8s.io/x' if fake.states else '', end='')
      return 0
    print(json.dumps({'status': fake.look()}))
  elif words[0] == 'logs':
    container = json.loads((fake.folder / 'manifest.json').read_text())['spec'][
        'replicatedJobs'][0]['template']['spec']['template']['spec']['containers'][0]
    command = ' '.join("'" + word.replace('$$(', '$(').replace("'", "'\\''") + "'"
                       for word in container['command'])
    each = len(fake.plan['hosts']) // fake.plan.get('slices', 1)
    variables = {entry['name']: entry['value'] for entry in container['env']}
    fake.on_all(f'tar -xzf ../uploaded.tar.gz && {command}', lambda host: {
        **variables, 'TPU_WORKER_ID': str(host % each), 'MEGASCALE_SLICE_ID': str(host // each)})
    if 'then' in fake.plan:
      restarts = fake.attempt + 1
      fake.next_attempt()
      fake.put([{**state, 'restarts': restarts} for state in fake.states])
  return 0


def sbatch(fake: Fake, words: list[str]) -> int:
  if fake.plan.get('cannot_submit'):
    print('sbatch: error: invalid partition specified', file=sys.stderr)
    return 1
  path = words[-1]
  log = next(line for line in Path(path).read_text().splitlines() if '--output=' in line)
  fake.put(['PENDING', 'RUNNING'])
  with open(log.partition('=')[2].replace('%j', '17'), 'ab') as file:
    child = subprocess.Popen(
        [sys.executable, __file__, 'job', path], stdout=file, stderr=file,
        stdin=subprocess.DEVNULL, start_new_session=True)
  (fake.folder / 'job').write_text(str(child.pid))
  print('17;cluster')
  return 0


def job(fake: Fake, words: list[str]) -> int:
  """What SLURM does with a script, also when it is put into the queue again."""
  for restart in range(100):
    fake.next_attempt()
    fake.put(['RUNNING'])
    again = fake.folder / 'again'
    again.unlink(missing_ok=True)
    subprocess.run(['bash', words[0]], env={
        **os.environ, 'SLURM_JOB_ID': '17', 'SLURM_RESTART_COUNT': str(restart)}, check=False)
    if not again.exists():
      break
  fake.put(fake.plan.get('then', ['COMPLETED']))
  return 0


def srun(fake: Fake, words: list[str]) -> int:
  command = [word for word in words if not word.startswith('--kill-on-bad-exit')]
  running = [
      subprocess.Popen(command, env={**os.environ, 'FAKE_HOST': str(n), 'SLURM_PROCID': str(n)})
      for n in range(len(fake.plan['hosts']))]
  return max(child.wait() for child in running)


def squeue(fake: Fake, words: list[str]) -> int:
  print(fake.look() or '')
  return 0


def scancel(fake: Fake, words: list[str]) -> int:
  os.killpg(int((fake.folder / 'job').read_text()), 15)
  return 0


def scontrol(fake: Fake, words: list[str]) -> int:
  (fake.folder / 'again').touch()
  return 0


def main() -> int:
  tool, *words = sys.argv[1:]
  fake = Fake()
  with (fake.folder / 'calls').open('a') as file:
    file.write(json.dumps([tool, *words]) + '\n')
  return globals()[tool](fake, words)


if __name__ == '__main__':
  sys.exit(main())
