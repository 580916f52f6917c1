"""Checkpoints: the same bits back, damage found, and a refusing disk leaves older ones alone."""

import errno
import os
import pathlib
import resource
import shutil
import subprocess
import sys
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

from jaxrl.errors import InputError
from jaxrl.parallel.mesh import make_mesh
from jaxrl.training import checkpoint
from jaxrl.training.checkpoint import Checkpoints


def state(scale=1.0):
  rng = np.random.default_rng(0)
  return {'w': jnp.asarray(scale * rng.random((8, 16)), jnp.float32), 'n': jnp.int32(scale)}


def restore(folder, like=None):
  """((step, state) or None, warnings)."""
  warnings = []
  found = Checkpoints(folder, warn=warnings.append).restore(like or state())
  return found, warnings


def save(folder, step, tree, **options):
  with Checkpoints(folder, **options) as writer:
    writer.save(step, tree)


def steps(folder):
  return [int(path.name[5:]) for path in checkpoint.checkpoints(epath.Path(folder))]


def assert_same(found, expected):
  for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
    np.testing.assert_array_equal(a, b)
    assert a.dtype == b.dtype


@pytest.fixture
def folder(tmp_path):
  """Checkpoints of steps 1 and 2."""
  path = epath.Path(tmp_path / 'checkpoint')
  for step in (1, 2):
    save(path, step, state(step))
  return path


def test_the_newest_comes_back_and_only_so_many_are_kept(folder):
  (step, found), warnings = restore(folder)
  assert (step, warnings) == (2, [])
  assert_same(found, state(2))
  save(folder, 3, state(3))
  assert steps(folder) == [2, 3]
  assert not list(folder.glob('.*')), 'nothing half-written is left'


def test_nothing_to_restore(tmp_path):
  assert restore(epath.Path(tmp_path / 'none')) == (None, [])


def test_a_step_can_be_saved_again(folder):
  save(folder, 2, state(7))
  assert_same(restore(folder)[0][1], state(7))


def test_arrays_come_back_where_they_are_wanted(folder):
  sharding = jax.NamedSharding(make_mesh(), jax.P('fsdp'))
  like = {'w': jax.ShapeDtypeStruct((8, 16), jnp.float32, sharding=sharding), 'n': state()['n']}
  (_, found), _ = restore(folder, like)
  assert found['w'].sharding == sharding
  assert_same(found, state(2))


def files(path):
  return sorted(p for p in pathlib.Path(path).rglob('*') if p.is_file())


def flip(path):
  data = bytearray(path.read_bytes())
  data[len(data) // 2] ^= 1
  path.write_bytes(bytes(data))


DAMAGES = {
    'a flipped bit': lambda newest: flip(max(files(newest), key=lambda p: p.stat().st_size)),
    'a missing file': lambda newest: files(newest / 'state')[0].unlink(),
    'another file': lambda newest: (newest / 'state' / 'extra').write_text('x'),
    'no hashes': lambda newest: (newest / 'files.json').unlink(),
    'cut hashes': lambda newest: (newest / 'files.json').write_text('{"a'),
    'hashes of another kind': lambda newest: (newest / 'files.json').write_text('[]'),
    'hashes that are no text': lambda newest: (newest / 'files.json').write_bytes(b'\xff\xfe'),
    'an empty folder': lambda newest: [p.unlink() for p in files(newest)],
}


@pytest.mark.parametrize('damage', DAMAGES)
def test_damage_is_named_and_the_one_before_is_used(folder, damage):
  DAMAGES[damage](folder / 'step_00000002')
  (step, found), (warning,) = restore(folder)
  assert step == 1 and 'step_00000002: the checkpoint is damaged' in warning
  assert_same(found, state(1))


def test_when_all_are_damaged_there_is_none(folder):
  for path in checkpoint.checkpoints(folder):
    (path / 'files.json').unlink()
  found, warnings = restore(folder)
  assert found is None and len(warnings) == 2


def test_a_kill_while_writing_leaves_nothing_that_counts(folder):
  partial = folder / '.step_00000003.partial'
  shutil.copytree(folder / 'step_00000002', partial)
  assert restore(folder)[0][0] == 2
  save(folder, 3, state(3))
  assert restore(folder)[0][0] == 3 and not partial.exists()


def test_a_full_disk_is_an_error_that_names_the_checkpoint(folder, monkeypatch):
  monkeypatch.setattr(checkpoint, '_fingerprints', refuse)
  with pytest.raises(InputError, match='step_00000003: .*No space left on device'):
    save(folder, 3, state(3))
  monkeypatch.undo()
  assert restore(folder)[0][0] == 2
  save(folder, 3, state(3))
  assert restore(folder)[0][0] == 3


def test_arrays_that_the_system_refuses_to_write(folder, caplog):
  """The writer of arrays reports the system's refusal in its own way; made by a limit on size."""
  big = {'w': jnp.asarray(np.random.default_rng(0).random(2_000_000), jnp.float32)}
  limits = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (4_000_000, limits[1]))
  try:
    with pytest.raises(
        InputError, match='(?s)step_00000003: .*could not be written.*File too large'):
      save(folder, 3, big)
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
  assert restore(folder)[0][0] == 2
  assert not caplog.records, 'it is said once, by the error'


