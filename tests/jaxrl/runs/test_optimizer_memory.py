"""No state of an optimizer is alive while a round samples."""

import dataclasses
import functools

import jax
import numpy as np
from etils import epath

from jaxrl.data.batches import Pair, TokenRow, pair_arrays, shuffled_batches
from jaxrl.models.config import ModelConfig
from jaxrl.models.hugging_face import save_model
from jaxrl.models.params import init_params
from jaxrl.parallel.mesh import make_mesh
from jaxrl.runs import sample_stage as sampling
from jaxrl.runs import session as sessions
from jaxrl.runs.folder import open_run
from jaxrl.runs.metrics import MetricsLog
from jaxrl.runs.progress import Progress
from jaxrl.runs.sample_stage import Draws, sample_stage
from jaxrl.runs.train_stage import make_trainer, train_stage
from jaxrl.sampling.engine import make_engine
from jaxrl.sampling.requests import Sample, SamplingConfig
from jaxrl.sampling.sizes import EngineConfig
from jaxrl.tokens.prompts import EncodedPrompt
from jaxrl.tokens.tiny import write_tokenizer
from jaxrl.training.logps import ComputePolicy
from jaxrl.training.loop import LoopConfig
from jaxrl.training.objectives import preference_objective
from jaxrl.training.optimizer import OptimizerConfig


def start(folder):
  vocabulary = write_tokenizer(folder / 'tokenizer', ['two and two'], vocab_size=270)
  config = ModelConfig('llama', vocabulary, 16, 1, 2, 1, 8, 32, 64, tie_embeddings=True)
  save_model(folder / 'model', init_params(jax.random.key(0), config), config,
             tokenizer_from=folder / 'tokenizer')
  return folder / 'model'


def pairs(count):
  rng = np.random.default_rng(0)
  made = []
  for _ in range(count):
    prompt, chosen, rejected = (rng.integers(5, 260, n).tolist() for n in (4, 6, 5))
    made.append(Pair(TokenRow(prompt, chosen), TokenRow(prompt, rejected),
                     -np.ones(6, np.float32), -np.ones(5, np.float32), weight=1.0))
  return made


def buffers(tree):
  return {shard.data.unsafe_buffer_pointer() for x in jax.tree.leaves(tree)
          for shard in x.addressable_shards}


def others(known):
  """Live arrays with the shape of a parameter that are not among the trees `known`."""
  shapes = {x.shape for x in jax.tree.leaves(known) if x.ndim > 1}
  held = buffers(known)
  return [x for x in jax.live_arrays() if x.shape in shapes and not buffers(x) <= held]


def test_sampling_has_the_devices_to_itself(tmp_path, monkeypatch):
  folder = start(epath.Path(tmp_path))
  mesh = make_mesh(devices=jax.devices()[:1])
  config, tokenizer = sessions.open_model_folder(folder)
  seen = {}

  def generate(engine, params, requests, *, seed, **options):
    seen['sampling'] = len(others((model.params, params)))
    for n, request in enumerate(requests):
      yield Sample(n, [7], [-1.0], 'eos', seed, request.key, request.draw, None)

  monkeypatch.setattr(sampling, 'generate', generate)
  with open_run(tmp_path / 'run', flags={}, versions={}) as run, jax.set_mesh(mesh), \
       MetricsLog(run.folder / 'metrics.jsonl') as metrics:
    compute = ComputePolicy('float32', 16, 'all')
    session = sessions.Session(run, metrics, Progress(), mesh, config, tokenizer, compute, 0,
                               lambda: 0)
    engine = make_engine(config, SamplingConfig(8), EngineConfig(4), mesh, max_prompt=8,
                         eos_ids=tokenizer.eos_ids, pad_id=0)
    trainer = make_trainer(
        preference_objective('dpo', {'beta': 0.1}, config, compute), OptimizerConfig(1e-2), 1)
    model = sessions.load_model(session, folder)

    def step(state, batch, learning_rate):
      seen['training'] = len(others((model.params, state.params)))
      return trainer.step(state, batch, learning_rate)

    batches = shuffled_batches(pairs(8), batch_size=4, seed=1, collate=functools.partial(
        pair_arrays, lengths=(16,), pad_id=0))
    train_stage(session, 'iteration_01/train', 1, model,
                dataclasses.replace(trainer, step=step), batches, LoopConfig(2, 1, 1))
    model = sessions.load_model(
        session, session.run.path('iteration_01/train', 'iteration_01/model'))
    sample_stage(session, 2, engine, model, [EncodedPrompt('p', '', (5, 6))], Draws(1, 1.0, 0))
  matrices = sum(x.ndim > 1 for x in jax.tree.leaves(model.params))
  assert seen['training'] >= 2 * matrices      # two moments of each: the count is not blind
  assert seen['sampling'] == 0
