"""`python -m experiments.score`: numbers of transformers, order, and what stops it."""

import dataclasses
import gzip
import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from absl import flags

from experiments import score
from jaxrl.models.config import Lora
from jaxrl.models.hugging_face import load_params, read_config, save_model
from jaxrl.models.lora import attach, init_adapter, merge
from jaxrl.models.peft_folder import write_adapter
from tests.experiments import in_process, irpo_runs, small_model
from tests.family_shapes import SHAPES
from tests.jaxrl.tokens import small_tokenizers

FLAGS = flags.FLAGS
TOLERANCE = 1e-4                       # per token, in float32
# In the style of GSM8K: a question, steps, a last line.
ROWS = [
    {'id': f'gsm8k-{n}', 'prompt': f'Ana has {n} apples and buys {m} bags of {k}. How many?',
     'response': f'She buys {m} * {k} = {m * k} apples.\n{n} + {m * k} = {n + m * k}\n'
                 f'#### {n + m * k}' + ' Well done.' * (n % 3)}
    for n, m, k in ((3, 2, 4), (12, 7, 5), (1, 1, 1), (20, 3, 9), (8, 11, 2), (5, 5, 5))]


def run(*arguments: object) -> irpo_runs.Ended:
  """The command in this process."""
  return in_process.run(score, *arguments)


def write(path, rows):
  small_model.write_problems(path, rows)
  return path


def read(path):
  return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope='module')
def model(tmp_path_factory):
  folder = tmp_path_factory.mktemp('score') / 'model'
  small_model.write_model(folder)
  return folder


def scored(model, rows, tmp_path, *more):
  """Output rows for input rows; a file that did not exist before."""
  source = write(tmp_path / f'in_{len(list(tmp_path.iterdir()))}.jsonl', rows)
  output = source.with_suffix('.scored.jsonl')
  ended = run(f'--model={model}', f'--data={source}', f'--output={output}', *FAST, *more)
  assert ended.status == 0, ended.stderr
  return read(output)


FAST = ('--compute_dtype=float32', '--batch_size=8')


# Against transformers

# The ids of the tokenizer beside them; rows are longer than any window.
FITTED = dict(vocab_size=420, max_position_embeddings=512, bos_token_id=1, eos_token_id=4)


@pytest.fixture(scope='module')
def tokenizer_folder(tmp_path_factory):
  return small_tokenizers.write(
      tmp_path_factory.mktemp('score') / 'tokenizer', generation={'eos_token_id': [4, 2]})


def make_checkpoint(family, folder, tokenizer_folder):
  """A random float32 checkpoint of transformers with the tokenizer beside it."""
  from tests import hugging_face_oracle as oracle  # skips where there is no PyTorch

  plainest = next(iter(SHAPES[family].values()))
  model = oracle.save_model(folder, family, **(plainest | FITTED))
  for file in tokenizer_folder.iterdir():
    (folder / file.name).write_bytes(file.read_bytes())
  return model


def their_logprobs(model, folder, row):
  """Ids of the whole conversation as transformers renders it, and their log-probs from id 1 on."""
  import torch
  import transformers

  chat = [{'role': 'user', 'content': row['prompt']},
          {'role': 'assistant', 'content': row['response']}]
  tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
  ids = tokenizer.apply_chat_template(chat, return_dict=False)
  with torch.no_grad():
    logits = model(input_ids=torch.tensor([ids])).logits[0].float()
  logps = torch.log_softmax(logits, dim=-1).numpy()
  return ids, np.array([logps[t - 1, ids[t]] for t in range(1, len(ids))])


@pytest.mark.parametrize('family', SHAPES)
def test_log_probs_are_those_of_transformers(family, tmp_path, tokenizer_folder):
  folder = tmp_path / 'model'
  theirs = make_checkpoint(family, folder, tokenizer_folder)
  found = scored(folder, ROWS, tmp_path)
  assert [row['id'] for row in found] == [row['id'] for row in ROWS]
  gap = 0.0
  for row, ours in zip(ROWS, found, strict=True):
    ids, logps = their_logprobs(theirs, folder, row)
    start, end = len(ours['prompt_ids']), len(ours['prompt_ids']) + len(ours['response_ids'])
    assert ours['prompt_ids'] + ours['response_ids'] == ids[:end]
    assert len(ids) == end + 1 and ids[end - 1] == 4      # <|im_end|>, then the newline after it
    assert len(ours['logprobs']) == len(ours['response_ids'])
    gap = max(gap, np.abs(np.array(ours['logprobs']) - logps[start - 1:end - 1]).max())
    assert abs(ours['logprob_sum'] - sum(ours['logprobs'])) < 1e-4
    assert np.std(ours['logprobs']) > 0.3                 # the weights matter
  print(f'{family}: largest difference per token {gap:.1e}')
  assert gap < TOLERANCE


