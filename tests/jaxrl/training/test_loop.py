"""The loop: killed anywhere it ends with the same bits and the same log; nan stops it."""

import functools
import signal

import jax
import numpy as np
import pytest
from etils import epath

from jaxrl.data.batches import pair_arrays, shuffled_batches
from jaxrl.errors import InputError
from jaxrl.parallel.mesh import make_mesh
from jaxrl.training import checkpoint
from jaxrl.training.loop import LoopConfig, NonFiniteError, check_loop, put_batch, train
from jaxrl.training.optimizer import learning_rate_schedule
from jaxrl.training.preemption import Preempted
from tests import tiny_training as tiny

STEPS, LOOP = 5, LoopConfig(steps=5, log_every=2, save_every=2)


class Killed(BaseException):
  pass


class Run:
  """A training stage in a folder with its log; killed at most once, at the named moment."""

  def __init__(self, folder, *, mesh=None, batch_size=4, loop=LOOP, kill=None):
    self.folder = epath.Path(folder)
    self.mesh, self.batch_size, self.loop, self.kill = (
        mesh or tiny.one_device(), batch_size, loop, kill)
    self.log, self.resumed, self.warnings, self.read = {}, [], [], []

  def reach(self, moment, step):
    if self.kill == (moment, step):
      self.kill = None
      raise Killed

  def __getitem__(self, step):
    self.reach('batch', step)
    self.read.append(step)
    return batches(self.batch_size)[step]

  def on_log(self, step, numbers):
    self.reach('before log', step)
    self.log[step] = {k: v for k, v in numbers.items() if not k.startswith('perf/')}
    self.reach('after log', step)

  def on_resume(self, step):
    self.resumed.append(step)
    self.log = {n: numbers for n, numbers in self.log.items() if n <= step}

  def save(self, checkpoints, step, state, notes):
    self.reach('before save', step)
    SAVE(checkpoints, step, state, notes)
    self.reach('after save', step)

  def __call__(self, monkeypatch, **more):
    """Numpy final state; starts again after a kill."""
    monkeypatch.setattr(
        checkpoint.Checkpoints, 'save', lambda *args: self.save(*args))
    rate = learning_rate_schedule(tiny.OPTIMIZER, STEPS)
    try:
      with jax.set_mesh(self.mesh):
        state = train(
            tiny.start_state(self.mesh), self, tiny.compiled_step(), config=self.loop,
            learning_rate=lambda step: float(rate(step)), mesh=self.mesh, checkpoints=self.folder,
            on_log=self.on_log, on_resume=self.on_resume, warn=self.warnings.append, **more)
    except Killed:
      return self(monkeypatch, **more)
    return jax.tree.map(np.asarray, state)


SAVE = checkpoint.Checkpoints.save


@functools.cache
def batches(batch_size):
  return shuffled_batches(
      tiny.random_pairs(10), batch_size=batch_size, seed=3,
      collate=functools.partial(pair_arrays, lengths=tiny.LENGTHS, pad_id=tiny.PAD))


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
  """(final state, run) that nothing interrupted."""
  run = Run(tmp_path_factory.mktemp('whole'))
  with pytest.MonkeyPatch.context() as monkeypatch:
    return run(monkeypatch), run


def assert_same_bits(state, run, whole):
  for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(whole[0]), strict=True):
    np.testing.assert_array_equal(a, b)
  assert run.log == whole[1].log


def test_an_uninterrupted_run(whole):
  state, run = whole
  assert list(run.log) == [2, 4, 5] and run.resumed == [0] and run.read == list(range(STEPS))
  assert int(state.step) == STEPS
  assert [p.name for p in checkpoint.checkpoints(run.folder)] == ['step_00000002', 'step_00000004']
  names = {'loss', 'loss/preference', 'loss/nll', 'grad_norm', 'update_norm', 'learning_rate',
           'num_tokens', 'logps/chosen', 'logps/rejected', 'rewards/margins'}
  assert names <= run.log[2].keys() and 'nonfinite' not in run.log[2]


