"""Iterative Reasoning Preference Optimization (Pang et al. 2024, version 3).

    for t = 1..T:
      draw N responses per training prompt from M_{t-1}
      winners: right final answer (and the gold solution, by flag); losers: the rest
      K pairs per prompt by cycling winners and losers in step
      M_t = argmin DPO + alpha * NLL(winner) / length, from M_{t-1} with reference M_{t-1}

`python -m experiments.irpo` runs it on the embedded world; `--model`, `--train` and `--test` on a
checkpoint and problems of your own. The same command again goes on where a run stopped.
"""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
from absl import flags
from etils import epath

from experiments import common_flags, data_flags, irpo_flags, irpo_table, world
from jaxrl.data.batches import pair_arrays, shuffled_batches
from jaxrl.data.readers import Problem, read_problems
from jaxrl.data.tasks import Task
from jaxrl.preferences.irpo import PairConfig, build_pairs, cap as hold_out
from jaxrl.runs import session as sessions
from jaxrl.runs.evaluation_stage import Evaluation, evaluation_stage, greedy_accuracy
from jaxrl.runs.folder import current_versions, open_run
from jaxrl.runs.metrics import MetricsLog
from jaxrl.runs.pair_stage import pair_stage
from jaxrl.runs.process import keep_pages
from jaxrl.runs.progress import Progress
from jaxrl.runs.reference_stage import read_pairs, reference_stage, training_pairs
from jaxrl.runs.report import write_report
from jaxrl.runs.sample_stage import Draws, sample_stage
from jaxrl.runs.score_stage import check_gold, score_stage
from jaxrl.runs.select_stage import select_stage
from jaxrl.runs.session import Session
from jaxrl.runs.train_stage import make_trainer, train_stage
from jaxrl.sampling.engine import EngineConfig, make_engine
from jaxrl.tokens.prompts import encode_prompts
from jaxrl.tokens.tokenizer import response_ids
from jaxrl.training.loop import LoopConfig, check_loop
from jaxrl.training.step import preference_objective

FLAGS = flags.FLAGS
for module in (common_flags, data_flags, irpo_flags, world):
  flags.adopt_module_key_flags(module)


def read_prompts(session: Session, path: epath.Path, task: Task, limit: int | None, rule):
  """Problems by id and their encoded prompts, all validated.

  A null gold answer is kept: up to 1 percent of them are counted, and score as unparseable gold.
  """
  problems = read_problems(path, task, limit, missing_gold='keep')
  unparsed = check_gold(problems, rule, str(path))
  encoded = encode_prompts(session.tokenizer, problems, max_prompt_length=FLAGS.max_prompt_length,
                           over_length=FLAGS.over_length)
  session.progress.line(
      f'{path}: {len(problems)} problems, {len(encoded.dropped)} dropped for their length, '
      f'{unparsed} with a gold answer that cannot be parsed')
  return {p.prompt_id: p for p in problems}, list(encoded.prompts)


def gold_ids(session: Session, problems: dict[str, Problem]) -> dict[str, list[int]]:
  """Response ids of the worked solutions, where the data has them and the flags want them."""
  if FLAGS.gold_in_winners == 'never':
    return {}
  return {
      p.prompt_id: response_ids(session.tokenizer, p.gold_solution, ends=True)
      for p in problems.values() if p.gold_solution is not None
  }