def test_other_errors_are_not_dressed_up(folder):
  with pytest.raises(ValueError) as caught:
    save(folder, 3, {'w': 'text'})
  assert not isinstance(caught.value, InputError)


def test_every_so_many_steps_one_stays_for_good(tmp_path):
  folder = epath.Path(tmp_path)
  for step in (2, 3, 4, 5, 6, 7):
    save(folder, step, state(step), keep=1, keep_every=3)
  assert steps(folder) == [3, 6, 7]


def test_what_is_beside_the_state_comes_back_and_counts_as_part_of_it(tmp_path):
  notes = {'steps': [{'loss': [float(np.float32(0.1)), 3.0]}], 'nan': float('nan')}
  with Checkpoints(tmp_path) as writer:
    writer.save(1, state(), notes)
    writer.wait()
    assert repr(writer.notes(1)) == repr(notes)
  (epath.Path(tmp_path) / 'step_00000001' / 'notes.json').write_text('{}')
  found, (warning,) = restore(tmp_path)
  assert found is None and 'notes.json is missing or changed' in warning


class Held:
  """Keeps the background of a save from hashing until it is released."""

  def __init__(self, monkeypatch):
    self.reached, self.released, hashes = threading.Event(), threading.Event(), FILE_HASHES

    def wait(folder):
      self.reached.set()
      assert self.released.wait(60)
      return hashes(folder)

    monkeypatch.setattr(checkpoint, '_fingerprints', wait)


FILE_HASHES = checkpoint._fingerprints


def test_a_save_goes_on_behind_the_training(folder, monkeypatch):
  held = Held(monkeypatch)
  with Checkpoints(folder) as writer:
    writer.save(3, state(3))
    assert held.reached.wait(60) and steps(folder) == [1, 2]
    later = threading.Thread(target=writer.save, args=(4, state(4)))
    later.start()
    later.join(0.2)
    assert later.is_alive(), 'one save at a time'
    held.released.set()
    later.join()
    assert steps(folder)[-1] >= 3
  assert steps(folder) == [3, 4]
  assert_same(restore(folder)[0][1], state(4))


@pytest.mark.parametrize('devices', [1, 8])
def test_arrays_that_are_donated_after_the_save_are_saved_as_they_were(tmp_path, devices):
  sharding = jax.NamedSharding(make_mesh(devices=jax.devices()[:devices]), jax.P('fsdp'))
  numbers = np.random.default_rng(0).random((1 << 22,), np.float32)
  overwrite = jax.jit(lambda x: 0 * x - 1, donate_argnums=0)
  tree = {'w': jnp.copy(jax.device_put(numbers, sharding))}
  with Checkpoints(tmp_path) as writer:
    writer.save(1, tree)
    for _ in range(3):
      tree = jax.block_until_ready({'w': overwrite(tree['w'])})
  _, found = Checkpoints(tmp_path).restore(tree)
  np.testing.assert_array_equal(found['w'], numbers)


def refuse(folder):
  raise OSError(errno.ENOSPC, 'No space left on device')


@pytest.mark.parametrize('notice', ['save', 'wait', 'exit'])
def test_what_went_wrong_behind_the_training_is_heard_next(folder, monkeypatch, notice):
  monkeypatch.setattr(checkpoint, '_fingerprints', refuse)
  with pytest.raises(InputError, match='step_00000003: .*No space left on device'):
    with Checkpoints(folder) as writer:
      writer.save(3, state(3))
      if notice == 'save':
        writer.save(4, state(4))
      elif notice == 'wait':
        writer.wait()
      else:
        notice = 'heard'
    assert notice == 'heard'
  monkeypatch.undo()
  assert restore(folder)[0][0] == 2
  assert not list(folder.glob('.*')), 'what was half-written is removed by a restore'


def test_a_failing_save_does_not_hide_why_the_training_ended(folder, monkeypatch):
  monkeypatch.setattr(checkpoint, '_fingerprints', refuse)
  warnings = []
  with pytest.raises(KeyError, match='why'):
    with Checkpoints(folder, warn=warnings.append) as writer:
      writer.save(3, state(3))
      raise KeyError('why')
  assert 'No space left' in warnings[0]


