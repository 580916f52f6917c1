"""Offline preference training: DPO and its whole family on a file of pairs, KTO on labelled rows.

    python -m experiments.dpo --model=DIR --train=FILE.jsonl --loss=dpo --loss_options=beta=0.1

Prompts go through the chat template, as in every experiment. Reference log-probs are computed once
and stored; then one model is in memory. With --test the same numbers are measured on held-out pairs
before and after. The trained model is iteration_01/model/ in the run folder.
"""

from __future__ import annotations

import collections
import json
from collections.abc import Mapping, Sequence

import jax
import numpy as np
from absl import flags
from etils import epath

from experiments import common_flags, dpo_flags, lora_flags, loss_flags, sft_flags, training_flags
from jaxrl.data.batches import LabelledRow, Pair, TokenRow
from jaxrl.data.preferences import read_labelled, read_preferences
from jaxrl.errors import InputError
from jaxrl.evaluation.statistics import mean_estimate, proportion
from jaxrl.losses import preference
from jaxrl.losses.pairs import PLAIN
from jaxrl.runs import durable, tables
from jaxrl.runs import session as sessions
from jaxrl.runs.folder import current_versions, open_run
from jaxrl.runs.input_stage import input_stage
from jaxrl.runs.process import count_programs, keep_pages, peak_memory
from jaxrl.runs.reference_stage import read_pairs, reference_stage, token_rows, training_pairs
from jaxrl.runs.session import Model, Session
from jaxrl.runs.train_stage import train_stage
from jaxrl.tokens.prompts import Prompt, prompt_ids
from jaxrl.tokens.tokenizer import response_ids
from jaxrl.training.objectives import kto_objective, mixed_objective
from jaxrl.training.optimizer import learning_rate_schedule
from jaxrl.training.score import score_rows

FLAGS = flags.FLAGS
for module in (common_flags, dpo_flags, lora_flags, loss_flags, training_flags):
  flags.adopt_module_key_flags(module)

ITERATION = 1                          # of the run folder; there is only one


def fit(session: Session, prompt: Sequence[int], responses: Sequence[str], where: str,
        counts: collections.Counter) -> list[list[int]] | None:
  """Ids of responses that fit after the prompt; None where the row is dropped.

  Raises:
    InputError: with --over_length=error, a row that does not fit.
  """
  encoded = [response_ids(session.tokenizer, text, ends=True, where=where) for text in responses]
  limit = sft_flags.row_limit(session.model)
  excess = len(prompt) + max(map(len, encoded)) - limit
  if excess <= 0:
    return encoded
  if FLAGS.over_length == 'error':
    raise InputError('the row is too long', where=where,
                     expected=f'at most {limit} ids (--max_length, or the model)',
                     found=f'{len(prompt)} of the prompt, {max(map(len, encoded))} of a response',
                     fix='Raise the limit, or give --over_length=drop or truncate')
  if FLAGS.over_length == 'drop' or len(prompt) >= limit:
    counts['dropped'] += 1
    return None
  counts['truncated'] += 1
  return [ids[:limit - len(prompt)] for ids in encoded]


def encode_prompt(session: Session, prompt: Prompt, where: str) -> list[int]:
  return prompt_ids(session.tokenizer, prompt, where=where)


def encode_pairs(session: Session, path: str, limit: int | None) -> tuple[list[dict], dict]:
  """Rows of the pairs table, and what was left out."""
  preferences, found = read_preferences(path, limit)
  counts: collections.Counter = collections.Counter()
  rows = []
  for p in preferences:
    ids = encode_prompt(session, p.prompt, p.where)
    sides = fit(session, ids, (p.chosen, p.rejected), p.where, counts)
    if sides is None:
      continue
    if sides[0] == sides[1]:
      counts['identical_after_truncation'] += 1
      continue
    rows.append({
        'prompt_id': p.prompt_id, 'pair_index': 0, 'chosen_index': None, 'rejected_index': 0,
        'prompt_ids': ids, 'chosen_ids': sides[0], 'rejected_ids': sides[1], 'weight': 1.0,
        'chosen_why': 'preferred in the file', 'rejected_why': 'not preferred in the file',
        'method': ','.join(FLAGS.loss), 'iteration': ITERATION})
  if not rows:
    raise InputError('no pair is left', where=path, expected='a pair of at most --max_length ids',
                     found=dict(counts), fix='Raise --max_length')
  return rows, {f'pairs/{key}': value for key, value in (found | counts).items()} | {
      'pairs/count': len(rows)}


