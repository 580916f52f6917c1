"""Checkpoints: the same bits back, damage found, and a refusing disk leaves older ones alone."""

import errno
import pathlib
import resource
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

from jaxrl.errors import InputError
from jaxrl.parallel.mesh import make_mesh
from jaxrl.training import checkpoint


def state(scale=1.0):
  rng = np.random.default_rng(0)
  return {'w': jnp.asarray(scale * rng.random((8, 16)), jnp.float32), 'n': jnp.int32(scale)}


def restore(folder, like=None):
  """((step, state) or None, warnings)."""
  warnings = []
  found = checkpoint.restore_latest(folder, like or state(), warn=warnings.append)
  return found, warnings


def assert_same(found, expected):
  for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
    np.testing.assert_array_equal(a, b)
    assert a.dtype == b.dtype


@pytest.fixture
def folder(tmp_path):
  """Checkpoints of steps 1 and 2."""
  path = epath.Path(tmp_path / 'checkpoint')
  for step in (1, 2):
    checkpoint.save(path, step, state(step))
  return path


def test_the_newest_comes_back_and_only_so_many_are_kept(folder):
  (step, found), warnings = restore(folder)
  assert (step, warnings) == (2, [])
  assert_same(found, state(2))
  checkpoint.save(folder, 3, state(3))
  assert [path.name for path in checkpoint.checkpoints(folder)] == [
      'step_00000002', 'step_00000003']
  assert not list(folder.glob('.*')), 'nothing half-written is left'


def test_nothing_to_restore(tmp_path):
  assert restore(epath.Path(tmp_path / 'none')) == (None, [])


def test_a_step_can_be_saved_again(folder):
  checkpoint.save(folder, 2, state(7))
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
  checkpoint.save(folder, 3, state(3))
  assert restore(folder)[0][0] == 3 and not partial.exists()


def test_a_full_disk_is_an_error_that_names_the_checkpoint(folder, monkeypatch):
  def refuse(folder):
    raise OSError(errno.ENOSPC, 'No space left on device')

  monkeypatch.setattr(checkpoint, '_file_hashes', refuse)
  with pytest.raises(InputError, match='step_00000003: .*No space left on device'):
    checkpoint.save(folder, 3, state(3))
  monkeypatch.undo()
  assert restore(folder)[0][0] == 2
  checkpoint.save(folder, 3, state(3))
  assert restore(folder)[0][0] == 3


def test_arrays_that_the_system_refuses_to_write(folder):
  """The writer of arrays reports the system's refusal in its own way; made by a limit on size."""
  big = {'w': jnp.asarray(np.random.default_rng(0).random(2_000_000), jnp.float32)}
  limits = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (4_000_000, limits[1]))
  try:
    with pytest.raises(
        InputError, match='(?s)step_00000003: .*could not be written.*File too large'):
      checkpoint.save(folder, 3, big)
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
  assert restore(folder)[0][0] == 2


def test_other_errors_are_not_dressed_up(folder):
  with pytest.raises(ValueError) as caught:
    checkpoint.save(folder, 3, {'w': 'text'})
  assert not isinstance(caught.value, InputError)
