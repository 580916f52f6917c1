"""Names, slices, and what is shipped: what is taken and what is refused, with which sentence."""

import math
import re
import tarfile

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxrl.errors import InputError
from launch import naming, shipping
from launch.commands import must
from launch.slices import GENERATIONS, find_slice
from tests import launch_fakes


@given(st.from_regex(r'[a-z]([-a-z0-9]{0,61}[a-z0-9])?', fullmatch=True))
def test_good_names_are_taken(name):
  assert naming.check_name(name, where='--name') == name


@given(st.text(max_size=70))
def test_names_are_taken_by_the_rule_of_rfc_1035_alone(name):
  good = (0 < len(name) <= 63 and set(name) <= set('abcdefghijklmnopqrstuvwxyz0123456789-')
          and name[0].isalpha() and name[-1] != '-')
  try:
    assert naming.check_name(name, where='--name') and good
  except InputError as error:
    assert not good and str(error).startswith('--name: ')


@given(st.text(max_size=30))
def test_no_path_of_a_bucket_has_what_a_shell_or_gcloud_would_expand(rest):
  try:
    path = naming.check_bucket_path(f'gs://bucket/{rest}', where='--run_dir')
  except InputError:
    return
  assert not re.search(r'[\s*?\[\]#]', path) and '..' not in path.split('/')


@pytest.mark.parametrize(('check', 'good', 'bad'), [
    (naming.check_zone, ['us-east5-a', 'europe-west4-b', 'us-central1-ai1a'],
     ['us-east5', 'us-east5-a ', 'US-east5-a', '', 'us-east5-a\n']),
    (naming.check_project, ['my-project', 'example.com:my-project'],
     ['My Project', '123456789', 'five5-', 'a', 'my-project\n']),
    (naming.check_image, ['python:3.12', 'us-docker.pkg.dev/p/r/jaxrl:1', 'h:5000/a@sha256:' +
                          64 * 'a'], ['Python', 'a b', 'a:', '-a', ''])])
def test_zones_projects_and_images(check, good, bad):
  for text in good:
    assert check(text) == text
  for text in bad:
    with pytest.raises(InputError):
      check(text)


@pytest.mark.parametrize('path', [
    '', 'runs/a', 's3://bucket/a', 'gs://bucket', 'gs://bucket/', 'gs://Bucket/a', 'gs://ab/a',
    'gs://google/a', 'gs://1.2.3.4/a', 'gs://a..b/a', 'gs://bucket/a//b', 'gs://bucket/../a',
    'gs://bucket/a b', 'gs://bucket/*'])
def test_paths_that_are_none_of_a_bucket(path):
  with pytest.raises(InputError, match='--run_dir: '):
    naming.check_bucket_path(path, where='--run_dir')


# accelerator type: shape, chips, hosts, as in the tables of the three generations
@pytest.mark.parametrize(('kind', 'shape', 'chips', 'hosts'), [
    ('v5litepod-1', '1x1', 1, 1), ('v5litepod-4', '2x2', 4, 1), ('v5litepod-8', '2x4', 8, 1),
    ('v5litepod-16', '4x4', 16, 4), ('v5litepod-64', '8x8', 64, 16),
    ('v5litepod-256', '16x16', 256, 64), ('v5p-8', '2x2x1', 4, 1), ('v5p-16', '2x2x2', 8, 2),
    ('v5p-64', '2x4x4', 32, 8), ('v5p-128', '4x4x4', 64, 16), ('v5p-256', '4x4x8', 128, 32),
    ('v5p-2048', '8x8x16', 1024, 256), ('v5p-12288', '16x16x24', 6144, 1536),
    ('v6e-1', '1x1', 1, 1), ('v6e-8', '2x4', 8, 1), ('v6e-16', '4x4', 16, 4),
    ('v6e-256', '16x16', 256, 64)])
def test_slices_of_the_published_tables(kind, shape, chips, hosts):
  one = find_slice(kind)
  assert (one.topology, one.chips, one.hosts) == (shape, chips, hosts)
  assert find_slice(f'{one.generation}:{shape}') == one


def test_every_slice_has_a_machine_and_whole_hosts():
  for generation, facts in GENERATIONS.items():
    for shape in facts.shapes:
      one = find_slice(f'{generation}:{shape}')
      assert one.hosts * one.chips_per_host == one.chips == math.prod(map(int, shape.split('x')))
      assert one.machine.endswith(f'-{one.chips_per_host}t')


@pytest.mark.parametrize(('name', 'sentence'), [
    ('v5p-100', 'there is no such accelerator type; expected one of v5p:2x2x1'),
    ('v5p:4x8x4', 'v5p has no such slice'), ('v5p:16x16x28', 'v5p has no such slice'),
    ('v5e:4x4x4', 'v5e has no such slice'), ('v9:2x2', 'the generation is not known'),
    ('4x4x4', 'the slice cannot be read'), ('', 'the slice cannot be read')])