# What is written


def test_a_process_of_its_own(model, tmp_path):
  output = tmp_path / 'out.jsonl'
  short = write(tmp_path / 'short.jsonl', [{'prompt': 'How many?', 'response': 'Two.'}] * 3)
  done = subprocess.run(
      [sys.executable, '-m', 'experiments.score', f'--model={model}', f'--data={short}',
       f'--output={output}'], cwd=irpo_runs.ROOT,
      env=irpo_runs.environment(None), capture_output=True, text=True, check=False)
  assert done.returncode == 0 and done.stderr == '', done.stderr
  first, second, third = read(output)
  assert first == second == third and first.keys() == {
      'prompt_ids', 'response_ids', 'logprobs', 'logprob_sum'}
  last = done.stdout.splitlines()[-1]
  assert last.startswith(f'{output}: 3 rows, {3 * len(first["logprobs"])} response tokens, ')
  assert ' tokens/s, ' in last and last.endswith(' s, 1 programs compiled')
  assert sorted(p.name for p in tmp_path.iterdir()) == ['out.jsonl', 'short.jsonl']


def test_prompts_and_messages_are_the_same_rows(model, tmp_path):
  question, answer = 'How many?', 'Two.'
  user, assistant = ({'role': 'user', 'content': question},
                     {'role': 'assistant', 'content': answer})
  found = scored(model, [
      {'prompt': question, 'response': answer},
      {'messages': [user, assistant]},
      {'messages': [user], 'response': answer},
      {'prompt': [user], 'response': answer, 'id': None}], tmp_path)
  assert all(row == found[0] for row in found)
  longer = scored(model, [{'messages': [user, assistant, user, assistant]}], tmp_path)[0]
  assert longer['prompt_ids'][:len(found[0]['prompt_ids'])] == found[0]['prompt_ids']
  assert longer['response_ids'] == found[0]['response_ids']


@pytest.mark.parametrize('suffix', ['.jsonl.gz', '.parquet'])
def test_other_formats(model, tmp_path, suffix):
  rows = [{'id': n, 'prompt': 'How many?', 'response': 'x' * (n + 1)} for n in range(3)]
  source, output = tmp_path / f'in{suffix}', tmp_path / 'out.jsonl'
  if suffix == '.parquet':
    pq.write_table(pa.Table.from_pylist(rows), source)
  else:
    source.write_bytes(gzip.compress(''.join(json.dumps(r) + '\n' for r in rows).encode()))
  ended = run(f'--model={model}', f'--data={source}', f'--output={output}', *FAST)
  assert ended.status == 0, ended.stderr
  assert read(output) == scored(model, rows, tmp_path)


def test_order_windows_and_float32_digits(model, tmp_path, monkeypatch):
  """More rows than a window, of all lengths, many with one id; each as if it stood alone."""
  rows = [{'id': n % 5, 'prompt': 'q' * (n % 7 + 1), 'response': 'x' * (n * 5 % 11 + 1)}
          for n in range(40)]
  whole = scored(model, rows, tmp_path)
  monkeypatch.setattr(score, 'WINDOW', 1)
  by_window = scored(model, rows, tmp_path)
  assert [row['id'] for row in by_window] == [row['id'] for row in rows]
  for a, b, row in zip(whole, by_window, rows, strict=True):
    assert (a['prompt_ids'], a['response_ids']) == (b['prompt_ids'], b['response_ids'])
    assert len(a['response_ids']) >= 2 and set(row['response']) == {'x'}
    np.testing.assert_allclose(a['logprobs'], b['logprobs'], rtol=1e-5)
    assert all(float(np.float32(x)) == np.float32(x) and len(repr(x)) <= 13 for x in a['logprobs'])


