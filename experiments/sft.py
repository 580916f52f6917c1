"""Supervised fine-tuning: mean negative log-likelihood per response token.

    python -m experiments.sft --model=DIR --train=FILE                 prompt + response rows
    python -m experiments.sft --model=DIR --train=FILE --task=gsm8k    worked solutions of problems
    python -m experiments.sft --train=FILE --d_model=256 --layers=4    a new model and tokenizer

Rows are JSONL (also gzip) or Parquet: `prompt` and `response`, or `messages` whose last one is the
assistant's; only that response is trained on. With --task=gsm8k rows are problems: the prompt is
the task's, the response its worked solution in the style that the prompt asks for. --test adds the
held-out loss. Without --model a Llama-shaped model starts from random weights, with a byte-level
BPE tokenizer trained on the training text.

The model is a Hugging Face folder, RUN_DIR/sft/model. The same command again goes on where a run
stopped.
"""

from __future__ import annotations

import collections
import math
from collections.abc import Mapping, Sequence

import jax
import numpy as np
import pyarrow as pa
from absl import flags
from etils import epath

from experiments import common_flags, data_flags, lora_flags, sft_flags, training_flags
from jaxrl.data.batches import TokenRow
from jaxrl.data.readers import Example, ExampleFields, read_examples, read_problems
from jaxrl.errors import InputError
from jaxrl.models.hugging_face import save_model
from jaxrl.models.params import count_params, init_params
from jaxrl.runs import durable, tables
from jaxrl.runs import session as sessions
from jaxrl.runs.folder import current_versions, open_run
from jaxrl.runs.process import count_programs, keep_pages
from jaxrl.runs.session import Session
from jaxrl.runs.stages import Run
from jaxrl.runs.train_stage import train_stage
from jaxrl.tokens.prompts import Message, prompt_ids, render_prompt
from jaxrl.tokens.tiny import write_tokenizer
from jaxrl.tokens.tokenizer import Tokenizer, load_tokenizer, response_ids
from jaxrl.training.objectives import sft_objective
from jaxrl.training.optimizer import learning_rate_schedule
from jaxrl.training.score import score_rows

FLAGS = flags.FLAGS
for module in (common_flags, data_flags, lora_flags, sft_flags, training_flags):
  flags.adopt_module_key_flags(module)

_IDS = pa.list_(pa.int32())
# One row per example that is kept; ids are what is trained on, text is for people.
ROWS: pa.Schema = pa.schema([
    pa.field('prompt_id', pa.string(), False), pa.field('prompt', pa.string(), False),
    pa.field('response', pa.string(), False), pa.field('prompt_ids', _IDS, False),
    pa.field('response_ids', _IDS, False), pa.field('truncated', pa.bool_(), False)])
# Row-aligned with the held-out rows.
HELD_OUT: pa.Schema = pa.schema([
    pa.field('prompt_id', pa.string(), False), pa.field('tokens', pa.int32(), False),
    pa.field('nll', pa.float64(), False)])   # summed over the response


def read(path: str, limit: int | None) -> list[Example]:
  """Rows with a response, or a task's problems with their worked solutions."""
  if FLAGS.task is None:
    fields = ExampleFields(FLAGS.prompt_field, FLAGS.response_field, FLAGS.id_field)
    return read_examples(path, fields, limit)
  examples = []
  for problem in read_problems(path, data_flags.task(), limit):
    if problem.gold_solution is None:
      raise InputError('the row has no worked solution', where=problem.where,
                       expected="an answer that ends in a line '#### N' after its steps",
                       found=f'{problem.gold!r} alone', fix='Remove the row')
    examples.append(Example(problem.prompt_id, problem.prompt, problem.gold_solution,
                            problem.where))
  return examples


def texts(examples: Sequence[Example]) -> list[str]:
  """All text that a tokenizer for these rows has to encode."""
  found = []
  for example in examples:
    messages = (Message('user', example.prompt),) if isinstance(example.prompt, str) else (
        example.prompt)
    found += [*(message.content for message in messages), example.response]
  return found


