"""How far recorded log-probs are from those that the trainer computes for the same ids.

    python -m benchmarks.sampler_gap --model=DIR --data=FILE.jsonl [--task=world]

Draws 8 samples of 64 prompts at temperature 0.8 with each kind of compute and cache, and scores
what was drawn in float32. The gap of float32 is rounding; of the others it is what sampling in that
type costs, int8 keys and values included.
"""

from __future__ import annotations

import argparse

import jax
import jax.numpy as jnp
import numpy as np
import rich.box
import rich.console
import rich.table

from jaxrl.data.batches import TokenRow
from jaxrl.data.readers import read_problems
from jaxrl.data.tasks import TASKS
from jaxrl.models.hugging_face import load_params
from jaxrl.parallel.mesh import make_mesh
from jaxrl.runs.session import open_model_folder
from jaxrl.sampling.engine import make_engine
from jaxrl.sampling.generate import engine_params, generate
from jaxrl.sampling.requests import SamplingConfig, requests_for
from jaxrl.sampling.sizes import EngineConfig
from jaxrl.tokens.prompts import encode_prompts
from jaxrl.training.logps import ComputePolicy
from jaxrl.training.score import score_rows

KINDS = (('float32', 'dtype'), ('bfloat16', 'dtype'), ('float32', 'int8'), ('bfloat16', 'int8'))


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--model', required=True)
  parser.add_argument('--data', required=True)
  parser.add_argument('--task', default='world', choices=sorted(TASKS))
  parser.add_argument('--prompts', type=int, default=64)
  parser.add_argument('--max_new_tokens', type=int, default=64)
  args = parser.parse_args()
  c, tokenizer = open_model_folder(args.model)
  mesh = make_mesh()
  problems = list(read_problems(args.data, TASKS[args.task]))[:args.prompts]
  prompts = encode_prompts(tokenizer, problems, max_prompt_length=c.max_length // 2,
                           over_length='drop').prompts
  longest = max(len(p.ids) for p in prompts)
  view = rich.table.Table(box=rich.box.SIMPLE, title='|recorded - scored in float32| per token')
  for name in ('compute', 'cache', 'tokens', 'mean', '99%', 'largest'):
    view.add_column(name, justify='right')
  with jax.set_mesh(mesh):
    params = load_params(args.model, c, mesh=mesh, dtype=jnp.float32)
    for dtype, kv_cache in KINDS:
      engine = make_engine(
          c, SamplingConfig(args.max_new_tokens), EngineConfig(dtype=dtype, kv_cache=kv_cache),
          mesh, max_prompt=longest, eos_ids=tokenizer.eos_ids, pad_id=tokenizer.pad_id, draws=8)
      requests = list(requests_for([p.ids for p in prompts], 8, temperature=0.8,
                                   keys=range(len(prompts))))
      samples = list(generate(engine, engine_params(engine, params), requests, seed=0))
      rows = [TokenRow(requests[s.request].prompt_ids, s.response_ids) for s in samples]
      scored = score_rows(
          params, rows, c, ComputePolicy('float32', chunk=64, remat='all'), mesh=mesh,
          lengths=(longest + args.max_new_tokens,), batch_size=64, pad_id=tokenizer.pad_id)
      gap = np.abs(np.concatenate([
          np.subtract(s.logprobs, logps) for s, logps in zip(samples, scored, strict=True)]))
      view.add_row(dtype, 'int8' if kv_cache == 'int8' else dtype, str(gap.size),
                   *(f'{x:.2g}' for x in (gap.mean(), np.quantile(gap, 0.99), gap.max())))
  rich.console.Console(width=100).print(view)


if __name__ == '__main__':
  main()
