"""The tables that end a DIVE run, read back from the run folder."""

from __future__ import annotations

from collections.abc import Mapping

from experiments import irpo_table
from jaxrl.runs.session import Session

RESULTS = ('iteration', 'greedy %', '95% interval', 'majority %', 'any of K %', 'pool', 'pairs')
METRICS = {'n-grams': 'distinct_n', 'embedding': 'embedding', 'chains': 'equation_chains'}
SIDES = {'right': 'positive', 'wrong': 'negative'}
DIVERSITY = ('iteration', *(f'{metric} {side}' for metric in METRICS for side in SIDES))
PICKED = ('iteration', 'prompts used', 'repeats left out', 'outliers left out', 'picked right',
          'picked wrong')


def _cell(found: Mapping[str, float], name: str, digits: int = 3, scale: float = 1) -> str:
  return f'{scale * found[name]:.{digits}f}' if name in found else '-'


def cells(diversity: Mapping[str, float], pairs: Mapping[str, float]) -> dict[str, str]:
  """Cells of one iteration, from the counts of its stages."""
  return {
      'any of K %': _cell(diversity, 'test/solved', 1, 100),
      'pool': _cell(pairs, 'pairs/pool', 0),
      'prompts used': _cell(pairs, 'pairs/prompts_used', 0),
      'repeats left out': _cell(pairs, 'pairs/duplicates', 0),
      'outliers left out': _cell(pairs, 'pairs/outliers', 0),
      'picked right': _cell(pairs, 'pairs/diversity_chosen'),
      'picked wrong': _cell(pairs, 'pairs/diversity_rejected'),
  } | {
      f'{metric} {side}': _cell(diversity, f'test/{prefix}/{name}')
      for metric, name in METRICS.items() for side, prefix in SIDES.items()}


def rows(session: Session) -> list[dict[str, str]]:
  """One row per iteration, cells by column."""
  entries = session.run.entries

  def counts(stage: str) -> Mapping[str, float]:
    return entries[stage].counts if stage in entries else {}

  return [
      row | cells(counts(f'iteration_{t:02d}/diversity'), counts(f'iteration_{t:02d}/pairs'))
      for t, row in enumerate(irpo_table.rows(session))]


def show(session: Session) -> None:
  """Prints the tables."""
  irpo_table.show(
      session, rows(session), name='DIVE',
      results=(
          ('answers of each model, and the pool and pairs it was trained on', RESULTS),
          ('diversity of its sampled answers to the held-out problems', DIVERSITY),
          ('what pairs were picked from, and how diverse the picked responses of a prompt are',
           PICKED)))
