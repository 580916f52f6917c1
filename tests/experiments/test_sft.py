"""`python -m experiments.sft`: what it trains on, what it counts, and going on after a kill."""

import dataclasses
import gzip
import json
import math
import pathlib
import re

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from absl import flags
from absl.testing import flagsaver
from etils import epath

from experiments import sft, sft_flags
from jaxrl.data.readers import Example
from jaxrl.errors import InputError
from jaxrl.runs.metrics import read_metrics
from jaxrl.tokens.tiny import write_tokenizer
from jaxrl.tokens.tokenizer import load_tokenizer
from jaxrl.training import checkpoint
from tests.experiments import in_process, irpo_runs

FLAGS = flags.FLAGS
SMALL = (
    '--d_model=16', '--layers=1', '--heads=2', '--kv_heads=2', '--d_mlp=32', '--vocab_size=300',
    '--compute_dtype=float32', '--remat=all', '--batch_size=8', '--log_every=1', '--save_every=2')


def run(*arguments: object) -> irpo_runs.Ended:
  """The command in this process."""
  return in_process.run(sft, *arguments, parse=sft_flags.parse)


@pytest.fixture(scope='module')
def tokenizer(tmp_path_factory):
  folder = epath.Path(tmp_path_factory.mktemp('tokenizer'))
  return load_tokenizer(folder, vocab_size=write_tokenizer(folder, ['a b c'], vocab_size=261))


# Rows


def encode(tokenizer, policy, *, max_length=12):
  # Ids: BOS, user, the bytes of the prompt, assistant; the bytes of the response, EOS.
  examples = [
      Example('fits', 'abc', 'defgh', 'f, row 1'),          # 6 + 6
      Example('long', 'abc', 'defghi', 'f, row 2'),         # 6 + 7
      Example('hopeless', 'a' * 9, 'b', 'f, row 3')]        # 12 + 2
  return sft.encode(tokenizer, examples, max_length=max_length, over_length=policy)


def test_rows_end_with_eos(tokenizer):
  rows, counts = encode(tokenizer, 'error', max_length=14)
  assert [row['response_ids'][-1] for row in rows] == [tokenizer.end_id] * 3
  assert all(tokenizer.end_id not in row['prompt_ids'] + row['response_ids'][:-1] for row in rows)
  assert counts == {'rows': 3, 'dropped': 0, 'truncated': 0, 'response_tokens': 6 + 7 + 2}
  assert rows[0]['prompt'] == '<bos><|user|>abc<|assistant|>'


def test_a_long_row_is_an_error_that_names_it(tokenizer):
  with pytest.raises(InputError, match='f, row 2.*at most 12 ids.*6 of the prompt and 7 of the'):
    encode(tokenizer, 'error')


def test_long_rows_are_dropped_and_counted(tokenizer):
  rows, counts = encode(tokenizer, 'drop')
  assert [row['prompt_id'] for row in rows] == ['fits']
  assert counts == {'rows': 1, 'dropped': 2, 'truncated': 0, 'response_tokens': 6}


def test_a_cut_response_never_gains_eos(tokenizer):
  rows, counts = encode(tokenizer, 'truncate')
  assert [(row['prompt_id'], row['truncated']) for row in rows] == [('fits', False), ('long', True)]
  assert rows[1]['response_ids'] == encode(tokenizer, 'error', max_length=14)[0][1][
      'response_ids'][:-1]
  assert tokenizer.end_id not in rows[1]['response_ids']
  assert counts == {'rows': 2, 'dropped': 1, 'truncated': 1, 'response_tokens': 12}
  short, _ = encode(tokenizer, 'truncate', max_length=8)
  assert [len(row['prompt_ids'] + row['response_ids']) for row in short] == [8, 8]


def test_no_row_left_is_an_error(tokenizer):
  with pytest.raises(InputError, match='no row is left'):
    encode(tokenizer, 'drop', max_length=4)


# Flags

