"""launch.gke: the manifest against its schema and as it should be, and a run by a fake kubectl."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxrl.errors import InputError
from launch import gke
from launch.commands import ToolError
from launch.jobset import GkeConfig, longest_name, manifest
from launch.shipping import Source, source_of
from launch.slices import GENERATIONS, find_slice
from tests import launch_fakes

jsonschema = pytest.importorskip('jsonschema', reason='jsonschema checks the manifest')

SCHEMA = json.loads((Path(__file__).parent / 'jobset.schema.json').read_text())
COMMAND = ('-m', 'experiments.tiny', '--run_dir=gs://bucket/run', '--x=$(HOME) \'"; `id`')


def config(source=None, **changes):
  return GkeConfig(**{
      'name': 'irpo', 'namespace': 'default', 'context': None, 'slice': find_slice('v6e:2x4'),
      'slices': 1, 'spot': False, 'image': 'host/image:1', 'service_account': None,
      'max_restarts': 5, 'keep': False, 'poll': 0.001,
      'source': source or Source('/r', 'a' * 40, 'a' * 40), 'code': 'gs://bucket/code',
      'command': COMMAND, 'run_dir': 'gs://bucket/run'} | changes)


def check(document):
  jsonschema.Draft202012Validator.check_schema(SCHEMA)
  jsonschema.validate(document, SCHEMA)
  return document


def pod_of(document):
  return document['spec']['replicatedJobs'][0]['template']['spec']['template']['spec']


def test_the_manifest_of_two_spot_slices_is_this():
  made = check(manifest(config(
      slice=find_slice('v5p:4x4x4'), slices=2, spot=True, service_account='writer')))
  mounts = [{'name': 'code', 'mountPath': '/jaxrl'}]
  chips = {'google.com/tpu': '4'}
  assert made == {
      'apiVersion': 'jobset.x-k8s.io/v1alpha2', 'kind': 'JobSet',
      'metadata': {
          'name': 'irpo', 'namespace': 'default', 'labels': {'jaxrl-commit': 'aaaaaaaaaaaa'},
          'annotations': {
              'alpha.jobset.sigs.k8s.io/exclusive-topology': 'cloud.google.com/gke-nodepool'}},
      'spec': {
          'network': {'enableDNSHostnames': True},
          'failurePolicy': {'maxRestarts': 5, 'rules': [{
              'name': 'failedByItself', 'action': 'FailJobSet',
              'onJobFailureReasons': ['PodFailurePolicy']}]},
          'replicatedJobs': [{'name': 'slice', 'replicas': 2, 'template': {'spec': {
              'completionMode': 'Indexed', 'completions': 16, 'parallelism': 16,
              'backoffLimit': 0,
              'podFailurePolicy': {'rules': [{'action': 'FailJob', 'onExitCodes': {
                  'containerName': 'jaxrl', 'operator': 'NotIn', 'values': [0, 75, 137, 143]}}]},
              'template': {'spec': {
                  'restartPolicy': 'Never',
                  'nodeSelector': {
                      'cloud.google.com/gke-tpu-accelerator': 'tpu-v5p-slice',
                      'cloud.google.com/gke-tpu-topology': '4x4x4',
                      'cloud.google.com/gke-spot': 'true'},
                  'initContainers': [{
                      'name': 'code',
                      'image': 'gcr.io/google.com/cloudsdktool/google-cloud-cli:slim',
                      'volumeMounts': mounts,
                      'command': ['sh', '-c', 'gcloud storage cat "$1" | tar -xzf - -C "$2"',
                                  'copy', 'gs://bucket/code/irpo/jaxrl-aaaaaaaaaaaa.tar.gz',
                                  '/jaxrl']}],
                  'containers': [{
                      'name': 'jaxrl', 'image': 'host/image:1', 'workingDir': '/jaxrl',
                      'volumeMounts': mounts,
                      'command': ['python3', 'launch/on_host.py', '--hosts_per_slice=16', '--',
                                  'python3', *COMMAND[:3], '--x=$$(HOME) \'"; `id`'],
                      'env': [{'name': 'PYTHONUNBUFFERED', 'value': '1'},
                              {'name': 'JAXRL_COORDINATOR', 'value': 'auto'}],
                      'ports': [{'containerPort': n} for n in (8482, 8471, 8080)],
                      'resources': {'requests': chips, 'limits': chips}}],
                  'volumes': [{'name': 'code', 'emptyDir': {}}],
                  'serviceAccountName': 'writer',
                  'tolerations': [{'key': 'cloud.google.com/gke-spot', 'operator': 'Equal',
                                   'value': 'true', 'effect': 'NoSchedule'}]}}}}}]}}


@pytest.mark.parametrize('name', [f'{generation}:{shape}' for generation, facts
                                  in GENERATIONS.items() for shape in facts.shapes])
def test_the_manifest_of_every_slice_fits_the_schema(name):
  one = find_slice(name)
  made = check(manifest(config(slice=one)))
  job = made['spec']['replicatedJobs'][0]['template']['spec']
  (container,) = pod_of(made)['containers']
  assert job['completions'] * int(container['resources']['limits']['google.com/tpu']) == one.chips
  assert ('JAXRL_COORDINATOR' in str(container['env'])) == (one.hosts > 1)
  assert bool(made['metadata']['annotations']) == (one.hosts > 1)


@given(st.lists(st.text(max_size=20), max_size=3))
def test_kubernetes_puts_no_variables_into_words(words):
  command = pod_of(manifest(config(command=tuple(words))))['containers'][0]['command'][5:]
  assert [word.replace('$$(', '$(') for word in command] == [
      word.replace('$$(', '$(') for word in words]
  assert all('$(' not in word.replace('$$(', '') for word in command)


def test_the_schema_refuses_what_it_should():
  for change in ({'backoffLimit': 3}, {'completionMode': 'indexed'}, {'completion': 2}):
    made = manifest(config())
    made['spec']['replicatedJobs'][0]['template']['spec'] |= change
    with pytest.raises(jsonschema.ValidationError):
      check(made)


def test_the_commands_are_these():
  one = config(context='c', namespace='team')
  kubectl = ['kubectl', '--context=c', '--namespace=team']
  assert gke.create_command(one) == [*kubectl, 'create', '--filename=-']
  assert gke.exists_command(one) == [*kubectl, 'get', 'jobset', 'irpo', '--ignore-not-found',
                                     '--output=name']
  assert gke.logs_command(one) == [
      *kubectl, 'logs', '--follow', '--selector=jobset.sigs.k8s.io/jobset-name=irpo',
      '--container=jaxrl', '--max-log-requests=1', '--tail=-1']
  assert gke.delete_commands(one) == [
      [*kubectl, 'delete', 'jobset', 'irpo', '--ignore-not-found'],
      ['gcloud', 'storage', 'rm', 'gs://bucket/code/irpo/jaxrl-aaaaaaaaaaaa.tar.gz']]
  assert gke.upload_command(one, '/t/a.tar.gz') == [
      'gcloud', 'storage', 'cp', '/t/a.tar.gz', one.archive]


def test_the_name_of_the_last_pod_has_63_characters():
  name = 'a' * longest_name(12, 64)
  assert len(f'{name}-slice-11-63-abcde') == 63


@pytest.fixture(scope='module')
def root(tmp_path_factory):
  return launch_fakes.repository(tmp_path_factory.mktemp('gke'))


@pytest.fixture
def start(root, tmp_path, monkeypatch):
  def started(plan, **changes):
    fake = launch_fakes.install(tmp_path, plan, monkeypatch)
    settings = config(source_of(root, allow_dirty=False), **{
        'slice': find_slice('v6e:4x4'), **changes})
    return fake, lambda: gke.run(settings, tmp_path / 'code.tar.gz')
  return started


PENDING, READY = {}, {'replicatedJobsStatus': [{'name': 'slice', 'ready': 1}]}
DONE, FAILED = {'terminalState': 'Completed'}, {'terminalState': 'Failed'}
CREATED = ['gcloud storage cp', 'kubectl --namespace=default create']
REMOVED = ['kubectl --namespace=default delete', 'gcloud storage rm']


def made_and_removed(fake):
  return [verb for verb in launch_fakes.verbs(fake) if verb in CREATED + REMOVED]


def test_lines_of_every_host_through_a_restart_and_nothing_is_left(start, capfd):
  fake, run = start([{'hosts': [75] * 4, 'states': [PENDING, READY], 'then': [READY]},
                     {'hosts': [0] * 4, 'states': [READY, DONE]}])
  assert run() == 0
  out, told = capfd.readouterr()
  for host in range(4):
    assert f'[{host}] host {host} of auto got {list(COMMAND[2:])!r}' in out.splitlines()
  assert 'launch: restart 1, which goes on from gs://bucket/run' in told
  assert made_and_removed(fake) == CREATED + REMOVED
  check(json.loads((fake / 'manifest.json').read_text()))


def test_a_failing_host_gives_its_status(start, capfd):
  fake, run = start([{'hosts': [75, 3, 75, 75], 'states': [READY, FAILED]}])
  assert run() == 3
  assert '[1] NO 3' in capfd.readouterr().out
  assert made_and_removed(fake) == CREATED + REMOVED


def test_a_job_set_of_somebody_is_not_touched(start):
  fake, run = start([{'hosts': [0]}])
  launch_fakes.Fake().put([READY])
  with pytest.raises(InputError, match='already is a JobSet'):
    run()
  assert made_and_removed(fake) == []


def test_a_cluster_without_an_answer_is_an_error(start, monkeypatch):
  fake, run = start([{'hosts': [0]}])
  (Path(os.environ['PATH'].split(os.pathsep)[0]) / 'kubectl').write_text(
      '#!/bin/sh\necho "error: the server has no resource type jobset." >&2; exit 1\n')
  with pytest.raises(ToolError, match='no resource type jobset'):
    run()
  assert launch_fakes.calls(fake) == []


def launch(root, *words):
  return subprocess.Popen(
      [sys.executable, '-m', 'launch.gke', '--name=irpo', '--topology=v6e:4x4', '--image=i:1',
       '--code_dir=gs://bucket/code', '--poll=0.05', '--nocheck_flags', *words, '--', *COMMAND],
      cwd=root, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def test_ctrl_c_removes_the_job_set_and_the_code(root, tmp_path, monkeypatch):
  fake = launch_fakes.install(tmp_path, [{'hosts': ['hang'], 'states': [READY]}], monkeypatch)
  child = launch(root)
  next(line for line in child.stdout if 'got' in line)
  child.send_signal(signal.SIGINT)
  _, told = child.communicate(timeout=200)
  assert child.returncode == 130, told
  assert made_and_removed(fake) == CREATED + REMOVED


def test_a_dry_run_prints_the_manifest_and_output_writes_it(root, tmp_path, monkeypatch):
  fake = launch_fakes.install(tmp_path, [], monkeypatch)
  out, told = launch(root, '--dry_run').communicate()
  assert not told
  assert '16 chips, 4 hosts of 4' in out.splitlines()[0]
  check(json.loads(out.partition('<<EOF\n')[2].partition('EOF\n')[0]))
  launch(root, f'--output={tmp_path / "m.json"}').communicate()
  check(json.loads((tmp_path / 'm.json').read_text()))
  assert not launch_fakes.calls(fake)
