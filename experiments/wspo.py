"""Weak-to-Strong Preference Optimization: a strong model learns what alignment did to a weak one.

    d_w = log-ratio of the aligned weak model to its base, per response id, computed once
    d_s = log-ratio of the strong model to itself at the start
    minimise the mean over ids of (gamma d_s - d_w)^2: no sampling, no reward, no pairs

    python -m experiments.wspo --model=STRONG --weak_base=DIR --weak_aligned=DIR --train=FILE

--train is a preference file, of which one side is read, or rows with prompt and response. With
--test problems the models answer them greedily. Without --model the embedded world makes a weak
model, aligns it with IRPO, and a stronger one to learn from the two. The same command again goes on
where a run stopped.
"""

from __future__ import annotations

import collections
import dataclasses
import json
from collections.abc import Mapping, Sequence

import jax
import numpy as np
import pyarrow as pa
from absl import flags
from etils import epath

from experiments import (
  common_flags,
  data_flags,
  engine_flags,
  lora_flags,
  training_flags,
  world,
  wspo_flags,
  wspo_table,
  wspo_world,
)
from jaxrl.data.batches import TokenRow, WeakRow
from jaxrl.data.preferences import RIGHT_FIELDS, read_preferences
from jaxrl.data.readers import Example, read_examples, read_rows
from jaxrl.errors import InputError
from jaxrl.models.hugging_face import read_config
from jaxrl.preferences.irpo import cap
from jaxrl.runs import durable, tables
from jaxrl.runs import session as sessions
from jaxrl.runs.evaluation_stage import Evaluation, evaluation_stage, summarise
from jaxrl.runs.folder import current_versions, open_run
from jaxrl.runs.input_stage import input_stage
from jaxrl.runs.problem_set import ProblemSet, read_problem_set
from jaxrl.runs.process import count_programs, keep_pages, peak_memory
from jaxrl.runs.sample_stage import Draws, draw_rows, share_of
from jaxrl.runs.score_stage import check_rows
from jaxrl.runs.session import Session
from jaxrl.runs.train_stage import train_stage
from jaxrl.runs.weak_stage import Responses, check_tokenizers, logps_stage, session_for, weak_stage
from jaxrl.sampling.engine import Engine, make_engine
from jaxrl.sampling.generate import engine_params
from jaxrl.sampling.requests import SamplingConfig
from jaxrl.tokens.prompts import prompt_ids
from jaxrl.tokens.tokenizer import response_ids
from jaxrl.training.objectives import wspo_objective
from jaxrl.training.optimizer import learning_rate_schedule

FLAGS = flags.FLAGS
flags.adopt_module_key_flags(wspo_flags)

_IDS = pa.list_(pa.int32())
# One row per response that is kept; ids are what is trained on.
RESPONSES: pa.Schema = pa.schema([
    pa.field('prompt_id', pa.string(), False), pa.field('prompt_ids', _IDS, False),
    pa.field('response_ids', _IDS, False), pa.field('held_out', pa.bool_(), False)])
PROBES = 64        # texts that the tokenizers must split alike


@dataclasses.dataclass(frozen=True)
class Inputs:
  """Folders of the models and files of a run."""

  strong: epath.Path
  weak: Mapping[str, epath.Path]       # 'base', 'aligned'
  train: epath.Path
  test: epath.Path | None


def read_responses(path: epath.Path) -> list[Example]:
  """One side of a preference file, or rows with prompt and response."""
  first = next(iter(read_rows(path)), None)
  fields = {} if first is None else first.fields
  if 'chosen' in fields or any(isinstance(fields.get(name), list) for name in RIGHT_FIELDS):
    return [Example(p.prompt_id, p.prompt, getattr(p, FLAGS.side), p.where)
            for p in read_preferences(path, FLAGS.train_limit)[0]]
  common_flags.refuse(FLAGS['side'].present > 0, 'side', f'{path} is no preference file')
  return read_examples(path, limit=FLAGS.train_limit)


