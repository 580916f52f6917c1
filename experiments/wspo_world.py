"""The embedded world of WSPO: a weak base, its alignment by IRPO, and the data for a strong model.

Stages, all inside the run folder: the strong model's SFT as in every experiment (world/, seed/),
the weak model's (weak/model), `experiments.irpo` on the weak model in a run folder of its own
(weak/irpo), and the pairs it was first aligned with as a preference file.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys

import jax
from absl import flags
from etils import epath

from experiments import irpo_flags
from jaxrl.errors import InputError
from jaxrl.models.config import ModelConfig
from jaxrl.models.hugging_face import save_model
from jaxrl.models.params import init_params
from jaxrl.parallel import hosts
from jaxrl.runs import tables
from jaxrl.runs.session import Session

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
    # Of several processes one starts it, as a run of one process.
    environment = {name: text for name, text in os.environ.items() if name not in (
        hosts.COORDINATOR, hosts.PROCESSES, hosts.PROCESS_ID)}
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