MOMENTS = [('batch', n) for n in range(STEPS)] + [
    (moment, step) for moment in ('before log', 'after log') for step in (2, 5)] + [
    (moment, step) for moment in ('before save', 'after save') for step in (2, 4)]
SURVIVES = {('batch', 2): 2, ('batch', 3): 2, ('batch', 4): 4, ('before log', 5): 4,
            ('after log', 5): 4, ('after save', 2): 2, ('before save', 4): 2, ('after save', 4): 4}


@pytest.mark.parametrize('moment', MOMENTS, ids=lambda m: f'{m[0]} {m[1]}')
def test_a_killed_run_ends_with_the_same_bits_and_log(whole, tmp_path, monkeypatch, moment):
  run = Run(tmp_path, kill=moment)
  state = run(monkeypatch)
  assert run.resumed == [0, SURVIVES.get(moment, 0)]
  assert_same_bits(state, run, whole)


def test_a_killed_run_on_eight_devices(tmp_path, monkeypatch):
  mesh = make_mesh(data=2, fsdp=2, tensor=2)
  loop = LoopConfig(steps=3, log_every=1, save_every=2)
  expected = Run(tmp_path / 'whole', mesh=mesh, loop=loop)
  found = Run(tmp_path / 'killed', mesh=mesh, loop=loop, kill=('batch', 2))
  expected_state = expected(monkeypatch)
  programs = tiny.compiled_step()._cache_size()
  assert_same_bits(found(monkeypatch), found, (expected_state, expected))
  assert found.resumed == [0, 2]
  assert tiny.compiled_step()._cache_size() == programs, 'restored arrays lie as the first ones'


def damage(folder, *steps):
  for step in steps:
    path = folder / f'step_{step:08d}' / 'state' / '_METADATA'
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize(('damaged', 'resumed'), [((4,), 2), ((2, 4), 0)])
def test_damaged_checkpoints_are_named_and_passed_over(
    whole, tmp_path, monkeypatch, damaged, resumed):
  run = Run(tmp_path)
  run(monkeypatch)
  damage(run.folder, *damaged)
  state = run(monkeypatch)
  assert run.resumed == [0, resumed]
  assert [w.split(':')[0].split('/')[-1] for w in run.warnings] == [
      f'step_{step:08d}' for step in sorted(damaged, reverse=True)]
  assert_same_bits(state, run, whole)


def test_logs_are_means_over_their_window(whole, tmp_path, monkeypatch):
  run = Run(tmp_path, loop=LoopConfig(steps=STEPS, log_every=1, save_every=100))
  run(monkeypatch)
  for name in ('loss', 'grad_norm', 'loss/nll', 'rewards/chosen'):
    assert whole[1].log[4][name] == pytest.approx((run.log[3][name] + run.log[4][name]) / 2)
  assert whole[1].log[4]['num_tokens'] == run.log[3]['num_tokens'] + run.log[4]['num_tokens']
  assert whole[1].log[4]['learning_rate'] == run.log[4]['learning_rate']


def test_stop_is_asked_at_checkpoints_and_again_after_a_restart(tmp_path, monkeypatch):
  asked = []

  def stop(step, state):
    asked.append((step, int(state.step)))
    return step == 2

  run = Run(tmp_path)
  assert [int(run(monkeypatch, stop=stop).step) for _ in range(2)] == [2, 2]
  assert asked == [(2, 2), (2, 2)] and run.read == [0, 1]


def test_the_optimizer_is_parked_while_the_run_is_looked_at(whole, tmp_path, monkeypatch):
  seen = []

  def stop(step, state):
    kinds = [{x.sharding.memory_kind for x in jax.tree.leaves(tree)}
             for tree in (state.opt_state, state.params)]
    seen.append((step, *kinds))
    return False

  run = Run(tmp_path, kill=('batch', 3))
  programs = tiny.compiled_step()._cache_size()
  state = run(monkeypatch, stop=stop, parks_optimizer=True)
  assert seen == [(step, {'pinned_host'}, {'device'}) for step in (2, 2, 4)]
  assert tiny.compiled_step()._cache_size() == programs
  assert_same_bits(state, run, whole)