BAD = [
    ((), '--train', 'nothing to learn from'),
    (('--train=A', '--check_timeout=3'), '--check_timeout', 'no answers are checked'),
    (('--train=A', '--test_limit=3'), '--test_limit', 'no --test'),
    (('--train=A', '--eval_every=2'), '--eval_every', 'no --test'),
    (('--train=A', '--answer_field=x'), '--answer_field', 'no --task'),
    (('--train=A', '--template={question}'), '--template', 'no --task'),
    (('--train=A', '--task=gsm8k', '--response_field=x'), '--response_field', 'worked solution'),
    (('--train=A', '--task=math'), '--task', 'no worked solutions'),
    (('--train=A', '--test=B', '--save_every=20', '--eval_every=30'), '--eval_every', 'multiple'),
    (('--train=A', '--epochs=0'), '--epochs', 'nothing to train'),
    (('--train=A', '--learning_rate=0'), '--learning_rate', 'nothing would be learned'),
    (('--train=A', '--learning_rate=nan'), '--learning_rate', 'no number'),
    (('--train=A', '--max_steps=5', '--warmup_steps=5'), '--warmup_steps', 'warm-up'),
    (('--train=A', '--batch_size=9', '--layout=padded'), '--batch_size', 'a multiple of 8'),
    (('--train=A', '--d_model=20', '--heads=4'), '--d_model', 'a multiple of 2 * --heads=8'),
    (('--train=A', '--heads=4', '--kv_heads=3'), '--kv_heads', 'a divisor'),
    (('--train=A', '--vocab_size=200'), '--vocab_size', '261'),
    (('--train=A', '--over_length=cut'), '--over_length', 'error|drop|truncate'),
    *((('--train=A', '--model=M', f'--{name}=300'), f'--{name}', 'no new model')
      for name in sft_flags.NEW_MODEL),
]


@pytest.mark.parametrize('arguments, flag, why', BAD)
def test_flags_that_cannot_work_are_one_sentence_and_no_folder(
    tmp_path, arguments, flag, why):
  ended = run(f'--run_dir={tmp_path / "run"}', *arguments)
  assert ended.status == 2
  assert ended.stderr.startswith('error: ') and ended.stderr.count('\n') == 1
  assert flag.lstrip('-') in ended.stderr and why in ended.stderr
  assert not (tmp_path / 'run').exists()


def test_the_learning_rate_follows_the_start():
  for arguments, rate in [(('--model=M',), 1e-5), ((), 1e-3), (('--learning_rate=3',), 3.0)]:
    with flagsaver.flagsaver():
      FLAGS.unparse_flags()
      sft_flags.parse(['sft', '--train=A', *arguments])
      assert FLAGS.learning_rate == rate and FLAGS.task is None
      assert ('d_model' in sft_flags.effective()) == (FLAGS.model is None)


# Runs


@dataclasses.dataclass(frozen=True)
class Trained:
  folder: pathlib.Path
  arguments: tuple[str, ...]
  stdout: str


def write_problems(path: pathlib.Path, numbers) -> pathlib.Path:
  rows = [
      {'id': f'{path.name}-{n}', 'question': f'What is {n} and 1?',
       'answer': f'It is {n}+1=<<{n}+1={n + 1}>>{n + 1}.\n#### {n + 1}'} for n in numbers]
  with gzip.open(path, 'wt') as file:
    file.writelines(json.dumps(row) + '\n' for row in rows)
  return path


@pytest.fixture(scope='module')
def trained(tmp_path_factory) -> Trained:
  """A new model, six steps on 40 problems, with looks at the held-out loss of 10 others."""
  base = tmp_path_factory.mktemp('sft')
  train = write_problems(base / 'train.jsonl.gz', range(40))
  test = write_problems(base / 'test.jsonl.gz', range(40, 50))
  arguments = (
      f'--train={train}', f'--test={test}', '--task=gsm8k', '--epochs=2', '--max_steps=6',
      '--eval_every=4', '--learning_rate=1e-2', '--max_length=256', *SMALL)

  ended = run(f'--run_dir={base / "run"}', *arguments)
  assert ended.status == 0, ended.stderr
  return Trained(base / 'run', arguments, ended.stdout)


