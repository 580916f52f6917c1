"""Whatever a user can get wrong is one sentence on stderr, exit status 2, and nothing compiled."""

import gzip
import re
import shutil

import pytest

from jaxrl.runs.process import count_programs
from tests.experiments import irpo_runs, small_model
from tests.experiments.small_model import edit_json, edit_weights, problem, write_problems


@pytest.fixture(scope='module')
def model(tmp_path_factory):
  folder = tmp_path_factory.mktemp('small') / 'model'
  small_model.write_model(folder)
  return folder


@pytest.fixture(scope='module')
def programs():
  return count_programs()


@pytest.fixture
def files(model, tmp_path):
  """A model and problems that work, to be spoilt."""
  shutil.copytree(model, tmp_path / 'model')
  write_problems(tmp_path / 'train.jsonl', [problem(n) for n in range(16)])
  write_problems(tmp_path / 'test.jsonl', [problem(n) for n in range(20, 28)])
  return tmp_path


def nothing(files):
  del files


def rows(name, *new):
  """Rows after a good first one."""
  return lambda files: write_problems(files / name, [problem(0), *new])


def remove(name):
  return lambda files: (files / name).unlink()


def make_nan(tensors):
  tensors['model.norm.weight'][3] = float('nan')


def cut(name, size):
  def spoil(files):
    content = (files / name).read_bytes()
    (files / name).write_bytes(content[:size])
  return spoil


