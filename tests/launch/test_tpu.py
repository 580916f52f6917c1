"""launch.tpu: the commands of gcloud, the states of a queued resource, and what is left behind."""

import itertools
import os
import shlex
import signal
import subprocess
import sys
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxrl.errors import InputError
from launch import queued_resource
from launch.commands import ToolError
from launch.queued_resource import Next, TpuConfig, next_step, verdict
from launch.shipping import Source, source_of
from launch.slices import find_slice
from tests import launch_fakes

COMMAND = ('-m', 'experiments.tiny', '--run_dir=gs://bucket/run', "--x=it's $HOME; rm -rf *")
STATES = ('CREATING', 'ACCEPTED', 'WAITING_FOR_RESOURCES', 'PROVISIONING', 'ACTIVE', 'SUSPENDING',
          'SUSPENDED', 'FAILED', 'DELETING')


def config(source=None, **changes):
  return TpuConfig(**{
      'name': 'irpo', 'project': 'my-project', 'zone': 'us-east5-a',
      'slice': find_slice('v5p:2x2x2'), 'slices': 1, 'spot': True, 'reserved': False,
      'service_account': None, 'network': None, 'subnetwork': None, 'internal_ips': False,
      'runtime': 'v2-alpha-tpuv5', 'valid_until': None, 'python': '3.12', 'keep': False,
      'poll': 0.001, 'max_restarts': 3, 'source': source or Source('/r', 'a' * 40, 'a' * 40),
      'command': COMMAND, 'run_dir': 'gs://bucket/run'} | changes)


@pytest.fixture(scope='module')
def root(tmp_path_factory):
  return launch_fakes.repository(tmp_path_factory.mktemp('tpu'))


@pytest.fixture
def start(root, tmp_path, monkeypatch):
  def started(plan, **changes):
    fake = launch_fakes.install(tmp_path, plan, monkeypatch)
    settings = config(source_of(root, allow_dirty=False), **changes)
    return fake, lambda: queued_resource.run(settings, tmp_path / 'code.tar.gz')
  return started


WHERE = ['--project=my-project', '--zone=us-east5-a']
TOOL = ['gcloud', 'compute', 'tpus', 'queued-resources']
ALL = ['--node=all', '--worker=all', '--batch-size=all']


def test_the_commands_of_one_slice_are_these():
  one = config()
  code = 'jaxrl-aaaaaaaaaaaa'
  assert queued_resource.create_command(one) == [
      *TOOL, 'create', 'irpo', *WHERE, '--accelerator-type=v5p-16',
      '--runtime-version=v2-alpha-tpuv5', '--node-id=irpo', '--spot',
      '--scopes=https://www.googleapis.com/auth/cloud-platform',
      '--labels=jaxrl-commit=aaaaaaaaaaaa', '--quiet']
  assert queued_resource.describe_command(one) == [
      *TOOL, 'describe', 'irpo', *WHERE, '--format=json']
  assert queued_resource.delete_command(one) == [
      *TOOL, 'delete', 'irpo', *WHERE, '--force', '--quiet']
  assert queued_resource.copy_command(one, '/t/c.tar.gz') == [
      *TOOL, 'scp', '/t/c.tar.gz', f'irpo:{code}.tar.gz', *WHERE, *ALL]
  ssh = queued_resource.on_hosts(one, queued_resource.run_script(one))
  assert ssh[:-1] == [*TOOL, 'ssh', 'irpo', *WHERE, *ALL, '--ssh-flag=-oServerAliveInterval=15',
                      '--ssh-flag=-oServerAliveCountMax=8']
  assert shlex.split(ssh[-1].removeprefix('--command=')) == [
      'cd', code, '&&', 'exec', 'env', 'PYTHONUNBUFFERED=1', 'JAXRL_COORDINATOR=auto', 'python3',
      'launch/on_host.py', '--hosts_per_slice=2', '--lock=../jaxrl.lock', '--',
      '../jaxrl-python/bin/python', *COMMAND]


def test_several_slices_and_networks_and_one_host():
  many = queued_resource.create_command(config(
      slices=3, spot=False, reserved=True, internal_ips=True, network='n', subnetwork='s',
      service_account='a@b', valid_until='6h'))
  assert many[10:-3] == [
      '--node-count=3', '--node-prefix=irpo', '--reserved', '--internal-ips',
      '--service-account=a@b', '--network=n', '--subnetwork=s', '--valid-until-duration=6h']
  assert '--tunnel-through-iap' in queued_resource.on_hosts(config(internal_ips=True), 'true')
  alone = queued_resource.run_script(config(slice=find_slice('v6e-8')))
  assert 'JAXRL_COORDINATOR' not in alone