def test_a_run_leaves_its_records(trained):
  manifest = json.loads((trained.folder / 'manifest.json').read_text())['stages']
  assert list(manifest) == ['sft/data', 'sft/before', 'sft/train', 'sft/after']
  counts = manifest['sft/data']['counts']
  assert (counts['train/rows'], counts['test/rows']) == (40, 10)
  rows = pq.read_table(trained.folder / 'sft' / 'train.parquet').to_pylist()
  assert counts['train/response_tokens'] == sum(len(row['response_ids']) for row in rows)
  assert rows[3]['response'] == 'It is 3+1=4.\nFinal answer: 4'
  assert 'Question: What is 3 and 1?' in rows[3]['prompt']
  assert (trained.folder / 'report.html').exists()
  records = read_metrics(trained.folder / 'metrics.jsonl')
  held_out = {r['step']: r['nll'] for r in records if r['stage'] == 'held_out'}
  assert sorted(held_out) == [0, 4, 6] and held_out[6] < held_out[4] < held_out[0]
  assert [r['step'] for r in records if r['stage'] == 'train'] == [1, 2, 3, 4, 5, 6]
  assert re.search(r'loss per token: \S+ before and \S+ after 6 steps, over \d+ tokens of 10 rows',
                   trained.stdout)
  assert f'model: {trained.folder / "sft" / "model"}' in trained.stdout
  assert '40 rows' in trained.stdout and '0 rows dropped' in trained.stdout


@pytest.mark.parametrize('name, folder', [('before', 'start'), ('after', 'model')])
def test_the_held_out_loss_is_that_of_transformers(trained, name, folder):
  torch = pytest.importorskip('torch')
  from transformers import AutoModelForCausalLM, AutoTokenizer
  where = trained.folder / 'sft' / folder
  model = AutoModelForCausalLM.from_pretrained(where)
  tokenizer = AutoTokenizer.from_pretrained(where)
  expected = []
  for row in pq.read_table(trained.folder / 'sft' / 'test.parquet').to_pylist():
    prompt, response = row['prompt_ids'], row['response_ids']
    assert tokenizer.decode(response) == row['response'] + '<eos>'
    assert tokenizer.decode(prompt) == row['prompt']
    with torch.no_grad():
      logps = model(torch.tensor([prompt + response])).logits[0].log_softmax(-1)
    expected.append(-sum(
        float(logps[len(prompt) + n - 1, token]) for n, token in enumerate(response)))
  found = pq.read_table(trained.folder / 'sft' / f'{name}.parquet').to_pylist()
  assert [row['nll'] for row in found] == pytest.approx(expected, rel=1e-4)
  counts = json.loads((trained.folder / 'manifest.json').read_text())['stages'][f'sft/{name}'][
      'counts']
  nll = sum(expected) / sum(row['tokens'] for row in found)
  assert counts['nll'] == pytest.approx(nll, rel=1e-4)
  assert counts['perplexity'] == pytest.approx(math.exp(nll), rel=1e-3)


class Killed(BaseException):
  pass


def test_a_killed_run_goes_on_to_the_same_bits(trained, tmp_path, monkeypatch):
  """Killed after the last checkpoint and the look that belongs to it."""
  log, save, saved = sft.log_held_out, checkpoint.Checkpoints.save, []

  def log_and_die(session, step, numbers):
    log(session, step, numbers)
    if step == 4:
      raise Killed

  def save_and_tell(self, step, *rest):
    saved.append(step)
    save(self, step, *rest)

  arguments = (f'--run_dir={tmp_path / "run"}', *trained.arguments)
  monkeypatch.setattr(checkpoint.Checkpoints, 'save', save_and_tell)
  with monkeypatch.context() as patch, pytest.raises(Killed):
    patch.setattr(sft, 'log_held_out', log_and_die)
    run(*arguments)
  assert saved == [2, 4] and not (tmp_path / 'run' / 'sft' / 'model').exists()
  assert run(*arguments).status == 0
  assert saved == [2, 4]   # it did not start again
  whole, resumed = (irpo_runs.contents(folder) for folder in (trained.folder, tmp_path / 'run'))
  assert irpo_runs.differences(whole, resumed) == []


