"""The embedded world of WSPO: a weak base, its alignment by IRPO, and the data for a strong model.

Stages, all inside the run folder: the strong model's SFT as in every experiment (world/, seed/),
the weak model's (weak/model), `experiments.irpo` on the weak model in a run folder of its own
(weak/irpo), and the pairs it was first aligned with as a preference file.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import subprocess
import sys

import jax
from absl import flags
from etils import epath

from experiments import irpo_flags, world
from jaxrl.data.batches import sequence_arrays, shuffled_batches
from jaxrl.errors import InputError
from jaxrl.models.config import ModelConfig
from jaxrl.models.hugging_face import save_model
from jaxrl.models.params import init_params
from jaxrl.rewards.checking import AnswerRule
from jaxrl.runs import tables
from jaxrl.runs.evaluation_stage import greedy_accuracy
from jaxrl.runs.problem_set import ProblemSet
from jaxrl.runs.session import TRAIN_STREAM, Session, load_model
from jaxrl.runs.train_stage import make_trainer, train_stage
from jaxrl.sampling.engine import Engine
from jaxrl.training.loop import LoopConfig
from jaxrl.training.objectives import sft_objective
from jaxrl.training.optimizer import OptimizerConfig

FLAGS = flags.FLAGS


def weak_config(strong: ModelConfig) -> ModelConfig:
  """About 0.4M parameters: fewer and narrower layers than the strong model, the same vocabulary."""
  return dataclasses.replace(strong, d_model=96, n_layers=3, n_heads=3, n_kv=3, d_mlp=288)


def start_stage(session: Session, folder: epath.Path) -> epath.Path:
  """Stage 'weak/start': the weak model's random weights, with the tokenizer of `folder`/start."""

  def produce(scratch: epath.Path) -> dict:
    if (scratch / 'start').exists():
      (scratch / 'start').rmtree()
    config = weak_config(session.model)
    params = init_params(jax.random.key(FLAGS.seed + 1), config)
    save_model(scratch / 'start', params, config, tokenizer_from=folder / 'start')
    return {}

  session.run.stage('weak/start', ('weak/start',), produce)
  return session.run.path('weak/start', 'weak/start')


def weak_seed_stage(
    session: Session, folder: epath.Path, start: epath.Path, engine: Engine, rule: AnswerRule,
    dev: ProblemSet, lengths: tuple[int, ...],
) -> epath.Path:
  """Stage 'weak/sft': the weak base, trained until --weak_accuracy; returns its folder.

  `session` is the weak model's. The same problems and settings as the strong model's.

  Raises:
    InputError: the accuracy was not reached within --seed_max_steps.
  """
  trainer = make_trainer(
      sft_objective(session.model, session.compute),
      OptimizerConfig(FLAGS.seed_learning_rate, warmup_steps=world.SEED_WARMUP), 1)
  every, limit = FLAGS.seed_check_every, FLAGS.seed_max_steps

  def stop(step: int, params: dict) -> bool:
    if step < min(FLAGS.seed_first_check, limit):
      return False
    accuracy = greedy_accuracy(
        session, engine, params, dev.problems, dev.prompts, rule)['greedy_accuracy']
    session.progress.line(f'  weak base: greedy dev accuracy {accuracy:.3f} at step {step}')
    if step >= limit and accuracy < FLAGS.weak_accuracy:
      raise InputError(
          'the weak model did not reach its accuracy', where='--seed_max_steps',
          expected=f'{FLAGS.weak_accuracy} on dev problems by step {limit}', found=accuracy,
          fix='Raise --seed_max_steps, or lower --weak_accuracy')
    return accuracy >= FLAGS.weak_accuracy

  batches = shuffled_batches(
      world.seed_rows(session, folder), batch_size=FLAGS.seed_batch_size,
      seed=session.stream_seed(0, TRAIN_STREAM),
      collate=functools.partial(sequence_arrays, lengths=lengths, pad_id=session.tokenizer.pad_id))
  train_stage(
      session, 'weak/sft', 0, load_model(session, start), trainer, batches,
      LoopConfig(steps=limit + 1, log_every=every, save_every=every), stop=stop)
  return session.run.path('weak/sft', 'weak/model')


def align_stage(session: Session, folder: epath.Path, base: epath.Path) -> epath.Path:
  """Stage 'weak/align': `experiments.irpo` from the weak base; returns the aligned model's folder.

  It runs in a process of its own, whose run folder is published as weak/irpo.

  Raises:
    InputError: the run ended with an error.
  """

  def produce(scratch: epath.Path) -> dict:
    command = [
        sys.executable, '-m', 'experiments.irpo', f'--flagfile={irpo_flags.WORLD_FLAGS}',
        f'--run_dir={scratch / "irpo"}', f'--model={base}', f'--train={folder / "train.jsonl"}',
        f'--test={folder / "test.jsonl"}', f'--iterations={FLAGS.weak_iterations}', '--votes=1',
        f'--seed={FLAGS.seed}', *(
            f'--{name}={text}' for name in ('max_prompt_length', 'max_new_tokens')
            if (text := FLAGS[name].value) is not None)]
    environment = dict(os.environ)
    if session.mesh.devices.flat[0].platform != 'cpu':
      environment['JAX_PLATFORMS'] = 'cpu'   # the accelerator is held by this process
    session.progress.line('$ ' + ' '.join(command[1:]))
    if (status := subprocess.run(command, env=environment).returncode) != 0:
      raise InputError('the alignment of the weak model failed', where=scratch / 'irpo',
                       expected='exit status 0', found=status,
                       fix='See its message above; the same command goes on from there')
    return {'iterations': FLAGS.weak_iterations}

  session.run.stage('weak/align', ('weak/irpo',), produce)
  run = session.run.path('weak/align', 'weak/irpo')
  return run / f'iteration_{FLAGS.weak_iterations:02d}' / 'model'


def preference_stage(session: Session, folder: epath.Path) -> epath.Path:
  """Stage 'weak/preferences': the pairs of the first iteration as a preference file.

  These are the weak base's own responses, right and wrong ones to each problem that has both. A
  response of several pairs is learned from once.
  """

  def produce(scratch: epath.Path) -> dict:
    first = session.run.path('weak/align', 'weak/irpo') / 'iteration_01'
    questions = {row['id']: row['question'] for row in map(
        json.loads, (folder / 'train.jsonl').read_text().splitlines())}
    responses = {
        (row['prompt_id'], row['sample_index']): row['response']
        for row in tables.read_table(first / 'samples.parquet', tables.SAMPLES).to_pylist()}
    lines = [
        json.dumps({
            'id': f'{row["prompt_id"]}/{row["pair_index"]}',
            'prompt': questions[row['prompt_id']],
            'chosen': responses[row['prompt_id'], row['chosen_index']],
            'rejected': responses[row['prompt_id'], row['rejected_index']]})
        for row in tables.read_table(first / 'pairs.parquet', tables.PAIRS).to_pylist()]
    (scratch / 'preferences.jsonl').write_text('\n'.join(lines) + '\n')
    return {'pairs': len(lines)}

  session.run.stage('weak/preferences', ('weak/preferences.jsonl',), produce)
  return session.run.path('weak/preferences', 'weak/preferences.jsonl')


