"""The report without a browser: what is counted, what is escaped, what a damaged run gives."""

import base64
import collections
import hashlib
import html.parser
import json
import math
import re

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxrl.errors import InputError
from jaxrl.evaluation.statistics import proportion
from jaxrl.runs import report, report_page, report_tables, tables
from tests.jaxrl.runs import report_run


class Page(html.parser.HTMLParser):
  """Script and style elements with their content, every start tag, and the visible text."""

  def __init__(self, path):
    super().__init__()
    self.raw = path.read_bytes().decode()
    self.tags, self.inside, self.text, self._open = [], [], [], None
    self.feed(self.raw)

  def handle_starttag(self, tag, attributes):
    self.tags.append((tag, dict(attributes)))
    if tag in ('script', 'style'):
      self._open = [tag, dict(attributes), '']

  def handle_data(self, data):
    if self._open:
      self._open[2] += data
    else:
      self.text.append(data)

  def handle_endtag(self, tag):
    if self._open and tag == self._open[0]:
      self.inside.append(tuple(self._open))
      self._open = None

  def data(self, name):
    return next(json.loads(text) for _, found, text in self.inside if found.get('id') == name)

  def words(self):
    return ' '.join(''.join(self.text).split())


@pytest.fixture(scope='module')
def run_dir(tmp_path_factory):
  return report_run.write_run(
      tmp_path_factory.mktemp('runs') / 'demo', iterations=2, prompts=20, n_samples=4, steps=12
  )


@pytest.fixture(scope='module')
def page(run_dir):
  return Page(report.write_report(run_dir))


def gather(run_dir, **bounds):
  bounds = {'max_prompts': 200, 'max_bytes': 10**7} | bounds
  return report.gather(report.epath.Path(run_dir), **bounds)


