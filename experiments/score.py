"""Log-probs of given responses under a model: one JSON row per row of a file, in its order.

    python -m experiments.score --model=DIR --data=FILE --output=FILE.jsonl

Rows are JSONL (also gzip) or Parquet: `prompt` and `response`, or `messages` whose last one is the
assistant's. Prompt and response become ids as in sampling and training, chat template and end of
turn included. --adapter adds a PEFT folder to the model. Each output row has `prompt_ids`,
`response_ids`, `logprobs` (one per response id, temperature 1) and `logprob_sum`, and the row's
`id` if it has one.

The whole file is read and checked before the model is. The output appears under its name when it is
whole.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import tempfile
import time
from collections.abc import Iterator
from typing import TextIO

import jax
import numpy as np
from absl import flags
from etils import epath

from experiments import common_flags, score_flags
from jaxrl.data.batches import TokenRow
from jaxrl.data.readers import read_exchange
from jaxrl.data.rows import Row, read_rows, row_id
from jaxrl.errors import InputError
from jaxrl.models.config import ModelConfig
from jaxrl.models.frozen import load_frozen
from jaxrl.models.lora import adapter_shardings, attach
from jaxrl.models.peft_folder import read_adapter
from jaxrl.runs.durable import naming_full_disk, open_atomic
from jaxrl.runs.process import count_programs, keep_pages
from jaxrl.runs.progress import Progress
from jaxrl.runs.session import open_model_folder
from jaxrl.tokens.prompts import prompt_ids, system_into_user
from jaxrl.tokens.tokenizer import Tokenizer, response_ids
from jaxrl.training.score import score_stream

FLAGS = flags.FLAGS
flags.adopt_module_key_flags(score_flags)

# Batches whose rows are sorted by length together: few enough to hold, enough to pad little.
WINDOW = 64


@dataclasses.dataclass
class Encoded:
  """What is known of the rows once all are encoded; the ids themselves wait on the disk."""

  rows: int = 0
  tokens: int = 0              # of responses
  longest: int = 0             # ids of prompt and response together
  dropped: int = 0             # rows left out for their length


def encode(tokenizer: Tokenizer, c: ModelConfig, row: Row) -> dict | None:
  """One row as ids; None for one that is too long and dropped.

  Raises:
    InputError: fields, text or length that cannot be used; names file and row.
  """
  prompt, text = read_exchange(row)
  if FLAGS.system_in_user:
    prompt = system_into_user(prompt)
  encoded: dict = {'where': row.where}
  if row.fields.get('id') is not None:
    row_id(row, 'id', required=True)
    encoded['id'] = row.fields['id']
  encoded['prompt_ids'] = prompt_ids(tokenizer, prompt, where=row.where)
  encoded['response_ids'] = response_ids(
      tokenizer, text, ends=FLAGS.end_of_response, where=row.where)
  if not encoded['response_ids']:
    raise InputError('the response has no ids', where=row.where, expected='at least one',
                     found=repr(text[:40]), fix='Remove the row')
  counts = len(encoded['prompt_ids']), len(encoded['response_ids'])
  if sum(counts) > c.max_length:
    if FLAGS.over_length == 'drop':
      return None
    raise InputError('the row is longer than the model was made for', where=row.where,
                     expected=f'at most {c.max_length} ids, from its config.json',
                     found=f'{counts[0]} of the prompt and {counts[1]} of the response',
                     fix='Shorten the row, or leave such rows out with --over_length=drop')
  return encoded


def encode_file(
    tokenizer: Tokenizer, c: ModelConfig, progress: Progress, spool: TextIO
) -> Encoded:
  """Reads, checks and encodes every row, one line of `spool` each; ids are never made twice."""
  found = Encoded()
  with progress.stage(f'encode {FLAGS.data}', None, 'rows') as bar:
    for row in read_rows(FLAGS.data):
      bar.advance()
      encoded = encode(tokenizer, c, row)
      if encoded is None:
        found.dropped += 1
        continue
      spool.write(json.dumps(encoded) + '\n')
      counts = len(encoded['prompt_ids']), len(encoded['response_ids'])
      found.rows += 1
      found.tokens += counts[1]
      found.longest = max(found.longest, sum(counts))
  if not found.rows:
    raise InputError('no row is left', where=FLAGS.data,
                     expected=f'a row of at most {c.max_length} ids, from config.json',
                     found=f'{found.dropped} rows, all longer')
  if found.dropped:
    progress.line(f'{found.dropped} rows dropped for their length')
  return found


def spooled(spool: TextIO) -> Iterator[dict]:
  spool.seek(0)
  return map(json.loads, spool)


def with_logprobs(row: dict, logprobs: np.ndarray) -> dict:
  """The row as it is written; float32 in the fewest digits that give the same bits back.

  Raises:
    InputError: a log-prob that is no number.
  """
  where = row.pop('where')
  if not np.isfinite(logprobs).all():
    raise InputError('the model gives a log-prob that is no number', where=where,
                     expected='finite ones', found=float(logprobs[~np.isfinite(logprobs)][0]),
                     fix='Give --compute_dtype=float32, or check the model')
  return row | {'logprobs': [float(str(x)) for x in logprobs],
                'logprob_sum': float(np.sum(logprobs, dtype=np.float64))}


def load_model(c: ModelConfig, mesh: jax.sharding.Mesh) -> tuple[dict, ModelConfig]:
  """Parameters on the mesh, and the configuration that they are run with.

  An adapter stays beside the model, as it was trained: nothing is merged or rounded.
  """
  params = load_frozen(FLAGS.model, c, mesh=mesh, storage=FLAGS.storage)
  if FLAGS.adapter is None:
    return params, c
  lora, factors = read_adapter(FLAGS.adapter, c)
  c = dataclasses.replace(c, lora=lora)
  return attach(params, jax.device_put(factors, adapter_shardings(c, mesh))), c


def score_file(
    spool: TextIO, found: Encoded, output: epath.Path, c: ModelConfig, tokenizer: Tokenizer,
    mesh: jax.sharding.Mesh, progress: Progress,
) -> None:
  """Writes the output from the encoded rows, a window of them at a time."""
  lengths = common_flags.length_buckets(found.longest)
  params, c = load_model(c, mesh)
  programs, start = count_programs(), time.monotonic()
  with progress.stage(f'score {output}', found.rows, 'rows') as bar, open_atomic(output) as file:
    rows, again = itertools.tee(spooled(spool))
    scored = score_stream(
        params, (TokenRow(row['prompt_ids'], row['response_ids']) for row in again), c,
        score_flags.compute_policy(), window=WINDOW * FLAGS.batch_size, mesh=mesh, lengths=lengths,
        batch_size=FLAGS.batch_size, pad_id=tokenizer.pad_id, on_rows=bar.advance)
    for logprobs, row in zip(scored, rows, strict=True):
      file.write(json.dumps(with_logprobs(row, logprobs)).encode() + b'\n')
  seconds = time.monotonic() - start
  progress.line(f'{output}: {found.rows} rows, {found.tokens} response tokens, '
                f'{found.tokens / seconds:.0f} tokens/s, {seconds:.1f} s, '
                f'{programs()} programs compiled')


def main(argv) -> None:
  del argv
  output = score_flags.check()
  keep_pages()
  progress = Progress()
  mesh = common_flags.mesh_from_flags()
  score_flags.check_devices(mesh)
  c, tokenizer = open_model_folder(FLAGS.model)
  with naming_full_disk(output), tempfile.TemporaryFile('w+', dir=output.parent) as spool:
    found = encode_file(tokenizer, c, progress, spool)
    with jax.set_mesh(mesh):
      score_file(spool, found, output, c, tokenizer, mesh, progress)


if __name__ == '__main__':
  common_flags.run(main)