def test_end_of_response(model, tmp_path):
  rows = [{'prompt': 'How many?', 'response': 'Two.'}]
  ends, cut = (scored(model, rows, tmp_path, *flag)[0] for flag in ((), ('--noend_of_response',)))
  assert ends['response_ids'][:-1] == cut['response_ids']
  assert ends['response_ids'][-1] == 2                   # <eos>
  np.testing.assert_allclose(ends['logprobs'][:-1], cut['logprobs'], rtol=1e-5)


def test_long_rows_are_dropped_where_asked(model, tmp_path):
  good, long = ({'id': n, 'prompt': 'hi', 'response': 'x' * n} for n in (3, 200))
  found = scored(model, [long, good, long], tmp_path, '--over_length=drop')
  assert [row['id'] for row in found] == [3]
  source = write(tmp_path / 'in.jsonl', [long])
  ended = run(f'--model={model}', f'--data={source}', f'--output={tmp_path}/out.jsonl', *FAST,
              '--over_length=drop')
  assert ended.status == 2 and 'no row is left' in ended.stderr


def test_devices_do_not_matter(model, tmp_path):
  rows = [{'prompt': 'How many?', 'response': 'x' * n} for n in range(1, 9)]
  one, many = (scored(model, rows, tmp_path, flag) for flag in ('--mesh=1,8,1', '--mesh=2,2,2'))
  for a, b in zip(one, many, strict=True):
    np.testing.assert_allclose(a['logprobs'], b['logprobs'], rtol=1e-5)


@pytest.mark.parametrize('storage', ['bfloat16', 'int8'])
def test_weights_may_be_stored_narrow(storage, model, tmp_path):
  """Other log-probs than those of float32, and close ones; an adapter does not go on int8."""
  rows = [{'prompt': 'abc', 'response': 'de'}, {'prompt': 'a', 'response': 'bcd'}]
  exact = scored(model, rows, tmp_path)
  found = scored(model, rows, tmp_path, f'--storage={storage}')
  gap = max(np.abs(np.subtract(a['logprobs'], b['logprobs'])).max()
            for a, b in zip(exact, found, strict=True))
  assert 0 < gap < 0.05
  refused = run(f'--model={model}', f'--data={tmp_path}/x', f'--output={tmp_path}/y.jsonl',
                '--storage=int8', f'--adapter={tmp_path}')
  assert refused.status == 2 and 'adapter' in refused.stderr


def test_an_adapter_beside_the_model(model, tmp_path):
  """The log-probs of the merged model; those of the model itself are others."""
  c = read_config(model)
  c = dataclasses.replace(c, lora=Lora(2, 8.0, ('q', 'down')))
  factors = jax.tree.map(
      lambda x: 0.3 * jax.random.normal(jax.random.key(1), x.shape),
      init_adapter(jax.random.key(0), c))
  write_adapter(tmp_path / 'adapter', factors, c)
  merged = merge(attach(load_params(model, c), factors), c)
  save_model(tmp_path / 'merged', merged, dataclasses.replace(c, lora=None), tokenizer_from=model,
             dtype=jnp.float32)
  rows = [{'prompt': 'How many?', 'response': 'Two apples.'}]
  base, adapted, whole = (scored(folder, rows, tmp_path, *more)[0]['logprobs'] for folder, more in (
      (model, ()), (model, (f'--adapter={tmp_path / "adapter"}',)), (tmp_path / 'merged', ())))
  np.testing.assert_allclose(adapted, whole, rtol=1e-5)
  assert np.abs(np.array(base) - adapted).max() > 1e-3


def test_system_in_user(model, tmp_path):
  system, user = ({'role': 'system', 'content': 'Be brief.'}, {'role': 'user', 'content': 'Who?'})
  joined = {'role': 'user', 'content': 'Be brief.\n\nWho?'}
  found = scored(model, [{'messages': [joined], 'response': 'I.'}], tmp_path)
  moved = scored(model, [{'messages': [system, user], 'response': 'I.'}], tmp_path,
                 '--system_in_user')
  assert found == moved


# What stops it

