"""The manifest of a run on GKE: one JobSet, one Job for each slice, one Pod for each host.

Fields: jobset.x-k8s.io/v1alpha2 (kubernetes-sigs/jobset, api/jobset/v1alpha2/jobset_types.go) and
batch/v1. Labels of nodes: cloud.google.com/kubernetes-engine/docs/concepts/plan-tpus. GKE gives
each Pod TPU_WORKER_ID and TPU_WORKER_HOSTNAMES, and MEGASCALE_* where there are several slices; JAX
reads them.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from jaxrl.parallel.hosts import COORDINATOR
from launch.on_host import NOT_ITS_OWN
from launch.shipping import Source
from launch.slices import Slice

SLICE = 'slice'           # names of the replicated job and of the container
CONTAINER = 'jaxrl'
_CODE = '/jaxrl'
_COPIER = 'gcr.io/google.com/cloudsdktool/google-cloud-cli:slim'
_KILLED = 137             # by SIGKILL: out of memory, or a node that is gone


@dataclasses.dataclass(frozen=True)
class GkeConfig:
  name: str
  namespace: str
  context: str | None          # of kubectl
  slice: Slice
  slices: int
  spot: bool
  image: str                   # has Python and what the project depends on
  service_account: str | None  # of Kubernetes; may read and write the bucket
  max_restarts: int            # after losing a host; a failure of the run ends it at once
  keep: bool
  poll: float                  # seconds between looks at the state
  source: Source
  code: str                    # gs:// folder that the code is copied through
  command: tuple[str, ...]     # what Python is given
  run_dir: str

  @property
  def hosts(self) -> int:
    return self.slice.hosts * self.slices

  @property
  def archive(self) -> str:
    return f'{self.code.rstrip("/")}/{self.name}/jaxrl-{self.source.name}.tar.gz'


def manifest(config: GkeConfig) -> dict[str, Any]:
  """The JobSet, as kubectl takes it in JSON."""
  one = config.slice
  annotations = {}
  if one.hosts > 1:
    # A slice is a node pool: all Pods of a Job go to one, and no two Jobs share one.
    annotations['alpha.jobset.sigs.k8s.io/exclusive-topology'] = 'cloud.google.com/gke-nodepool'
  return {
      'apiVersion': 'jobset.x-k8s.io/v1alpha2',
      'kind': 'JobSet',
      'metadata': {
          'name': config.name, 'namespace': config.namespace,
          'labels': {'jaxrl-commit': config.source.name}, 'annotations': annotations},
      'spec': {
          'network': {'enableDNSHostnames': True},
          'failurePolicy': {
              'maxRestarts': config.max_restarts,
              'rules': [{'name': 'failedByItself', 'action': 'FailJobSet',
                         'onJobFailureReasons': ['PodFailurePolicy']}]},
          'replicatedJobs': [{
              'name': SLICE, 'replicas': config.slices,
              'template': {'spec': {
                  'completionMode': 'Indexed', 'completions': one.hosts,
                  'parallelism': one.hosts, 'backoffLimit': 0,
                  'podFailurePolicy': {'rules': [{
                      'action': 'FailJob',
                      'onExitCodes': {'containerName': CONTAINER, 'operator': 'NotIn',
                                      'values': sorted({*NOT_ITS_OWN, _KILLED})}}]},
                  'template': {'spec': _pod(config)}}}}]}}


def _pod(config: GkeConfig) -> dict[str, Any]:
  one = config.slice
  chips = {'google.com/tpu': str(one.chips_per_host)}
  nodes = {'cloud.google.com/gke-tpu-accelerator': one.gke_accelerator,
           'cloud.google.com/gke-tpu-topology': one.topology}
  mounts = [{'name': 'code', 'mountPath': _CODE}]
  variables = {'PYTHONUNBUFFERED': '1'}
  if config.hosts > 1:
    variables[COORDINATOR] = 'auto'
  pod: dict[str, Any] = {
      'restartPolicy': 'Never',
      'nodeSelector': nodes,
      'initContainers': [{
          'name': 'code', 'image': _COPIER, 'volumeMounts': mounts,
          # The one shell: its data are arguments, not part of the script.
          'command': ['sh', '-c', 'gcloud storage cat "$1" | tar -xzf - -C "$2"', 'copy',
                      _literal(config.archive), _CODE]}],
      'containers': [{
          'name': CONTAINER, 'image': config.image, 'workingDir': _CODE, 'volumeMounts': mounts,
          'command': ['python3', 'launch/on_host.py', f'--hosts_per_slice={one.hosts}', '--',
                      'python3', *map(_literal, config.command)],
          'env': [{'name': name, 'value': value} for name, value in variables.items()],
          # JAX's coordinator, and libtpu's own between hosts and between slices.
          'ports': [{'containerPort': port} for port in (8482, 8471, 8080)],
          'resources': {'requests': chips, 'limits': chips}}],
      'volumes': [{'name': 'code', 'emptyDir': {}}]}
  if config.service_account:
    pod['serviceAccountName'] = config.service_account
  if config.spot:
    nodes['cloud.google.com/gke-spot'] = 'true'
    pod['tolerations'] = [{'key': 'cloud.google.com/gke-spot', 'operator': 'Equal',
                           'value': 'true', 'effect': 'NoSchedule'}]
  return pod


def _literal(word: str) -> str:
  """Kubernetes puts variables for $(NAME) in commands; $$( is how it is told not to."""
  return word.replace('$(', '$$(')


def longest_name(slices: int, hosts: int) -> int:
  """What is left of 63 characters for NAME in NAME-slice-J-H-xxxxx, the name of a Pod."""
  return 63 - len(f'-{SLICE}-{slices - 1}-{hosts - 1}-xxxxx')
