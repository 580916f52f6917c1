"""A model folder and problem files that `experiments.irpo --model=...` takes, both very small."""

from __future__ import annotations

import json
import pathlib
import shutil

import jax
import numpy as np
import safetensors.numpy
from etils import epath

from jaxrl.models.config import ModelConfig
from jaxrl.models.hugging_face import save_model
from jaxrl.models.params import decoder_specs, is_spec
from jaxrl.tokens.tiny import write_tokenizer

CONFIG = ModelConfig(
    family='llama', vocab_size=400, d_model=16, n_layers=1, n_heads=2, n_kv=2, d_head=8, d_mlp=32,
    max_length=64, tie_embeddings=True)
# Flags with which the model fits on eight devices.
FLAGS = (
    '--template={question}', '--max_prompt_length=40', '--max_new_tokens=8', '--length_buckets=47',
    '--slots=8', '--score_batch=8', '--batch_size=8', '--compute_dtype=float32')


def write_model(folder: pathlib.Path) -> None:
  """Random weights and a byte-level tokenizer of at most 400 ids."""
  rng = np.random.default_rng(0)
  params = jax.tree.map(
      lambda spec: rng.normal(0, 0.1, spec.shape).astype(np.float32), decoder_specs(CONFIG),
      is_leaf=is_spec)
  tokenizer = folder.with_name('tokenizer')
  write_tokenizer(epath.Path(tokenizer), ['How many apples has Ana?'], vocab_size=400)
  save_model(folder, params, CONFIG, tokenizer_from=tokenizer)
  shutil.rmtree(tokenizer)


def problem(number: int) -> dict:
  """A row in the style of GSM8K."""
  return {'id': str(number), 'question': f'Ana has {number}, finds 2.',
          'answer': f'{number}+2={number + 2}\n#### {number + 2}'}


def write_problems(path: pathlib.Path, rows: list) -> None:
  path.write_text(''.join(
      (row if isinstance(row, str) else json.dumps(row)) + '\n' for row in rows))


def edit_weights(folder: pathlib.Path, edit) -> None:
  tensors = safetensors.numpy.load_file(folder / 'model.safetensors')
  edit(tensors)
  safetensors.numpy.save_file(tensors, folder / 'model.safetensors')


def edit_json(path: pathlib.Path, edit) -> None:
  value = json.loads(path.read_text())
  edit(value)
  path.write_text(json.dumps(value))
