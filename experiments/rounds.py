"""The rounds that every iterated preference method goes through.

    M_0 evaluated
    for t = 1..T:
      samples    responses per prompt from M_{t-1}
      scores     the answer of each, checked and voted on
      pairs      by the method's rule
      reference  log-probs of the pairs under M_{t-1}
      M_t        trained from M_{t-1} with the method's loss, evaluated

`Method` is all that sets one method apart; experiments/irpo.py is the shortest example. Every step
is a stage of the run folder, so that a run goes on where it stopped.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence, Set

import grain
import jax
from absl import flags
from etils import epath

from experiments import (
    common_flags,
    data_flags,
    engine_flags,
    lora_flags,
    rounds_flags,
    training_flags,
    world,
)
from experiments.rounds_flags import RoundsConfig
from jaxrl.data.batches import Pair
from jaxrl.errors import InputError
from jaxrl.runs import durable
from jaxrl.runs import session as sessions
from jaxrl.runs.evaluation_stage import Evaluation, evaluation_stage, greedy_accuracy
from jaxrl.runs.folder import current_versions, open_run
from jaxrl.runs.input_stage import input_stage
from jaxrl.runs.pair_stage import pair_stage
from jaxrl.runs.problem_set import ProblemSet, read_problem_set
from jaxrl.runs.process import count_programs, keep_pages, peak_memory
from jaxrl.runs.reference_stage import read_pairs, reference_stage, training_pairs
from jaxrl.runs.sample_stage import Draws, sample_stage
from jaxrl.runs.score_stage import score_stage
from jaxrl.runs.select_stage import select_stage
from jaxrl.runs.session import Model, Session
from jaxrl.runs.shift_stage import shift_stage
from jaxrl.runs.train_stage import Trainer, train_stage
from jaxrl.sampling.engine import Engine, make_engine
from jaxrl.sampling.header import common_header
from jaxrl.tokens.prompts import EncodedPrompt
from jaxrl.training.loop import LoopConfig
from jaxrl.training.objectives import preference_objective

FLAGS = flags.FLAGS
for module in rounds_flags.MODULES:
  flags.adopt_module_key_flags(module)


@dataclasses.dataclass(frozen=True)
class Round:
  """One iteration as a method sees it."""

  session: Session
  iteration: int              # 1..T
  model: Model                # M_{t-1}: draws the responses and is the reference
  train: ProblemSet           # problems of --train that may be asked
  test: ProblemSet

  def seed(self, stream: int) -> int:
    """A seed of 32 bits for one kind of draw; streams are those of jaxrl/runs/session.py."""
    return self.session.stream_seed(self.iteration, stream)


PairRows = tuple[list[dict], Mapping[str, float]]


@dataclasses.dataclass(frozen=True)
class Method:
  """What sets one method apart from the others.

  Attributes:
    name: in pairs.parquet.
    loss, loss_options: of the loss family.
    pair: (round, samples joined with scores) -> pair rows and counts, see `pair_stage`.
    needs, fix: what pairs are built from, and what to do where there are none.
    first_loss: preference loss of a pair of weight 1 while policy and reference are equal.
    extra_temperatures: of responses that are drawn beside those that vote.
    ask: round -> the problems that are asked.
    trains_held_out: --dev_prompts join in once they have decided on the number of steps; else they
      are never trained on.
    measure: a further stage after the evaluation of M_t, called with the session and t.
  """

  name: str
  loss: str
  loss_options: Mapping
  pair: Callable[[Round, Sequence[Mapping]], PairRows]
  needs: str
  fix: str
  first_loss: float = math.log(2)
  extra_temperatures: tuple[float, ...] = ()
  ask: Callable[[Round], ProblemSet] = lambda this: this.train
  trains_held_out: bool = False
  measure: Callable[[Session, int], object] = lambda session, t: None


@dataclasses.dataclass(frozen=True)
class Machinery:
  """What is made once and serves all rounds."""

  session: Session
  config: RoundsConfig
  engine: Engine
  trainer: Trainer
  train: ProblemSet
  test: ProblemSet
  held_out: Sequence[EncodedPrompt]
  lengths: tuple[int, ...]    # that rows are padded to


def evaluate(made: Machinery, method: Method, t: int, model: Model) -> None:
  """Greedy and majority accuracy of M_t, and the report of all that is finished."""
  seed = made.session.stream_seed(t, sessions.VOTE_STREAM)
  evaluation_stage(made.session, t, made.engine, model, Evaluation(
      made.test.problems, made.test.prompts, made.config.rule, FLAGS.votes, FLAGS.vote_temperature,
      seed))
  method.measure(made.session, t)
  sessions.report(made.session.run)


def make_pairs(made: Machinery, method: Method, t: int, model: Model) -> list[Pair]:
  """Draws, scores and pairs responses of M_{t-1}; the pairs with their reference log-probs."""
  session, config = made.session, made.config
  this = Round(session, t, model, made.train, made.test)
  asked = method.ask(this)
  draws = Draws(
      config.samples_per_prompt, config.temperatures[t - 1], this.seed(sessions.SAMPLE_STREAM),
      method.extra_temperatures)
  sample_stage(session, t, made.engine, model, asked.prompts, draws)
  score_stage(session, t, asked.problems, config.rule, voters=draws.count)
  pair_stage(session, t, method.name, functools.partial(method.pair, this), needs=method.needs,
             fix=method.fix)
  reference_stage(session, t, model, made.lengths, FLAGS.score_batch)
  return training_pairs(session, t, model)


def train_next(made: Machinery, method: Method, t: int, model: Model, pairs: list[Pair]) -> Model:
  """M_t, trained from `model` on the pairs; with --dev_prompts for the best number of steps."""
  session = made.session
  batches, schedule, stop = _batches(made, t, pairs), _loop(made, pairs), None
  if made.held_out:
    best = _best_steps(made, method, t, model, pairs)
    if method.trains_held_out:
      schedule = dataclasses.replace(schedule, steps=best)
    else:
      # The training that was looked at, once more up to there: it must not know where it ends.
      schedule = dataclasses.replace(schedule, steps=schedule.steps + 1)

      def stop(step: int, params: dict) -> bool:
        del params
        return step >= best

  name = f'iteration_{t:02d}'
  train_stage(session, f'{name}/train', t, model, made.trainer, batches, schedule,
              expected_first_loss=_first_loss(method, batches), stop=stop)
  trained = sessions.load_model(session, session.run.path(f'{name}/train', f'{name}/model'))
  shift_stage(session, t, model, trained, made.lengths, FLAGS.score_batch)
  return trained


def _batches(made: Machinery, t: int, pairs: Sequence[Pair]) -> grain.MapDataset:
  return training_flags.batches(
      made.session, 'pairs', pairs, iteration=t, steps=_loop(made, pairs).steps + 1,
      lengths=made.lengths, stream=sessions.TRAIN_STREAM, batch_size=FLAGS.batch_size)


def _loop(made: Machinery, pairs: Sequence[Pair]) -> LoopConfig:
  return training_flags.loop_config(len(pairs), made.config.epochs, made.config.max_steps)


def _first_loss(method: Method, batches: grain.MapDataset) -> float:
  return method.first_loss * training_flags.mean_weight(batches[0])


def _best_steps(
    made: Machinery, method: Method, t: int, model: Model, pairs: Sequence[Pair]
) -> int:
  """Steps that do best on held-out prompts when trained without their pairs."""
  ids = {prompt.prompt_id for prompt in made.held_out}
  rest = [pair for pair, row in zip(pairs, read_pairs(made.session, t), strict=True)
          if row['prompt_id'] not in ids]
  batches = _batches(made, t, rest)
  return select_stage(
      made.session, t, model, made.trainer, batches, _loop(made, rest),
      lambda params: greedy_accuracy(
          made.session, made.engine, params, made.train.problems, made.held_out, made.config.rule),
      expected_first_loss=_first_loss(method, batches))


MakeMethod = Callable[[Session, ProblemSet, epath.Path], Method]
Labelled = Callable[[Sequence[str]], Set[str]]


def read_problems(
    session: Session, config: RoundsConfig, paths: Mapping[str, epath.Path],
    labelled: Labelled | None,
) -> dict[str, ProblemSet]:
  """Problems by split; the files are noted, so that a restart on changed ones is refused."""
  limits = {'train': FLAGS.train_limit, 'test': FLAGS.test_limit}
  sets = {
      split: read_problem_set(
          session, path, data_flags.task(), config.rule, limit=limits.get(split),
          max_prompt_length=FLAGS.max_prompt_length, over_length=FLAGS.over_length,
          labelled=labelled if split == 'train' else None)
      for split, path in paths.items()
  }
  input_stage(session, paths)
  return sets


def iterate(
    session: Session, config: RoundsConfig, make_method: MakeMethod, start: epath.Path,
    paths: Mapping[str, epath.Path], labelled: Labelled | None,
    world_writing: world.Writing | None,
) -> None:
  """Every iteration, from the model folder `start`; `paths` names the problem files by split."""
  lengths = common_flags.length_buckets(rounds_flags.longest_row())
  rounds_flags.check_devices(session.mesh)
  adapted = lora_flags.adapted(session.model)
  sets = read_problems(session, config, paths, labelled)
  engine = make_engine(
      session.model, config.sampling, engine_flags.engine_config(session.compute.dtype),
      session.mesh, max_prompt=FLAGS.max_prompt_length, eos_ids=session.tokenizer.eos_ids,
      pad_id=session.tokenizer.pad_id, draws=config.samples_per_prompt,
      held=sessions.master_bytes(session),
      header=common_header(p.ids for problems in sets.values() for p in problems.prompts))
  session.progress.line(f'rollouts: {engine.sizes}')
  if FLAGS.model is None:
    # Rows of writing are longer than any others.
    seed_lengths = lengths + ((world_writing.longest - 1,) if world_writing else ())
    start = world.seed_stage(session, start.parent, engine, config.rule, sets['dev'], seed_lengths)
  start = lora_flags.start_from(session, start)
  train = sets['train']
  method = make_method(session, train, paths['train'])
  if FLAGS.dev_prompts >= len(train.prompts):
    raise InputError('no prompt would be left to train on', where='--dev_prompts',
                     expected=f'fewer than the {len(train.prompts)} prompts of {paths["train"]}',
                     found=FLAGS.dev_prompts)
  held_out = train.held_out(FLAGS.dev_prompts, FLAGS.seed)
  if not method.trains_held_out:
    train = train.without(held_out)
  trainer = training_flags.trainer(
      preference_objective(
          method.loss, method.loss_options, adapted or session.model, session.compute),
      common_flags.optimizer_config(), adapted)
  made = Machinery(session, config, engine, trainer, train, sets['test'], held_out, lengths)

  model = sessions.load_model(session, start)
  evaluate(made, method, 0, model)
  for t in range(1, config.iterations + 1):
    pairs = make_pairs(made, method, t, model)
    model = train_next(made, method, t, model, pairs)
    evaluate(made, method, t, model)


def run(
    folder: str, config: RoundsConfig, effective: Mapping[str, str], make_method: MakeMethod,
    show: Callable[[Session], None], *, labelled: Labelled | None = None,
    world_writing: world.Writing | None = None,
) -> None:
  """A whole run in --run_dir, else in `folder`; `show` prints its tables at the end.

  `effective` are the flags to record. `make_method(session, train problems, their file)` may
  refuse them. `labelled` takes the ids of training problems to those whose gold answers are used,
  by default all. In the embedded world `world_writing` is what the seed model learns of writing
  problems.
  """
  keep_pages()
  programs = count_programs()
  progress = sessions.open_progress()
  mesh = common_flags.mesh_from_flags()
  rounds_flags.check_devices(mesh)
  with open_run(FLAGS.run_dir or folder, flags=effective, versions=current_versions(),
                free_flags=common_flags.FREE_FLAGS) as opened, \
       jax.set_mesh(mesh):
    if FLAGS.model is None:
      problems = world.world_stage(opened, FLAGS.seed, world_writing)
      start = problems / 'start'
      paths = {split: problems / f'{split}.jsonl' for split in ('train', 'test', 'dev')}
    else:
      start = epath.Path(FLAGS.model)
      paths = {'train': epath.Path(FLAGS.train), 'test': epath.Path(FLAGS.test)}
    model, tokenizer = sessions.open_model_folder(start)
    with sessions.open_metrics(opened) as metrics:
      session = Session(opened, metrics, progress, mesh, model, tokenizer,
                        common_flags.compute_policy(), FLAGS.seed, programs,
                        FLAGS.param_dtype)
      iterate(session, config, make_method, start, paths, labelled, world_writing)
      show(session)
    progress.line(f'{programs()} programs compiled, peak memory {peak_memory() / 2**30:.2f} GiB; '
                  f'report: {durable.shared(opened.folder / "report.html")}')