def pairs_stage(session: Session) -> Mapping:
  """Stage 'iteration_01/pairs': the pairs of --train, encoded once; returns counts."""

  def produce(scratch: epath.Path) -> dict:
    rows, counts = encode_pairs(session, FLAGS.train, FLAGS.train_limit)
    tables.write_table(scratch / 'pairs.parquet', rows, tables.PAIRS)
    session.record(ITERATION, 'pairs', counts)
    return counts

  return session.run.stage('iteration_01/pairs', ('iteration_01/pairs.parquet',), produce).counts


def labelled_rows(session: Session) -> tuple[list[TokenRow], list[bool], dict]:
  """Encoded responses of --train with their labels, and what was left out."""
  counts: collections.Counter = collections.Counter()
  rows, labels = [], []
  for item in read_labelled(FLAGS.train, FLAGS.train_limit):
    ids = encode_prompt(session, item.prompt, item.where)
    sides = fit(session, ids, (item.response,), item.where, counts)
    if sides is not None:
      rows.append(TokenRow(ids, sides[0]))
      labels.append(item.label)
  if not rows:
    raise InputError('no row is left', where=FLAGS.train,
                     expected='a row of at most --max_length ids', found=dict(counts))
  for side in (True, False):
    if side not in labels:
      raise InputError('all labels are the same', where=FLAGS.train,
                       expected='desirable and undesirable responses', found=f'{side} alone')
  return rows, labels, {'rows': len(rows), 'desirable': sum(labels), **counts}


def mismatched(rows: Sequence[TokenRow], group: int) -> list[TokenRow]:
  """Each prompt with the response of the row before it, inside groups of `group` rows.

  A last row that would stand alone joins the group before it.
  """
  starts = list(range(0, len(rows), group))
  if len(starts) > 1 and len(rows) - starts[-1] == 1:
    starts.pop()
  out = []
  for start, end in zip(starts, [*starts[1:], len(rows)], strict=True):
    for n in range(start, end):
      other = rows[n - 1 if n > start else end - 1]
      out.append(TokenRow(rows[n].prompt_ids, other.response_ids))
  return out


def score(session: Session, params: dict, rows: Sequence[TokenRow], lengths: Sequence[int],
          label: str) -> list[np.ndarray]:
  with session.progress.stage(label, len(rows), 'responses') as bar:
    return score_rows(
        params, rows, session.model, session.compute, mesh=session.mesh, lengths=lengths,
        batch_size=FLAGS.score_batch, pad_id=session.tokenizer.pad_id, on_rows=bar.advance)


def held_out_sums(session: Session, params: dict, rows: Sequence[Mapping],
                  lengths: Sequence[int], label: str) -> np.ndarray:
  """Log-probs of both responses of every pair, [n, 2] float64."""
  scored = score(session, params, token_rows(rows), lengths, label)
  return np.array([x.sum(dtype=np.float64) for x in scored]).reshape(-1, 2)