def encode(session: Session, examples: Sequence[Example], limit: int) -> tuple[list[dict], dict]:
  """Rows of the table, not yet divided, and what was left out.

  Raises:
    InputError: with --over_length=error, a row of more than `limit` ids; no row is left.
  """
  counts: collections.Counter = collections.Counter()
  rows: dict[tuple, dict] = {}
  for example in examples:
    prompt = prompt_ids(session.tokenizer, example.prompt, where=example.where)
    response = response_ids(session.tokenizer, example.response, ends=True, where=example.where)
    excess = len(prompt) + len(response) - limit
    if excess > 0 and FLAGS.over_length == 'error':
      raise InputError('the row is too long', where=example.where,
                       expected=f'at most {limit} ids (--max_length, or the models)',
                       found=f'{len(prompt)} of the prompt and {len(response)} of the response',
                       fix='Raise the limit, or give --over_length=drop or truncate')
    if excess > 0 and (FLAGS.over_length == 'drop' or len(prompt) >= limit):
      counts['dropped'] += 1
      continue
    counts['truncated'] += int(excess > 0)
    response = response[:limit - len(prompt)]
    key = tuple(prompt), tuple(response)
    counts['repeated'] += key in rows
    rows.setdefault(key, {'prompt_id': example.prompt_id, 'prompt_ids': prompt,
                          'response_ids': response})
  if not rows:
    raise InputError('no row is left', where='--max_length', expected=f'a row of at most {limit} '
                     'ids', found=f'{len(examples)} rows, all longer', fix='Raise the limit')
  return list(rows.values()), {
      name: counts[name] for name in ('dropped', 'truncated', 'repeated')}


def responses_stage(session: Session, inputs: Inputs) -> list[dict]:
  """Stage 'iteration_01/responses': the rows of --train, checked against all models, encoded once.

  With --held_out_prompts so many prompts, chosen by the seed, are marked with all their responses.
  """

  def produce(scratch: epath.Path) -> dict:
    examples = read_responses(inputs.train)
    probes = [example.response for example in examples[:PROBES]]
    limit = min(FLAGS.max_length or session.model.max_length, session.model.max_length)
    for folder in inputs.weak.values():
      weak = session_for(session, folder)
      check_tokenizers(session.tokenizer, weak.tokenizer, probes)
      limit = min(limit, weak.model.max_length)
    rows, counts = encode(session, examples, limit)
    prompts = list(dict.fromkeys(tuple(row['prompt_ids']) for row in rows))
    if FLAGS.held_out_prompts >= len(prompts):
      raise InputError('no prompt would be left to train on', where='--held_out_prompts',
                       expected=f'fewer than the {len(prompts)} prompts of {inputs.train}',
                       found=FLAGS.held_out_prompts)
    kept_apart = set(cap(prompts, FLAGS.held_out_prompts,
                         session.stream_seed(1, sessions.PAIR_STREAM)))
    rows = [row | {'held_out': tuple(row['prompt_ids']) in kept_apart} for row in rows]
    tables.write_table(scratch / 'responses.parquet', rows, RESPONSES)
    counts |= {'train': sum(not row['held_out'] for row in rows),
               'held_out': sum(row['held_out'] for row in rows)}
    session.record(1, 'responses', counts)
    return counts

  name = 'iteration_01/responses'
  counts = session.run.stage(name, (f'{name}.parquet',), produce).counts
  session.progress.line(f'{inputs.train}: ' + ', '.join(f'{k} {v}' for k, v in counts.items()))
  return tables.read_table(session.run.path(name, f'{name}.parquet'), RESPONSES).to_pylist()


def first_loss(batch: Mapping[str, np.ndarray]) -> float:
  """The loss where the policy is its reference: the mean of d_w^2 over the first batch."""
  gap, mask = (batch[name].reshape(-1, batch[name].shape[-1]) for name in ('weak_gap', 'mask'))
  gap, mask = (x[mask.any(axis=1)] for x in (gap.astype(np.float64), mask))
  gap = np.where(mask, gap, 0.0)
  squared = gap.sum(axis=1) ** 2 if FLAGS.level == 'sequence' else (gap ** 2).sum(axis=1)
  return float((squared / mask.sum(axis=1)).mean())


def largest(session: Session, rows: Sequence[Mapping], values: Sequence[np.ndarray]) -> dict:
  """The largest absolute value, and the response id it belongs to."""
  n = max(range(len(rows)), key=lambda n: float(np.abs(values[n]).max()))
  place = int(np.abs(values[n]).argmax())
  token = session.tokenizer.hf.convert_ids_to_tokens([rows[n]['response_ids'][place]])[0]
  return {'value': float(values[n][place]),
          'where': f'id {place} ({token!r}) of the response to {rows[n]["prompt_id"]}'}


def follow(
    strong: Sequence[np.ndarray], weak: Sequence[np.ndarray], gamma: float
) -> dict[str, float]:
  """How d_s follows d_w over all ids; `ratio`, the slope of d_s on d_w, is 1/gamma at best."""
  d_s, d_w = (np.concatenate(x).astype(np.float64) for x in (strong, weak))
  error, power = gamma * d_s - d_w, max(float(np.sum(d_w ** 2)), 1e-30)
  return {
      'tokens': len(d_w), 'error': float(np.abs(error).mean()),
      'error_at_start': float(np.abs(d_w).mean()),
      'error_max': float(np.abs(error).max()), 'weak_gap_max': float(np.abs(d_w).max()),
      'weak_gap': float(d_w.mean()), 'strong_gap': float(d_s.mean()),
      'ratio': float(np.sum(d_s * d_w)) / power, 'ratio_expected': 1 / gamma,
      'explained': 1 - float(np.sum(error ** 2)) / power}


