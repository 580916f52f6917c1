"""ScPO from its command line: gold answers of training problems reach nothing but its tables."""

import json
import math
import pathlib
import re
import subprocess
import sys

import pytest
from absl import flags
from absl.testing import flagsaver
from etils import epath

from experiments import data_flags, scpo, scpo_flags
from jaxrl.data.tasks import get_task
from jaxrl.preferences.scpo import VoteConfig, build_vote_pairs
from jaxrl.rewards.voting import votes_among
from jaxrl.runs import tables
from jaxrl.runs.metrics import read_metrics
from jaxrl.runs.problem_set import read_problem_set
from jaxrl.runs.session import PAIR_STREAM, Session
from jaxrl.tokens.tokenizer import load_tokenizer
from tests.experiments import irpo_runs

K, EXTRA = 6, 3
SETTINGS = (
    '--task=world', '--compute_dtype=float32', '--remat=all', '--iterations=1',
    f'--samples_per_prompt={K}', f'--extra_samples={EXTRA}', '--extra_temperature=1.5',
    '--tau_fraction=0.3', '--temperature=0.8', '--max_prompt_length=24', '--max_new_tokens=20',
    '--length_buckets=44', '--logp_chunk=128', '--learning_rate=1e-3', '--batch_size=4',
    '--votes=0', '--slots=64', '--log_every=1', '--num_generated=9',
    '--few_shot=2', '--max_writer_prompt=60', '--max_new_problem=24')


def run(finished, folder, train, *more):
  done = subprocess.run(
      [sys.executable, '-m', 'experiments.scpo', f'--run_dir={folder}',
       f'--model={finished.folder}/seed/model', f'--train={train}',
       f'--test={finished.folder}/world/test.jsonl', *SETTINGS, *more],
      cwd=irpo_runs.ROOT, env=irpo_runs.environment(finished.cache), capture_output=True, text=True,
      check=False)
  assert done.returncode == 0, done.stderr[-2000:]
  return done.stdout


def garbled(row, number):
  """Three ways in which an answer can be of no use."""
  if number % 3 == 0:
    return {key: value for key, value in row.items() if key != 'answer'}
  return row | {'answer': 'nobody knows' if number % 3 == 1 else str(int(row['answer']) + 1)}


@pytest.fixture(scope='module')
def runs(finished, tmp_path_factory):
  """The folders of a run and of one whose training problems have other gold answers; stdout."""
  base = tmp_path_factory.mktemp('scpo')
  rows = list(map(json.loads, (finished.folder / 'world/train.jsonl').read_text().splitlines()))
  (base / 'train.jsonl').write_text('\n'.join(
      json.dumps(garbled(row, number)) for number, row in enumerate(rows)))
  said = run(finished, base / 'gold', finished.folder / 'world/train.jsonl')
  run(finished, base / 'garbled', base / 'train.jsonl')
  return base / 'gold', base / 'garbled', said


def read(folder, name):
  schema = getattr(tables, name.upper())
  return tables.read_table(folder / f'iteration_01/{name}.parquet', schema).to_pylist()


def written(folder):
  lines = (folder / 'iteration_01/new_problems.jsonl').read_text().splitlines()
  return list(map(json.loads, lines))


def test_new_problems_are_written_after_training_questions(runs):
  rows = tables.read_table(
      runs[0] / 'iteration_01/written.parquet', tables.SAMPLES).to_pylist()
  questions = {row['prompt'] for row in read(runs[0], 'samples')[:24 * (K + EXTRA)]}
  questions = {q.removeprefix('<bos><|user|>').removesuffix('<|assistant|>') for q in questions}
  for row in rows:
    shown = row['prompt'].removeprefix('<bos><|user|>New:\n').removesuffix('<|assistant|>')
    assert len(set(shown.split('\n')) & questions) == 2
    assert row['temperature'] == pytest.approx(0.7)
  assert len(rows) == len(written(runs[0])) == 9
  verdicts = {row['verdict'] for row in read(runs[0], 'scores')[24 * (K + EXTRA):]}
  assert verdicts <= {'unparseable_gold'}                    # nobody knows their answers
  assert 'problems that the model wrote' in runs[2]


def test_gold_answers_of_training_problems_do_not_matter(runs):
  gold, other, _ = runs
  same = ('written.parquet', 'new_problems.jsonl', 'samples.parquet', 'pairs.parquet',
          'reference.parquet', 'model/model.safetensors')
  for name in same:
    assert (gold / 'iteration_01' / name).read_bytes() == (
        other / 'iteration_01' / name).read_bytes(), name
  assert read(gold, 'scores') != read(other, 'scores')   # the answers were there to be seen


