"""The table of claims, from tiny made-up runs; nothing is trained here."""

import dataclasses
import json

import pytest
from absl import flags
from absl.testing import flagsaver
from etils import epath

from experiments import (
    claim_runs,
    claims,
    claims_page,
    dive_claims,
    findings,
    irpo_ablation,
    scpo_claims,
    wspo_claims,
)
from experiments.claims_page import PaperClaims
from jaxrl.errors import InputError
from jaxrl.evaluation.statistics import Estimate
from jaxrl.runs.manifest import Entry, write_manifest
from tests.experiments import (
    in_process,
    test_dive,
    test_irpo_ablation,
    test_scpo_claims,
    test_wspo,
)

PAGE = 'A_PAGE.md'


def fake_run(folder, *stages, iterations='2', beta='0.1', seconds=1.5):
  folder.mkdir(parents=True)
  (folder / 'flags.flags').write_text(
      f'--beta={beta}\n--iterations={iterations}\n--model={folder}/M\n--seed=5\n')
  (folder / 'versions.json').write_text(
      json.dumps({'jax': '0.10.2', 'devices': '1 x cpu', 'platform': 'secret'}))
  write_manifest(folder, {stage: Entry((), seconds, {}) for stage in stages})


FINISHED = ('iteration_01/evaluation', 'iteration_02/evaluation')


def fake_paper(started, **changes):
  """Two variants per seed; a run that is started is finished at once."""

  def folders(output, seed):
    return {variant: output / f'seed_{seed}_{variant}' for variant in ('a', 'b')}

  def run_seed(output, seed):
    started.append(seed)
    for folder in folders(output, seed).values():
      if not folder.exists():
        fake_run(folder, *FINISHED)

  def summarise(runs):
    return {'verdicts': {'it | works': findings.finding(
        'holds', findings.POINTS, Estimate(0.1, 0.05, 0.15),
        [Estimate(0.01 * seed, 0, 0.5) for seed in runs], published='+5 points')}}

  return dataclasses.replace(
      claims.Paper('IRPO', folders, run_seed, summarise), **changes)


@pytest.fixture
def parsed():
  """Flags at their defaults."""
  with flagsaver.flagsaver():
    if not flags.FLAGS.is_parsed():
      flags.FLAGS.mark_as_parsed()
    yield


# Findings


def test_a_finding_by_hand():
  each = [Estimate(0.2, 0.1, 0.3), Estimate(0.4, 0.4, 0.4)]
  assert findings.finding('holds', findings.POINTS, Estimate(0.3, -0.971, 1.571), each,
                          published='+26', more='1 of 2 rise') == {
      'verdict': 'holds', 'seen': '+30.0 points; per seed +20.0 [+10.0, +30.0], +40.0; 1 of 2 rise',
      'interval': '[-97.1, +157.1]', 'published': '+26'}
  alone = findings.finding('holds', findings.SHARE, each[1], each[1:], published='')
  assert (alone['seen'], alone['interval']) == ('40.0%', '-')


def test_over_seeds():
  one, other = Estimate(0.2, 0.1, 0.3), Estimate(0.4, 0.0, 0.9)
  assert findings.over_seeds([one]) == one
  mean = findings.over_seeds([one, other])
  assert mean.value == pytest.approx(0.3) and mean.low < 0 < 1 < mean.high    # t with 1 degree


@pytest.mark.parametrize(('module', 'seed', 'count'), [
    (irpo_ablation, test_irpo_ablation._seed, 5), (scpo_claims, test_scpo_claims.seed, 5),
    (wspo_claims, test_wspo._seed, 4), (dive_claims, test_dive._seed, 11)])
def test_every_claim_of_every_paper_fills_its_row(module, seed, count):
  found = module.verdicts([seed(), seed(), seed()])
  assert len(found) == count
  for claim, finding in found.items():
    assert finding.keys() == {'verdict', 'seen', 'interval', 'published'}, claim
    assert all(finding.values()) and finding['verdict'] in ('holds', 'does not hold', 'undecided')
    assert 'per seed' in finding['seen'] or 'seed 0:' in finding['seen'], claim


def test_published_gains_of_dive_are_ten_to_forty_five_percent():
  found = dive_claims.verdicts([test_dive._seed()])
  assert [v['published'] for v in list(found.values())[:4]] == [
      f'{ten} with 10 samples, {fifty} with 50 on GSM8K'
      for ten, fifty in (('+15%', '+45%'), ('+12%', '+32%'), ('+19%', '+43%'), ('+17%', '+33%'))]


# Runs


def test_run_folders_keep_their_names(parsed):
  """Folders that the commands of the papers made are taken over."""
  output = epath.Path('OUT')
  assert {name: [f.name for f in paper.folders(output / name, 3).values()]
          for name, paper in claims.PAPERS.items()} == {
      'irpo': ['seed_3_with_nll', 'seed_3_without_nll'],
      'scpo': ['seed_3_scpo', 'seed_3_scpo_unweighted', 'seed_3_irpo_with_gold'],
      'wspo': ['seed_3_gamma_0.5', 'seed_3_gamma_0.1', 'seed_3_gamma_1'],
      'dive': ['seed_3_vanilla', 'seed_3_global', 'seed_3_selection', 'seed_3_global_selection']}


@pytest.mark.parametrize(('stages', 'iterations', 'expected'), [
    (FINISHED, '2', True), (FINISHED, '3', False), (FINISHED[:1], '2', False), ((), '1', False)])
def test_a_run_is_finished_with_its_last_evaluation(tmp_path, stages, iterations, expected):
  folder = epath.Path(tmp_path / 'run')
  assert not claim_runs.is_finished(folder)
  fake_run(folder, *stages, iterations=iterations)
  assert claim_runs.is_finished(folder) == expected