def damage_gzip(files):
  content = bytearray(gzip.compress((files / 'train.jsonl').read_bytes()))
  content[len(content) // 2] ^= 255
  (files / 'train.jsonl.gz').write_bytes(content)


def without_tokenizer(files):
  for path in (files / 'model').glob('tokenizer*'):
    path.unlink()


def without_eos(files):
  edit_json(files / 'model/tokenizer_config.json', lambda c: c.pop('eos_token'))
  edit_json(files / 'model/generation_config.json', lambda c: c.pop('eos_token_id'))


def narrow_embedding(files):
  def cut_rows(tensors):
    tensors['model.embed_tokens.weight'] = tensors['model.embed_tokens.weight'][:100].copy()
  edit_weights(files / 'model', cut_rows)
  edit_json(files / 'model/config.json', lambda c: c.update(
      vocab_size=100, bos_token_id=1, eos_token_id=2, pad_token_id=0))


def swap_for_pickle(files):
  (files / 'model/model.safetensors').rename(files / 'model/pytorch_model.bin')


def world_golds(files):
  good = [{'question': f'{n}', 'answer': str(n)} for n in range(50)]
  write_problems(files / 'train.jsonl', [*good, {'question': 'q', 'answer': 'many'}])


def bare_answers(files):
  write_problems(files / 'train.jsonl', [{'question': f'{n}?', 'answer': n} for n in range(9)])


# How the files are spoilt, flags beside the good ones, and what the sentence must say.
CASES = {
    # The command line itself.
    'unknown flag': (nothing, ['--iteratons=2'], "'iteratons'.*Did you mean: .*iterations"),
    'not a number': (nothing, ['--beta=small'], '--beta=small: .*small'),
    'below the bound': (nothing, ['--iterations=0'], '--iterations=0: 0 is not'),
    'not in the list': (
        nothing, ['--schedule=step'], '--schedule=step: .*constant\\|linear\\|cosine'),
    'seed too large': (nothing, ['--seed=99999999999'], '--seed=99999999999'),
    'no such flag file': (nothing, ['--flagfile={}/no.flags'], 'no.flags'),
    'not a flag': (nothing, ['--dedup', 'false'], "'false': this is not a flag; expected --name="),
    'no such model': (nothing, ['--model={}/none'], 'none: .*not a model folder'),
    'a name of the hub': (nothing, ['--model=org/name'], 'org/name: .*not a model folder'),
    'template without question': (nothing, ['--template=Solve'], '--template: .*no place for'),
    'template of two lines': (nothing, ['--template={{question}}\n'], '--template: .*line break'),
    'temperatures': (nothing, ['--temperature=1,1,1,1'], '--temperature: .*1 to 3 numbers'),
    # Devices: there are eight.
    'mesh of words': (nothing, ['--mesh=a,b,c'], '--mesh: .*whole numbers data,fsdp,tensor'),
    'mesh too small': (nothing, ['--mesh=1,3,1'], 'mesh: .*= 8 devices'),
    'mesh does not divide': (nothing, ['--mesh=1,2,4'], '--mesh: the model cannot be split'),
    'batch': (nothing, ['--batch_size=12', '--layout=padded'], '--batch_size: .*a multiple of 8'),
    'micro-batches': (nothing, ['--micro_batches=3'], '--batch_size: .*at least 24'),
    'score batch': (nothing, ['--score_batch=12'], '--score_batch: .*a multiple of 8'),
    'slots': (nothing, ['--slots=9'], '--slots: .*multiple of 8'),
    'saves between logs': (nothing, ['--save_every=15'], '--save_every: .*multiple of --log_every'),
    # Lengths.
    'longer than the context': (
        nothing, ['--max_new_tokens=25', '--length_buckets=64'],
        '--max_new_tokens: .*<= 64; found 40 . 25'),
    'short buckets': (nothing, ['--length_buckets=30'], '--length_buckets: .*at least 47'),
    'long prompt': (
        rows('train.jsonl', problem(1) | {'question': 'x' * 99}), [],
        r'train.jsonl, row 2: the prompt is too long.*at most 40 ids \(--max_prompt_length\)'),
    'all prompts long': (
        nothing, ['--max_prompt_length=2', '--over_length=drop', '--length_buckets=9'],
        '--max_prompt_length: no prompt is left'),
    # Where the run is.
    'run folder is a file': (
        lambda f: (f / 'run').write_text('x'), [], 'run: this is not a folder'),
    'run folder is another': (
        lambda f: write_problems((f / 'run').mkdir() or f / 'run/x', []), [], 'is not a run'),
    'run folder on an object store': (nothing, ['--run_dir=gs://bucket/run'], 'gs://bucket/run'),
    'run folder cannot be made': (
        nothing, ['--run_dir=/proc/run'], '/proc/run: .*cannot be written'),
    # Problems.
    'no such file': (remove('train.jsonl'), [], 'train.jsonl: .*no such file'),
    'a folder': (nothing, ['--train={}'], 'not a regular file; .*found a directory'),
    'empty file': (
        lambda f: (f / 'test.jsonl').write_text(''), [], 'test.jsonl: the file is empty'),
    'not JSON': (rows('train.jsonl', '{"id": 1,'), [], 'train.jsonl, row 2: invalid JSON'),
    'no question': (
        rows('test.jsonl', {'id': 'x', 'answer': '#### 1'}), [],
        "test.jsonl, row 2: field 'question' is missing"),
    'no such field': (
        nothing, ['--prompt_field=text'], "train.jsonl, row 1: field 'text' is missing"),
    'gold without number': (
        rows('train.jsonl', problem(1) | {'answer': 'six'}), [],
        "train.jsonl, row 2, field 'answer': the gold answer"),
    'gold that cannot be parsed': (
        world_golds, ['--task=world'],
        "train.jsonl: .*at most 1 percent of 51 rows; found 1, first .*row 51: 'many'"),
    'id twice': (
        rows('train.jsonl', problem(0)), [],
        "train.jsonl, row 2, field 'id': the id '0' occurs twice"),
    'damaged gzip': (damage_gzip, ['--train={}/train.jsonl.gz'], 'train.jsonl.gz'),
    'no worked solutions': (
        bare_answers, ['--gold_in_winners=always'],
        'train.jsonl: no problem has a worked solution'),
    'all prompts held out': (nothing, ['--dev_prompts=16'], '--dev_prompts: .*fewer than the 16'),
    # The checkpoint.
    'no tokenizer': (without_tokenizer, [], 'model: the folder has no tokenizer'),
    'no end of sequence': (without_eos, [], 'model: the tokenizer has no end-of-sequence token'),
    'vocabulary': (narrow_embedding, [], 'model: the vocabulary is larger than the embedding'),
    'NaN': (
        lambda f: edit_weights(f / 'model', make_nan), [],
        "model.safetensors: tensor 'model.norm.weight' holds NaN"),
    'pickle only': (swap_for_pickle, [], 'model: the weights are pickle files'),
    'no configuration': (remove('model/config.json'), [], 'config.json'),
    'unknown family': (
        lambda f: edit_json(f / 'model/config.json', lambda c: c.update(model_type='mamba')), [],
        'config.json: .*mamba'),
    'weights cut short': (
        cut('model/model.safetensors', 9999), [], 'model.safetensors: the file ends before'),
    'tokenizer cut short': (
        cut('model/tokenizer.json', 500), [], 'model: the tokenizer does not load'),
}


def good_flags(files):
  return (f'--run_dir={files / "run"}', f'--model={files / "model"}',
          f'--train={files / "train.jsonl"}', f'--test={files / "test.jsonl"}', *small_model.FLAGS)


@pytest.mark.parametrize('case', CASES)
def test_bad_input_is_one_sentence(case, files, capsys, programs):
  spoil, extra, message = CASES[case]
  spoil(files)
  before = programs()
  ended = irpo_runs.run_here(
      capsys, *good_flags(files), *(flag.replace('{}', str(files)).replace('{{', '{').replace(
          '}}', '}') for flag in extra))
  assert ended.status == 2, ended
  assert ended.stderr.startswith('error: ') and ended.stderr.count('\n') == 1, ended.stderr
  # Numbers are checked as the weights are read, which the programs that place them are made for:
  # nothing of the model itself is compiled by then.
  assert programs() == before if case != 'NaN' else programs() - before < 20
  assert re.search(message, ended.stderr), ended.stderr


@pytest.mark.parametrize('extra, message', [
    (['--iteratons=2'], "error: Unknown command line flag 'iteratons'"),
    (['--batch_size=0'], 'error: flag --batch_size=0: '),
    (['--train=none.jsonl'], 'error: none.jsonl: '),
])
def test_the_process_says_the_same(extra, message, files):
  """Nothing else stands on stderr, from whatever library."""
  ended = irpo_runs.run(*good_flags(files), *extra, cache=None)
  assert ended.status == 2
  assert ended.stderr.startswith(message) and ended.stderr.count('\n') == 1, ended.stderr