def test_extra_samples_are_hotter_and_do_not_vote(runs):
  samples, scores = read(runs[0], 'samples'), read(runs[0], 'scores')
  new = [row for row in written(runs[0]) if row['discarded'] is None]
  assert len(samples) == (24 + len(new)) * (K + EXTRA)
  assert [row['prompt_id'] for row in samples[24 * (K + EXTRA)::K + EXTRA]] == [
      row['id'] for row in new]
  for start in range(0, len(samples), K + EXTRA):
    rows = samples[start:start + K + EXTRA]
    assert [row['sample_index'] for row in rows] == list(range(K + EXTRA))
    assert [row['temperature'] for row in rows] == pytest.approx([0.8] * K + [1.5] * EXTRA)
    answers = [score['answer'] for score in scores[start:start + K + EXTRA]]
    assert [score['votes'] for score in scores[start:start + K + EXTRA]] == votes_among(
        answers[:K], answers)


def test_pairs_are_those_of_the_votes(runs):
  joined = [a | b for a, b in zip(read(runs[0], 'samples'), read(runs[0], 'scores'), strict=True)]
  seed = Session(*[None] * 7, seed=0, programs=None).stream_seed(1, PAIR_STREAM)
  expected, counts = build_vote_pairs(
      joined, set(), VoteConfig(K, 0.3, True, True, None, 44, seed))
  found = read(runs[0], 'pairs')
  keys = ('prompt_id', 'chosen_index', 'rejected_index', 'chosen_ids', 'rejected_ids')
  assert [[row[key] for key in keys] for row in found] == [
      [row[key] for key in keys] for row in expected]
  assert counts['pairs/prompts_voted'] == len(found) > 3
  assert {row['method'] for row in found} == {'scpo'}
  assert any(row['rejected_index'] >= K for row in found)    # else the extra samples did nothing


def test_training_starts_at_the_weighted_ln_2(runs):
  first = next(r for r in read_metrics(epath.Path(runs[0]) / 'metrics.jsonl')
               if (r['stage'], r['step']) == ('train', 1))
  weights = [row['weight'] for row in read(runs[0], 'pairs')]
  mean = first['loss/preference'] / math.log(2)   # of one batch of four pairs
  rounding = 1e-6             # the loss is a float32
  assert min(weights) - rounding <= mean <= max(weights) + rounding < 1
  assert mean * 4 * K == pytest.approx(round(mean * 4 * K), abs=1e-3)


def test_the_tables_show_the_votes(runs):
  text = runs[2]
  for column in ('mean weight', 'top answer %', 'votes against correctness', 'chosen right %'):
    assert column in text
  assert text.rstrip().endswith('report.html')


class Said:
  def __init__(self, tokenizer):
    self.tokenizer, self.progress, self.lines = tokenizer, self, []

  def line(self, text):
    self.lines.append(text)


def test_only_labelled_problems_need_a_gold_answer(finished, tmp_path):
  """A quarter is labelled: of those a bad answer is left out, of the others it does not matter."""
  path = finished.folder / 'world/train.jsonl'
  rows = list(map(json.loads, path.read_text().splitlines()))
  ids = [row['id'] for row in rows]
  folder = finished.folder / 'seed/model'
  session = Said(load_tokenizer(folder, vocab_size=10_000))
  with flagsaver.flagsaver():
    scpo_flags.parse(['scpo', '--labelled_fraction=0.25', '--seed=3', '--model=M', '--train=A',
                      '--test=B', '--task=world'])
    config = scpo_flags.check()
    labelled = scpo.labelled(ids)
    assert len(labelled) == 6 and labelled == scpo.labelled(ids) < set(ids)

    def asked(spoilt):
      out = tmp_path / 'train.jsonl'
      out.write_text('\n'.join(
          json.dumps(row | ({'answer': 'x'} if row['id'] in spoilt else {})) for row in rows))
      found = read_problem_set(
          session, out, get_task('world'), config.rule, limit=None, max_prompt_length=99,
          over_length='error', labelled=scpo.labelled)
      return [p.prompt_id for p in found.prompts]

    assert asked(set(ids) - labelled) == ids
    with pytest.raises(Exception, match='too many gold answers'):
      asked({min(labelled)})
    flags.FLAGS.mark_as_parsed()


def test_helpshort_lists_every_flag():
  done = subprocess.run(
      [sys.executable, '-m', 'experiments.scpo', '--helpshort'], cwd=irpo_runs.ROOT,
      env=irpo_runs.environment(None), capture_output=True, text=True, check=False)
  listed = set(re.findall(r'^\s+--(?:\[no\])?(\w+):', done.stdout, re.MULTILINE))
  names = {f.name for m in scpo_flags.MODULES for f in flags.FLAGS.get_flags_for_module(m)}
  assert names <= listed and data_flags in scpo_flags.MODULES
  assert done.stdout.startswith('Self-Consistency Preference Optimization')
  assert pathlib.Path(scpo_flags.WORLD_FLAGS).exists()