def test_a_full_disk_stops_the_run_and_a_later_one_goes_on(whole, tmp_path, monkeypatch):
  run = Run(tmp_path)
  save = run.save

  def refuse(checkpoints, step, state, notes):
    if step == 4:
      raise InputError('the checkpoint could not be written', where=run.folder)
    save(checkpoints, step, state, notes)

  run.save = refuse
  with pytest.raises(InputError):
    run(monkeypatch)
  run.save = save
  assert_same_bits(run(monkeypatch), run, whole)
  assert run.resumed == [0, 2]


def terminated(run, monkeypatch, **more):
  """The run after SIGTERM, which must end by Preempted; what it had read by then."""
  with pytest.raises(Preempted) as caught:
    run(monkeypatch, **more)
  assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
  return str(caught.value)


class Terminating(Run):
  """Gets SIGTERM at the named moment, once."""

  def reach(self, moment, step):
    if self.kill == (moment, step):
      self.kill = None
      signal.raise_signal(signal.SIGTERM)


SAVED = {**{('batch', n): n + 1 for n in range(STEPS)}, ('before log', 2): 2, ('after log', 4): 4,
         ('before log', 5): 5, ('after log', 5): 5, ('after save', 2): 2, ('before save', 4): 4}


@pytest.mark.parametrize('moment', SAVED, ids=lambda m: f'{m[0]} {m[1]}')
def test_sigterm_saves_the_step_in_flight_and_the_window_of_the_log(
    whole, tmp_path, monkeypatch, moment):
  run = Terminating(tmp_path, kill=moment)
  message = terminated(run, monkeypatch)
  assert message == f'the run was asked to end; step {SAVED[moment]} of 5 is saved'
  assert run.read == list(range(SAVED[moment])), 'no step after the one in flight'
  state = run(monkeypatch)
  assert run.resumed == [0, SAVED[moment]] and run.read == list(range(STEPS))
  assert_same_bits(state, run, whole)


def test_sigterm_after_sigterm(whole, tmp_path, monkeypatch):
  run = Terminating(tmp_path)
  for step in range(STEPS):
    run.kill = ('batch', step)
    terminated(run, monkeypatch)
  assert_same_bits(run(monkeypatch), run, whole)
  assert run.resumed == list(range(STEPS + 1)) and run.read == list(range(STEPS))


def test_sigterm_while_the_run_is_looked_at_ends_the_look(whole, tmp_path, monkeypatch):
  asked = []

  def stop(step, state):
    asked.append(step)
    if len(asked) == 2:
      signal.raise_signal(signal.SIGTERM)
      raise AssertionError('the look went on')
    return False

  run = Run(tmp_path)
  assert 'step 4 of 5 is saved' in terminated(run, monkeypatch, stop=stop)
  assert_same_bits(run(monkeypatch, stop=stop), run, whole)
  assert asked == [2, 4, 4], 'what was not looked at to the end is looked at again'


def test_a_step_that_only_sigterm_saved_is_not_looked_at(whole, tmp_path, monkeypatch):
  asked = []
  run = Terminating(tmp_path, kill=('batch', 2))

  def look(step, state):
    asked.append(step)
    return False

  terminated(run, monkeypatch, stop=look)
  assert_same_bits(run(monkeypatch, stop=look), run, whole)
  assert asked == [2, 4]


def test_sigterm_before_the_first_step_saves_nothing(tmp_path, monkeypatch):
  run = Run(tmp_path)
  run.on_resume = lambda step: signal.raise_signal(signal.SIGTERM)
  assert terminated(run, monkeypatch) == 'the run was asked to end before step 1'
  assert run.read == [] and not checkpoint.checkpoints(run.folder)


