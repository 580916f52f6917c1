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

from experiments import common_flags, data_flags, irpo_flags, irpo_table, lora_flags, world
from jaxrl.data.batches import pair_arrays, shuffled_batches
from jaxrl.errors import InputError
from jaxrl.preferences.irpo import PairConfig, build_pairs
from jaxrl.runs import session as sessions
from jaxrl.runs.evaluation_stage import Evaluation, evaluation_stage, greedy_accuracy
from jaxrl.runs.folder import current_versions, open_run
from jaxrl.runs.input_stage import input_stage
from jaxrl.runs.metrics import MetricsLog
from jaxrl.runs.pair_stage import pair_stage
from jaxrl.runs.problem_set import gold_response_ids, read_problem_set
from jaxrl.runs.process import count_programs, keep_pages, peak_memory
from jaxrl.runs.progress import Progress
from jaxrl.runs.reference_stage import read_pairs, reference_stage, training_pairs
from jaxrl.runs.report import write_report
from jaxrl.runs.sample_stage import Draws, sample_stage
from jaxrl.runs.score_stage import score_stage
from jaxrl.runs.select_stage import select_stage
from jaxrl.runs.session import Session
from jaxrl.runs.shift_stage import shift_stage
from jaxrl.runs.train_stage import make_trainer, train_stage
from jaxrl.sampling.engine import EngineConfig, make_engine
from jaxrl.training.loop import LoopConfig, check_loop
from jaxrl.training.objectives import preference_objective

FLAGS = flags.FLAGS
for module in (common_flags, data_flags, irpo_flags, lora_flags, world):
  flags.adopt_module_key_flags(module)