def test_only_seeds_with_missing_runs_are_started(tmp_path, parsed):
  output, started = epath.Path(tmp_path / 'irpo'), []
  for variant in 'ab':
    fake_run(output / f'seed_0_{variant}', *FINISHED)
  fake_run(output / 'seed_1_a', *FINISHED)
  found = claims.gather(fake_paper(started), output, [0, 1, 2])
  assert started == [1, 2] and found.seeds == (0, 1, 2) and not found.missing
  assert found.seconds == 6 * 2 * 1.5            # those of resumed and found runs as well
  assert found.settings == dict.fromkeys('ab', {'beta': '0.1', 'iterations': '2'})
  assert found.versions == ('jax 0.10.2 on 1 x cpu',)
  assert json.loads((output / 'summary.json').read_text())['verdicts'] == found.verdicts
  claims.gather(fake_paper(started), output, [0, 1, 2])
  assert started == [1, 2]
  with flagsaver.flagsaver(with_flag=['--beta=2']):     # the runs themselves compare flags
    claims.gather(fake_paper(started), output, [0, 1])
  assert started == [1, 2, 0, 1]


def test_summarising_starts_nothing_and_says_what_is_missing(tmp_path, parsed):
  output, started = epath.Path(tmp_path / 'irpo'), []
  for variant in 'ab':
    fake_run(output / f'seed_1_{variant}', *FINISHED)
  fake_run(output / 'seed_2_a', *FINISHED)
  with flagsaver.flagsaver(summarise_only=True):
    found = claims.gather(fake_paper(started), output, [1, 2])
    nothing = claims.gather(fake_paper(started), output, [7])
  assert not started and not (output / 'summary.json').exists()
  assert found.seeds == (1,) and found.missing == ('irpo/seed_2_b',)
  assert not nothing.verdicts and nothing.missing == ('irpo/seed_7_a', 'irpo/seed_7_b')
  page = claims_page.render('python', [found, nothing])
  assert all(f'`{name}`' in page for name in (*found.missing, *nothing.missing))


def test_seeds_of_other_settings_are_refused(tmp_path, parsed):
  output = epath.Path(tmp_path / 'irpo')
  for seed, beta in ((0, '0.1'), (1, '0.2')):
    for variant in 'ab':
      fake_run(output / f'seed_{seed}_{variant}', *FINISHED, beta=beta)
  with pytest.raises(InputError, match='seed_1_a.*not run alike.*--beta=0.1.*--beta=0.2'):
    claims.gather(fake_paper([]), output, [0, 1])


# The page


def test_the_page(tmp_path, parsed):
  found = claims.gather(fake_paper([]), epath.Path(tmp_path / 'irpo'), [0, 1, 2])
  found.settings['b']['beta'] = '0.3'
  page = claims_page.render('python -m COMMAND', [found])
  assert '    python -m COMMAND\n' in page and '--beta=0.1 --iterations=2' in page
  assert '- `b`, given the models of `a`: `--beta=0.3`' in page
  assert str(tmp_path) not in page and 'secret' not in page and 'Missing' not in page
  row = next(line for line in page.splitlines() if line.startswith('| IRPO'))
  assert row == (
      '| IRPO | it \\| works | +5 points | +10.0 points; per seed +0.0 [+0.0, +50.0], +1.0 [+0.0, '
      '+50.0], +2.0 [+0.0, +50.0] | 0, 1, 2 | [+5.0, +15.0] | holds | 18 |')


@pytest.mark.parametrize(('seeds', 'expected'), [((0, 1, 2), 'holds'), ((0, 1), 'undecided')])
def test_fewer_than_three_seeds_decide_nothing(seeds, expected):
  found = PaperClaims('IRPO', seeds, {'it works': {
      'verdict': 'holds', 'seen': '1', 'interval': '-', 'published': '2'}}, 1.0, {}, (), ())
  assert claims_page.rows([found])[0][6] == expected


# The command


def test_the_command_writes_the_page(tmp_path, monkeypatch):
  started = []
  monkeypatch.setattr(claims, 'PAPERS', {**claims.PAPERS, 'irpo': fake_paper(started)})
  page = tmp_path / 'docs' / PAGE
  ended = in_process.run(claims, '--papers=irpo', '--seeds=4,5,6', f'--output={tmp_path}/runs',
                         f'--page={page}', '--with_world_flag=--world_test=9')
  assert ended.status == 0 and started == [4, 5, 6], ended.stderr
  text = page.read_text()
  assert ('    python -m experiments.claims --papers=irpo --seeds=4,5,6 '
          '--with_world_flag=--world_test=9\n') in text
  assert '| 4, 5, 6 |' in text and str(tmp_path) not in text


@pytest.mark.parametrize(('arguments', 'said'), [
    (('--papers=irpo,dpo',), '--papers'), (('--papers=irpo,irpo',), '--papers'),
    (('--papers=',), '--papers'), (('--papers=irpo', '--gammas=1'), '--gammas'),
    (('--gammas=a',), '--gammas'), (('--seeds=1,1',), '--seeds'),
    (('--summarise_only', '--with_flag=--iterations=1'), '--with_flag'),
    (('--summarise_only', '--with_world_flag=--world_test=9'), '--with_world_flag')])
def test_flags_that_cannot_be_used(tmp_path, arguments, said):
  ended = in_process.run(claims, f'--output={tmp_path}', f'--page={tmp_path / PAGE}', *arguments)
  assert ended.status == 2 and said in ended.stderr
  assert not (tmp_path / PAGE).exists()