def test_a_run_goes_on_with_other_devices(tmp_path, monkeypatch):
  """From one device to four: the same numbers up to rounding."""
  loop = LoopConfig(steps=3, log_every=1, save_every=2)
  one = Run(tmp_path, loop=loop)
  expected = one(monkeypatch)
  four = Run(tmp_path, loop=loop, mesh=make_mesh(fsdp=2, tensor=2, devices=jax.devices()[:4]))
  found = four(monkeypatch)
  assert four.resumed == [2] and list(four.log) == [3]
  assert four.log[3]['loss'] == pytest.approx(one.log[3]['loss'], rel=1e-5)
  for a, b in zip(jax.tree.leaves(found.params), jax.tree.leaves(expected.params), strict=True):
    np.testing.assert_allclose(a, b, atol=1e-5)


def test_how_many_checkpoints_are_kept(tmp_path, monkeypatch):
  run = Run(tmp_path, loop=LoopConfig(steps=STEPS, log_every=1, save_every=1, keep=1, keep_every=2))
  run(monkeypatch)
  assert [p.name[-1] for p in checkpoint.checkpoints(run.folder)] == ['2', '4']


def poisoned():
  """A batch with one reference log-prob that is not a number."""
  batch = {k: x.copy() for k, x in batches(4)[0].items()}
  row, column, place = np.argwhere(batch['mask'])[-1]
  batch['ref_logps'][row, column, place] = np.nan
  return batch


def test_a_step_that_is_not_finite_changes_nothing():
  mesh = tiny.one_device()
  state, _ = tiny.take_steps(
      tiny.compiled_step(), tiny.start_state(mesh), [batches(4)[0]], mesh)
  before = jax.tree.map(np.array, (state.params, state.opt_state))
  after, metrics = tiny.take_steps(tiny.compiled_step(), state, [poisoned()], mesh)
  for a, b in zip(
      jax.tree.leaves((after.params, after.opt_state)), jax.tree.leaves(before), strict=True):
    np.testing.assert_array_equal(a, b)
  assert float(metrics['nonfinite'].total) == 1
  assert int(after.step) == 2


def test_nan_stops_the_run_and_is_never_saved(tmp_path, monkeypatch):
  run = Run(tmp_path, loop=LoopConfig(steps=STEPS, log_every=1, save_every=1))
  monkeypatch.setattr(
      Run, '__getitem__', lambda self, step: poisoned() if step == 2 else batches(4)[step])
  with pytest.raises(NonFiniteError, match=r'step 3: the loss is nan.*Batch 2 held 4 rows'):
    run(monkeypatch)
  assert list(run.log) == [1, 2]
  assert [p.name for p in checkpoint.checkpoints(run.folder)] == ['step_00000001', 'step_00000002']


def test_batches_are_spread_over_the_devices():
  mesh = make_mesh(data=2, fsdp=4)
  batch = put_batch(batches(8)[0], mesh)
  assert {s.data.shape for s in batch['mask'].addressable_shards} == {(1, 2, 16)}
  assert {s.data.shape for s in batch['weights'].addressable_shards} == {(1,)}


@pytest.mark.parametrize(('loop', 'batch_size', 'micro_batches', 'message'), [
    (LoopConfig(0), 16, 1, '--steps: .*at least 1; found 0'),
    (LoopConfig(5, 0, 4), 16, 1, '--save_every'),
    (LoopConfig(5, 3, 4), 16, 1, '--save_every: .*multiple of --log_every=3; found 4'),
    (LoopConfig(5, 2, 4, keep=0), 16, 1, '--keep_last: .*at least 1; found 0'),
    (LoopConfig(5, 2, 4, keep_every=6), 16, 1,
     '--keep_every: .*multiple of --save_every=4; found 6'),
    (LoopConfig(5, 2, 4), 12, 1, '--batch_size: .*multiple of 8 .*found 12'),
    (LoopConfig(5, 2, 4), 16, 4, '--batch_size: .*multiple of 32 .*found 16'),
])
def test_loops_that_cannot_run(loop, batch_size, micro_batches, message):
  with pytest.raises(InputError, match=message):
    check_loop(loop, batch_size=batch_size, micro_batches=micro_batches,
               mesh=make_mesh(data=2, tensor=1))


def test_loops_that_can_run():
  mesh = make_mesh(data=2, fsdp=2, tensor=2)
  check_loop(LoopConfig(5, 2, 4), batch_size=8, micro_batches=2, mesh=mesh)