def follow_stage(
    session: Session, model: sessions.Model, rows: Sequence[Mapping],
    references: Sequence[np.ndarray], gaps: Sequence[np.ndarray], responses: Responses,
) -> Mapping:
  """Stages 'iteration_01/trained' and 'iteration_01/follow': `follow` on the held-out responses."""
  scored = logps_stage(session, 'trained', model, responses)
  strong = [new - old for new, old in zip(scored, references, strict=True)]

  def produce(scratch: epath.Path) -> dict:
    numbers = follow(strong, gaps, FLAGS.gamma)
    errors = [FLAGS.gamma * s - w for s, w in zip(strong, gaps, strict=True)]
    found = numbers | {'largest_weak': largest(session, rows, gaps),
                       'largest_error': largest(session, rows, errors)}
    (scratch / 'follow.json').write_text(json.dumps(found, indent=1))
    session.record(1, 'follow', numbers)
    return found

  return session.run.stage('iteration_01/follow', ('iteration_01/follow.json',), produce).counts


def train_strong(session: Session, inputs: Inputs, options: Mapping, start: epath.Path) -> None:
  """Responses, weak log-ratios, reference of the strong model, training."""
  optimizer = common_flags.optimizer_config()
  adapted = lora_flags.adapted(session.model)
  objective = wspo_objective(options, adapted or session.model, session.compute)
  table = responses_stage(session, inputs)
  rows = [TokenRow(row['prompt_ids'], row['response_ids']) for row in table]
  lengths = common_flags.length_buckets(max(map(len, rows)))
  train = [n for n, row in enumerate(table) if not row['held_out']]
  loop = training_flags.loop_config(len(train), FLAGS.epochs, FLAGS.max_steps)
  learning_rate_schedule(optimizer, loop.steps)   # a warm-up that is too long is refused here

  responses = Responses([row['prompt_id'] for row in table], rows, lengths, FLAGS.score_batch)
  gaps = weak_stage(session, inputs.weak, responses)
  worst = largest(session, table, gaps)
  joined = np.concatenate(gaps)
  session.progress.line(
      f'weak log-ratio: mean {joined.mean():+.4f}, mean absolute {np.abs(joined).mean():.4f}, '
      f'largest {worst["value"]:+.2f} at {worst["where"]}')
  model = sessions.load_model(session, start)
  references = logps_stage(session, 'reference_logps', model, responses)
  batches = training_flags.batches(
      session, 'weak', [
          WeakRow(rows[n], references[n].tolist(), gaps[n].tolist()) for n in train],
      iteration=1, steps=loop.steps, lengths=lengths, stream=sessions.TRAIN_STREAM,
      batch_size=FLAGS.batch_size)
  trainer = training_flags.trainer(objective, optimizer, adapted)
  train_stage(session, 'iteration_01/train', 1, model, trainer, batches, loop,
              expected_first_loss=first_loss(batches[0]))
  del model, trainer
  if FLAGS.held_out_prompts:
    held = [n for n, row in enumerate(table) if row['held_out']]
    follow_stage(
        session, sessions.load_model(
            session, session.run.path('iteration_01/train', 'iteration_01/model')),
        [table[n] for n in held], [references[n] for n in held], [gaps[n] for n in held],
        Responses([table[n]['prompt_id'] for n in held], [rows[n] for n in held], lengths,
                  FLAGS.score_batch))


def engine_for(session: Session) -> Engine:
  return make_engine(
      session.model, SamplingConfig(FLAGS.max_new_tokens),
      engine_flags.engine_config(session.compute.dtype), session.mesh,
      max_prompt=FLAGS.max_prompt_length, eos_ids=session.tokenizer.eos_ids,
      pad_id=session.tokenizer.pad_id, held=sessions.master_bytes(session))


def read_problems(session: Session, path: epath.Path, limit: int | None) -> ProblemSet:
  return read_problem_set(
      session, path, data_flags.task(), data_flags.answer_rule(), limit=limit,
      max_prompt_length=FLAGS.max_prompt_length,
      over_length='error' if FLAGS.over_length == 'error' else 'drop')


