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

import functools
from collections.abc import Mapping, Sequence

from absl import flags
from etils import epath

from experiments import common_flags, irpo_flags, irpo_table, rounds, rounds_flags
from experiments.irpo_flags import IrpoConfig
from experiments.rounds import Method, PairRows, Round
from jaxrl.errors import InputError
from jaxrl.preferences.irpo import PairConfig, build_pairs
from jaxrl.runs.problem_set import ProblemSet, gold_response_ids
from jaxrl.runs.session import PAIR_STREAM, Session

FLAGS = flags.FLAGS
for module in irpo_flags.MODULES:
  flags.adopt_module_key_flags(module)


def method(config: IrpoConfig, session: Session, train: ProblemSet, path: epath.Path) -> Method:
  """IRPO on the training problems of `path`.

  Raises:
    InputError: gold solutions are wanted and there is none.
  """
  solutions: dict[str, list[int]] = {}
  if FLAGS.gold_in_winners != 'never':
    solutions = gold_response_ids(session, train.problems)
    if not solutions:
      raise InputError('no problem has a worked solution', where=path,
                       expected='some for --gold_in_winners', found='none',
                       fix='Leave --gold_in_winners out')

  def pair(this: Round, samples: Sequence[Mapping]) -> PairRows:
    return build_pairs(samples, solutions, PairConfig(
        FLAGS.pairs_per_prompt, FLAGS.gold_in_winners, FLAGS.dedup, FLAGS.max_pairs,
        rounds_flags.longest_row(), this.seed(PAIR_STREAM)))

  return Method(
      'irpo', config.loss, config.loss_options, pair,
      needs='prompts with both right and wrong answers',
      fix='Raise --samples_per_prompt or --temperature, or use another model or other prompts',
      # Once the number of steps is chosen, the model is trained again on all pairs.
      trains_held_out=True)


def main(argv) -> None:
  del argv
  config = irpo_flags.check()
  rounds.run('runs/irpo', config, irpo_flags.effective(), functools.partial(method, config),
             lambda session: irpo_table.show(session, irpo_table.rows(session)))


if __name__ == '__main__':
  common_flags.run(main, irpo_flags.parse, several=True)