def encode(
    tokenizer: Tokenizer, examples: Sequence[Example], *, max_length: int, over_length: str
) -> tuple[list[dict], dict[str, int]]:
  """Rows of the table, and how many were too long.

  'truncate' cuts the response, which then has no EOS; a prompt that leaves no room is dropped.

  Raises:
    InputError: a row that cannot be encoded or, with 'error', is too long; none left.
  """
  counts: collections.Counter = collections.Counter()
  rows: list[dict] = []
  for example in examples:
    prompt = prompt_ids(tokenizer, example.prompt, where=example.where)
    response = response_ids(tokenizer, example.response, ends=True, where=example.where)
    excess = len(prompt) + len(response) - max_length
    if excess > 0 and over_length == 'error':
      raise InputError('the row is too long', where=example.where,
                       expected=f'at most {max_length} ids (--max_length)',
                       found=f'{len(prompt)} of the prompt and {len(response)} of the response',
                       fix='Raise the limit, or give --over_length=drop or truncate')
    if excess > 0 and (over_length == 'drop' or len(prompt) >= max_length):
      counts['dropped'] += 1
      continue
    counts['truncated'] += int(excess > 0)
    rows.append({
        'prompt_id': example.prompt_id, 'response': example.response, 'prompt_ids': prompt,
        'prompt': render_prompt(tokenizer, example.prompt, where=example.where),
        'response_ids': response[:-excess] if excess > 0 else response,
        'truncated': excess > 0})
  if not rows:
    raise InputError('no row is left', where='--max_length',
                     expected=f'a row of at most {max_length} ids',
                     found=f'{len(examples)} rows, all longer', fix='Raise the limit')
  return rows, {
      'rows': len(rows), 'dropped': counts['dropped'], 'truncated': counts['truncated'],
      'response_tokens': sum(len(row['response_ids']) for row in rows)}


def data_stage(run: Run) -> Mapping[str, int]:
  """Stage 'sft/data': the encoded rows and, for a new model, its folder; returns counts.

  Everything is read, checked and encoded before the first array is made.
  """
  paths = {'train': (FLAGS.train, FLAGS.train_limit), 'test': (FLAGS.test, FLAGS.test_limit)}
  splits = [split for split in paths if paths[split][0] is not None]

  def produce(scratch: epath.Path) -> dict:
    examples = {split: read(*paths[split]) for split in splits}
    if FLAGS.model is None:
      folder = scratch / 'tokenizer'
      size = write_tokenizer(folder, texts(examples['train']), vocab_size=FLAGS.vocab_size)
      model, tokenizer = sft_flags.new_config(size), load_tokenizer(folder, vocab_size=size)
    else:
      model, tokenizer = sessions.open_model_folder(FLAGS.model)
    counts: dict[str, int] = {}
    for split in splits:
      rows, found = encode(tokenizer, examples[split], max_length=sft_flags.row_limit(model),
                           over_length=FLAGS.over_length)
      tables.write_table(scratch / f'{split}.parquet', rows, ROWS)
      counts |= {f'{split}/{name}': value for name, value in found.items()}
    if FLAGS.model is None:
      if (scratch / 'start').exists():
        (scratch / 'start').rmtree()
      save_model(scratch / 'start', init_params(jax.random.key(FLAGS.seed), model), model,
                 tokenizer_from=folder)
    return counts

  outputs = (*(f'sft/{split}.parquet' for split in splits),
             *(('sft/start',) if FLAGS.model is None else ()))
  return run.stage('sft/data', outputs, produce).counts


def read_rows(run: Run, split: str) -> tuple[list[str], list[TokenRow]]:
  """Ids of the rows of a split, and what is trained on or scored."""
  rows = tables.read_table(run.path('sft/data', f'sft/{split}.parquet'), ROWS).to_pylist()
  return ([row['prompt_id'] for row in rows],
          [TokenRow(row['prompt_ids'], row['response_ids']) for row in rows])


def held_out_loss(
    session: Session, params: dict, rows: Sequence[TokenRow], lengths: Sequence[int], name: str
) -> tuple[list[float], dict[str, float]]:
  """Summed negative log-likelihood of each response, and the numbers that are logged."""
  with session.progress.stage(f'sft: held-out loss {name}', len(rows), 'rows') as bar:
    scored = score_rows(params, rows, session.model, session.compute, mesh=session.mesh,
                        lengths=lengths, batch_size=FLAGS.batch_size,
                        pad_id=session.tokenizer.pad_id, on_rows=bar.advance)
  sums = [-float(np.sum(logps, dtype=np.float64)) for logps in scored]
  tokens = sum(len(logps) for logps in scored)
  nll = sum(sums) / tokens
  numbers = {'nll': nll, 'perplexity': math.exp(min(nll, 700.0)), 'tokens': tokens,
             'rows': len(rows)}
  session.progress.line(
      f'  held-out loss {name}: {nll:.4f} per token, perplexity {numbers["perplexity"]:.4g}')
  return sums, numbers


def log_held_out(session: Session, step: int, numbers: Mapping[str, float]) -> None:
  """One record of this step, in place of what a killed attempt left from here on."""
  session.metrics.rewind(0, 'held_out', step - 1)
  session.metrics.write(0, 'held_out', step, numbers)
  session.metrics.sync()