def measure(session: Session, iteration: int, model: Model, rows: Sequence[Mapping],
            lengths: Sequence[int], reference: np.ndarray | None = None) -> Mapping:
  """Stage 'iteration_0N/held_out': how the model ranks held-out pairs.

  Returns the numbers, and `sums` [n, 2]. With `reference`, the sums under it, implicit rewards too.
  """
  stage = f'iteration_{iteration:02d}/held_out'

  def rank(scratch: epath.Path) -> np.ndarray:
    del scratch
    return held_out_sums(session, model.params, rows, lengths, f'held-out pairs, M{iteration}')

  def produce(scratch: epath.Path, sums: np.ndarray) -> dict:
    counts = np.array([[len(row[f'{side}_ids']) for side in ('chosen', 'rejected')]
                       for row in rows])
    ranked = {'mean': sums / counts, 'sequence': sums}
    numbers: dict[str, float] = {'pairs': len(rows)}
    if reference is not None:
      ranked = {'reward': sums - reference} | ranked
      gap = mean_estimate(list(ranked['reward'][:, 0] - ranked['reward'][:, 1]))
      numbers |= {'margin': gap.value, 'margin_low': gap.low, 'margin_high': gap.high}
    for key, values in ranked.items():
      estimate = proportion(int((values[:, 0] > values[:, 1]).sum()), len(rows))
      numbers |= {f'{key}_accuracy': estimate.value, f'{key}_low': estimate.low,
                  f'{key}_high': estimate.high}
    numbers |= {'logps/chosen': float(sums[:, 0].mean()),
                'logps/rejected': float(sums[:, 1].mean())}
    (scratch / 'held_out.json').write_text(json.dumps(numbers | {'sums': sums.tolist()}))
    session.record(iteration, 'held_out', numbers)
    return numbers

  session.run.stage(stage, (f'{stage}.json',), produce, together=rank)
  return json.loads(session.run.path(stage, f'{stage}.json').read_text())


def show(session: Session, before: Mapping, after: Mapping) -> None:
  """Two lines on held-out pairs."""
  for name, numbers in (('before', before), ('after', after)):
    accuracies = '  '.join(
        f'{key} {100 * numbers[f"{key}_accuracy"]:.1f}% '
        f'[{100 * numbers[f"{key}_low"]:.1f}, {100 * numbers[f"{key}_high"]:.1f}]'
        for key in ('reward', 'mean', 'sequence') if f'{key}_accuracy' in numbers)
    session.progress.line(
        f'held-out pairs {name}: chosen above rejected by {accuracies}; log-prob of chosen '
        f'{numbers["logps/chosen"]:.2f}, rejected {numbers["logps/rejected"]:.2f}')


def first_loss(config: loss_flags.LossConfig) -> float | None:
  """The preference loss where policy = reference; None where it depends on the data."""
  if config.kto_options is not None or len(config.parts) != 1:
    return None
  (name, (_, options)), = config.parts.items()
  if not preference.needs_reference(name, config.pair_options) or config.pair_options != PLAIN \
      or preference.resolve(name) in ('rdpo_len', 'reward_aware') or FLAGS.reference is not None:
    return None
  return preference.value_at_reference(name, options)


def load_reference(session: Session, model: Model) -> Model:
  """The reference of --reference; the model in training where none is given."""
  if FLAGS.reference is None:
    return model
  return sessions.load_reference(session, epath.Path(FLAGS.reference), FLAGS.reference_storage)


def train_pairs(session: Session, start: epath.Path, config: loss_flags.LossConfig) -> None:
  """Pairs, reference, training, and what it did to held-out pairs."""
  counts = pairs_stage(session)
  session.progress.line(f'{FLAGS.train}: ' + ', '.join(
      f'{key.removeprefix("pairs/")} {value}' for key, value in counts.items()))
  rows = read_pairs(session, ITERATION)
  held_out = encode_pairs(session, FLAGS.test, FLAGS.test_limit)[0] if FLAGS.test else []
  lengths = common_flags.length_buckets(max(
      len(row['prompt_ids']) + max(len(row['chosen_ids']), len(row['rejected_ids']))
      for row in [*rows, *held_out]))
  loop = training_flags.loop_config(len(rows), FLAGS.epochs, FLAGS.max_steps)
  optimizer = common_flags.optimizer_config()
  learning_rate_schedule(optimizer, loop.steps)   # a warm-up that is too long is refused here
  adapted = lora_flags.adapted(session.model)
  objective = mixed_objective(config.parts, adapted or session.model, session.compute,
                              pair_options=config.pair_options, moving=config.moving)
  model = sessions.load_model(session, start)
  before = measure(session, 0, model, held_out, lengths) if held_out else {}
  sums = np.asarray(before.get('sums', ()))
  if config.needs_reference:
    reference = load_reference(session, model)
    if held_out and reference is not model:
      sums = held_out_sums(
          session, reference.params, held_out, lengths, 'held-out pairs, reference')
    reference_stage(session, ITERATION, reference, lengths, FLAGS.score_batch)
    pairs = training_pairs(session, ITERATION, reference)
    del reference
  else:
    # Losses without a reference read none; zeros stand where it would be.
    both = token_rows(rows)
    pairs = [Pair(w, loser, [0.0] * len(w.response_ids), [0.0] * len(loser.response_ids))
             for w, loser in zip(both[::2], both[1::2], strict=True)]
  batches = training_flags.batches(
      session, 'pairs', pairs, iteration=ITERATION, steps=loop.steps, lengths=lengths,
      stream=sessions.TRAIN_STREAM, batch_size=FLAGS.batch_size)
  trainer = training_flags.trainer(objective, optimizer, adapted)
  train_stage(session, 'iteration_01/train', ITERATION, model, trainer, batches, loop,
              expected_first_loss=first_loss(config))
  if held_out:
    trained = sessions.load_model(
        session, session.run.path('iteration_01/train', 'iteration_01/model'))
    show(session, before, measure(session, ITERATION, trained, held_out, lengths, sums))


