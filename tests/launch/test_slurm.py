"""launch.slurm: the script as it should be, and runs of it by a fake queue."""

import os
import signal
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from launch import slurm
from launch.commands import ToolError
from launch.shipping import Source, source_of
from launch.slurm import SlurmConfig
from tests import launch_fakes

COMMAND = ('-m', 'experiments.tiny', '--run_dir=/shared/run', "--x=it's $HOME")


def config(source=None, **changes):
  return SlurmConfig(**{
      'name': 'irpo', 'nodes': 2, 'gpus_per_node': 4, 'cpus_per_gpu': None, 'time': None,
      'save_before': 300, 'partition': None, 'account': None, 'qos': None,
      'python': sys.executable, 'code': '/shared/code', 'max_restarts': 2, 'keep': False,
      'poll': 0.02, 'source': source or Source('/r', 'a' * 40, 'a' * 40), 'command': COMMAND,
      'run_dir': '/shared/run'} | changes)


@pytest.fixture(scope='module')
def root(tmp_path_factory):
  return launch_fakes.repository(tmp_path_factory.mktemp('slurm'))


@pytest.fixture
def start(root, tmp_path, monkeypatch):
  def started(plan, **changes):
    fake = launch_fakes.install(tmp_path, plan, monkeypatch)
    settings = config(source_of(root, allow_dirty=False), code=str(tmp_path / 'code'), **changes)
    return fake, lambda: slurm.run(settings)
  return started


def test_the_script_is_this():
  assert slurm.script(config(python='/env/bin/python', time='24:00:00', partition='gpu',
                             account='me', qos='high', cpus_per_gpu=12)) == r'''#!/bin/bash
#SBATCH --job-name=irpo
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=48
#SBATCH --time=24:00:00
#SBATCH --partition=gpu
#SBATCH --account=me
#SBATCH --qos=high
#SBATCH --output=/shared/code/irpo/%j.log
#SBATCH --open-mode=append
#SBATCH --signal=TERM@300
#SBATCH --requeue

cd /shared/code/irpo/aaaaaaaaaaaa || exit 1
ends=/shared/code/irpo/$SLURM_JOB_ID
failures=$ends.failures
export JAXRL_COORDINATOR=auto PYTHONUNBUFFERED=1
export JAX_LOCAL_DEVICE_IDS=0,1,2,3
srun --kill-on-bad-exit=0 /env/bin/python launch/on_host.py --grace=300 '''\
r'''--failures="$failures" -- '''\
r'''/env/bin/python -m experiments.tiny --run_dir=/shared/run '--x=it'"'"'s $HOME'
status=$?
if [ -s "$failures" ]; then
  status=$(head -n 1 "$failures")
elif [ "$status" -ne 0 ] && [ "${SLURM_RESTART_COUNT:-0}" -lt 2 ]; then
  # 75: lost a node; 143: saved itself when it was told to; 137: killed with it.
  case $status in 75|137|143) scontrol requeue "$SLURM_JOB_ID" && exit 0;; esac
fi
echo "$status" > "$ends.status"
exit "$status"
'''


@settings(max_examples=20, deadline=None)     # a process for each
@given(st.lists(st.text(st.characters(exclude_characters='\0', exclude_categories=['Cs']),
                        max_size=20), max_size=3))
def test_bash_gives_every_word_as_it_is(words):
  script = slurm.script(config(command=tuple(words), python='printf')).partition('\nsrun ')[2]
  line = script.partition('\nstatus=$?')[0].partition(' -- ')[2].replace('printf', 'echo_all', 1)
  program = 'echo_all() { for word in "$@"; do printf "%s\\0" "$word"; done; }\n' + line
  done = subprocess.run(['bash', '-c', program], capture_output=True, check=True)
  assert [word.decode() for word in done.stdout.split(b'\0')[:-1]] == words


def test_lines_of_every_process_and_the_end(start, capfd):
  fake, run = start([{'hosts': [0, 0]}])
  assert run() == 0
  out, told = capfd.readouterr()
  for n in range(2):
    assert f'[{n}] host {n} of auto got {list(COMMAND[2:])!r}' in out.splitlines()
  assert 'launch: job 17 is RUNNING' in told
  assert not any(words[0] == 'scancel' for words in launch_fakes.calls(fake))


def test_interrupted_twice_then_done(start):
  fake, run = start([{'hosts': [75, 143]}, {'hosts': [75, 75]}, {'hosts': [0, 0]}])
  assert run() == 0
  assert sum(words[:2] == ['scontrol', 'requeue'] for words in launch_fakes.calls(fake)) == 2


def test_gives_up_after_so_many_interruptions(start):
  fake, run = start([{'hosts': [75, 75]}] * 4, max_restarts=2)
  assert run() == 75
  assert sum(words[0] == 'srun' for words in launch_fakes.calls(fake)) == 3


def test_a_failing_process_gives_its_status_though_others_have_a_larger_one(start, capfd):
  fake, run = start([{'hosts': [3, 75]}])
  assert run() == 3
  assert '[0] NO 3' in capfd.readouterr().out
  assert not any(words[0] == 'scontrol' for words in launch_fakes.calls(fake))


def test_a_job_that_is_gone_without_a_status_is_an_error(start):
  fake, run = start([{'hosts': ['hang']}])
  sbatch = os.path.join(os.environ['PATH'].split(os.pathsep)[0], 'sbatch')
  with open(sbatch, 'w') as file:
    file.write('#!/bin/sh\necho 17\n')
  launch_fakes.Fake().put(['PENDING', 'CANCELLED'])
  with pytest.raises(ToolError, match='job 17 ended without a status and is CANCELLED'):
    run()


def test_a_job_that_is_refused(start):
  _, run = start([{'hosts': [0], 'cannot_submit': True}])
  with pytest.raises(ToolError, match='invalid partition'):
    run()


def test_keep_returns_at_once_and_leaves_the_job(start, capfd):
  fake, run = start([{'hosts': [0]}], keep=True)
  assert run() == 0
  assert 'scancel 17 ends it' in capfd.readouterr().err
  assert [words[0] for words in launch_fakes.calls(fake) if words[0] != 'srun'][0] == 'sbatch'


def launch(root, folder, *words, command=COMMAND):
  return subprocess.Popen(
      [sys.executable, '-m', 'launch.slurm', '--name=irpo', f'--python={sys.executable}',
       f'--code_dir={folder}', '--poll=0.05', '--nocheck_flags', *words, '--', *command],
      cwd=root, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def test_ctrl_c_cancels_the_job(root, tmp_path, monkeypatch):
  fake = launch_fakes.install(tmp_path, [{'hosts': ['hang']}], monkeypatch)
  child = launch(root, tmp_path / 'code')
  next(line for line in child.stdout if 'got' in line)
  child.send_signal(signal.SIGINT)
  _, told = child.communicate(timeout=200)
  assert child.returncode == 130, told
  assert ['scancel', '17'] in launch_fakes.calls(fake)


@pytest.mark.parametrize(('words', 'command', 'sentence'), [
    (['--time=soon'], COMMAND, '--time: the value cannot be used'),
    (['--code_dir=/a b'], COMMAND, '--code_dir: the folder cannot be used'),
    (['--python=python3'], COMMAND, '--python: this is no Python'),
    (['--dry_run'], COMMAND[:2], '--run_dir: the run folder is not one that all nodes see')])
def test_what_cannot_be_is_one_sentence_and_status_2(root, tmp_path, words, command, sentence):
  child = launch(root, tmp_path, *words, command=command)
  _, told = child.communicate()
  assert child.returncode == 2 and told.startswith(f'error: {sentence}')
