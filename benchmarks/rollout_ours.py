"""This project's engine as a contender of the rollout benchmark.

Each response ends at its request's cap, which the engine compares with as it does with an EOS: the
scheduler orders by `expected_tokens` alone, and that stays unset. Log-probs of all responses are
kept, as always.
"""

from __future__ import annotations

import jax

from benchmarks.rollout_worker import Contender
from benchmarks.rollout_workload import VOCABULARY, Workload
from jaxrl.models.hugging_face import load_params, read_config
from jaxrl.parallel.mesh import make_mesh
from jaxrl.sampling.engine import make_engine
from jaxrl.sampling.generate import engine_params, generate
from jaxrl.sampling.requests import Request, SamplingConfig
from jaxrl.sampling.sizes import EngineConfig


def load(folder: str, dtype: str, batch: int, workload: Workload) -> Contender:
  """`batch` slots."""
  config, mesh = read_config(folder), make_mesh()
  engine = make_engine(
      config, SamplingConfig(workload.max_new_tokens, top_p=workload.top_p),
      EngineConfig(slots=batch, dtype=dtype, prefill_tokens=256, shrink=True), mesh,
      max_prompt=workload.longest_prompt, pad_id=0,
      eos_ids=(VOCABULARY,))     # an EOS that is never drawn
  params = engine_params(engine, load_params(folder, config, mesh=mesh, dtype=dtype))

  def draw(requests: list[Request], seed: int) -> list[list[int]]:
    responses: list[list[int]] = [[]] * len(requests)
    for sample in generate(engine, params, requests, seed=seed):
      responses[sample.request] = sample.response_ids
    return responses

  def sample(workload: Workload, seed: int) -> list[list[int]]:
    return draw([
        Request(key, n, prompt, temperature=1.0, max_new_tokens=length)
        for key, (prompt, lengths) in enumerate(zip(workload.prompts, workload.lengths))
        for n, length in enumerate(lengths)], seed)

  def greedy(prompt: tuple[int, ...], tokens: int) -> list[int]:
    return draw([Request(0, 0, prompt, temperature=0.0, max_new_tokens=tokens)], 0)[0]

  sample(workload, 0)     # compiles for every number of slots that a round ends with
  return Contender(sample, greedy, (
      f'jaxrl, jax {jax.__version__}: weights, products and cache {dtype}, draws in float32, '
      f'log-probs kept, {batch} slots'), engine.compiled_programs)
