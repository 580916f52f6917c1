"""Stage: how different the answers of a model are, right and wrong ones apart."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

from etils import epath

from jaxrl.evaluation.diversity import EQUATION, by_side, solved_share
from jaxrl.evaluation.text_embedding import hashed_ngrams
from jaxrl.runs.evaluation_stage import read_evaluation
from jaxrl.runs.sample_stage import read_samples
from jaxrl.runs.score_stage import read_scores
from jaxrl.runs.session import Session


def scored_samples(session: Session, iteration: int) -> list[dict]:
  """Samples of a finished iteration, each with its score."""
  return [
      sample | score for sample, score in zip(
          read_samples(session, iteration), read_scores(session, iteration), strict=True)]


def measure(rows: Sequence[Mapping], vocabulary: int) -> dict[str, float]:
  """The metrics of `by_side`, and `solved`: the share of questions with a right response.

  Texts are embedded by hashed n-grams, which do not move with training, so that models of
  different iterations and runs are measured alike. `vocabulary` is that of `ead`.
  """
  embeddings = hashed_ngrams([row['response'] for row in rows])
  return {'responses': len(rows), 'solved': solved_share(rows)} | by_side(
      rows, embeddings, pattern=EQUATION, vocabulary=vocabulary)


def diversity_stage(session: Session, iteration: int) -> Mapping[str, float]:
  """Writes `diversity.json` and one metrics record; returns the same numbers.

  `test/NAME` is about the votes of M_t on the held-out problems, all drawn alike, and absent
  without votes; `samples/NAME` about what M_{t-1} answered to the training problems, and absent
  in iteration 0.
  """
  name = f'iteration_{iteration:02d}/diversity'

  def produce(scratch: epath.Path) -> dict:
    groups = {'test': [
        row for row in read_evaluation(session, iteration) if row['kind'] == 'vote']}
    if iteration:
      groups['samples'] = scored_samples(session, iteration)
    total = sum(map(len, groups.values()))
    numbers: dict[str, float] = {}
    with session.progress.stage(
        f'iteration {iteration}: diversity', total, 'responses') as bar:
      for group, rows in groups.items():
        if rows:
          found = measure(rows, session.model.vocab_size)
          numbers |= {f'{group}/{key}': value for key, value in found.items()}
        bar.advance(len(rows))
    (scratch / 'diversity.json').write_text(json.dumps(numbers, indent=1))
    session.record(iteration, 'diversity', numbers)
    return numbers

  return session.run.stage(name, (f'{name}.json',), produce).counts
