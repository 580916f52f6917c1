"""docs/claims.md: what the papers claim beside what runs of `experiments.claims` have shown."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from experiments.findings import OPEN

COLUMNS = ('paper', 'claim', 'published figure', 'what the small world shows', 'seeds',
         '95% interval', 'verdict', 'seconds')
FEWEST_SEEDS = 3             # with fewer no verdict but undecided


@dataclasses.dataclass(frozen=True)
class PaperClaims:
  """What the runs of one paper have shown."""

  title: str
  seeds: tuple[int, ...]                       # those whose runs are all finished
  verdicts: Mapping[str, Mapping[str, str]]    # claim -> finding, see experiments/findings.py
  seconds: float                               # of all runs of these seeds
  settings: Mapping[str, Mapping[str, str]]    # variant -> recorded flags
  versions: tuple[str, ...]
  missing: tuple[str, ...]                     # run folders

  def shown(self) -> dict[str, Mapping[str, str]]:
    """The findings, undecided where there are too few seeds."""
    if len(self.seeds) >= FEWEST_SEEDS:
      return dict(self.verdicts)
    return {claim: {**found, 'verdict': OPEN} for claim, found in self.verdicts.items()}


def rows(papers: Sequence[PaperClaims]) -> list[list[str]]:
  """One row per claim, cells in the order of `COLUMNS`."""
  return [
      [paper.title, claim, found['published'], found['seen'], ', '.join(map(str, paper.seeds)),
       found['interval'], found['verdict'], f'{paper.seconds:.0f}']
      for paper in papers for claim, found in paper.shown().items()]


def render(command: str, papers: Sequence[PaperClaims]) -> str:
  """The page as Markdown."""
  parts = [f'''# Claims of the papers, and what the embedded world shows

Written by the command below, verdicts included; changes by hand are lost. Figures are read from the
run folders.

    {command}

{_table(COLUMNS, rows(papers))}

- **Interval**: 95%, of the figure that stands first under what is seen. Over seeds it is a t
  interval of the mean; accuracies of DIVE are compared over the problems of all seeds together.
  After each seed's figure stands its own interval over problems, where it has one.
- **Verdict**: holds, does not hold or undecided, by the rules of the pages named below; undecided
  with fewer than {FEWEST_SEEDS} seeds.
- **Seconds**: of all runs of the paper and the seeds named, the same in each of its rows; the sum
  over the finished stages of each run, as its manifest has them.
- **Published figures** are of the papers' own models and data.
''']
  missing = [f'- {paper.title}: `{name}`' for paper in papers for name in paper.missing]
  if missing:
    parts.append('## Missing\n\nThese runs are not finished, and their seeds not counted above:\n\n'
                 + '\n'.join(missing) + '\n')
  parts += [_settings(paper) for paper in papers if paper.settings]
  return '\n'.join(parts)


PAGES = {'IRPO': 'irpo_world.md', 'ScPO': 'scpo.md', 'WSPO': 'wspo.md', 'DIVE': 'dive.md'}


def _table(heads: Sequence[str], cells: Sequence[Sequence[str]]) -> str:
  lines = [heads, ['---'] * len(heads),
           *([cell.replace('|', '\\|') for cell in row] for row in cells)]
  return '\n'.join(f'| {" | ".join(line)} |' for line in lines)


def _settings(paper: PaperClaims) -> str:
  """All flags of the first variant, and what the others have otherwise."""
  (first, flags), *others = paper.settings.items()
  page = PAGES[paper.title]
  lines = [
      f'## {paper.title}', '', f'Rules and background: [{page}]({page}). Made with '
      f'{"; ".join(paper.versions)}.', '',
      f'Flags of `{first}` as its runs recorded them, without seed and files:', '', '```',
      *_wrapped([f'--{name}={value}' for name, value in flags.items()]), '```', '']
  for variant, own in others:
    changed = [f'`--{name}={value}`' for name, value in own.items() if flags.get(name) != value]
    lines.append(f'- `{variant}`, given the models of `{first}`: '
                 f'{", ".join(changed) or "no other flags"}')
  return '\n'.join(lines) + '\n'


def _wrapped(words: Sequence[str], width: int = 118) -> list[str]:
  lines = ['']
  for word in words:
    if lines[-1] and len(lines[-1]) + 1 + len(word) > width:
      lines.append('')
    lines[-1] = f'{lines[-1]} {word}'.strip()
  return lines