def test_arrays_come_back_on_a_mesh_of_another_size(tmp_path):
  def on(count, *axes):
    sharding = jax.NamedSharding(make_mesh(devices=jax.devices()[:count]), jax.P(*axes))
    return jax.tree.map(lambda x: jax.device_put(x, sharding), {'w': state()['w']})

  save(tmp_path, 1, on(8, 'fsdp'))
  for like in (on(4, 'fsdp'), on(1), on(2, None, 'fsdp')):
    _, found = Checkpoints(tmp_path).restore(like)
    assert found['w'].sharding == like['w'].sharding
    assert_same(found, like)


# A child per moment dies there without any clean-up, as by SIGKILL.
KILLS = '''
import os, pathlib, sys
import jax.numpy as jnp
from etils import epath
from jaxrl.training import checkpoint

def die(*args, **kwargs):
  os._exit(9)

def save(folder, moment):
  with checkpoint.Checkpoints(folder) as writer:
    for step in (1, 2, 3):
      writer.wait()
      if step == 3 and moment == 'hashing':
        checkpoint._fingerprints = die
      if step == 3 and moment == 'removing':
        type(epath.Path(folder)).rmtree = die
      if step == 3 and moment in ('renaming', 'renamed'):
        rename = type(epath.Path(folder)).rename
        type(epath.Path(folder)).rename = lambda path, to: (
            'state' in str(path.name) or moment == 'renaming' and die(), rename(path, to),
            'state' in str(path.name) or die())
      writer.save(step, {'w': jnp.full((1000, 1000), float(step))})
      if step == 3 and moment == 'writing':
        die()

for moment in sys.argv[2:]:
  child = os.fork()
  if not child:
    save(os.path.join(sys.argv[1], moment), moment)
    os._exit(0)
  assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9, moment
'''


def test_a_process_that_dies_while_saving_leaves_sound_checkpoints(tmp_path):
  survivors = {'writing': 2, 'hashing': 2, 'renaming': 2, 'renamed': 3, 'removing': 3}
  subprocess.run([sys.executable, '-c', KILLS, str(tmp_path), *survivors], check=True, timeout=120,
                 env={**os.environ, 'PYTHONPATH': os.pathsep.join(sys.path)})
  like = {'w': jnp.zeros((1000, 1000))}
  for moment, expected in survivors.items():
    (step, found), warnings = restore(tmp_path / moment, like)
    assert (step, warnings) == (expected, []), moment
    np.testing.assert_array_equal(found['w'], np.full((1000, 1000), expected, np.float32))
    save(tmp_path / moment, 3, found)
    assert steps(tmp_path / moment)[-1] == 3


# On gs://, where nothing can be renamed.


def test_the_newest_comes_back_from_a_bucket(bucket):
  folder = f'{bucket.url}/run/checkpoint'
  for step in (1, 2, 3):
    save(folder, step, state(step))
  assert steps(folder) == [2, 3]
  assert not bucket.names('run/checkpoint/step_00000001')
  (step, found), warnings = restore(folder)
  assert step == 3 and not warnings
  assert_same(found, state(3))
  name = bucket.names('run/checkpoint/step_00000003/state/d/')[0]
  bucket.objects[name] = bucket.content(name)[:-1] + b'?', 1
  (step, found), (warning,) = restore(folder)
  assert step == 2 and f'{folder}/step_00000003: the checkpoint is damaged (state/d/' in warning
  assert_same(found, state(2))


def test_a_save_to_a_bucket_that_is_cut_off_does_not_count(bucket):
  """Whatever was put or deleted last: the newest that counts is whole."""
  folder, snapshots = f'{bucket.url}/run/checkpoint', []
  save(folder, 1, state(1))
  bucket.after = lambda verb, name: snapshots.append((name, dict(bucket.objects)))
  save(folder, 2, state(2), keep=1)
  bucket.after = lambda verb, name: None
  published = [name for name, _ in snapshots].index('run/checkpoint/step_00000002/files.json')
  assert published > 5
  for number in (0, published // 2, published - 1, published, published + 1, published + 2):
    bucket.objects = dict(snapshots[number][1])
    (step, found), warnings = restore(folder)
    assert step == (1 if number < published else 2) and not warnings
    assert_same(found, state(step))


def test_a_step_is_saved_to_a_bucket_again(bucket):
  folder = f'{bucket.url}/run/checkpoint'
  save(folder, 1, state(1))
  save(folder, 1, state(5))
  assert_same(restore(folder)[0][1], state(5))


def test_a_bucket_that_refuses_is_named(bucket):
  folder = f'{bucket.url}/run/checkpoint'
  save(folder, 1, state(1))
  bucket.refuses = 'step_00000002/state'
  with pytest.raises(InputError, match=f'{folder}/step_00000002: .*could not be written'):
    save(folder, 2, state(2))
  bucket.refuses = None
  assert restore(folder)[0][0] == 1