@given(st.lists(st.text(st.characters(exclude_characters='\0'), max_size=20), max_size=4))
def test_no_word_of_the_command_is_read_by_a_shell(words):
  script = queued_resource.run_script(config(command=tuple(words)))
  assert shlex.split(script)[13:] == words


def test_what_each_state_asks_for():
  def steps(**more):
    return {state: next_step(state, **more) for state in (*STATES, None)}
  first = steps(spot=True, was_active=False)
  assert first.pop('ACTIVE') is Next.RUN
  assert {first.pop(state) for state in ('SUSPENDED', 'FAILED', None)} == {Next.GIVE_UP}
  assert set(first.values()) == {Next.WAIT}
  later = steps(spot=True, was_active=True)
  assert {s for s, step in later.items() if step is Next.RECREATE} == {'SUSPENDED', 'FAILED', None}
  assert steps(spot=False, was_active=True)['SUSPENDED'] is Next.GIVE_UP
  with pytest.raises(ToolError, match='RESTING'):
    next_step('RESTING', spot=True, was_active=True)


@pytest.mark.parametrize(('status', 'ends', 'expected'), [
    (0, {0: 0, 1: 0}, 0),
    (75, {0: 75, 1: 3}, 3),         # host 1 failed, host 0 lost it
    (75, {0: 75, 1: 75}, 75),
    (143, {0: 143, 1: 75}, 143),
    (1, {0: 75}, 255),              # host 1 said nothing
    (1, {}, 1)])                    # not even started
def test_one_status_for_all_hosts(status, ends, expected):
  assert verdict(status, ends, 2) == expected


def test_runs_on_every_host_of_every_slice_and_leaves_nothing(start, capfd):
  fake, run = start([{'states': ['ACCEPTED', 'PROVISIONING', 'ACTIVE'], 'hosts': [0] * 4,
                      'slices': 2}], slices=2)
  assert run() == 0
  out, told = capfd.readouterr()
  for host in range(4):
    assert f'[{host}] host {host} of auto got {list(COMMAND[2:])!r}' in out.splitlines()
    assert f'[{host}] on_host: ended with status 0' in out.splitlines()
  assert launch_fakes.verbs(fake) == ['create', 'scp', 'ssh', 'ssh', 'delete']
  assert [line for line in told.splitlines() if ' is ' in line] == [
      f'launch: irpo is {state}' for state in ('ACCEPTED', 'PROVISIONING', 'ACTIVE')]


def test_preempted_twice_then_done(start, capfd):
  lost = {'hosts': [143, 75], 'then': ['ACTIVE', 'SUSPENDING', 'SUSPENDED']}
  fake, run = start([lost, {'hosts': [137, 75], 'then': ['SUSPENDED']}, {'hosts': [0, 0]}])
  assert run() == 0
  once = ['create', 'scp', 'ssh', 'ssh', 'delete']
  assert launch_fakes.verbs(fake) == 3 * once
  created = [words for words in launch_fakes.calls(fake) if 'create' in words]
  assert created[0] == created[1] == created[2]
  assert 'goes on from gs://bucket/run' in capfd.readouterr().err


def test_preempted_while_it_is_made_again(start):
  fake, run = start([{'hosts': [75, 75], 'then': ['SUSPENDED']},
                     {'hosts': [0, 0], 'states': ['PROVISIONING', 'FAILED']}, {'hosts': [0, 0]}])
  assert run() == 0
  assert launch_fakes.verbs(fake).count('create') == 3


def test_gives_up_after_so_many_preemptions(start):
  fake, run = start([{'hosts': [75, 75], 'then': ['SUSPENDED']}] * 3, max_restarts=1)
  with pytest.raises(ToolError, match='interrupted 2 times'):
    run()
  assert launch_fakes.verbs(fake)[-1] == 'delete'


def test_a_failing_host_ends_it_with_its_status(start, capfd):
  fake, run = start([{'hosts': [75, 3]}])
  assert run() == 3
  assert '[1] NO 3' in capfd.readouterr().out
  assert launch_fakes.verbs(fake) == ['create', 'scp', 'ssh', 'ssh', 'delete']


def test_machines_that_are_still_there_are_used_again_as_they_are(start):
  fake, run = start([{'hosts': [75, 75], 'then': ['ACTIVE']}], max_restarts=2)
  with pytest.raises(ToolError, match='interrupted'):
    run()
  assert launch_fakes.verbs(fake) == ['create', 'scp', 'ssh', 'ssh', 'ssh', 'ssh', 'delete']


def test_on_demand_machines_that_are_gone_are_not_bought_again(start):
  fake, run = start([{'hosts': [75, 75], 'then': ['SUSPENDED']}], spot=False)
  with pytest.raises(ToolError, match='irpo is SUSPENDED'):
    run()
  assert launch_fakes.verbs(fake).count('create') == 1