@given(st.recursive(
    st.text(st.characters(codec=None, exclude_categories=())) | st.integers() | st.none(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
))  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_embedded_json_is_inert_and_exact(value):
  text = report_page.embed(value)
  assert json.loads(text) == value
  assert not re.search('[<>&\u2028\u2029\x00-\x1f\ud800-\udfff\u202e]', text)
  text.encode()   # lone surrogates are escaped, so the page is valid UTF-8


def test_texts_of_models_add_no_element_to_the_page(run_dir, page):
  allowed = {'html', 'head', 'meta', 'link', 'title', 'style', 'body', 'a', 'header', 'p', 'h1',
             'main', 'section', 'div', 'h2', 'h3', 'span', 'b', 'small', 'noscript', 'details',
             'summary', 'table', 'thead', 'tbody', 'tr', 'th', 'td', 'script'}  # fmt: skip
  counts = collections.Counter(tag for tag, _ in page.tags)
  assert set(counts) <= allowed, 'an img or a second script would come from a sample'
  assert counts['script'] == 2 + len(gather(run_dir)['choices'])
  samples = page.data('samples-1')
  assert samples[0]['samples'][0]['response'] == report_run.HOSTILE[0]
  assert samples[1]['samples'][0]['response'] == report_run.HOSTILE[1]
  assert samples[3]['samples'][0]['response'] == report_run.HOSTILE[3]


def test_policy_allows_exactly_the_script_and_the_style_of_the_page(page):
  policy = next(a['content'] for tag, a in page.tags if a.get('http-equiv'))
  assert "default-src 'none'" in policy and 'unsafe' not in policy
  code = [(tag, text) for tag, found, text in page.inside if found.get('type') is None]
  assert [tag for tag, _ in code] == ['style', 'script']
  for tag, text in code:
    digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
    assert f"{tag}-src 'sha256-{digest}'" in policy


def test_page_refers_to_nothing_outside_itself(page):
  assert set(re.findall(r'https?://[^\'"\s<]+', page.raw)) == {'http://www.w3.org/2000/svg'}
  links = [a[k] for _, a in page.tags for k in ('src', 'href', 'srcset', 'data') if k in a]
  assert set(links) == {'data:,', '#samples'}
  assert not re.search(r'@import|url\(|fetch\(|XMLHttpRequest|innerHTML|eval\(', page.raw)


def test_the_same_run_gives_the_same_bytes(run_dir):
  first = report.write_report(run_dir).read_bytes()
  assert report.write_report(run_dir).read_bytes() == first
  assert not [p for p in run_dir.iterdir() if 'tmp' in p.name]


def test_outcomes_and_filters_count_every_prompt(run_dir):
  data = gather(run_dir)
  scores = pq.read_table(run_dir / 'iteration_01' / 'scores.parquet').to_pylist()
  by_prompt = collections.defaultdict(list)
  for row in scores:
    by_prompt[row['prompt_id']].append(row['verdict'])
  correct = {p: sum(v == 'correct' for v in found) for p, found in by_prompt.items()}
  expected = {
      'all_correct': sum(correct[p] == len(v) for p, v in by_prompt.items()),
      'mixed': sum(0 < correct[p] < len(v) for p, v in by_prompt.items()),
      'no_gold': sum('unparseable_gold' in v for v in by_prompt.values()),
  }
  found = data['outcomes'][0]
  assert found['iteration'] == 1
  assert {name: found[name] for name in expected} == expected
  assert expected['no_gold'] == 1 and expected['mixed'] > 1
  assert sum(found[name] for name in report_tables.OUTCOMES) == 20
  choice = next(c for c in data['choices'] if c['id'] == 'samples-1')
  pairs = pq.read_table(run_dir / 'iteration_01' / 'pairs.parquet').to_pylist()
  assert choice['counts']['pairs'] == len({row['prompt_id'] for row in pairs})
  assert choice['counts']['timeout'] == 1
  assert choice['total'] == choice['shown'] == len(choice['prompts']) == 20


@pytest.mark.parametrize('verdicts, expected', [
    (['correct', 'correct'], 'all_correct'),
    (['wrong', 'timeout'], 'all_wrong'),
    (['correct', 'unparseable_answer'], 'mixed'),
    (['timeout', 'unparseable_answer'], 'no_answer'),
    (['unparseable_gold', 'unparseable_gold'], 'no_gold'),
    ([None, None], None),
])  # fmt: skip
def test_outcome_of_a_prompt(verdicts, expected):
  assert report_tables.outcome(verdicts) == expected


def test_a_sample_carries_its_score_log_probs_and_pairs(run_dir):
  choice = next(c for c in gather(run_dir)['choices'] if c['id'] == 'samples-2')
  prompt = choice['prompts'][4]
  rows = {
      name: pq.read_table(run_dir / 'iteration_02' / f'{name}.parquet').to_pylist()
      for name in ('samples', 'scores', 'pairs', 'reference')
  }
  index = next(i for i, r in enumerate(rows['samples']) if r['prompt_id'] == prompt['id'])
  sample, score, shown = rows['samples'][index], rows['scores'][index], prompt['samples'][0]
  assert shown['response'] == sample['response'] and prompt['prompt'] == sample['prompt']
  assert shown['length'] == len(sample['response_ids'])
  assert shown['sum'] == pytest.approx(math.fsum(sample['logprobs']), rel=1e-5)
  assert shown['mean'] == pytest.approx(shown['sum'] / shown['length'], rel=1e-5)
  assert (shown['verdict'], shown['votes']) == (score['verdict'], score['votes'])
  assert (shown['answer'], prompt['gold']) == (score['answer'], score['gold'])
  with_pair = next(p for p in choice['prompts'] if p['pairs'])
  row = next(i for i, r in enumerate(rows['pairs']) if r['prompt_id'] == with_pair['id'])
  pair, reference = with_pair['pairs'][0], rows['reference'][row]
  assert pair['chosen'] == rows['pairs'][row]['chosen_index']
  assert pair['rejected_why'] == rows['pairs'][row]['rejected_why']
  assert pair['chosen_reference'] == pytest.approx(math.fsum(reference['chosen_logps']), rel=1e-5)


def test_a_gold_solution_is_a_pair_without_a_chosen_sample(run_dir):
  choice = next(c for c in gather(run_dir)['choices'] if c['id'] == 'samples-1')
  golds = [pair for p in choice['prompts'] for pair in p['pairs'] if pair['chosen'] is None]
  assert golds and all(pair['chosen_length'] == 40 for pair in golds)


def test_a_response_of_an_earlier_iteration_marks_no_sample_of_this_one(tmp_path):
  run = report_run.write_run(tmp_path / 'run', iterations=1, prompts=6, n_samples=4, steps=4)
  path = run / 'iteration_01/pairs.parquet'
  rows = tables.read_table(path, tables.PAIRS).to_pylist()
  changed = next(row for row in rows if row['chosen_index'] is not None)
  changed['chosen_ids'] = [9] * len(changed['chosen_ids'])   # as long as the sample of that index
  tables.write_table(path, rows, tables.PAIRS)
  shown = [
      pair for choice in gather(run)['choices'] if choice['id'] == 'samples-1'
      for prompt in choice['prompts'] for pair in prompt['pairs']
  ]
  assert len(shown) == len(rows)
  for pair, row in zip(shown, rows, strict=True):
    here = row is not changed
    assert pair['chosen'] == (row['chosen_index'] if here else None)
    assert pair['chosen_earlier'] == (None if here else row['chosen_index'])
    assert (pair['rejected'], pair['rejected_earlier']) == (row['rejected_index'], None)


def test_a_bounded_page_says_how_much_it_shows(run_dir):
  data = gather(run_dir, max_prompts=7)
  choice = next(c for c in data['choices'] if c['id'] == 'samples-1')
  assert (choice['shown'], choice['total'], len(choice['prompts'])) == (7, 20, 7)
  assert sum(data['outcomes'][0][name] for name in report_tables.OUTCOMES) == 20
  assert choice['counts'] == next(
      c['counts'] for c in gather(run_dir)['choices'] if c['id'] == 'samples-1'
  ), 'counts are of the whole table'
  assert choice['prompts'][0]['id'] == 'train-0000' and choice['prompts'][-1]['id'] == 'train-0017'
  small = next(c for c in gather(run_dir, max_bytes=60_000)['choices'] if c['id'] == 'samples-1')
  assert 1 <= small['shown'] == len(small['prompts']) < 20


@given(st.integers(0, 50), st.integers(1, 60))
def test_prompts_are_chosen_evenly(total, count):
  chosen = report_tables.choose_evenly(list(range(total)), count)
  assert len(chosen) == min(total, count) == len(set(chosen))
  gaps = [b - a for a, b in zip(chosen, chosen[1:], strict=False)]
  assert not gaps or max(gaps) - min(gaps) <= 1


def test_wilson_interval_of_seven_in_ten():
  table = evaluation(['correct'] * 7 + ['wrong'] * 3)
  (row,) = report._accuracy([], {1: table})
  assert (row['greedy_low'], row['greedy_high']) == pytest.approx((0.396778, 0.892209), abs=1e-6)


def evaluation(greedy, votes=None):
  return {'greedy': {str(i): (v, 'x') for i, v in enumerate(greedy)}, 'votes': votes or {}}


def test_paired_difference_by_hand():
  before = evaluation(['correct', 'wrong', 'wrong', 'correct', 'unparseable_gold', 'wrong'])
  after = evaluation(['correct', 'correct', 'unparseable_answer', 'wrong', 'correct', 'correct'])
  paired = report._paired({0: before, 1: evaluation([]), 3: after})
  # Differences 0, +1, 0, -1, +1 over five prompts: mean 0.2, sample variance 0.7.
  half = 1.959964 * math.sqrt(0.7 / 5)
  assert (paired['n'], paired['gained'], paired['lost'], paired['last']) == (5, 2, 1, 3)
  assert paired['difference'] == pytest.approx(0.2)
  assert (paired['low'], paired['high']) == pytest.approx((0.2 - half, 0.2 + half), rel=1e-5)


def test_accuracy_comes_from_the_table_where_no_metric_is_recorded():
  votes = {
      'a': [('wrong', '1'), ('correct', '2'), ('correct', '2')],
      'b': [('correct', '5'), ('wrong', '6')],   # a tie goes to the answer seen first
      'c': [('wrong', '7'), ('unparseable_answer', None), ('unparseable_answer', None)],
      'd': [('unparseable_answer', None)],
  }
  table = evaluation(['correct', 'wrong', 'timeout', 'unparseable_gold', 'correct'], votes)
  (row,) = report._accuracy([], {2: table})
  assert (row['iteration'], row['n'], row['greedy'], row['majority']) == (2, 4, 0.5, 0.5)
  assert row['greedy_low'] == pytest.approx(proportion(2, 4).low, rel=1e-5)
  record = {'iteration': 2, 'stage': 'evaluate', 'step': 0, 'greedy_accuracy': 0.75,
            'greedy_low': 0.3, 'greedy_high': 0.9, 'n': 4}  # fmt: skip
  (row,) = report._accuracy([record], {2: table})
  assert (row['greedy'], row['greedy_low'], row['greedy_high']) == (0.75, 0.3, 0.9)


def train(iteration, step, **values):
  return {'iteration': iteration, 'stage': 'train', 'step': step} | values


def test_steps_grow_whether_or_not_they_start_again_in_an_iteration():
  again = [train(1, 1, loss=1.0), train(1, 2, loss=0.5), train(2, 1, loss=0.4)]
  found = report._training(again)
  assert found['steps'] == [1, 2, 3] and found['iterations'] == [1, 1, 2]
  assert found['starts'] == [{'iteration': 1, 'step': 1}, {'iteration': 2, 'step': 3}]
  zero = [train(1, 0, loss=1.0), train(1, 1, loss=0.5), train(2, 0, loss=0.4)]
  assert report._training(zero)['steps'] == [0, 1, 2]
  on = [train(1, 1, loss=1.0), train(1, 2, loss=0.5), train(2, 3, loss=0.4)]
  assert report._training(on)['steps'] == [1, 2, 3]


def test_numbers_that_are_not_finite_leave_a_gap_and_are_counted():
  records = [train(1, 1, loss=math.nan), train(1, 2, loss=math.inf), train(1, 3, loss=0.5)]
  found = report._training(records)
  assert found['series']['loss'] == [None, None, 0.5] and found['nonfinite'] == {'loss': 2}


def test_long_curves_are_averaged_in_bins_that_stay_within_an_iteration():
  count = report.MAX_POINTS
  records = [train(i, s, loss=float(i)) for i in (1, 2) for s in range(1, count + 2)]
  found = report._training(records)
  assert found['per_point'] == 3 and len(found['steps']) == 2 * -(-(count + 1) // 3)
  assert set(found['series']['loss']) == {1.0, 2.0}, 'a bin over the boundary would give 1.5'
  assert found['steps'] == sorted(set(found['steps']))


def test_an_empty_run_gives_a_page(tmp_path):
  page = Page(report.write_report(tmp_path))
  assert 'nothing recorded yet' in page.words()
  assert page.data('report-data')['choices'] == []


def test_a_run_in_progress_says_what_is_missing(tmp_path, run_dir):
  for part in ('iteration_00/evaluation', 'iteration_01/samples', 'iteration_01/pairs'):
    target = tmp_path / f'{part}.parquet'
    target.parent.mkdir(exist_ok=True)
    target.write_bytes((run_dir / f'{part}.parquet').read_bytes())
  (tmp_path / 'iteration_01' / 'train.partial').mkdir()
  (tmp_path / 'iteration_02').mkdir()
  page = Page(report.write_report(tmp_path))
  assert 'Iteration 1 has no scores, reference, evaluation yet.' in page.words()
  assert 'Iteration 2 has no samples, scores, pairs, reference, evaluation yet.' in page.words()
  assert 'Iteration 0' not in page.words()
  data = page.data('report-data')
  assert [c['id'] for c in data['choices']] == ['evaluation-0', 'samples-1']
  assert data['outcomes'] == [] and len(data['accuracy']) == 1
  assert page.data('samples-1')[5]['samples'][0]['verdict'] is None
  assert {row['group'] for row in data['lengths']} == {'all', 'chosen', 'rejected'}


def test_damaged_parts_are_left_out_and_named(tmp_path, run_dir):
  folder = tmp_path / 'iteration_01'
  folder.mkdir()
  for part in ('samples', 'scores', 'pairs'):
    source = run_dir / 'iteration_01' / f'{part}.parquet'
    (folder / source.name).write_bytes(source.read_bytes())
  (folder / 'scores.parquet').write_bytes(b'PAR1 cut')
  rows = pq.read_table(run_dir / 'iteration_01' / 'reference.parquet').slice(3).to_pylist()
  tables.write_table(folder / 'reference.parquet', rows, tables.REFERENCE)
  (tmp_path / 'metrics.jsonl').write_text('{"iteration": 1}\n{}\n')
  (tmp_path / 'manifest.json').write_text('{"stages"')
  (tmp_path / 'versions.json').write_text('[1]')
  (tmp_path / 'flags.flags').write_text('what?\n')
  words = Page(report.write_report(tmp_path)).words()
  for name in ('iteration_01/scores.parquet could not be read', 'metrics.jsonl line 1',
               'manifest.json', 'versions.json', 'flags.flags line 1',
               'iteration_01/reference.parquet has'):  # fmt: skip
    assert name in words


def test_a_table_without_a_column_or_with_broken_text_is_shown(tmp_path):
  folder = tmp_path / 'iteration_00'
  folder.mkdir()
  broken = pa.array([b'ok', b'\xff\xfe'], pa.binary()).view(pa.string())
  table = pa.table({
      'prompt_id': ['a', 'b'], 'kind': ['greedy', 'greedy'], 'response': broken,
      'verdict': ['correct', 'wrong'],
  })  # fmt: skip
  pq.write_table(table, folder / 'evaluation.parquet')
  page = Page(report.write_report(tmp_path))
  assert 'iteration_00/evaluation.parquet lacks the columns' in page.words()
  assert page.data('evaluation-0')[1]['samples'][0]['response'] == '\ufffd\ufffd'
  assert page.data('report-data')['accuracy'][0]['greedy'] == 0.5


def test_flags_and_names_of_a_run_are_text(tmp_path):
  run_dir = tmp_path / '<img src=x onerror=alert(1)>&{{script}}'
  run_dir.mkdir()
  (run_dir / 'flags.flags').write_text(
      '--method=</title><script>alert(1)</script>\n--model=x\u202ey\n--note={{data}} "\'<b>\n'
  )
  page = Page(report.write_report(run_dir))
  counts = collections.Counter(tag for tag, _ in page.tags)
  assert counts['script'] == 2 and counts['img'] == 0 and counts['b'] == 0
  assert '</title><script>alert(1)</script> on x[U+202E]y' in page.words()
  assert '{{data}} "\'<b>' in page.words() and run_dir.name in page.words()


def test_headline_cards(page):
  words = page.words()
  for label in ('Greedy accuracy', 'Paired difference', 'Majority vote', '95% interval'):
    assert label in words
  assert 'irpo on Llama-3.2-1B-Instruct' in words
  assert '2 of 3 iterations evaluated' in words and '160 samples' in words
  assert 'dropped identical 2' in words and '--' not in words


def test_command_renders_a_run_again(run_dir, capsys):
  assert report.main([str(run_dir), '--max_prompts', '3']) == 0
  path = capsys.readouterr().out.strip()
  assert path == str(run_dir / 'report.html')
  assert len(Page(run_dir / 'report.html').data('samples-1')) == 3
  assert report.main([str(run_dir / 'nowhere')]) == 2
  assert 'is not a run folder' in capsys.readouterr().err


def test_bounds_must_be_positive(run_dir):
  with pytest.raises(InputError, match='max_prompts.*1 or more.*found 0'):
    report.write_report(run_dir, max_prompts=0)
