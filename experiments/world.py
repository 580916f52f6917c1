"""The embedded world as a command: `python -m experiments.world --output=DIR` writes its problems.

Also the first two stages of an experiment that was given no model: the problems, and a tiny seed
model trained on written-out solutions until its greedy accuracy on dev problems reaches a target.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence

import jax
from absl import flags
from etils import epath

from experiments import common_flags, training_flags
from jaxrl.data.batches import TokenRow
from jaxrl.data.world import SPLITS, STYLES, WorldProblem, problems
from jaxrl.errors import InputError
from jaxrl.models.config import ModelConfig
from jaxrl.models.hugging_face import save_model
from jaxrl.models.params import init_params
from jaxrl.preferences.new_problems import WORLD_WRITER, choose_examples, writer_prompt
from jaxrl.rewards.checking import AnswerRule
from jaxrl.runs.evaluation_stage import greedy_accuracy
from jaxrl.runs.problem_set import ProblemSet
from jaxrl.runs.session import TRAIN_STREAM, Session, load_model
from jaxrl.runs.stages import Run
from jaxrl.runs.train_stage import make_trainer, train_stage
from jaxrl.sampling.engine import Engine
from jaxrl.tokens.prompts import Message, prompt_ids
from jaxrl.tokens.tiny import write_tokenizer
from jaxrl.tokens.tokenizer import response_ids
from jaxrl.training.loop import LoopConfig
from jaxrl.training.objectives import sft_objective
from jaxrl.training.optimizer import OptimizerConfig

FLAGS = flags.FLAGS
flags.DEFINE_integer('world_sft', 12_000, 'Worked solutions that the seed model is trained on.',
                     lower_bound=1)
flags.DEFINE_integer('world_train', 600, 'Training problems; only their final answers are used.',
                     lower_bound=1)
flags.DEFINE_integer('world_dev', 200, 'Problems that decide when the seed is good enough.',
                     lower_bound=1)
flags.DEFINE_integer('world_test', 400, 'Held-out problems.', lower_bound=1)
flags.DEFINE_integer('world_min_steps', 2, 'Fewest operations in a problem.', lower_bound=1)
flags.DEFINE_integer('world_max_steps', 4, 'Most operations in a problem.', lower_bound=1)
# Unset rather than 1: the flags of a run of one style stay those of the runs before there were any.
flags.DEFINE_integer('world_styles', None, 'Styles of reasoning that worked solutions are written '
                     'in; default: one.', lower_bound=1, upper_bound=len(STYLES))
flags.DEFINE_float('seed_accuracy', 0.4, 'Greedy dev accuracy at which the seed stops training.',
                   lower_bound=0.0, upper_bound=1.0)
flags.DEFINE_integer('seed_max_steps', 600, 'Most steps of the seed.', lower_bound=1)
flags.DEFINE_integer('seed_check_every', 20, 'Steps between looks at its accuracy.', lower_bound=1)
flags.DEFINE_integer('seed_first_check', 120, 'Steps before the first look.', lower_bound=1)
flags.DEFINE_float('seed_learning_rate', 3e-3, 'Learning rate of the seed.', lower_bound=0.0)
flags.DEFINE_integer('seed_batch_size', 64, 'Examples per step of the seed.', lower_bound=1)

VOCABULARY = 400
SEED_WARMUP = 20
# Distinct problems of one operation that every split has; each further one gives 20 times as many.
ONE_STEP_PROBLEMS = 13_000
FILES = tuple(f'world/{split}.jsonl' for split in SPLITS)


def tiny_config(vocab_size: int) -> ModelConfig:
  """About 0.8M parameters; everything a Llama has, small."""
  return ModelConfig(
      family='llama', vocab_size=vocab_size, d_model=128, n_layers=4, n_heads=4, n_kv=2, d_head=32,
      d_mlp=384, max_length=256, tie_embeddings=True)


@dataclasses.dataclass(frozen=True)
class Writing:
  """What the seed model learns of writing problems, beside solving them."""

  share: float                # examples of it, as a share of the worked solutions
  few_shot: int               # questions in the prompt, after which one more is written
  longest: int                # ids of prompt and response together


def writing_rows(made: Sequence[WorldProblem], writing: Writing, seed: int) -> list[dict]:
  """Rows of sft.jsonl whose question shows a few problems and whose solution is one more."""
  count = round(writing.share * len(made))
  rows = []
  for n, chosen in enumerate(choose_examples(count, len(made), writing.few_shot + 1, seed)):
    *shown, last = (made[i].question for i in chosen)
    rows.append({'id': f'write-{n:05d}', 'question': writer_prompt(shown, WORLD_WRITER),
                 'answer': '', 'solution': last})
  return rows


def write_world(folder: epath.Path, seed: int, writing: Writing | None = None) -> dict:
  """Writes SPLIT.jsonl (id, question, answer; `solution` in sft only) and `start/`.

  `start/` is a Hugging Face folder with the tiny tokenizer and random weights.
  """
  counts = {}
  texts: list[str] = []
  for split in SPLITS:
    made = list(problems(
        split, int(FLAGS[f'world_{split}'].value or 0), seed=seed, min_steps=FLAGS.world_min_steps,
        max_steps=FLAGS.world_max_steps, styles=FLAGS.world_styles or 1))
    rows = []
    for p in made:
      row = {'id': p.id, 'question': p.question, 'answer': str(p.answer)}
      if split == 'sft':        # elsewhere the reasoning is not even on disk
        row['solution'] = p.reasoning
        texts += [p.question, p.reasoning]
      rows.append(json.dumps(row))
    if split == 'sft' and writing is not None:
      rows += map(json.dumps, writing_rows(made, writing, seed))
    (folder / f'{split}.jsonl').write_text('\n'.join(rows) + '\n')
    counts[split] = len(made)
  tokenizer = folder / 'tokenizer.partial'
  config = tiny_config(write_tokenizer(tokenizer, texts[:4000], vocab_size=VOCABULARY))
  start = folder / 'start'
  if start.exists():
    start.rmtree()
  save_model(start, init_params(jax.random.key(seed), config), config, tokenizer_from=tokenizer)
  return counts


def world_stage(run: Run, seed: int, writing: Writing | None = None) -> epath.Path:
  """Stage 'world/problems'; returns the folder with the problems and the untrained model."""
  outputs = (*FILES, 'world/start')
  run.stage('world/problems', outputs, lambda scratch: write_world(scratch, seed, writing))
  for output in outputs:
    run.path('world/problems', output)
  return run.folder / 'world'


def seed_rows(session: Session, world: epath.Path) -> list[TokenRow]:
  """Prompt and solution ids of the SFT problems."""
  rows = []
  for line in (world / 'sft.jsonl').read_text().splitlines():
    row = json.loads(line)
    prompt = prompt_ids(session.tokenizer, (Message('user', row['question']),))
    rows.append(TokenRow(prompt, response_ids(session.tokenizer, row['solution'], ends=True)))
  return rows


def seed_stage(
    session: Session, world: epath.Path, engine: Engine, rule: AnswerRule, dev: ProblemSet,
    lengths: tuple[int, ...], *, stage: str = 'seed/train', start: epath.Path | None = None,
    accuracy: str = 'seed_accuracy',
) -> epath.Path:
  """SFT until the dev accuracy is reached; returns the model folder.

  Args:
    stage: its name; the accuracies are recorded under the first part, the losses under the last.
    start: the untrained model; default: the world's.
    accuracy: the flag that holds the accuracy to reach.

  Raises:
    InputError: the accuracy was not reached within --seed_max_steps.
  """
  untrained = load_model(session, start or world / 'start')
  rows = seed_rows(session, world)
  optimizer = OptimizerConfig(FLAGS.seed_learning_rate, warmup_steps=SEED_WARMUP)
  trainer = make_trainer(sft_objective(session.model, session.compute), optimizer, 1)
  name = stage.partition('/')[0]
  every, limit = FLAGS.seed_check_every, FLAGS.seed_max_steps
  target = float(FLAGS[accuracy].value or 0)

  def stop(step: int, params: dict) -> bool:
    if step < min(FLAGS.seed_first_check, limit):
      return False
    numbers = greedy_accuracy(session, engine, params, dev.problems, dev.prompts, rule)
    session.metrics.rewind(0, name, step - 1)
    session.metrics.write(0, name, step, numbers)
    session.metrics.sync()
    reached = numbers['greedy_accuracy']
    session.progress.line(f'  {name}: greedy dev accuracy {reached:.3f} at step {step}')
    if step >= limit and reached < target:
      raise InputError(
          f'the {name} model did not reach its accuracy', where='--seed_max_steps',
          expected=f'{target} on dev problems by step {limit}', found=reached,
          fix=f'Raise --seed_max_steps, or lower --{accuracy} or --world_max_steps')
    return reached >= target

  batches = training_flags.batches(
      session, 'sequences', rows, iteration=0, steps=limit + 1, lengths=lengths,
      stream=TRAIN_STREAM, batch_size=FLAGS.seed_batch_size)
  # One step past the limit: `stop` is asked at the limit, and ends or refuses there.
  train_stage(
      session, stage, 0, untrained, trainer, batches,
      LoopConfig(steps=limit + 1, log_every=every, save_every=every), stop=stop,
      parks_optimizer=True)
  return session.run.path(stage, f'{name}/model')


def check_flags() -> None:
  """Raises InputError for flags of the world that contradict each other."""
  if FLAGS.world_min_steps > FLAGS.world_max_steps:
    raise InputError('no problem has so many operations', where='--world_min_steps',
                     expected=f'at most --world_max_steps={FLAGS.world_max_steps}',
                     found=FLAGS.world_min_steps)
  if FLAGS.seed_max_steps % FLAGS.seed_check_every:
    raise InputError('the last step must be a look', where='--seed_max_steps',
                     expected=f'a multiple of --seed_check_every={FLAGS.seed_check_every}',
                     found=FLAGS.seed_max_steps)
  if FLAGS.seed_max_steps < SEED_WARMUP:
    raise InputError('the seed would end in its warm-up', where='--seed_max_steps',
                     expected=f'at least {SEED_WARMUP}', found=FLAGS.seed_max_steps)
  if FLAGS.seed_learning_rate == 0:
    raise InputError('the seed would learn nothing', where='--seed_learning_rate',
                     expected='a number > 0', found=0)
  most = ONE_STEP_PROBLEMS * 20 ** (FLAGS.world_max_steps - 1)
  for split in SPLITS:
    if FLAGS[f'world_{split}'].value > most:
      raise InputError('there are not so many different problems', where=f'--world_{split}',
                       expected=f'at most {most} with --world_max_steps={FLAGS.world_max_steps}',
                       found=FLAGS[f'world_{split}'].value)


def main(argv) -> None:
  if FLAGS.output is None:
    raise InputError('no folder given', where='--output', expected='where to write the world')
  del argv
  check_flags()
  folder = epath.Path(FLAGS.output)
  folder.mkdir(parents=True, exist_ok=True)
  counts = write_world(folder, FLAGS.seed)
  print(', '.join(f'{split} {count}' for split, count in counts.items()), 'problems in', folder)


if __name__ == '__main__':
  flags.DEFINE_string('output', None, 'Folder to write the problems and the untrained model to.')
  common_flags.run(main)