def train_labelled(session: Session, start: epath.Path, options: Mapping) -> None:
  """KTO: labelled responses, their reference and that of mismatched ones, training."""
  rows, labels, counts = labelled_rows(session)
  session.progress.line(f'{FLAGS.train}: ' + ', '.join(f'{k} {v}' for k, v in counts.items()))
  others = mismatched(rows, FLAGS.batch_size)
  lengths = common_flags.length_buckets(max(len(row) for row in [*rows, *others]))
  loop = training_flags.loop_config(len(rows), FLAGS.epochs, FLAGS.max_steps)
  optimizer = common_flags.optimizer_config()
  learning_rate_schedule(optimizer, loop.steps)
  adapted = lora_flags.adapted(session.model)
  objective = kto_objective(options, adapted or session.model, session.compute)
  model = sessions.load_model(session, start)
  reference = load_reference(session, model)
  logps = score(session, reference.params, [*rows, *others], lengths, 'reference')
  del reference
  training = [
      LabelledRow(row, label, other, ref.tolist(), other_ref.tolist())
      for row, label, other, ref, other_ref in zip(
          rows, labels, others, logps[:len(rows)], logps[len(rows):], strict=True)]
  batches = training_flags.batches(
      session, 'labelled', training, iteration=ITERATION, steps=loop.steps, lengths=lengths,
      stream=sessions.TRAIN_STREAM, batch_size=FLAGS.batch_size)
  trainer = training_flags.trainer(objective, optimizer, adapted)
  train_stage(session, 'iteration_01/train', ITERATION, model, trainer, batches, loop)


def main(argv) -> None:
  del argv
  config = dpo_flags.check()
  keep_pages()
  programs = count_programs()
  progress = sessions.open_progress()
  mesh = common_flags.mesh_from_flags()
  dpo_flags.check_devices(mesh)
  with open_run(FLAGS.run_dir or 'runs/dpo', flags=dpo_flags.effective(),
                versions=current_versions(), free_flags=common_flags.FREE_FLAGS) as run, \
       jax.set_mesh(mesh):
    model, tokenizer = sessions.open_model_folder(FLAGS.model)
    with sessions.open_metrics(run) as metrics:
      session = Session(run, metrics, progress, mesh, model, tokenizer,
                        common_flags.compute_policy(), FLAGS.seed, programs,
                        FLAGS.param_dtype)
      start = lora_flags.start_from(session, epath.Path(FLAGS.model))
      input_stage(session, {
          split: epath.Path(FLAGS[split].value) for split in ('train', 'test')
          if FLAGS[split].value is not None})
      if config.kto_options is not None:
        train_labelled(session, start, config.kto_options)
      else:
        train_pairs(session, start, config)
    sessions.report(run)
    progress.line(f'{programs()} programs compiled, peak memory {peak_memory() / 2**30:.2f} GiB; '
                  f'model: {durable.shared(run.folder / "iteration_01" / "model")}')


if __name__ == '__main__':
  common_flags.run(main, several=True)
