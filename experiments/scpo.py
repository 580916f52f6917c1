"""Self-Consistency Preference Optimization (Prasad et al. 2024, version 3): no gold answers.

    for t = 1..T:
      M_{t-1} writes new problems after the example of a few (by flag)
      draw k responses per problem from M_{t-1}, which vote, and hotter ones, which do not
      keep a problem where the top answer has a share tau of the votes
      one pair: chosen, a response of the top answer; rejected, one whose answer has fewest votes
      w = (votes of chosen - votes of rejected) / k
      M_t = argmin w * (DPO + alpha * NLL(chosen) / length), from M_{t-1} with reference M_{t-1}

`python -m experiments.scpo` runs it on the embedded world; `--model`, `--train` and `--test` on a
checkpoint and problems of your own, of which those to train on need no answers. The same command
again goes on where a run stopped.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence, Set

from absl import flags
from etils import epath

from experiments import (
    common_flags,
    engine_flags,
    rounds,
    rounds_flags,
    scpo_flags,
    scpo_table,
    world,
)
from experiments.rounds import Method, PairRows, Round
from experiments.scpo_flags import ScpoConfig
from jaxrl.preferences.irpo import cap
from jaxrl.preferences.new_problems import WORLD_WRITER, WRITER
from jaxrl.preferences.scpo import VoteConfig, build_vote_pairs
from jaxrl.runs.problem_set import ProblemSet
from jaxrl.runs.session import PAIR_STREAM, WRITE_STREAM, Session
from jaxrl.runs.write_stage import Writing, write_stage
from jaxrl.sampling.engine import Engine, make_engine

FLAGS = flags.FLAGS
for module in scpo_flags.MODULES:
  flags.adopt_module_key_flags(module)


def labelled(ids: Sequence[str]) -> Set[str]:
  """The training problems whose gold answers are used: a share of all, chosen uniformly."""
  return set(cap(ids, round(FLAGS.labelled_fraction * len(ids)), FLAGS.seed))


def method(config: ScpoConfig, session: Session, train: ProblemSet, path: epath.Path) -> Method:
  """ScPO on the training problems."""
  del path
  ids = labelled(list(train.problems))
  ask = functools.partial(ask_with_new, config, _writer(config, session)) \
      if any(config.num_generated) else lambda this: this.train

  def pair(this: Round, samples: Sequence[Mapping]) -> PairRows:
    return build_vote_pairs(samples, ids, VoteConfig(
        config.samples_per_prompt, config.tau_fractions[this.iteration - 1],
        FLAGS.allow_unparsed_rejected, FLAGS.weighted, FLAGS.max_pairs, rounds_flags.longest_row(),
        this.seed(PAIR_STREAM)))

  return Method(
      'scpo', config.loss, config.loss_options, pair,
      needs='prompts whose samples agree by --tau_fraction, but not all of them',
      fix='Lower --tau_fraction, raise --extra_samples or --extra_temperature, or use another '
          'model or other prompts',
      extra_temperatures=config.extra_temperatures, ask=ask)


def _writer(config: ScpoConfig, session: Session) -> Engine:
  """Its prompts are longer than those that ask a problem, and its responses shorter."""
  sampling = dataclasses.replace(config.sampling, max_new_tokens=FLAGS.max_new_problem)
  return make_engine(
      session.model, sampling, engine_flags.engine_config(session.compute.dtype),
      session.mesh, max_prompt=FLAGS.max_writer_prompt, eos_ids=session.tokenizer.eos_ids,
      pad_id=session.tokenizer.pad_id)


def ask_with_new(config: ScpoConfig, writer: Engine, this: Round) -> ProblemSet:
  """The training problems, and those that M_{t-1} writes after their example."""
  count = config.num_generated[this.iteration - 1]
  if not count:
    return this.train
  return this.train.joined(write_stage(
      this.session, this.iteration, writer, this.model, config.task,
      Writing(count, FLAGS.few_shot, FLAGS.new_problem_temperature,
              WORLD_WRITER if config.task.name == 'world' else WRITER,
              FLAGS.max_writer_prompt, this.seed(WRITE_STREAM)),
      this.train, this.test, max_prompt_length=FLAGS.max_prompt_length))


def main(argv) -> None:
  del argv
  config = scpo_flags.check()
  rounds.run('runs/scpo', config, scpo_flags.effective(), functools.partial(method, config),
             functools.partial(scpo_table.show, voters=config.samples_per_prompt),
             labelled=labelled, world_writing=world.Writing(
                 FLAGS.world_writer_share, FLAGS.few_shot,
                 FLAGS.max_writer_prompt + FLAGS.max_new_problem)
             if any(config.num_generated) and FLAGS.world_writer_share else None)


if __name__ == '__main__':
  common_flags.run(main, scpo_flags.parse, several=True)