def test_slices_that_there_are_not(name, sentence):
  with pytest.raises(InputError, match=f'--topology: {re.escape(sentence)}'):
    find_slice(name)


def test_cubes_that_only_gke_makes():
  one = find_slice('v5p:4x4x12')
  assert (one.accelerator_type, one.chips, one.hosts) == (None, 192, 48)


@pytest.fixture(scope='module')
def clean(tmp_path_factory):
  return launch_fakes.repository(tmp_path_factory.mktemp('clean'))


def test_a_commit_is_shipped_and_changes_only_when_asked(tmp_path, monkeypatch, capfd):
  root = launch_fakes.repository(tmp_path)
  head = must(['git', '-C', str(root), 'rev-parse', 'HEAD']).strip()
  one = shipping.source_of(root, allow_dirty=False)
  assert (one.commit, one.name) == (head, head[:12])
  (root / 'new.py').write_text('')
  (root / 'experiments/tiny.py').write_text('changed')
  with pytest.raises(InputError, match='found experiments/tiny.py'):
    shipping.source_of(root, allow_dirty=False)
  for name in ('NAME', 'EMAIL'):
    monkeypatch.setenv(f'GIT_COMMITTER_{name}', 'a')
    monkeypatch.setenv(f'GIT_AUTHOR_{name}', 'a')
  before = must(['git', '-C', str(root), 'status', '--porcelain'])
  changed = shipping.source_of(root, allow_dirty=True)
  assert 'not shipped: new.py' in capfd.readouterr().err
  assert changed.head == head and changed.name == f'{head[:12]}-changed-{changed.commit[:12]}'
  assert must(['git', '-C', str(root), 'status', '--porcelain']) == before
  assert not must(['git', '-C', str(root), 'stash', 'list'])
  must(shipping.archive_command(changed, tmp_path / 'a.tar.gz'))
  with tarfile.open(tmp_path / 'a.tar.gz') as archive:
    assert archive.extractfile('experiments/tiny.py').read() == b'changed'
    assert 'new.py' not in archive.getnames()


def test_what_is_no_repository(tmp_path):
  with pytest.raises(InputError, match='what is shipped is a commit'):
    shipping.source_of(tmp_path, allow_dirty=True)


RUN = '--run_dir=gs://bucket/run'


@pytest.mark.parametrize(('command', 'sentence'), [
    ((), 'there is nothing to run'), (('experiments/tiny.py',), 'there is nothing to run'),
    (('-m', '-c'), 'there is nothing to run'), (('-m', 'a;b'), 'this is no module'),
    (('-m', 'experiments.none', RUN), 'the commit has no such module'),
    (('-m', 'experiments.tiny'), '--run_dir: this is no path of a bucket'),
    (('-m', 'experiments.tiny', '--run_dir=/tmp/a'), '--run_dir: this is no path of a bucket'),
    (('-m', 'experiments.tiny', RUN, '--model=gs://Bad/x'), '--model: the bucket cannot'),
    (('-m', 'experiments.tiny', RUN, '--model=/home/me/x'), '--model: the path is one of this'),
    (('-m', 'experiments.tiny', RUN, '--flagfile=a.flags'), 'the commit has no such flag file'),
    (('-m', 'experiments.tiny', RUN, '--flagfile=/etc/passwd'), 'the commit has no such flag')])
def test_commands_that_hosts_could_not_run(clean, command, sentence):
  source = shipping.source_of(clean, allow_dirty=False)
  with pytest.raises(InputError, match=re.escape(sentence)):
    shipping.check_command(command, source, buckets=True)


def test_a_command_that_they_can(clean):
  source = shipping.source_of(clean, allow_dirty=False)
  shipping.check_command(('-m', 'experiments.tiny', RUN, '--seed=1',
                          '--flagfile=experiments/flags/tiny.flags'), source, buckets=True)


def test_an_experiment_reads_its_flags_and_goes_no_further(tmp_path):
  (tmp_path / 'one.py').write_text(
      "from absl import app, flags\n"
      "flags.DEFINE_integer('seed', 0, 'Seed.')\n"
      "def main(argv):\n  raise SystemExit('it ran')\n"
      "if __name__ == '__main__':\n  app.run(main)\n")
  shipping.check_flags(('-m', 'one', '--seed=3'), tmp_path)
  for wrong in ('--sed=3', '--seed=x'):
    with pytest.raises(InputError, match='one: the flags are refused'):
      shipping.check_flags(('-m', 'one', wrong), tmp_path)
