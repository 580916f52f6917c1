"""Any experiment on a GPU cluster with SLURM: one job, one process for each GPU.

  python -m launch.slurm --name=irpo --nodes=4 --gpus_per_node=8 --code_dir=/shared/me/jaxrl \\
    --python=/shared/me/env/bin/python -- -m experiments.irpo --run_dir=/shared/me/runs/irpo ...

--dry_run prints every command and the script. The job is put into the queue again when it is
preempted, loses a node, or has saved itself because its time is nearly over. Ctrl-C cancels it.
"""

from __future__ import annotations

import dataclasses
import os
import re
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from absl import app, flags

from jaxrl.errors import InputError
from jaxrl.parallel.hosts import COORDINATOR, EXIT_LOST
from launch.commands import (
    ToolError,
    capture,
    clean_up,
    ends_with_sentence,
    must,
    parse,
    require,
    say,
    shown,
    stoppable,
    unstoppable,
)
from launch.naming import check_name
from launch.shipping import Source, archive_command, required, run_dir_of, source_from_flags
from launch.shipping import define_flags as define_shipping_flags

FLAGS = flags.FLAGS
_GONE_AFTER = 3      # looks at which the queue does not know the job


@dataclasses.dataclass(frozen=True)
class SlurmConfig:
  name: str
  nodes: int
  gpus_per_node: int
  cpus_per_gpu: int | None
  time: str | None             # limit, as sbatch takes it
  save_before: int             # seconds before the limit at which the run is asked to save
  partition: str | None
  account: str | None
  qos: str | None
  python: str                  # of an environment that all nodes see
  code: str                    # folder that all nodes see
  max_restarts: int
  keep: bool                   # leave the job in the queue and return at once
  poll: float                  # seconds between looks
  source: Source
  command: tuple[str, ...]     # what Python is given
  run_dir: str

  @property
  def folder(self) -> str:
    return f'{self.code}/{self.name}/{self.source.name}'

  @property
  def log(self) -> str:
    return f'{self.code}/{self.name}/%j.log'


def script(config: SlurmConfig) -> str:
  """The batch script; everything that comes from flags is quoted.

  A task that fails by itself says so in a file. Without it srun only tells the largest status,
  which is that of the tasks that then lost it.
  """
  cpus = None if config.cpus_per_gpu is None else config.cpus_per_gpu * config.gpus_per_node
  options: dict[str, object] = {
      'job-name': config.name, 'nodes': config.nodes, 'ntasks-per-node': 1,
      'gpus-per-node': config.gpus_per_node, 'cpus-per-task': cpus,
      'time': config.time, 'partition': config.partition, 'account': config.account,
      'qos': config.qos, 'output': config.log, 'open-mode': 'append',
      'signal': f'TERM@{config.save_before}' if config.time else None}
  header = [f'#SBATCH --{name}={value}' for name, value in options.items() if value is not None]
  words = ['srun', '--kill-on-bad-exit=0', config.python, 'launch/on_host.py']
  run = (f'{shlex.join(words)} --grace={config.save_before} --failures="$failures" -- '
         f'{shlex.join([config.python, *config.command])}')
  return '\n'.join([
      '#!/bin/bash', *header, '#SBATCH --requeue', '',
      f'cd {shlex.quote(config.folder)} || exit 1',
      f'ends={shlex.quote(f"{config.code}/{config.name}")}/$SLURM_JOB_ID',
      'failures=$ends.failures',
      f'export {COORDINATOR}=auto PYTHONUNBUFFERED=1',
      # Under SLURM JAX would give a process the one GPU of its local number.
      f'export JAX_LOCAL_DEVICE_IDS={",".join(map(str, range(config.gpus_per_node)))}',
      run,
      'status=$?',
      'if [ -s "$failures" ]; then',
      '  status=$(head -n 1 "$failures")',
      f'elif [ "$status" -ne 0 ] && [ "${{SLURM_RESTART_COUNT:-0}}" -lt {config.max_restarts} ]; '
      'then',
      f'  # {EXIT_LOST}: lost a node; 143: saved itself when it was told to; 137: killed with it.',
      f'  case $status in {EXIT_LOST}|137|143) scontrol requeue "$SLURM_JOB_ID" && exit 0;; esac',
      'fi',
      'echo "$status" > "$ends.status"',
      'exit "$status"', ''])


def submit_command(path: str) -> list[str]:
  return ['sbatch', '--parsable', path]


def queue_command(job: str) -> list[str]:
  return ['squeue', f'--jobs={job}', '--noheader', '--format=%T', '--states=all']


def cancel_command(job: str) -> list[str]:
  return ['scancel', job]


def unpack_commands(config: SlurmConfig, archive: Path) -> list[list[str]]:
  return [archive_command(config.source, archive), ['mkdir', '-p', config.folder],
          ['tar', '-xzf', str(archive), '-C', config.folder]]


def described(config: SlurmConfig) -> str:
  path, archive = f'{config.folder}.sbatch', Path(f'{config.folder}.tar.gz')
  lines = ['# the code', *map(shown, unpack_commands(config, archive)),
           f'# the script, {path}', script(config), '# the run', shown(submit_command(path))]
  if not config.keep:
    lines += [f'# its lines, every {config.poll:g} s, from {config.log}',
              shown(queue_command('JOB')), '# after Ctrl-C', shown(cancel_command('JOB'))]
  return '\n'.join(lines)


