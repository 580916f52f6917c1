"""One process of several that train as a test tells them: `PROGRAM FOLDER RUNS`, RUNS in JSON.

A run is a folder's name with what happens in it: {"name": ..., "save_every": 3, "terminate":
[process, step], "refuse": process}. Each process writes what it saw to FOLDER/PROCESS.json.
"""

import contextlib
import functools
import json
import pathlib
import resource
import signal
import sys

import jax
from etils import epath

from jaxrl.parallel import hosts

STEPS = 6


def batches():
  from jaxrl.data.batches import pair_arrays, shuffled_batches
  from tests import tiny_training as tiny
  return shuffled_batches(
      tiny.random_pairs(12), batch_size=4, seed=3,
      collate=functools.partial(pair_arrays, lengths=tiny.LENGTHS, pad_id=tiny.PAD))


class Terminating:
  """Batches, of which reading one sends SIGTERM to the process."""

  def __init__(self, at):
    self.batches, self.at = batches(), at

  def __getitem__(self, step):
    if step == self.at:
      signal.raise_signal(signal.SIGTERM)
    return self.batches[step]


def train_in(folder, *, mesh, terminate=None, **loop):
  """(how it ended, {step: loss}, steps resumed from, final state or None)."""
  from jaxrl.errors import InputError
  from jaxrl.training.loop import LoopConfig, train
  from jaxrl.training.preemption import Preempted
  from tests import tiny_training as tiny
  log, resumed, state, ended = {}, [], None, 'whole'
  with jax.set_mesh(mesh):
    try:
      state = train(
          tiny.start_state(mesh), Terminating(terminate), tiny.compiled_step(), mesh=mesh,
          config=LoopConfig(steps=STEPS, log_every=3, **loop), checkpoints=epath.Path(folder),
          learning_rate=lambda step: 1e-2, on_resume=resumed.append,
          on_log=lambda step, numbers: log.update({str(step): numbers['loss']}))
    except (Preempted, InputError) as error:
      ended = f'{type(error).__name__}: {error}'
  return ended, log, resumed, state


@contextlib.contextmanager
def refusing_disk():
  """No file that this process writes may be longer than this."""
  soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))
  try:
    yield
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def main(folder, runs):
  from jaxrl.parallel.mesh import make_mesh
  from jaxrl.training.checkpoint import Checkpoints
  me, mesh, said = jax.process_index(), make_mesh(), {}
  for run in runs:
    process, step = run.get('terminate', (None, None))
    with refusing_disk() if run.get('refuse') == me else contextlib.nullcontext():
      ended, log, resumed, state = train_in(
          folder / run['name'], mesh=mesh, save_every=run['save_every'],
          terminate=step if process == me else None)
    if state is not None:
      with Checkpoints(folder / f'{run["name"]}_end') as end:
        end.save(STEPS, state)
    said[run['name']] = {'ended': ended, 'log': log, 'resumed': resumed}
  (folder / f'{me}.json').write_text(json.dumps(said))


if __name__ == '__main__':
  with hosts.start(hosts.config_from_environment()):
    main(pathlib.Path(sys.argv[1]), json.loads(sys.argv[2]))
