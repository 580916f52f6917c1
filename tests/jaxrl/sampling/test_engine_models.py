"""Models, prompts in chunks, and headers: every sample is that of whole forward passes."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from jaxrl.models.config import Lora
from jaxrl.models.lora import attach, lora_specs
from jaxrl.models.params import is_spec
from jaxrl.models.storage import quantise
from jaxrl.sampling.requests import Request
from tests.tiny_engine import build, check_against_naive, config, log_probs_of, run
from tests.tiny_model import CONFIG, random_params

LONGEST = 14                  # ids of a prompt
CHUNKED = config(slots=6, prefill_tokens=8, prompt_multiple=2, chunk=4)
MODELS = {
    'plain': CONFIG,
    'windows_and_caps': dataclasses.replace(
        CONFIG, windows=(3, None), attention_softcap=3.0, final_softcap=5.0, attention_scale=0.4,
        norm_placement='around', norm_offset=True, embedding_scale=1.5, tie_embeddings=True,
        activation='gelu_tanh'),
    'one_key_head_one_window': dataclasses.replace(
        CONFIG, n_kv=1, vocab_size=51, qk_norm='width', windows=(5, 5)),
    'adapter_over_int8': dataclasses.replace(CONFIG, lora=Lora(3, 6.0, ('q', 'v', 'o', 'down'))),
}


@functools.cache
def params_of(name):
  model = MODELS[name]
  params = random_params(model)
  if name != 'adapter_over_int8':
    return params
  rng = np.random.default_rng(1)
  return attach(jax.jit(lambda p: quantise(p, model))(params), jax.tree.map(
      lambda s: rng.normal(scale=0.3, size=s.shape).astype(np.float32), lora_specs(model),
      is_leaf=is_spec))


def requests_around(header, seed=0):
  """Three draws, the first of them greedy, of prompts of all lengths.

  Half of them begin with the header, one is the header, and one leaves it at its last id.
  """
  rng = np.random.default_rng(seed)

  def ids(count):
    return tuple(rng.integers(0, CONFIG.vocab_size, count).tolist())

  room = LONGEST - len(header)
  prompts = [ids(n) for n in (1, 2, 5, 6, 9, 10, LONGEST)]
  if header:
    prompts += [header + ids(n) for n in (1, 2, min(5, room), min(6, room), room)]
    prompts += [header, header[:-1] + ids(3)]
  order = rng.permutation(len(prompts))
  return [Request(int(key), draw, prompts[key], 1.0 if draw else 0.0)
          for key in order for draw in range(3)]


@pytest.mark.parametrize(('name', 'header'), [
    ('plain', (7, 8, 9)), ('windows_and_caps', (7, 8, 9, 10, 11, 12)),
    ('one_key_head_one_window', ()), ('adapter_over_int8', ())])
def test_samples_are_those_of_whole_forward_passes(name, header):
  """Prompts in up to four chunks, some after a header shorter or longer than a chunk."""
  params = params_of(name)
  built = build(CHUNKED, model=MODELS[name], params=params, max_prompt=LONGEST, header=header)
  requests = requests_around(header)
  samples = check_against_naive(built, requests, params=params)
  assert len({tuple(s.response_ids) for s in samples}) > len(samples) / 2, 'the test tells apart'


def test_int8_cache_costs_little_and_is_there():
  """Log-probs against whole forward passes over the same ids; all keys are rounded."""
  header = (7, 8, 9, 10, 11, 12)
  built = build(dataclasses.replace(CHUNKED, kv_cache='int8'), max_prompt=LONGEST, header=header)
  requests = requests_around(header)
  errors = np.concatenate([
      np.subtract(sample.logprobs, log_probs_of(request.prompt_ids, sample.response_ids))
      for request, sample in zip(requests, run(built, requests), strict=True)])
  assert 1e-3 < np.sqrt(np.mean(errors**2)) < 0.04, 'these weights are large; 0.02 was seen'
  assert np.abs(errors).max() < 0.25