def iterate(session: Session, config: irpo_flags.IrpoConfig, start: epath.Path,
            paths: dict[str, epath.Path]) -> None:
  """Every iteration, from the model folder `start`; `paths` names the problem files by split."""
  longest = FLAGS.max_prompt_length + config.sampling.max_new_tokens
  lengths = common_flags.length_buckets(longest)
  check_loop(LoopConfig(1, FLAGS.log_every, FLAGS.save_every), batch_size=FLAGS.batch_size,
             micro_batches=FLAGS.micro_batches, mesh=session.mesh)
  adapted = lora_flags.adapted(session.model)
  engine = make_engine(
      session.model, config.sampling, EngineConfig(FLAGS.slots, dtype=session.compute.dtype),
      session.mesh, max_prompt=FLAGS.max_prompt_length, eos_ids=session.tokenizer.eos_ids,
      pad_id=session.tokenizer.pad_id)
  rule = config.rule
  limits = {'train': FLAGS.train_limit, 'test': FLAGS.test_limit}
  sets = {
      split: read_problem_set(
          session, path, data_flags.task(), rule, limit=limits.get(split),
          max_prompt_length=FLAGS.max_prompt_length, over_length=FLAGS.over_length)
      for split, path in paths.items()
  }
  input_stage(session, paths)
  if FLAGS.model is None:
    start = world.seed_stage(session, start.parent, engine, rule, sets['dev'], lengths)
  start = lora_flags.start_from(session, start)
  train, test = sets['train'], sets['test']
  solutions = gold_response_ids(session, train.problems) \
      if FLAGS.gold_in_winners != 'never' else {}
  if FLAGS.gold_in_winners != 'never' and not solutions:
    raise InputError('no problem has a worked solution', where=paths['train'],
                     expected='some for --gold_in_winners', found='none',
                     fix='Leave --gold_in_winners out')
  if FLAGS.dev_prompts >= len(train.prompts):
    raise InputError('no prompt would be left to train on', where='--dev_prompts',
                     expected=f'fewer than the {len(train.prompts)} prompts of {paths["train"]}',
                     found=FLAGS.dev_prompts)
  held_out = train.held_out(FLAGS.dev_prompts, FLAGS.seed)
  trainer = make_trainer(
      preference_objective(
          config.loss, config.loss_options, adapted or session.model, session.compute),
      common_flags.optimizer_config(), FLAGS.micro_batches, adapted)

  def evaluate(t: int, model: sessions.Model) -> None:
    evaluation_stage(session, t, engine, model, Evaluation(
        test.problems, test.prompts, rule, FLAGS.votes, FLAGS.vote_temperature,
        session.stream_seed(t, sessions.VOTE_STREAM)))
    write_report(session.run.folder)

  def batches(t: int, pairs):
    return shuffled_batches(
        pairs, batch_size=FLAGS.batch_size, seed=session.stream_seed(t, sessions.TRAIN_STREAM),
        collate=functools.partial(pair_arrays, lengths=lengths, pad_id=session.tokenizer.pad_id))

  def loop(pairs) -> LoopConfig:
    epoch = len(pairs) / FLAGS.batch_size
    steps = math.ceil(config.epochs * epoch)
    return LoopConfig(min(steps, config.max_steps or steps), FLAGS.log_every, FLAGS.save_every,
                      steps_per_epoch=epoch)

  def best_steps(t: int, model: sessions.Model, pairs) -> int:
    """Steps that do best on held-out prompts when trained without their pairs."""
    ids = {p.prompt_id for p in held_out}
    rest = [pair for pair, row in zip(pairs, read_pairs(session, t), strict=True)
            if row['prompt_id'] not in ids]
    return select_stage(
        session, t, model, trainer, batches(t, rest), loop(rest), lambda params: greedy_accuracy(
            session, engine, params, train.problems, held_out, rule),
        expected_first_loss=math.log(2))

  model = sessions.load_model(session, start)
  evaluate(0, model)
  for t in range(1, config.iterations + 1):
    sample_stage(session, t, engine, model, train.prompts, Draws(
        config.samples_per_prompt, config.temperatures[t - 1],
        session.stream_seed(t, sessions.SAMPLE_STREAM), FLAGS.part_prompts))
    score_stage(session, t, train.problems, rule)
    pair_stage(session, t, 'irpo', functools.partial(
        build_pairs, gold_ids=solutions, config=PairConfig(
            FLAGS.pairs_per_prompt, FLAGS.gold_in_winners, FLAGS.dedup, FLAGS.max_pairs, longest,
            session.stream_seed(t, sessions.PAIR_STREAM))))
    reference_stage(session, t, model, lengths, FLAGS.score_batch)
    pairs = training_pairs(session, t, model)
    schedule = loop(pairs)
    if held_out:
      schedule = dataclasses.replace(schedule, steps=best_steps(t, model, pairs))
    name = f'iteration_{t:02d}'
    train_stage(session, f'{name}/train', t, model, trainer, batches(t, pairs), schedule,
                expected_first_loss=math.log(2))
    trained = sessions.load_model(session, session.run.path(f'{name}/train', f'{name}/model'))
    shift_stage(session, t, model, trained, lengths, FLAGS.score_batch)
    model = trained
    evaluate(t, model)


def main(argv) -> None:
  del argv
  config = irpo_flags.check()
  keep_pages()
  programs = count_programs()
  progress = Progress()
  mesh = common_flags.mesh_from_flags()
  irpo_flags.check_devices(mesh)
  with open_run(FLAGS.run_dir or 'runs/irpo', flags=irpo_flags.effective(),
                versions=current_versions(), free_flags=common_flags.FREE_FLAGS) as run, \
       jax.set_mesh(mesh):
    if FLAGS.model is None:
      folder = world.world_stage(run, FLAGS.seed)
      start = folder / 'start'
      paths = {split: folder / f'{split}.jsonl' for split in ('train', 'test', 'dev')}
    else:
      start = epath.Path(FLAGS.model)
      paths = {'train': epath.Path(FLAGS.train), 'test': epath.Path(FLAGS.test)}
    model, tokenizer = sessions.open_model_folder(start)
    with MetricsLog(run.folder / 'metrics.jsonl') as metrics:
      session = Session(run, metrics, progress, mesh, model, tokenizer,
                        common_flags.compute_policy(), FLAGS.seed, programs)
      iterate(session, config, start, paths)
      irpo_table.show(session, irpo_table.rows(session))
    progress.line(f'{programs()} programs compiled, peak memory {peak_memory() / 2**30:.2f} GiB; '
                  f'report: {run.folder / "report.html"}')


if __name__ == '__main__':
  common_flags.run(main, irpo_flags.parse)