def run(config: SlurmConfig) -> int:
  """Submits the job and shows what all processes write; the status of the run."""
  path, archive = Path(f'{config.folder}.sbatch'), Path(f'{config.folder}.tar.gz')
  if Path(config.folder).exists():
    say(f'the code is there already: {config.folder}')
  else:
    Path(config.folder).parent.mkdir(parents=True, exist_ok=True)
    for words in unpack_commands(config, archive):
      must(words)
    archive.unlink(missing_ok=True)
  path.write_text(script(config))
  job = must(submit_command(str(path))).strip().partition(';')[0]
  if not job.isdecimal():
    raise ToolError(f'sbatch gave no number of a job but {job!r}.')
  log = config.log.replace('%j', job)
  say(f'job {job}; its lines are in {log}, and {shown(cancel_command(job))} ends it')
  if config.keep:
    return 0
  try:
    return _follow(config, job, Path(log))
  except BaseException:
    with unstoppable():
      clean_up(cancel_command(job))
    raise


def _follow(config: SlurmConfig, job: str, log: Path) -> int:
  """Copies the log until the script has left its status, or the job is gone without one."""
  end = log.with_suffix('.status')
  read, last, gone = 0, None, 0
  while True:
    ended = end.exists()    # before the log is read, so that nothing of it is missed
    if log.exists():
      with log.open('rb') as file:
        file.seek(read)
        lines = file.read()
      read += len(lines)
      sys.stdout.buffer.write(lines)
      sys.stdout.buffer.flush()
    if ended and (text := end.read_text().strip()):
      return int(text)
    done = capture(queue_command(job))
    state = done.out.strip() or 'not in the queue'
    if state != last:
      say(f'job {job} is {state}')
    last = state
    gone = gone + 1 if state in _FINAL or not done.out.strip() else 0
    if gone >= _GONE_AFTER:
      raise ToolError(f'job {job} ended without a status and is {state}; see {log}.')
    time.sleep(config.poll)


_FINAL = ('BOOT_FAIL', 'CANCELLED', 'COMPLETED', 'DEADLINE', 'FAILED', 'NODE_FAIL',
          'OUT_OF_MEMORY', 'TIMEOUT')


def define_flags() -> None:
  define_shipping_flags(poll=5.0)
  flags.DEFINE_integer('nodes', 1, 'Nodes of the job.', lower_bound=1)
  flags.DEFINE_integer('gpus_per_node', 8, 'GPUs of each node, all of one process.', lower_bound=1,
                       upper_bound=16)
  flags.DEFINE_integer('cpus_per_gpu', None, 'CPU cores for each GPU.', lower_bound=1)
  flags.DEFINE_string('time', None, 'Limit of the job, as sbatch takes it: 24:00:00.')
  flags.DEFINE_integer('save_before', 300, 'Seconds before the limit to save and start again.',
                       lower_bound=1, upper_bound=65535)
  flags.DEFINE_string('partition', None, 'Partition of the cluster.')
  flags.DEFINE_string('account', None, 'Account that is charged.')
  flags.DEFINE_string('qos', None, 'Quality of service.')
  flags.DEFINE_string('python', None, 'Python of an environment that all nodes see.')
  flags.DEFINE_string('code_dir', None, 'Folder that all nodes see, for code and logs.')


def config_from_flags(command: Sequence[str]) -> SlurmConfig:
  """What the flags say, checked.

  Raises:
    InputError: a name, limit or path cannot be used, or the command cannot run.
  """
  limit = r'(\d+|\d+:\d\d|\d+:\d\d:\d\d|\d+-\d+(:\d\d){0,2})'
  name = r'[\w.,-]+'
  for flag, pattern, expected in (
      ('time', limit, 'a limit such as 24:00:00 or 2-00:00:00'), ('partition', name, 'a name'),
      ('account', name, 'a name'), ('qos', name, 'a name')):
    value = FLAGS[flag].value
    if value is not None and not re.fullmatch(pattern, value):
      raise InputError('the value cannot be used', where=f'--{flag}', expected=expected,
                       found=value or 'nothing')
  code = required('code_dir', 'a folder that all nodes see')
  # In a line of #SBATCH there are no quotes, and % stands for numbers of the job.
  if not re.fullmatch(r'/[\w./+-]+', code):
    raise InputError('the folder cannot be used', where='--code_dir', found=code,
                     expected='a whole path of letters, digits and _ . / + -')
  python = required('python', 'the whole path of a Python')
  if not (os.path.isabs(python) and os.access(python, os.X_OK)):
    raise InputError('this is no Python', where='--python', found=python,
                     expected='the whole path of a program that is there')
  run_dir = run_dir_of(command)
  if not run_dir.startswith(('/', 'gs://')):
    raise InputError('the run folder is not one that all nodes see', where='--run_dir',
                     expected='a whole path', found=run_dir or 'nothing')
  return SlurmConfig(
      name=check_name(required('name', 'a name'), where='--name'), nodes=FLAGS.nodes,
      gpus_per_node=FLAGS.gpus_per_node, cpus_per_gpu=FLAGS.cpus_per_gpu, time=FLAGS.time,
      save_before=FLAGS.save_before, partition=FLAGS.partition, account=FLAGS.account,
      qos=FLAGS.qos, python=python, code=code.rstrip('/'), max_restarts=FLAGS.max_restarts,
      keep=FLAGS.keep, poll=FLAGS.poll, source=source_from_flags(command, buckets=False),
      command=tuple(command), run_dir=run_dir)


def main(argv: Sequence[str]) -> None:
  config = config_from_flags(argv[1:])
  print(f'# {config.name}: {config.nodes} nodes of {config.gpus_per_node} GPUs, '
        f'{config.nodes} processes\n'
        f'# code: {config.source.name}; run folder: {config.run_dir}', flush=True)
  if FLAGS.dry_run:
    print(described(config))
    return
  require('sbatch', 'squeue', 'scancel')
  with stoppable():
    status = run(config)
  sys.exit(status)


if __name__ == '__main__':
  define_flags()
  app.run(ends_with_sentence(main), flags_parser=ends_with_sentence(parse))
