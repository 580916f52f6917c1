"""Samples from a model for a file of prompts: one JSON row per response, as they finish.

    python -m experiments.sample --model=DIR --data=FILE --output=FILE.jsonl --n=8

Rows are JSONL (also gzip) or Parquet with `prompt` (text, or a list of messages) or `messages`;
with --task they are problems of that task and asked with its template. The same command goes on
where it was stopped and draws what is missing. OUTPUT.done.json appears when all samples are there;
without it the output is not whole. --choices_field scores given responses in place of sampling.

The whole file is read and checked before the model is. See docs/sample.md.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
import json
import math
import tempfile
import time
import zlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TextIO

import jax
import numpy as np
from absl import flags

from experiments import common_flags, engine_flags, sample_flags, score
from experiments.sample_flags import SampleFlags
from jaxrl.data.readers import read_problems, read_prompt
from jaxrl.data.rows import (
    Row,
    check_text,
    check_unique,
    describe,
    get_field,
    read_rows,
    row_id,
)
from jaxrl.errors import InputError
from jaxrl.models.config import ModelConfig
from jaxrl.models.identity import identity
from jaxrl.runs.durable import naming_full_disk
from jaxrl.runs.process import count_programs, keep_pages
from jaxrl.runs.progress import Bar, Progress
from jaxrl.runs.sample_file import Asked, finish, finished_before, keep_chosen
from jaxrl.runs.sample_log import SampleLog, open_log
from jaxrl.runs.session import open_model_folder
from jaxrl.sampling.engine import Engine, make_engine
from jaxrl.sampling.generate import engine_params, generate
from jaxrl.sampling.header import common_header
from jaxrl.sampling.requests import Request, Sample, SamplingConfig
from jaxrl.tokens.prompts import Prompt, prompt_ids, render_prompt, system_into_user
from jaxrl.tokens.tokenizer import Tokenizer, decode, response_ids
from jaxrl.training.choices import prompt_logprobs, score_choices

FLAGS = flags.FLAGS
flags.adopt_module_key_flags(sample_flags)

# Finished rows that wait to be written together; what a kill loses of them is drawn again.
WINDOW = 16      # batches whose rows are sorted by length together where they are scored


@dataclasses.dataclass
class Encoded:
  """What is known of the rows once all are encoded; the ids themselves wait on the disk."""

  prompts: int = 0             # to sample from
  refused: int = 0             # too long
  longest_prompt: int = 0
  longest_row: int = 0         # prompt and given response together
  digest: str = ''             # of all rows


def read_asked(asked: SampleFlags) -> Iterator[tuple[str, Prompt, Row | None, Any, str]]:
  """Id, prompt, row, labels and place of every prompt of the file."""
  if asked.task is not None:
    for problem in read_problems(FLAGS.data, asked.task, missing_gold='keep_any'):
      yield problem.prompt_id, problem.prompt, None, problem.labels, problem.where
    return
  seen: dict[str, int] = {}
  id_field = FLAGS.id_field or 'id'
  for row in read_rows(FLAGS.data):
    prompt_id = row_id(row, id_field, required=FLAGS.id_field is not None)
    check_unique(seen, row, prompt_id, id_field)
    has_messages = 'prompt' not in row.fields and 'messages' in row.fields
    field = FLAGS.prompt_field or ('messages' if has_messages else 'prompt')
    prompt = read_prompt(row, field)
    if not isinstance(prompt, str) and prompt[-1].role != 'user':
      raise InputError(f'field {field!r} does not end with the user', where=row.where,
                       expected="a last message of role 'user'",
                       found=describe(prompt[-1].role), fix='Correct the row')
    if FLAGS.system_in_user:
      prompt = system_into_user(prompt)
    yield prompt_id, prompt, row, None, row.where


def encode_choices(tokenizer: Tokenizer, row: Row, field: str) -> list[dict]:
  """Text and ids of the responses to score.

  Raises:
    InputError: no list of texts, or one without ids; names file and row.
  """
  value = get_field(row, field, 'a list of texts')
  if not isinstance(value, list) or not value:
    raise InputError(f'field {field!r} has no choices', where=row.where,
                     expected='a list of texts', found=describe(value), fix='Correct the row')
  choices = []
  for place, text in enumerate(value, 1):
    check_text(text, row.where, f'choice {place} of field {field!r}')
    ids = response_ids(tokenizer, text, ends=FLAGS.end_of_response, where=row.where)
    if not ids:
      raise InputError(f'choice {place} of field {field!r} has no ids', where=row.where,
                       expected='at least one', found=repr(text[:40]), fix='Remove it')
    choices.append({'text': text, 'response_ids': ids})
  return choices


def encode_file(
    tokenizer: Tokenizer, c: ModelConfig, asked: SampleFlags, progress: Progress, spool: TextIO
) -> Encoded:
  """Reads, checks and encodes every prompt, one line of `spool` each.

  Raises:
    InputError: a row that cannot be used, or no prompt that fits.
  """
  found, digest = Encoded(), hashlib.sha256()
  with progress.stage(f'encode {FLAGS.data}', None, 'prompts') as bar:
    for prompt_id, prompt, row, labels, where in read_asked(asked):
      ids = prompt_ids(tokenizer, prompt, where=where)
      text = render_prompt(tokenizer, prompt, where=where)
      entry: dict = {'prompt_id': prompt_id, 'prompt': text, 'prompt_ids': ids}
      longest, what = asked.sampling.max_new_tokens, '--max_new_tokens'
      if asked.choices_field is not None:
        if row is None:
          raise InputError('responses to score are fields of plain rows', where='--choices_field',
                           expected='no --task', found=FLAGS.task)
        entry['choices'] = encode_choices(tokenizer, row, asked.choices_field)
        longest = max(len(choice['response_ids']) for choice in entry['choices'])
        what = 'the longest choice'
      if labels is not None:
        entry['labels'] = labels
      if len(ids) + longest > c.max_length:
        error = InputError(
            'prompt and response do not fit into the context of the model', where=where,
            expected=f'at most {c.max_length} ids, from its config.json',
            found=f'{len(ids)} of the prompt and {longest} of {what}',
            fix='Shorten the prompt, or go on without such rows with --over_length=drop')
        if FLAGS.over_length == 'error':
          raise error
        entry = {'prompt_id': prompt_id, 'error': str(error)}
        found.refused += 1
      else:
        found.prompts += 1
        found.longest_prompt = max(found.longest_prompt, len(ids))
        found.longest_row = max(found.longest_row, len(ids) + longest)
      line = json.dumps(entry) + '\n'
      digest.update(line.encode())
      spool.write(line)
      bar.advance()
  if not found.prompts:
    raise InputError('no prompt fits into the context of the model', where=FLAGS.data,
                     expected=f'at most {c.max_length} ids with the response',
                     found=f'{found.refused} prompts, all longer')
  found.digest = digest.hexdigest()
  return found


def entries(spool: TextIO) -> Iterator[dict]:
  spool.seek(0)
  return map(json.loads, spool)


def header_of(asked: SampleFlags, sampling: SamplingConfig, found: Encoded, model: str) -> dict:
  """Everything the rows of the output depend on."""
  common = {'format': 1, 'model': model, 'prompts': found.digest,
            'compute_dtype': FLAGS.compute_dtype, 'prompt_logprobs': FLAGS.prompt_logprobs}
  if asked.choices_field is not None:
    return common | {'choices_field': asked.choices_field}
  settings = dataclasses.asdict(sampling) | {'logit_bias': [
      [token, 'ban' if bias == -math.inf else bias] for token, bias in sampling.logit_bias]}
  return common | {'seed': FLAGS.seed, 'temperature': asked.temperature,
                   'kv_cache': FLAGS.kv_cache} | settings


def shortest(logprobs: Iterable[float]) -> list[float]:
  """float32 in the fewest digits that give the same bits back."""
  return [float(str(x)) for x in np.asarray(logprobs, np.float32)]


@dataclasses.dataclass
class Writer:
  """Rows on their way to the log."""

  log: SampleLog
  bar: Bar
  tokens: int = 0              # of responses, so far

  def add(self, row: dict) -> None:
    self.tokens += sum(len(each['response_ids']) for each in (row, *row.get('choices', ()))
                       if 'response_ids' in each)
    self.log.append([row])
    self.bar.advance()


class Scoring:
  """What `score_choices` and `prompt_logprobs` need beside the rows."""

  def __init__(self, params: dict, c: ModelConfig, mesh: jax.sharding.Mesh, longest: int,
               pad_id: int):
    self.mesh = mesh
    self._fixed = (c, sample_flags.compute_policy())
    self._params = params
    self._options = dict(mesh=mesh, lengths=common_flags.length_buckets(longest),
                         batch_size=FLAGS.batch_size, pad_id=pad_id)

  def prompts(self, group: list[dict]) -> None:
    """Adds `prompt_logprobs`, one per prompt id; null for the first."""
    with jax.set_mesh(self.mesh):
      scored = prompt_logprobs(
          self._params, [e['prompt_ids'] for e in group], *self._fixed, **self._options)
    for entry, logprobs in zip(group, scored, strict=True):
      entry['prompt_logprobs'] = [None, *shortest(logprobs)]

  def choices(self, group: list[dict]) -> None:
    """Adds log-probs to every choice, and which one is best."""
    with jax.set_mesh(self.mesh):
      scored = score_choices(
          self._params, [e['prompt_ids'] for e in group],
          [[each['response_ids'] for each in e['choices']] for e in group], *self._fixed,
          **self._options)
    for entry, found in zip(group, scored, strict=True):
      for choice, logprobs, total, mean in zip(
          entry['choices'], found.logprobs, found.sums, found.means, strict=True):
        choice |= {'logprobs': shortest(logprobs), 'logprob_sum': total, 'logprob_mean': mean}
      entry |= {'best_by_sum': found.best_by_sum, 'best_by_mean': found.best_by_mean}


def in_groups(rows: Iterable[dict], size: int) -> Iterator[list[dict]]:
  source = iter(rows)
  while group := list(itertools.islice(source, size)):
    yield group


def write_refused(spool: TextIO, writer: Writer) -> None:
  """A row for each prompt that is too long: an error in place of samples."""
  for entry in entries(spool):
    if 'error' in entry and (entry['prompt_id'], None) not in writer.log:
      writer.add({'prompt_id': entry['prompt_id'], 'sample_index': None, 'error': entry['error']})


def score_given(spool: TextIO, writer: Writer, scoring: Scoring) -> None:
  """One row per prompt, its choices scored."""
  missing = (e for e in entries(spool)
             if 'error' not in e and (e['prompt_id'], None) not in writer.log)
  for group in in_groups(missing, WINDOW * FLAGS.batch_size):
    scoring.choices(group)
    if FLAGS.prompt_logprobs:
      scoring.prompts(group)
    for entry in group:
      writer.add({'prompt_id': entry['prompt_id'], 'sample_index': None} | entry)


def draw_missing(
    spool: TextIO, writer: Writer, asked: SampleFlags, scoring: Scoring | None,
    tokenizer: Tokenizer, run: Callable[[Iterator[Request]], Iterator[Sample]],
) -> None:
  """One row per (prompt, draw) that the log does not have."""
  waiting: dict[int, dict] = {}      # prompts by the number of the request that asks for a draw

  def requests() -> Iterator[Request]:
    number = itertools.count()
    usable = (e for e in entries(spool) if 'error' not in e)
    # The log only grows by what has been asked for, so that looking as we go sees what it had.
    missing = ((e, [d for d in range(asked.n) if (e['prompt_id'], d) not in writer.log])
               for e in usable)
    for group in in_groups(({**e, 'draws': d} for e, d in missing if d), FLAGS.batch_size):
      if scoring is not None:
        scoring.prompts(group)
      for entry in group:
        key, ids = zlib.crc32(entry['prompt_id'].encode()), tuple(entry['prompt_ids'])
        for draw in entry.pop('draws'):
          waiting[next(number)] = entry
          yield Request(key, draw, ids, asked.temperature)

  for sample in run(requests()):
    entry = waiting.pop(sample.request)
    writer.add({
        'prompt_id': entry['prompt_id'], 'sample_index': sample.draw, 'prompt': entry['prompt'],
        'response': decode(tokenizer, sample.response_ids),
        'finish_reason': sample.finish_reason,
        'prompt_ids': entry['prompt_ids'], 'response_ids': sample.response_ids,
        'logprobs': shortest(sample.logprobs), 'seed': sample.seed, 'key': sample.key,
        'step': sample.step,
    } | {key: entry[key] for key in ('labels', 'prompt_logprobs') if key in entry})


def check_draws(log: SampleLog, asked: SampleFlags) -> None:
  """Raises InputError where the file has more draws of a prompt than are asked for."""
  most = max((index for _, index in log.finished if index is not None), default=-1) + 1
  if most > asked.n:
    raise InputError('the file has more samples per prompt than are asked for', where=log.path,
                     expected=f'at most --n={asked.n}', found=most,
                     fix=f'Give --n={most} or more, or another --output')


def fill(
    log: SampleLog, spool: TextIO, found: Encoded, asked: SampleFlags, engine: Engine | None,
    params: dict, c: ModelConfig, tokenizer: Tokenizer, mesh: jax.sharding.Mesh,
    progress: Progress,
) -> int:
  """Adds all that is missing; returns how many response tokens that were."""
  per_prompt = 1 if asked.choices_field is not None else asked.n
  total = found.prompts * per_prompt + found.refused
  missing = total - len(log)
  if len(log):
    progress.line(f'{log.path}: {len(log)} rows are there, {missing} are missing')
  scoring = None
  if asked.choices_field is not None or FLAGS.prompt_logprobs:
    longest = found.longest_row if asked.choices_field is not None else found.longest_prompt
    scoring = Scoring(params, c, mesh, longest, tokenizer.pad_id)
  unit = 'prompts' if asked.choices_field is not None else 'samples'
  with progress.stage(f'{"score" if scoring and unit == "prompts" else "sample"} {log.path}',
                      missing, unit) as bar:
    writer = Writer(log, bar)
    write_refused(spool, writer)
    if engine is None:
      assert scoring is not None
      score_given(spool, writer, scoring)
      return writer.tokens
    held = engine_params(engine, params)
    draw_missing(
        spool, writer, asked, scoring, tokenizer,
        lambda requests: generate(engine, held, requests, seed=FLAGS.seed, draws=asked.n))
    return writer.tokens


def sample_file(
    spool: TextIO, found: Encoded, asked: SampleFlags, sampling: SamplingConfig, c: ModelConfig,
    tokenizer: Tokenizer, mesh: jax.sharding.Mesh, progress: Progress,
) -> None:
  """Makes the output whole, from nothing or from what an earlier command left."""
  FLAGS.set_default('storage', sample_flags.storage())
  with jax.set_mesh(mesh):
    params, c = score.load_model(c, mesh)
    header = header_of(asked, sampling, found, identity(params))
  per_prompt = None if asked.choices_field is not None else asked.n
  what = Asked(asked.output, header, found.prompts, found.refused, per_prompt, asked.keep)
  if finished_before(what):
    progress.line(f'{asked.output}: all of it is there already')
    return
  engine = None
  if asked.choices_field is None:
    engine = make_engine(
        c, sampling, engine_flags.engine_config(FLAGS.compute_dtype), mesh,
        max_prompt=found.longest_prompt, eos_ids=tokenizer.eos_ids, pad_id=tokenizer.pad_id,
        decode_text=functools.partial(decode, tokenizer) if sampling.stop_strings else None,
        header=common_header(e['prompt_ids'] for e in entries(spool) if 'error' not in e),
        draws=asked.n, requests=found.prompts * asked.n)
    progress.line(f'rollouts: {engine.sizes}')
  programs, start = count_programs(), time.monotonic()
  with open_log(what.log_path, header, say=progress.line) as log:
    check_draws(log, asked)
    tokens = fill(log, spool, found, asked, engine, params, c, tokenizer, mesh, progress)
    seconds = time.monotonic() - start
    if asked.keep != 'all':
      keep_chosen(what, asked.rule)
    counts = finish(what)
  progress.line(
      f'{asked.output}: {", ".join(f"{n} {name}" for name, n in counts.items())}; now {tokens} '
      f'tokens in {seconds:.1f} s, {tokens / seconds:.0f} tokens/s, {programs()} programs compiled')


def main(argv) -> None:
  del argv
  asked = sample_flags.check()
  keep_pages()
  progress = Progress()
  mesh = common_flags.mesh_from_flags()
  c, tokenizer = open_model_folder(FLAGS.model)
  sampling = sample_flags.complete_sampling(asked.sampling, tokenizer)
  output = asked.output
  with naming_full_disk(output), tempfile.TemporaryFile('w+', dir=output.parent) as spool:
    found = encode_file(tokenizer, c, asked, progress, spool)
    sample_file(spool, found, asked, sampling, c, tokenizer, mesh, progress)


if __name__ == '__main__':
  common_flags.run(main)
