"""Choosing the number of steps on held-out prompts, and the exact shift of log-probs."""

import functools
import json
import math

import jax
import numpy as np
import pytest
from etils import epath

from jaxrl.data.batches import pair_arrays, shuffled_batches
from jaxrl.errors import InputError
from jaxrl.models.config import ModelConfig
from jaxrl.models.hugging_face import save_model
from jaxrl.models.params import init_params
from jaxrl.parallel.mesh import make_mesh
from jaxrl.runs import session as sessions
from jaxrl.runs import tables
from jaxrl.runs.folder import open_run
from jaxrl.runs.metrics import MetricsLog, read_metrics
from jaxrl.runs.progress import Progress
from jaxrl.runs.reference_stage import reference_stage, training_pairs
from jaxrl.runs.select_stage import select_stage
from jaxrl.runs.shift_stage import shift_stage
from jaxrl.runs.train_stage import make_trainer, train_stage
from jaxrl.tokens.tiny import write_tokenizer
from jaxrl.training.logps import ComputePolicy
from jaxrl.training.loop import LoopConfig
from jaxrl.training.objectives import preference_objective
from jaxrl.training.optimizer import OptimizerConfig

LENGTHS = (16,)


@pytest.fixture(scope='module')
def start(tmp_path_factory):
  """A Hugging Face folder with random weights and a tokenizer."""
  folder = epath.Path(tmp_path_factory.mktemp('start'))
  vocabulary = write_tokenizer(folder / 'tokenizer', ['two and two'], vocab_size=270)
  config = ModelConfig('llama', vocabulary, 16, 1, 2, 1, 8, 32, 64, tie_embeddings=True)
  save_model(folder / 'model', init_params(jax.random.key(0), config), config,
             tokenizer_from=folder / 'tokenizer')
  return folder / 'model'


@pytest.fixture
def session(start, tmp_path):
  mesh = make_mesh(devices=jax.devices()[:1])
  model, tokenizer = sessions.open_model_folder(start)
  with open_run(tmp_path / 'run', flags={}, versions={}) as run, jax.set_mesh(mesh), \
       MetricsLog(run.folder / 'metrics.jsonl') as metrics:
    made = sessions.Session(run, metrics, Progress(), mesh, model, tokenizer,
                            ComputePolicy('float32', 16, 'all'), 0, lambda: 0)
    _publish_pairs(made)
    yield made


def _publish_pairs(session):
  rng = np.random.default_rng(0)
  rows = [{
      'prompt_id': f'p{n}', 'pair_index': 0, 'chosen_index': 0, 'rejected_index': 1,
      'prompt_ids': rng.integers(5, 260, 4).tolist(),
      'chosen_ids': rng.integers(5, 260, 6).tolist(),
      'rejected_ids': rng.integers(5, 260, 5).tolist(), 'weight': 1.0, 'chosen_why': '',
      'rejected_why': '', 'method': 'irpo', 'iteration': 1} for n in range(12)]
  samples = [{
      'prompt_id': r['prompt_id'], 'sample_index': side, 'prompt': '', 'response': '',
      'prompt_ids': r['prompt_ids'], 'response_ids': ids, 'logprobs': [0.0] * len(ids),
      'finish_reason': 'eos', 'temperature': 1.0, 'top_p': 1.0, 'iteration': 1, 'source_model': ''}
      for r in rows for side, ids in enumerate((r['chosen_ids'], r['rejected_ids']))]
  for name, table, schema in (('pairs', rows, tables.PAIRS), ('samples', samples, tables.SAMPLES)):
    session.run.stage(
        f'iteration_01/{name}', (f'iteration_01/{name}.parquet',),
        lambda scratch, n=name, t=table, s=schema: (
            tables.write_table(scratch / f'{n}.parquet', t, s), {})[1])


def _trainer(session):
  objective = preference_objective(
      'irpo', {'beta': 0.1, 'alpha': 1.0}, session.model, session.compute)
  return make_trainer(objective, OptimizerConfig(1e-2), 1)


def _batches(pairs):
  return shuffled_batches(
      pairs, batch_size=4, seed=1,
      collate=functools.partial(pair_arrays, lengths=LENGTHS, pad_id=0))


def test_the_earliest_best_step_is_chosen_and_survives_a_failure(session, start):
  model = sessions.load_model(session, start)
  reference_stage(session, 1, model, LENGTHS, 8)
  pairs = training_pairs(session, 1, model)
  trainer = _trainer(session)
  accuracy = iter([0.2, 0.6, RuntimeError('killed'), 0.6, 0.6, 0.4])
  seen = []

  def look(params):
    value = next(accuracy)
    if isinstance(value, Exception):
      raise value
    seen.append(float(np.asarray(params['final_norm']).sum()))
    return {'greedy_accuracy': value}

  def choose():
    return select_stage(session, 1, model, trainer, _batches(pairs), LoopConfig(8, 2, 2), look,
                        expected_first_loss=math.log(2))

  with pytest.raises(RuntimeError, match='killed'):
    choose()
  # The restart goes on from the newest checkpoint: it looks at step 6 again, then at 8.
  assert choose() == 4
  records = [r for r in read_metrics(session.run.folder / 'metrics.jsonl')
             if r['stage'] == 'select_dev']
  assert [(r['step'], r['greedy_accuracy']) for r in records] == [
      (2, 0.2), (4, 0.6), (6, 0.6), (8, 0.6)]
  written = json.loads((session.run.folder / 'iteration_01' / 'selection.json').read_text())
  assert written['best'] == 4 and len(set(seen)) == len(seen)
  assert choose() == 4        # finished: asks nothing, the iterator would be exhausted


def test_no_look_before_training_ends_is_refused(session, start):
  model = sessions.load_model(session, start)
  with pytest.raises(InputError, match='--save_every.*no step to choose from'):
    select_stage(session, 1, model, _trainer(session), None, LoopConfig(3, 2, 4), lambda p: {},
                 expected_first_loss=math.log(2))


def test_shift_is_zero_without_training_and_exact_with_it(session, start):
  model = sessions.load_model(session, start)
  reference_stage(session, 1, model, LENGTHS, 8)
  pairs = training_pairs(session, 1, model)
  train_stage(session, 'iteration_01/train', 1, model, _trainer(session), _batches(pairs),
              LoopConfig(6, 2, 2), expected_first_loss=math.log(2))
  trained = sessions.load_model(
      session, session.run.path('iteration_01/train', 'iteration_01/model'))
  numbers = shift_stage(session, 1, model, trained, LENGTHS, 8)
  assert numbers['chosen/responses'] == 12
  assert numbers['chosen/change_low'] > 0       # NLL at this learning rate is memorised at once
  np.testing.assert_allclose(
      numbers['chosen/after'] - numbers['chosen/before'], numbers['chosen/change'], rtol=1e-5)
  reference = sum(float(np.sum(np.float32(p.chosen_ref))) for p in pairs) / 12
  np.testing.assert_allclose(numbers['chosen/before'], reference, rtol=1e-6)
  session.run.forget('iteration_01/shift')
  none = shift_stage(session, 1, model, model, LENGTHS, 8)
  assert abs(none['chosen/change']) < 1e-5 and abs(none['rejected/change']) < 1e-5


def test_reference_of_another_model_is_refused(session, start):
  model = sessions.load_model(session, start)
  reference_stage(session, 1, model, LENGTHS, 8)
  other = sessions.Model(model.folder, model.params, 'another')
  with pytest.raises(InputError, match='reference.parquet.*computed for something else'):
    training_pairs(session, 1, other)
