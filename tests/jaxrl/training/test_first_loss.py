"""Training starts at ln 2 where the reference is the policy itself, and is refused elsewhere."""

import dataclasses
import math

import jax
import numpy as np
import pytest
from etils import epath

from jaxrl.data.batches import pair_arrays, shuffled_batches
from jaxrl.models.identity import identity
from jaxrl.models.params import param_shardings
from jaxrl.runs.folder import open_run
from jaxrl.runs.metrics import MetricsLog, read_metrics
from jaxrl.runs.progress import Progress
from jaxrl.runs.session import Model, Session
from jaxrl.runs.train_stage import FirstLossError, Trainer, train_stage
from jaxrl.training.loop import LoopConfig
from tests import tiny_training as tiny
from tests.tiny_model import CONFIG, random_params


class Reached(Exception):
  """Training is over and the model is being written, which is another test's matter."""


@pytest.fixture(scope='module')
def pairs():
  return tiny.own_reference(tiny.random_pairs(8), random_params())


def collate(rows):
  return pair_arrays(rows, tiny.LENGTHS, tiny.PAD)


@pytest.mark.parametrize('loss', ['dpo', 'irpo'])
def test_the_first_loss_is_ln_2(pairs, loss):
  mesh = tiny.one_device()
  _, metrics = tiny.take_steps(
      tiny.compiled_step(loss), tiny.start_state(mesh), [collate(pairs[:4])], mesh)
  found = metrics.get('loss/preference', metrics['loss']).value()
  np.testing.assert_allclose(found, math.log(2), rtol=1e-6)
  if loss == 'irpo':
    nll = np.mean([-np.mean(p.chosen_ref) for p in pairs[:4]])
    np.testing.assert_allclose(metrics['loss'].value(), math.log(2) + nll, rtol=1e-5)
    np.testing.assert_allclose(metrics['loss/nll'].value(), nll, rtol=1e-5)


def run_stage(folder, pairs, monkeypatch):
  """Trains three steps inside a run; raises Reached where it would write the model."""
  mesh = tiny.one_device()
  params = jax.device_put(random_params(), param_shardings(CONFIG, mesh))
  model = Model(epath.Path(folder), params, identity(params))

  def write(*unused):
    raise Reached

  monkeypatch.setattr('jaxrl.runs.train_stage.write_model', write)
  batches = shuffled_batches(pairs, batch_size=4, seed=0, collate=collate)
  with open_run(folder, flags={}, versions={}) as run, jax.set_mesh(mesh), MetricsLog(
      run.folder / 'metrics.jsonl') as metrics:
    session = Session(
        run, metrics, Progress(), mesh, CONFIG, None, tiny.POLICY, seed=0, programs=lambda: 0)
    train_stage(
        session, 'iteration_01/train', 1, model, Trainer(tiny.compiled_step(), tiny.OPTIMIZER),
        batches, LoopConfig(3, 1, 1), expected_first_loss=math.log(2))


def test_a_stage_whose_reference_is_its_model_trains(pairs, tmp_path, monkeypatch):
  with pytest.raises(Reached):
    run_stage(tmp_path / 'run', pairs, monkeypatch)
  assert [r['step'] for r in read_metrics(tmp_path / 'run' / 'metrics.jsonl')] == [1, 2, 3]


@pytest.mark.parametrize('change', [
    lambda p: dataclasses.replace(p, chosen_ref=p.chosen_ref + np.float32(0.1)),
    lambda p: dataclasses.replace(p, rejected=p.chosen, rejected_ref=p.chosen_ref[::-1] * 2),
], ids=['log-probs', 'ids'])
def test_a_stage_whose_reference_is_something_else_is_refused(pairs, tmp_path, monkeypatch, change):
  with pytest.raises(FirstLossError, match='the first preference loss is .* and not 0.693147'):
    run_stage(tmp_path / 'run', [change(p) for p in pairs], monkeypatch)
  assert not list(tmp_path.glob('run/**/step_*')), 'nothing of it was saved'