def fine_tune(session: Session, start: epath.Path) -> epath.Path:
  """Stages 'sft/before', 'sft/train', 'sft/after'; returns the folder of the trained model."""
  run = session.run
  adapted = lora_flags.adapted(session.model)
  start = lora_flags.start_from(session, start)
  _, rows = read_rows(run, 'train')
  test_ids, test_rows = read_rows(run, 'test') if FLAGS.test is not None else ([], [])
  lengths = common_flags.length_buckets(max(len(row) for row in [*rows, *test_rows]))
  loop = training_flags.loop_config(len(rows), FLAGS.epochs, FLAGS.max_steps)
  optimizer = common_flags.optimizer_config()
  learning_rate_schedule(optimizer, loop.steps)   # a warm-up that is too long is refused here

  def held_out_stage(name: str, step: int, folder: epath.Path) -> None:
    def score(scratch: epath.Path) -> tuple[list[float], dict[str, float]]:
      del scratch
      params = sessions.load_model(session, folder).params
      return held_out_loss(session, params, test_rows, lengths, f'{name} training')

    def produce(scratch: epath.Path, found: tuple[list[float], dict[str, float]]) -> dict:
      sums, numbers = found
      tables.write_table(scratch / f'{name}.parquet', [
          {'prompt_id': prompt_id, 'tokens': len(row.response_ids), 'nll': value}
          for prompt_id, row, value in zip(test_ids, test_rows, sums, strict=True)], HELD_OUT)
      log_held_out(session, step, numbers)
      return numbers

    if test_rows:
      run.stage(f'sft/{name}', (f'sft/{name}.parquet',), produce, together=score)

  def look(step: int, params: dict) -> bool:
    if step % FLAGS.eval_every == 0:
      log_held_out(session, step, held_out_loss(
          session, params, test_rows, lengths, f'at step {step}')[1])
    return False

  held_out_stage('before', 0, start)
  batches = training_flags.batches(
      session, 'sequences', rows, iteration=0, steps=loop.steps, lengths=lengths,
      stream=sessions.TRAIN_STREAM, batch_size=FLAGS.batch_size)
  trainer = training_flags.trainer(
      sft_objective(adapted or session.model, session.compute), optimizer, adapted)
  train_stage(session, 'sft/train', 0, sessions.load_model(session, start), trainer, batches, loop,
              stop=look if FLAGS.eval_every is not None else None)
  model = run.path('sft/train', 'sft/model')
  held_out_stage('after', loop.steps, model)
  if test_rows:
    before, after = (run.entries[f'sft/{name}'].counts for name in ('before', 'after'))
    session.progress.line(
        f'held-out loss per token: {before["nll"]:.4f} before and {after["nll"]:.4f} after '
        f'{loop.steps} steps, over {after["tokens"]} tokens of {after["rows"]} rows')
  return model


def main(argv) -> None:
  del argv
  sft_flags.check()
  keep_pages()
  programs = count_programs()
  progress = sessions.open_progress()
  mesh = common_flags.mesh_from_flags()
  sft_flags.check_devices(mesh)
  with open_run(FLAGS.run_dir or 'runs/sft', flags=sft_flags.effective(),
                versions=current_versions(),
                free_flags=common_flags.FREE_FLAGS) as run, jax.set_mesh(mesh):
    counts = data_stage(run)
    start = epath.Path(FLAGS.model) if FLAGS.model else run.path('sft/data', 'sft/start')
    model, tokenizer = sessions.open_model_folder(start)
    for split in ('train', 'test'):
      if f'{split}/rows' in counts:
        progress.line(
            f'{FLAGS[split].value}: {counts[f"{split}/rows"]} rows, '
            f'{counts[f"{split}/response_tokens"]} response tokens; '
            f'{counts[f"{split}/dropped"]} rows dropped and '
            f'{counts[f"{split}/truncated"]} cut for their length')
    progress.line(f'{start}: {count_params(model):,} parameters')
    with sessions.open_metrics(run) as metrics:
      session = Session(run, metrics, progress, mesh, model, tokenizer,
                        common_flags.compute_policy(), FLAGS.seed, programs,
                        FLAGS.param_dtype)
      folder = fine_tune(session, start)
    sessions.report(run)
    progress.line(f'report: {durable.shared(run.folder / "report.html")}')
    progress.line(f'model: {durable.shared(folder)}')


if __name__ == '__main__':
  common_flags.run(main, sft_flags.parse, several=True)
