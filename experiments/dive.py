"""DIVE: Diversified Iterative Self-Improvement (Qin et al. 2025).

    for t = 1..T:
      draw K responses per training prompt from M_{t-1}
      pool: those of this iteration, or of all so far (--global_pool)
      split by final answer; on each side leave outliers out and pick P diverse responses
        (--selection), or P at random
      pair right and wrong ones place by place
      M_t = argmin alpha * DPO + (1 - alpha) * NLL(chosen) / length, from M_{t-1} with reference
        M_{t-1}, which scores the pairs anew whichever iteration their responses are of

`--noglobal_pool --noselection` is plain self-improvement. `python -m experiments.dive` runs on the
embedded world; `--model`, `--train` and `--test` on a checkpoint and problems of your own. The same
command again goes on where a run stopped.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence

import numpy as np
from absl import flags
from etils import epath

from experiments import common_flags, dive_flags, dive_table, rounds, rounds_flags
from experiments.dive_flags import DiveRun
from experiments.rounds import Method, PairRows, Round
from jaxrl.data.batches import TokenRow
from jaxrl.evaluation.text_embedding import hashed_ngrams
from jaxrl.preferences.dive import DiveConfig, build_diverse_pairs, pool_rows
from jaxrl.runs.diversity_stage import diversity_stage, scored_samples
from jaxrl.runs.problem_set import ProblemSet
from jaxrl.runs.session import PAIR_STREAM, Session
from jaxrl.training.embed import embed_rows

FLAGS = flags.FLAGS
flags.adopt_module_key_flags(dive_flags)


def embed(this: Round, pool: Sequence[Mapping], encoder: str) -> np.ndarray:
  """Embeddings of the responses of a pool, [rows, width]; the model that embeds is M_{t-1}."""
  if encoder == 'ngrams':
    return hashed_ngrams([row['response'] for row in pool])
  # A response that was drawn several times is embedded once.
  places: dict[tuple, int] = {}
  place = [
      places.setdefault((tuple(row['prompt_ids']), tuple(row['response_ids'])), len(places))
      for row in pool]
  session = this.session
  return embed_rows(
      this.model.params, [TokenRow(*key) for key in places], session.model, session.compute,
      mesh=session.mesh, lengths=common_flags.length_buckets(rounds_flags.longest_row()),
      batch_size=FLAGS.score_batch, pad_id=session.tokenizer.pad_id)[place]


def method(config: DiveRun, session: Session, train: ProblemSet, path: epath.Path) -> Method:
  """DIVE on the training problems."""
  del session, train, path

  def pair(this: Round, samples: Sequence[Mapping]) -> PairRows:
    earlier = range(1, this.iteration) if FLAGS.global_pool else ()
    pool = pool_rows(
        [*(scored_samples(this.session, t) for t in earlier), samples],
        global_pool=FLAGS.global_pool)
    rows, counts = build_diverse_pairs(
        pool, embed(this, pool, config.encoder) if FLAGS.selection else None, DiveConfig(
            FLAGS.pairs_per_prompt, FLAGS.global_pool, FLAGS.selection, FLAGS.max_pairs,
            rounds_flags.longest_row(), this.seed(PAIR_STREAM), FLAGS.diversity,
            config.contamination))
    return rows, {'pairs/pool': len(pool)} | counts

  return Method(
      'dive', config.loss, config.loss_options, pair,
      needs='prompts with both right and wrong answers',
      fix='Raise --samples_per_prompt or --temperature, or use another model or other prompts',
      first_loss=config.first_loss, trains_held_out=True, measure=diversity_stage)


def main(argv) -> None:
  del argv
  config = dive_flags.check()
  rounds.run('runs/dive', config, dive_flags.effective(), functools.partial(method, config),
             dive_table.show)


if __name__ == '__main__':
  common_flags.run(main, dive_flags.parse, several=True)