def iterate(session: Session, config, start: epath.Path, train_path, test_path, dev_path=None):
  """All iterations; returns the rows of the final table."""
  task, rule = data_flags.task(), config.rule
  problems, prompts = read_prompts(session, train_path, task, FLAGS.train_limit, rule)
  test_problems, test_prompts = read_prompts(session, test_path, task, FLAGS.test_limit, rule)
  longest = FLAGS.max_prompt_length + config.sampling.max_new_tokens
  lengths = common_flags.length_buckets(longest)
  check_loop(LoopConfig(1, FLAGS.log_every, FLAGS.save_every), batch_size=FLAGS.batch_size,
             micro_batches=FLAGS.micro_batches, mesh=session.mesh)
  engine = make_engine(
      session.model, config.sampling, EngineConfig(FLAGS.slots, dtype=session.compute.dtype),
      session.mesh, max_prompt=FLAGS.max_prompt_length, eos_ids=session.tokenizer.eos_ids,
      pad_id=session.tokenizer.pad_id)
  if dev_path is not None:
    _, dev_prompts = read_prompts(session, dev_path, task, None, rule)
    start = world.seed_stage(session, start.parent, engine, rule, dev_prompts, lengths)
  trainer = make_trainer(
      preference_objective(config.loss, config.loss_options, session.model, session.compute),
      common_flags.optimizer_config(), FLAGS.micro_batches)
  solutions = gold_ids(session, problems)
  held_out = {p.prompt_id for p in hold_out(prompts, FLAGS.dev_prompts, FLAGS.seed)}

  def test(iteration):
    return Evaluation(test_problems, test_prompts, rule, FLAGS.votes, FLAGS.vote_temperature,
                      session.stream_seed(iteration, sessions.VOTE_STREAM))

  model = sessions.load_model(session, start)
  evaluation_stage(session, 0, engine, model, test(0))
  write_report(session.run.folder)
  for t in range(1, config.iterations + 1):
    name = f'iteration_{t:02d}'
    sample_stage(session, t, engine, model, prompts, Draws(
        config.samples_per_prompt, config.temperatures[t - 1],
        session.stream_seed(t, sessions.SAMPLE_STREAM), FLAGS.part_prompts))
    score_stage(session, t, problems, rule)
    pair_stage(session, t, 'irpo', functools.partial(
        build_pairs, gold_ids=solutions, config=PairConfig(
            FLAGS.pairs_per_prompt, FLAGS.gold_in_winners, FLAGS.dedup, FLAGS.max_pairs, longest,
            session.stream_seed(t, sessions.PAIR_STREAM))))
    reference_stage(session, t, model, lengths, FLAGS.score_batch)
    pairs = training_pairs(session, t, model)
    def batches(rows):
      return shuffled_batches(
          rows, batch_size=FLAGS.batch_size, seed=session.stream_seed(t, sessions.TRAIN_STREAM),
          collate=functools.partial(
              pair_arrays, lengths=lengths, pad_id=session.tokenizer.pad_id))

    def loop(rows):
      steps = math.ceil(config.epochs * len(rows) / FLAGS.batch_size)
      return LoopConfig(min(steps, config.max_steps or steps), FLAGS.log_every, FLAGS.save_every)

    schedule = loop(pairs)
    if held_out:
      rest = [p for p, row in zip(pairs, read_pairs(session, t), strict=True)
              if row['prompt_id'] not in held_out]
      best = select_stage(
          session, t, model, trainer, batches(rest), loop(rest), lambda params: greedy_accuracy(
              session, engine, params, problems,
              [p for p in prompts if p.prompt_id in held_out], rule),
          expected_first_loss=math.log(2))
      schedule = dataclasses.replace(schedule, steps=best)
    train_stage(session, f'{name}/train', t, model, trainer, batches(pairs), schedule,
                expected_first_loss=math.log(2))
    model = sessions.load_model(session, session.run.path(f'{name}/train', f'{name}/model'))
    evaluation_stage(session, t, engine, model, test(t))
    write_report(session.run.folder)
  return irpo_table.rows(session)


def main(argv) -> None:
  del argv
  config = irpo_flags.check()
  keep_pages()
  progress = Progress()
  run_dir = FLAGS.run_dir or 'runs/irpo'
  mesh = common_flags.mesh_from_flags()
  with open_run(run_dir, flags=irpo_flags.effective(), versions=current_versions(),
                free_flags=common_flags.FREE_FLAGS) as run, jax.set_mesh(mesh):
    if FLAGS.model is None:
      folder = world.world_stage(run, FLAGS.seed)
      start = folder / 'start'
      paths = [folder / f'{split}.jsonl' for split in ('train', 'test', 'dev')]
    else:
      start, paths = epath.Path(FLAGS.model), [epath.Path(FLAGS.train), epath.Path(FLAGS.test)]
    model, tokenizer = sessions.open_model_folder(start)
    with MetricsLog(run.folder / 'metrics.jsonl') as metrics:
      session = Session(run, metrics, progress, mesh, model, tokenizer,
                        common_flags.compute_policy(), FLAGS.seed)
      rows = iterate(session, config, start, *paths)
      irpo_table.show(session, rows)
    progress.line(f'report: {run.folder / "report.html"}')


if __name__ == '__main__':
  common_flags.run(main, irpo_flags.parse)