USER, ASSISTANT = ({'role': r, 'content': 'hi'} for r in ('user', 'assistant'))
GOOD = {'prompt': 'hi', 'response': 'ok'}
BAD_ROWS = {
    'no response': ({'prompt': 'hi'}, "row 2: field 'response' is missing"),
    'empty response': ({'prompt': 'hi', 'response': ''}, "row 2: field 'response' is empty"),
    'blank response': ({'prompt': 'hi', 'response': ' \n'}, "row 2: field 'response' is empty"),
    'both': ({'messages': [USER, ASSISTANT], 'response': 'ok'},
             "row 2: field 'messages' does not end with the user"),
    'neither': ({'messages': [USER]}, "row 2: field 'messages' has no response"),
    'no prompt': ({'response': 'ok'}, "row 2: field 'prompt' is missing"),
    'role': ({'messages': [{'role': 'tool', 'content': 'x'}], 'response': 'ok'},
             "row 2: message 1 of field 'messages' has a role that cannot stand there"),
    'id': ({**GOOD, 'id': [1]}, "row 2: field 'id' has the wrong type"),
    'not JSON': ('{"prompt": ', 'row 2: invalid JSON at column'),
    'too long': ({'prompt': 'hi', 'response': 'x' * 200},
                 'row 2: the row is longer than the model was made for; expected at most 64 ids'),
}


@pytest.mark.parametrize('case', BAD_ROWS)
def test_bad_rows_are_named_before_the_model_is_read(case, model, tmp_path, monkeypatch):
  row, expected = BAD_ROWS[case]
  source, output = write(tmp_path / 'in.jsonl', [GOOD, row]), tmp_path / 'out.jsonl'
  monkeypatch.setattr(score, 'load_model', None)
  ended = run(f'--model={model}', f'--data={source}', f'--output={output}', *FAST)
  assert ended.status == 2 and ended.stderr.count('\n') == 1
  assert ended.stderr.startswith(f'error: {source}, {expected}'), ended.stderr
  assert sorted(p.name for p in tmp_path.iterdir()) == ['in.jsonl']


BAD_FLAGS = [
    (['--output={exists}.jsonl'], 'the output already exists'),
    (['--output={folder}/none/out.jsonl'], 'the folder of the output does not exist'),
    (['--output={folder}/out.parquet'], 'expected a path that ends in .jsonl'),
    (['--output=gs://bucket/out.jsonl'], 'on a local disk'),
    (['--output='], '--output: scoring needs this flag'),
    (['--data={folder}/none.jsonl'], 'no such file'),
    (['--model={folder}/none'], 'not a model folder'),
    (['--batch_size=3'], '--batch_size: the rows do not divide over the devices'),
    (['--learning_rate=1e-3'], '--learning_rate: the flag would have no effect'),
    (['--run_dir=x'], '--run_dir: the flag would have no effect'),
    (['--adapter={folder}/none'], 'not a model folder'),
    (['--lora_rank=4'], '--lora_rank: the flag would have no effect'),
    (['--over_length=truncate'], 'responses are scored whole'),
    (['--task=gsm8k'], '--task: the flag would have no effect'),
    (['--remat=all'], '--remat: the flag would have no effect'),
    (['--length_buckets=4'], 'the padded lengths do not cover the longest row'),
]


@pytest.mark.parametrize('more, expected', BAD_FLAGS)
def test_bad_flags_are_named(more, expected, model, tmp_path):
  source = write(tmp_path / 'in.jsonl', [GOOD])
  exists = write(tmp_path / 'there.jsonl', [GOOD])
  ended = run(f'--model={model}', f'--data={source}', f'--output={tmp_path}/out.jsonl', *FAST,
              *(flag.format(folder=tmp_path, exists=exists.with_suffix('')) for flag in more))
  assert ended.status == 2 and ended.stderr.count('\n') == 1
  assert expected in ended.stderr
  assert read(exists) == [GOOD] and not (tmp_path / 'out.jsonl').exists()


def test_weights_that_give_no_number_leave_no_file(model, tmp_path, monkeypatch):
  source = write(tmp_path / 'in.jsonl', [GOOD])
  monkeypatch.setattr(score, 'score_stream', lambda *a, **k: iter([np.array([-1.0, np.nan])]))
  ended = run(f'--model={model}', f'--data={source}', f'--output={tmp_path}/out.jsonl', *FAST)
  assert ended.status == 2
  assert f'{source}, row 1: the model gives a log-prob that is no number' in ended.stderr
  assert os.listdir(tmp_path) == ['in.jsonl']
