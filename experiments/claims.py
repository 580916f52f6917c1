"""The claims of the preference papers on the embedded world, over several seeds, as one table.

`python -m experiments.claims --papers=irpo,scpo,wspo,dive` runs what is missing and writes --page.
Below --output each paper has a folder as `experiments.irpo_ablation`, `scpo_claims`, `wspo_claims`
and `dive_claims` leave it, so one made by them is taken over. A seed whose runs are all finished is
read as it is, whatever it was made with: the page says at which settings. With --with_flag or
--with_world_flag every run is started again, which refuses one made with others. The same command
again goes on where it stopped.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Hashable, Mapping, Sequence

from absl import flags
from etils import epath

from experiments import (
    claim_runs,
    claims_page,
    common_flags,
    dive_claims,
    findings,
    irpo_ablation,
    output_flag,
    scpo_claims,
    wspo_claims,
)
from experiments.claims_page import PaperClaims
from jaxrl.errors import InputError
from jaxrl.runs.folder import FLAGS as FLAGS_FILE
from jaxrl.runs.folder import decode_flags
from jaxrl.runs.manifest import read_manifest
from jaxrl.runs.progress import Progress

FLAGS = flags.FLAGS
for module in (claim_runs, output_flag):
  flags.adopt_module_key_flags(module)
flags.declare_key_flag('gammas')
DEFAULT_OUTPUT = 'runs/claims'       # holds one folder per paper

flags.DEFINE_list('papers', ['irpo', 'scpo', 'wspo', 'dive'], 'Whose claims: irpo, scpo, wspo, '
                  'dive.')
flags.DEFINE_bool('summarise_only', False, 'Start no run: read what is finished, and say what is '
                  'missing.')
flags.DEFINE_string('page', 'docs/claims.md', 'File to write the table to.')

Folders = Mapping[Hashable, epath.Path]      # variant -> run folder


@dataclasses.dataclass(frozen=True)
class Paper:
  """How the claims of one paper are run and summed up."""

  title: str
  folders: Callable[[epath.Path, int], Folders]                # of one seed
  run_seed: Callable[[epath.Path, int], None]
  summarise: Callable[[Mapping[int, Folders]], dict]


PAPERS = {
    name: Paper(title, made.folders, made.run_seed, made.summarise)
    for name, title, made in (
        ('irpo', 'IRPO', irpo_ablation), ('scpo', 'ScPO', scpo_claims),
        ('wspo', 'WSPO', wspo_claims), ('dive', 'DIVE', dive_claims))}
# What differs from seed to seed.
OF_ONE_RUN = ('seed', 'model', 'train', 'test', 'weak_base', 'weak_aligned')


def check() -> list[str]:
  """The papers of --papers.

  Raises:
    InputError: none, an unknown one, one twice, or a flag that the others leave without effect.
  """
  names = FLAGS.papers
  if not names or len({*names}) < len(names) or not {*names} <= {*PAPERS}:
    raise InputError('the papers cannot be used', where='--papers',
                     expected=f'some of {",".join(PAPERS)}, each once', found=','.join(names))
  common_flags.refuse('wspo' not in names and FLAGS['gammas'].present > 0, 'gammas',
                      'wspo is not among --papers')
  for name in ('with_flag', 'with_world_flag'):
    common_flags.refuse(FLAGS.summarise_only and bool(FLAGS[name].value), name, '--summarise_only')
  wspo_claims.gammas()
  return names


def gather(paper: Paper, output: epath.Path, seeds: Sequence[int]) -> PaperClaims:
  """Runs what is missing, unless --summarise_only, and sums up the seeds that are finished."""
  finished, missing = {}, []
  for seed in seeds:
    folders = paper.folders(output, seed)
    absent = [f for f in folders.values() if not claim_runs.is_finished(f)]
    if not FLAGS.summarise_only and (absent or FLAGS.with_flag or FLAGS.with_world_flag):
      paper.run_seed(output, seed)
      absent = []
    missing += [f'{output.name}/{f.name}' for f in absent]
    if not absent:
      finished[seed] = folders
  if not finished:
    return PaperClaims(paper.title, (), {}, 0.0, {}, (), tuple(missing))
  summary = paper.summarise(finished)
  if not FLAGS.summarise_only:
    (output / 'summary.json').write_text(json.dumps(summary, indent=2))
  runs = [folder for folders in finished.values() for folder in folders.values()]
  return PaperClaims(
      paper.title, tuple(finished), summary['verdicts'], sum(map(seconds, runs)),
      settings(finished), tuple(sorted({*map(version, runs)})), tuple(missing))


def seconds(folder: epath.Path) -> float:
  """Of all finished stages of a run, whenever they ran."""
  return sum(entry.seconds for entry in read_manifest(folder).values())


def version(folder: epath.Path) -> str:
  """What a run was made with, as 'jax 0.10.2 on 1 x cpu'."""
  found = json.loads((folder / 'versions.json').read_text())
  return f'jax {found["jax"]} on {found["devices"]}'


def settings(finished: Mapping[int, Folders]) -> dict[str, dict[str, str]]:
  """Variant -> the recorded flags of its runs, which are the same for all seeds.

  Raises:
    InputError: a flag was another one for another seed.
  """
  found: dict[str, dict[str, str]] = {}
  for folders in finished.values():
    for variant, folder in folders.items():
      flags_of = {name: value for name, value in decode_flags(folder / FLAGS_FILE).items()
                  if name not in OF_ONE_RUN}
      first = found.setdefault(str(variant), flags_of)
      for name in sorted(first.keys() & flags_of.keys()):
        if flags_of[name] != first[name]:
          raise InputError('the seeds were not run alike', where=folder,
                           expected=f'--{name}={first[name]}, as for the first seed',
                           found=f'--{name}={flags_of[name]}',
                           fix='Leave the seed out, or run it again in an empty folder')
  return found


def command(papers: Sequence[str]) -> str:
  """The command that makes these runs and the page, without its places."""
  parts = ['python -m experiments.claims', f'--papers={",".join(papers)}',
           f'--seeds={",".join(FLAGS.seeds)}']
  if 'wspo' in papers:
    parts.append(f'--gammas={",".join(f"{gamma:g}" for gamma in wspo_claims.gammas())}')
  for name in ('with_flag', 'with_world_flag'):
    parts += [f'--{name}={value}' for value in FLAGS[name].value or ()]
  return ' '.join(parts)


def main(argv) -> None:
  del argv
  papers, seeds = check(), claim_runs.seeds()
  output = epath.Path(FLAGS.output or DEFAULT_OUTPUT)
  found = [gather(PAPERS[name], output / name, seeds) for name in papers]
  page = epath.Path(FLAGS.page)
  page.parent.mkdir(parents=True, exist_ok=True)
  page.write_text(claims_page.render(command(papers), found))
  progress = Progress()
  progress.table('Claims', ('paper', *findings.COLUMNS), [
      [paper.title, *row] for paper in found for row in findings.table(paper.shown())])
  for paper in found:
    for name in paper.missing:
      progress.line(f'{paper.title}: {name} is missing or not finished')
  progress.line(f'page: {page}')


if __name__ == '__main__':
  common_flags.run(main)
