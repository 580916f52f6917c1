"""Stage: scored samples to preference pairs, by a method's own rule."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from etils import epath

from jaxrl.errors import InputError
from jaxrl.runs import tables
from jaxrl.runs.sample_stage import read_samples
from jaxrl.runs.score_stage import read_scores
from jaxrl.runs.session import Session

# (samples joined with their scores) -> (pair rows without method and iteration, counts by name)
BuildPairs = Callable[[Sequence[Mapping]], tuple[list[dict], Mapping[str, float]]]


def pair_stage(
    session: Session, iteration: int, method: str, build: BuildPairs, *, needs: str, fix: str
) -> Mapping:
  """Writes `pairs.parquet` and one metrics record; returns counts.

  Of several processes all call `build`, which may use the devices of all.

  Raises:
    InputError: no pair could be built: what it `needs`, the counts, and how to `fix` it.
  """
  name = f'iteration_{iteration:02d}/pairs'

  def build_all(scratch: epath.Path) -> tuple[list[dict], Mapping[str, float]]:
    del scratch
    joined = [
        sample | score for sample, score in zip(
            read_samples(session, iteration), read_scores(session, iteration), strict=True)
    ]
    with session.progress.stage(f'iteration {iteration}: pair', None, 'pairs') as bar:
      rows, counts = build(joined)
      bar.advance(len(rows))
    return rows, counts

  def produce(
      scratch: epath.Path, built: tuple[list[dict], Mapping[str, float]]
  ) -> Mapping:
    rows, counts = built
    if not rows:
      raise InputError(
          'no preference pair could be built, so there is nothing to train on', where=name,
          expected=needs, found=', '.join(f'{key} {value}' for key, value in counts.items()),
          fix=fix)
    tables.write_table(
        scratch / 'pairs.parquet', [r | {'method': method, 'iteration': iteration} for r in rows],
        tables.PAIRS)
    session.record(iteration, 'pairs', counts)
    return counts

  return session.run.stage(name, (f'{name}.parquet',), produce, together=build_all).counts
