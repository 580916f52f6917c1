"""One process of a small training run: `train.py FOLDER [MOMENT STEP PROCESS]`.

MOMENT is `batch` (before step STEP is fed) or `publish` (its checkpoint is about to be renamed);
PROCESS then kills itself, or, where it is `all`, every process of the run at once. A run that ends
leaves FOLDER/result.npz and FOLDER/log.json.
"""

import functools
import json
import os
import pathlib
import signal
import sys

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils

from jaxrl.data.batches import pair_arrays, shuffled_batches
from jaxrl.parallel import hosts
from jaxrl.parallel.mesh import make_mesh
from jaxrl.training.checkpoint import Checkpoints
from jaxrl.training.loop import LoopConfig, train
from jaxrl.training.optimizer import learning_rate_schedule
from tests import tiny_training as tiny

LOOP = LoopConfig(steps=5, log_every=1, save_every=2)
DEVICES = 4


class Batches:
  """The batches of the run; `reach` is called before each."""

  def __init__(self, reach=lambda moment, step: None):
    self.reach = reach
    self.batches = shuffled_batches(
        tiny.random_pairs(10), batch_size=8, seed=3,
        collate=functools.partial(pair_arrays, lengths=tiny.LENGTHS, pad_id=tiny.PAD))

  def __getitem__(self, step):
    self.reach('batch', step)
    return self.batches[step]


def run(folder, batches):
  """(leaves of the final state as whole arrays, log, the steps it was resumed at)."""
  mesh = make_mesh(data=2, fsdp=2, devices=jax.devices()[:DEVICES])
  rate = learning_rate_schedule(tiny.OPTIMIZER, LOOP.steps)
  log, resumed = {}, []

  def keep(step, numbers):
    log[str(step)] = {k: v for k, v in numbers.items() if not k.startswith('perf/')}

  with jax.set_mesh(mesh):
    state = train(
        tiny.start_state(mesh), batches, tiny.compiled_step(), config=LOOP,
        learning_rate=lambda step: float(rate(step)), mesh=mesh,
        checkpoints=epath.Path(folder) / 'checkpoint', on_log=keep, on_resume=resumed.append)
    whole = multihost_utils.process_allgather(state, tiled=True)
  return [np.asarray(x) for x in jax.tree.leaves(whole)], log, resumed


def killer(folder, moment, step, process):
  """Kills as it says on the command line when that moment is reached."""
  (folder / f'{jax.process_index()}.pid').write_text(str(os.getpid()))
  hosts.barrier('pids are written', 60)

  def reach(found_moment, found_step):
    if (found_moment, found_step) != (moment, int(step)):
      return
    if process == 'all' and hosts.is_writer():
      for path in sorted(folder.glob('*.pid'), reverse=True):   # itself last
        os.kill(int(path.read_text()), signal.SIGKILL)
    elif process == str(jax.process_index()):
      os.kill(os.getpid(), signal.SIGKILL)

  publish = Checkpoints._publish

  def published(self, step, notes):
    reach('publish', step)
    publish(self, step, notes)

  Checkpoints._publish = published
  return reach


def main(folder, *kill):
  folder = pathlib.Path(folder)
  jax.config.update('jax_numpy_rank_promotion', 'raise')
  with hosts.start(hosts.config_from_environment()):
    leaves, log, resumed = run(folder, Batches(killer(folder, *kill)) if kill else Batches())
    if hosts.is_writer():
      np.savez(folder / 'result.npz', *leaves)
      (folder / 'log.json').write_text(json.dumps([log, resumed]))


if __name__ == '__main__':
  main(*sys.argv[1:])