def weak_evaluation(session: Session, role: str, folder: epath.Path, test: ProblemSet) -> None:
  """Stage 'weak_ROLE/evaluation': the weak model's greedy answers."""
  stage = f'weak_{role}/evaluation'

  def draw(scratch: epath.Path) -> list[dict]:
    del scratch
    weak = session_for(session, folder)
    engine = engine_for(weak)
    params = engine_params(engine, sessions.load_model(weak, folder).params)
    total = share_of(test.prompts)
    with session.progress.stage(f'evaluate weak {role}', total, 'samples') as bar:
      return draw_rows(weak, engine, params, test.prompts, Draws(1, 0.0, 0), bar)

  def produce(scratch: epath.Path, drawn: list[dict]) -> dict:
    rows = [
        {key: row[key] for key in (
            'prompt_id', 'sample_index', 'prompt', 'response', 'finish_reason')}
        | {key: check[key] for key in ('gold', 'answer', 'verdict')}
        | {'kind': 'greedy', 'length': len(row['response_ids'])}
        for row, check in zip(
            drawn, check_rows(drawn, test.problems, data_flags.answer_rule()), strict=True)]
    tables.write_table(scratch / 'evaluation.parquet', rows, tables.EVALUATION)
    summary = summarise(rows)
    session.record(0, f'weak_{role}', summary)
    return summary

  session.run.stage(stage, (f'{stage}.parquet',), produce, together=draw)


def evaluate(session: Session, inputs: Inputs, start: epath.Path) -> None:
  """Greedy answers of the weak models, the strong base and the result."""
  assert inputs.test is not None
  test = read_problems(session, inputs.test, FLAGS.test_limit)
  for role, folder in inputs.weak.items():
    weak_evaluation(session, role, folder, test)
  engine = engine_for(session)
  result = session.run.path('iteration_01/train', 'iteration_01/model')
  for iteration, folder in enumerate((start, result)):
    evaluation_stage(
        session, iteration, engine, sessions.load_model(session, folder),
        Evaluation(test.problems, test.prompts, data_flags.answer_rule(), 0, 0.0, 0))


def embedded(session: Session, folder: epath.Path) -> Inputs:
  """The models and files of the embedded world."""
  lengths = common_flags.length_buckets(FLAGS.max_prompt_length + FLAGS.max_new_tokens)
  rule = data_flags.answer_rule()
  dev = read_problems(session, folder / 'dev.jsonl', None)
  strong = world.seed_stage(session, folder, engine_for(session), rule, dev, lengths)
  start = wspo_world.start_stage(session, folder)
  weak = session_for(session, start)
  base = world.seed_stage(weak, folder, engine_for(weak), rule, dev, lengths, stage='weak/sft',
                          start=start, accuracy='weak_accuracy')
  aligned = wspo_world.align_stage(session, folder, base)
  return Inputs(strong, {'base': base, 'aligned': aligned},
                wspo_world.preference_stage(session, folder), folder / 'test.jsonl')


def given() -> Inputs:
  """The models and files that flags name."""
  weak = {'base': epath.Path(FLAGS.weak_base), 'aligned': epath.Path(FLAGS.weak_aligned)}
  return Inputs(epath.Path(FLAGS.model), weak, epath.Path(FLAGS.train),
                epath.Path(FLAGS.test) if FLAGS.test else None)


def main(argv) -> None:
  del argv
  options = wspo_flags.check()
  keep_pages()
  programs = count_programs()
  progress = sessions.open_progress()
  mesh = common_flags.mesh_from_flags()
  wspo_flags.check_devices(mesh)
  if FLAGS.model is not None:      # before the run folder is made
    for folder in given().weak.values():
      read_config(folder)
  with open_run(FLAGS.run_dir or 'runs/wspo', flags=wspo_flags.effective(),
                versions=current_versions(), free_flags=common_flags.FREE_FLAGS) as run, \
       jax.set_mesh(mesh):
    folder = world.world_stage(run, FLAGS.seed) if FLAGS.model is None else None
    model, tokenizer = sessions.open_model_folder(
        FLAGS.model if folder is None else folder / 'start')
    with sessions.open_metrics(run) as metrics:
      session = Session(run, metrics, progress, mesh, model, tokenizer,
                        common_flags.compute_policy(), FLAGS.seed, programs, FLAGS.param_dtype)
      inputs = given() if folder is None else embedded(session, folder)
      input_stage(session, {'train': inputs.train} | (
          {'test': inputs.test} if inputs.test is not None else {}))
      start = lora_flags.start_from(session, inputs.strong)
      train_strong(session, inputs, options, start)
      if inputs.test is not None:
        evaluate(session, inputs, start)
      wspo_table.show(session)
    sessions.report(run)
    progress.line(f'{programs()} programs compiled, peak memory {peak_memory() / 2**30:.2f} GiB; '
                  f'model: {durable.shared(run.folder / "iteration_01" / "model")}')


if __name__ == '__main__':
  common_flags.run(main, wspo_flags.parse, several=True)
