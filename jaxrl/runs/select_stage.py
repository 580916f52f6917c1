"""Stage: how many steps to train, by greedy accuracy on held-out training prompts.

Pang et al. 2024 train up to a maximum, pick the best step on prompts held out from the training
set, and then train again from the same model on all pairs for that many steps.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable

import grain
from etils import epath

from jaxrl.errors import InputError
from jaxrl.runs.metrics import read_metrics
from jaxrl.runs.session import Model, Session
from jaxrl.runs.train_stage import Trainer, run_training
from jaxrl.training.loop import LoopConfig


def select_stage(
    session: Session, iteration: int, model: Model, trainer: Trainer, batches: grain.MapDataset,
    loop: LoopConfig, accuracy: Callable[[dict], dict[str, float]], *, expected_first_loss: float,
) -> int:
  """Writes `selection.json`; returns the step whose parameters were best, the earliest of equals.

  `accuracy(params)` returns numbers with 'greedy_accuracy' among them; it is asked at every
  `loop.save_every` steps. The trained parameters are not kept.

  Raises:
    InputError: training would end before the first look.
  """
  name = f'iteration_{iteration:02d}/select'
  if loop.steps < loop.save_every:
    raise InputError('there would be no step to choose from', where='--save_every',
                     expected=f'at most the {loop.steps} steps of iteration {iteration}',
                     found=loop.save_every)

  def search(scratch: epath.Path) -> None:
    def look(step: int, params: dict) -> bool:
      numbers = accuracy(params)
      session.metrics.rewind(iteration, 'select_dev', step - 1)
      session.metrics.write(iteration, 'select_dev', step, numbers)
      session.metrics.sync()
      session.progress.line(
          f'  dev accuracy {numbers["greedy_accuracy"]:.3f} after {step} steps')
      return False

    # One step past the last look, which falls on a checkpoint.
    run_training(session, scratch, name, iteration, model, trainer, batches,
                 dataclasses.replace(loop, steps=loop.steps + 1),
                 expected_first_loss=expected_first_loss, stop=look, parks_optimizer=True)

  def produce(scratch: epath.Path, _: None) -> dict:
    seen = {
        record['step']: record['greedy_accuracy']
        for record in read_metrics(session.run.folder / 'metrics.jsonl')
        if (record['iteration'], record['stage']) == (iteration, 'select_dev')
    }
    best = max(seen, key=lambda step: (seen[step], -step))
    (scratch / 'selection.json').write_text(json.dumps({'best': best, 'accuracy': seen}, indent=1))
    return {'best_step': best, 'dev_accuracy': seen[best]}

  counts = session.run.stage(
      name, (f'iteration_{iteration:02d}/selection.json',), produce, together=search).counts
  return int(counts['best_step'])
