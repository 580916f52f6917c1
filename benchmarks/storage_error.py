"""What bfloat16 and int8 storage of a frozen model change in its log-probs.

    python -m benchmarks.storage_error --model=DIR --data=FILE.jsonl

Scores the rows of --data (as `experiments.score` reads them) with weights stored in float32,
bfloat16 and int8 and float32 products, and prints the differences from float32 per response token
and per response, and the bytes of the weights.
"""

from __future__ import annotations

import jax
import numpy as np
from absl import app, flags

from jaxrl.data.batches import TokenRow
from jaxrl.data.readers import read_examples
from jaxrl.models.frozen import STORAGES, load_frozen
from jaxrl.parallel.mesh import make_mesh
from jaxrl.runs.session import open_model_folder
from jaxrl.tokens.prompts import prompt_ids
from jaxrl.tokens.tokenizer import response_ids
from jaxrl.training.logps import ComputePolicy
from jaxrl.training.score import score_rows

FLAGS = flags.FLAGS
flags.DEFINE_string('model', None, 'Hugging Face folder.', required=True)
flags.DEFINE_string('data', None, 'Rows with prompt or messages, and response.', required=True)
flags.DEFINE_integer('limit', 200, 'Rows to read.', lower_bound=1)


def main(argv) -> None:
  del argv
  c, tokenizer = open_model_folder(FLAGS.model)
  rows = [TokenRow(prompt_ids(tokenizer, e.prompt), response_ids(tokenizer, e.response, ends=True))
          for e in read_examples(FLAGS.data, limit=FLAGS.limit)]
  longest = -(-max(len(row) for row in rows) // 16) * 16
  mesh = make_mesh()
  found = {}
  with jax.set_mesh(mesh):
    for storage in STORAGES:
      params = load_frozen(FLAGS.model, c, mesh=mesh, storage=storage)
      size = sum(x.nbytes for x in jax.tree.leaves(params))
      logps = score_rows(
          params, rows, c, ComputePolicy('float32', 512, 'all'), mesh=mesh, lengths=(longest,),
          batch_size=8 * mesh.size, pad_id=tokenizer.pad_id)
      found[storage] = (size, logps)
  exact = found['float32'][1]
  print(f'{len(rows)} responses, {sum(map(len, exact))} tokens, mean log-prob per token '
        f'{np.concatenate(exact).mean():.4f}')
  print('| storage | bytes of weights | per token: mean | 99 % | largest | per response: mean |')
  print('|---|---|---|---|---|---|')
  for storage, (size, logps) in found.items():
    token = np.abs(np.concatenate(logps) - np.concatenate(exact))
    response = np.abs([x.sum() - y.sum() for x, y in zip(logps, exact, strict=True)])
    print(f'| {storage} | {size:,} | {token.mean():.2e} | {np.quantile(token, 0.99):.2e} | '
          f'{token.max():.2e} | {response.mean():.2e} |')


if __name__ == '__main__':
  app.run(main)