def test_a_request_that_fails_says_why_and_is_removed(start):
  fake, run = start([{'hosts': [0], 'states': ['CREATING', 'FAILED']}])
  with pytest.raises(ToolError, match='irpo is FAILED: no quota'):
    run()
  assert launch_fakes.verbs(fake) == ['create', 'delete']


def test_a_request_that_is_refused(start):
  fake, run = start([{'hosts': [0], 'cannot_create': True}])
  with pytest.raises(ToolError, match='Quota exceeded'):
    run()


@pytest.mark.parametrize(('flag', 'refused'), [('--topology', 'v5p-16'),
                                               ('--run_dir', 'gs://bucket')])
def test_what_the_cloud_does_not_know_is_told_before_anything_is_made(start, flag, refused):
  fake, run = start([{'hosts': [0], 'refused': refused}])
  with pytest.raises(InputError, match=f'{flag}: it cannot be used.*{refused} is not there'):
    run()
  assert len(launch_fakes.verbs(fake)) == 0


def test_a_queued_resource_of_somebody_is_not_touched(start):
  fake, run = start([{'hosts': [0]}])
  launch_fakes.Fake().put(['ACTIVE'])
  with pytest.raises(InputError, match='already is a queued resource'):
    run()
  assert launch_fakes.verbs(fake) == []


def test_kept_machines_are_used_and_stay(start):
  fake, run = start([{'hosts': [0, 0]}], keep=True)
  launch_fakes.Fake().next_attempt()
  assert run() == 0
  assert launch_fakes.verbs(fake) == ['scp', 'ssh', 'ssh']


def flags(**more):
  given = {'name': 'irpo', 'project': 'my-project', 'zone': 'us-east5-a', 'topology': 'v5p:2x2x2',
           'poll': '0.05'} | more
  return [f'--{name}={value}' for name, value in given.items()] + ['--nocheck_flags']


def launch(root, *words, **more):
  return subprocess.Popen([sys.executable, '-m', 'launch.tpu', *words], cwd=root, text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE, **more)


@pytest.mark.parametrize('signum', [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_run_and_removes_the_machines(root, tmp_path, monkeypatch, signum):
  fake = launch_fakes.install(tmp_path, [{'hosts': ['hang', 'hang']}], monkeypatch)
  child = launch(root, *flags(), '--', *COMMAND)
  seen = list(itertools.islice(
      (line for line in child.stdout if 'got' in line), 2))
  assert sorted(line[:4] for line in seen) == ['[0] ', '[1] ']
  for _ in range(200):
    if all((fake / f'pid{host}').exists() for host in range(2)):
      break
    time.sleep(0.02)
  child.send_signal(signum)
  _, told = child.communicate(timeout=200)
  assert child.returncode == 128 + signum, told
  assert f'error: ended by {signum.name}.' in told
  assert launch_fakes.verbs(fake)[-1] == 'delete'
  for host in range(2):
    with pytest.raises(ProcessLookupError):
      os.kill(int((fake / f'pid{host}').read_text()), 0)


def test_a_dry_run_calls_nothing_and_prints_all_of_it(root, tmp_path, monkeypatch):
  fake = launch_fakes.install(tmp_path, [], monkeypatch)
  out, told = launch(root, *flags(), '--spot', '--dry_run', '--', *COMMAND).communicate()
  assert not told and not launch_fakes.calls(fake)
  lines = out.splitlines()
  assert lines[0] == ('# irpo: 1 x v5p-16 (v5p:2x2x2), 8 chips, 2 hosts of 4, spot, in us-east5-a '
                      'of my-project')
  source = source_of(root, allow_dirty=False)
  real = config(source, poll=0.05)
  for words in (queued_resource.create_command(real), queued_resource.delete_command(real),
                queued_resource.on_hosts(real, queued_resource.run_script(real))):
    assert words in [shlex.split(line, comments=True) for line in lines]


@pytest.mark.parametrize(('more', 'command', 'sentence'), [
    ({'name': 'Irpo'}, COMMAND, '--name: the name cannot be used'),
    ({'topology': 'v5p:12x12x12'}, COMMAND, '--topology: only GKE makes this shape'),
    ({'zone': 'us-east5'}, COMMAND, '--zone: this is no zone'),
    ({'valid_until': '6 hours'}, COMMAND, '--valid_until: the value cannot be used'),
    ({}, COMMAND[:2], '--run_dir: this is no path of a bucket')])
def test_what_cannot_be_is_one_sentence_and_status_2(root, more, command, sentence):
  child = launch(root, *flags(**more), '--', *command)
  _, told = child.communicate()
  assert child.returncode == 2
  assert told.startswith(f'error: {sentence}') and told.count('\n') == 1
