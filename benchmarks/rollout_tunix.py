"""Tunix's sampler as a contender of the rollout benchmark; runs in an environment of its own.

Its best case: the cache is no longer than it must be, everything is compiled before the clock
starts, a batch ends as soon as its longest row does, no log-probs are kept, and at top-p 1 nothing
is sorted.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
from pathlib import Path

import jax
import jax.numpy as jnp
from tunix.generate import sampler as tunix_sampler
from tunix.models.llama3 import model as llama3
from tunix.models.llama3 import params as llama3_params

from benchmarks.rollout_worker import Contender
from benchmarks.rollout_workload import VOCABULARY, Workload


class _Ids:
  """A tokenizer for prompts that are ids already; an EOS that is never drawn."""

  def encode(self, ids):
    return list(ids)

  def decode(self, ids):
    return ''

  def bos_id(self):
    return 0      # read as "none"

  def eos_id(self):
    return VOCABULARY

  def pad_id(self):
    return 0


class _RowLengths(tunix_sampler.Sampler):
  """Ends a batch with its longest row, in the same compiled program for every batch."""

  longest: int | None = None

  def init_sample_state(self, all_input_ids, *args, **kwargs):
    state = super().init_sample_state(all_input_ids, *args, **kwargs)
    if self.longest is None:
      return state
    return dataclasses.replace(state, total_sampling_steps=all_input_ids.shape[1] + self.longest)


def llama_config(folder: str) -> llama3.ModelConfig:
  c = json.loads((Path(folder) / 'config.json').read_text())
  return llama3.ModelConfig(
      num_layers=c['num_hidden_layers'], vocab_size=c['vocab_size'], embed_dim=c['hidden_size'],
      hidden_dim=c['intermediate_size'], num_heads=c['num_attention_heads'],
      head_dim=c['head_dim'], num_kv_heads=c['num_key_value_heads'],
      rope_theta=c['rope_parameters']['rope_theta'], norm_eps=c['rms_norm_eps'],
      weight_tying=c['tie_word_embeddings'])


def load(folder: str, dtype: str, batch: int, workload: Workload) -> Contender:
  """`batch` rows at a time; every draw is a row with its prompt."""
  config = llama_config(folder)
  # Its loader lays tensors out over a mesh; this one has a single device.
  mesh = jax.make_mesh((1, 1), ('fsdp', 'tp'), axis_types=2 * (jax.sharding.AxisType.Auto,))
  model = llama3_params.create_model_from_safe_tensors(folder, config, mesh, jnp.dtype(dtype))
  width = workload.longest_prompt
  sampler = _RowLengths(model, _Ids(), tunix_sampler.CacheConfig(
      width + workload.max_new_tokens, config.num_layers, config.num_kv_heads, config.head_dim))

  def sample(workload: Workload, seed: int) -> list[list[int]]:
    responses = []
    for n, part in enumerate(workload.batches(batch)):
      lengths = [n for row in part.lengths for n in row]
      rows = [p for p, row in zip(part.prompts, part.lengths) for _ in row]
      sampler.longest = max(lengths)
      out = sampler(rows, workload.max_new_tokens, max_prompt_length=width, temperature=1.0,
                    top_p=workload.top_p, seed=1000 * seed + n)
      responses += [ids[:n].tolist() for ids, n in zip(out.tokens, lengths)]
    return responses

  def greedy(prompt: tuple[int, ...], tokens: int) -> list[int]:
    sampler.longest = None
    return sampler([prompt], tokens, max_prompt_length=width).tokens[0].tolist()

  return Contender(sample, greedy, (
      f'google-tunix {importlib.metadata.version("google-tunix")}, jax {jax.__version__}: weights, '
      f'products and cache {dtype}, {batch} rows'))