def test_a_checkpoint_goes_on_with_rows_of_its_own(trained, tmp_path):
  """--model, Parquet, messages, a cut response; the tokenizer and the weights are the model's."""
  start = trained.folder / 'sft' / 'model'
  train, test = tmp_path / 'train.parquet', tmp_path / 'test.jsonl'
  asked = [{'role': 'user', 'content': 'Say a.'}]
  answers = ['a', 'b', 'c' * 90, *'defg']
  pq.write_table(pa.table({
      'talk': [[*asked, {'role': 'assistant', 'content': text}] for text in answers]}), train)
  test.write_text('\n'.join(json.dumps({'talk': asked, 'said': text}) for text in 'ab'))
  common = (
      f'--run_dir={tmp_path / "run"}', f'--model={start}', '--prompt_field=talk', '--max_length=40',
      '--over_length=truncate', '--compute_dtype=float32', '--batch_size=8', '--max_steps=1',
      '--length_buckets=39')
  ended = run(*common, f'--train={train}')
  assert ended.status == 0, ended.stderr
  assert '0 rows dropped and 1 cut' in ended.stdout
  rows = pq.read_table(tmp_path / 'run' / 'sft' / 'train.parquet').to_pylist()
  assert [row['truncated'] for row in rows] == [text.startswith('c') for text in answers]
  assert len(rows[2]['prompt_ids'] + rows[2]['response_ids']) == 40
  tokens = [tuple(row['prompt_ids']) for row in rows]
  assert len(set(tokens)) == 1
  assert (tmp_path / 'run' / 'sft' / 'model' / 'tokenizer.json').read_bytes() == (
      start / 'tokenizer.json').read_bytes()
  counts = json.loads((tmp_path / 'run' / 'manifest.json').read_text())['stages']['sft/train'][
      'counts']
  earlier = json.loads((trained.folder / 'manifest.json').read_text())['stages']['sft/train'][
      'counts']
  assert counts['before'] == earlier['after'] != counts['after']


ROWS_THAT_CANNOT_BE = [
    ('--task=gsm8k', {'question': 'q', 'answer': '5'}, 'row 2', 'no worked solution'),
    ('--task=gsm8k', {'question': 'q'}, 'row 2', "'answer'"),
    ('--seed=0', {'prompt': 'q'}, 'row 2', "'response'"),
    ('--seed=0', {'prompt': 'q', 'response': '5' * 600}, 'row 2', 'too long'),
]


@pytest.mark.parametrize('flag, row, where, what', ROWS_THAT_CANNOT_BE)
def test_a_bad_row_stops_the_run_before_anything_is_made(
    tmp_path, monkeypatch, flag, row, where, what):
  good = {'question': 'q', 'prompt': 'q', 'response': 'r', 'answer': 's\n#### 5'}
  path = tmp_path / 'rows.jsonl'
  path.write_text(json.dumps(good) + '\n' + json.dumps(row) + '\n')
  monkeypatch.setattr(sft, 'init_params', lambda *args: pytest.fail('a model was made'))
  ended = run(f'--run_dir={tmp_path / "run"}', f'--train={path}', flag, *SMALL)
  assert ended.status == 2 and where in ended.stderr and what in ended.stderr


def test_rows_longer_than_the_model_was_made_for_are_refused(trained, tmp_path):
  path = tmp_path / 'rows.jsonl'
  path.write_text(json.dumps({'prompt': 'q', 'response': 'r'}))
  ended = run(f'--run_dir={tmp_path / "run"}', f'--train={path}',
              f'--model={trained.folder / "sft" / "model"}', '--max_length=257')
  assert ended.status == 2 and '--max_length' in ended.stderr and 'at most 256' in ended.stderr
