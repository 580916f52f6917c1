"""`python -m experiments.sample`: what the engine gives, resumable, and what stops it."""

import itertools
import json
import re
import zlib

import jax
import numpy as np
import pytest
from absl import flags
from absl.testing import flagsaver
from jax.experimental.compilation_cache import compilation_cache

from experiments import sample, sample_flags
from jaxrl.errors import InputError
from jaxrl.models.hugging_face import load_params
from jaxrl.parallel.mesh import make_mesh
from jaxrl.runs.session import open_model_folder
from jaxrl.sampling.engine import make_engine
from jaxrl.sampling.generate import engine_params, generate
from jaxrl.sampling.requests import SamplingConfig, requests_for
from jaxrl.sampling.sizes import EngineConfig
from jaxrl.tokens.prompts import Message, prompt_ids
from jaxrl.tokens.tokenizer import decode
from tests.experiments import in_process, small_model

FLAGS = flags.FLAGS
FAST = ('--compute_dtype=float32', '--slots=8', '--max_new_tokens=6', '--mesh=1,8,1')
USER, ASSISTANT = ({'role': r, 'content': 'Who?'} for r in ('user', 'assistant'))
ROWS = [{'id': 'a', 'prompt': 'Ana has 3.'}, {'prompt': [USER, ASSISTANT, USER]},
        {'id': 7, 'messages': [USER]}]
IDS = ['a', 'in-2', '7']


def run(*arguments):
  return in_process.run(sample, *arguments)


def read(path):
  """Header and rows."""
  header, *rows = (json.loads(line) for line in path.read_text().splitlines())
  return header['header'], rows


@pytest.fixture(autouse=True, scope='module')
def cached_programs(tmp_path_factory):
  """Every command builds its engine anew; programs they share are compiled once."""
  names = {'jax_compilation_cache_dir': str(tmp_path_factory.mktemp('cache')),
           'jax_persistent_cache_min_compile_time_secs': 0.0}
  before = {name: getattr(jax.config, name) for name in names}
  for name, value in names.items():
    jax.config.update(name, value)
  compilation_cache.reset_cache()
  yield
  for name, value in before.items():
    jax.config.update(name, value)
  compilation_cache.reset_cache()


@pytest.fixture(scope='module')
def model(tmp_path_factory):
  folder = tmp_path_factory.mktemp('sample') / 'model'
  small_model.write_model(folder)
  return folder


@pytest.fixture(scope='module')
def parts(model):
  """Mesh, configuration, tokenizer and parameters, for the engine called directly."""
  mesh = make_mesh(data=1, fsdp=8, tensor=1)
  c, tokenizer = open_model_folder(model)
  with jax.set_mesh(mesh):
    return mesh, c, tokenizer, load_params(model, c, mesh=mesh)


class Case:
  """An input file and an output that does not exist yet."""

  def __init__(self, folder, model, rows):
    self.source, self.output = folder / 'in.jsonl', folder / 'out.jsonl'
    self.done = folder / 'out.jsonl.done.json'
    self.folder, self.model = folder, model
    small_model.write_problems(self.source, rows)

  def run(self, *more):
    return run(f'--model={self.model}', f'--data={self.source}', f'--output={self.output}', *FAST,
               *more)

  def rows(self, *more):
    ended = self.run(*more)
    assert ended.status == 0, ended.stderr
    return read(self.output)[1]


@pytest.fixture
def case(tmp_path, model):
  return lambda rows=ROWS: Case(tmp_path, model, rows)


def by_draw(rows):
  return {(row['prompt_id'], row['sample_index']): row for row in rows}


@pytest.fixture(scope='module')
def drawn(tmp_path_factory, model):
  """An output that was made in one go: three prompts, three draws."""
  made = Case(tmp_path_factory.mktemp('drawn'), model, ROWS)
  made.ended = made.run('--n=3')
  assert made.ended.status == 0, made.ended.stderr
  return made


# What is written


def test_samples_are_those_of_the_engine(drawn, parts):
  mesh, c, tokenizer, params = parts
  prompts = [prompt_ids(tokenizer, p) for p in (
      'Ana has 3.', tuple(Message(**m) for m in (USER, ASSISTANT, USER)), 'Who?')]
  engine = make_engine(c, SamplingConfig(6), EngineConfig(slots=8, dtype='float32'), mesh,
                       max_prompt=40, eos_ids=tokenizer.eos_ids, pad_id=tokenizer.pad_id)
  keys = [zlib.crc32(i.encode()) for i in IDS]
  expected = generate(engine, engine_params(engine, params), list(requests_for(
      prompts, 3, temperature=0.8, keys=keys)), seed=0)
  found = by_draw(read(drawn.output)[1])
  assert len(found) == 9
  for each in expected:
    row = found.pop((IDS[each.request // 3], each.draw))
    assert row['prompt_ids'] == prompts[each.request // 3]
    assert row['response_ids'] == each.response_ids
    np.testing.assert_array_equal(np.float32(row['logprobs']), np.float32(each.logprobs))
    assert row['response'] == decode(tokenizer, each.response_ids)
    assert (row['finish_reason'], row['seed'], row['key'], row['step']) == (
        each.finish_reason, 0, each.key, None)
    assert row['prompt'].endswith('<|assistant|>')
  assert not found


def test_the_mark_of_a_whole_output(drawn):
  done = json.loads(drawn.done.read_text())
  header, rows = read(drawn.output)
  assert done['header'] == header and done['rows'] == done['samples'] == 9
  assert done['tokens'] == sum(len(row['response_ids']) for row in rows)
  assert sum(done['finish_reasons'].values()) == 9 and done['draws'] == 3
  assert done['bytes'] == drawn.output.stat().st_size
  last = drawn.ended.stdout.splitlines()[-1]
  assert re.search(rf'9 rows, 3 prompts, 9 samples, {done["tokens"]} tokens; now {done["tokens"]} '
                   r'tokens in [\d.]+ s, \d+ tokens/s, \d+ programs compiled$', last), last
  assert re.search(r'sample .*out.jsonl: 9 samples in .* samples/s', drawn.ended.stdout)
  assert drawn.ended.stderr == ''


def test_the_same_command_again_does_nothing(drawn, monkeypatch):
  monkeypatch.setattr(sample, 'generate', None)
  before = drawn.output.read_bytes()
  ended = drawn.run('--n=3')
  assert ended.status == 0 and ended.stdout.splitlines()[-1].endswith('is there already')
  assert drawn.output.read_bytes() == before


@pytest.mark.parametrize('kept', [0.01, 0.4, 0.999])
def test_an_interrupted_file_goes_on(drawn, case, kept, monkeypatch):
  """Cut anywhere: the missing (prompt, draw) are drawn, nothing else, to the same bits."""
  again = case()
  content = drawn.output.read_bytes()
  cut = content[:int(kept * len(content))]
  again.output.write_bytes(cut)
  asked = []

  def counted(engine, params, requests, **options):
    return generate(engine, params, (asked.append(r) or r for r in requests), **options)

  monkeypatch.setattr(sample, 'generate', counted)
  assert not again.done.exists()
  ended = again.run('--n=3', '--cadence=3')                 # that is no part of what is drawn
  assert ended.status == 0, ended.stderr
  assert len(asked) == 9 - max(cut.count(b'\n') - 1, 0)
  assert by_draw(read(again.output)[1]) == by_draw(read(drawn.output)[1])
  assert again.output.read_bytes().startswith(cut[:cut.rfind(b'\n') + 1])
  assert again.done.exists()
  assert ('was cut short' in ended.stdout) == (content[len(cut) - 1] != 10)


def test_an_interrupt_keeps_what_is_finished(drawn, case, monkeypatch):
  again = case()

  def interrupted(*args, **options):
    samples = generate(*args, **options)
    yield next(samples)
    yield next(samples)
    raise KeyboardInterrupt

  monkeypatch.setattr(sample, 'generate', interrupted)
  with pytest.raises(KeyboardInterrupt):
    again.run('--n=3')
  assert len(read(again.output)[1]) == 2 and not again.done.exists()
  monkeypatch.undo()
  assert by_draw(again.rows('--n=3')) == by_draw(read(drawn.output)[1])


def test_more_draws_are_added(drawn, case):
  again = case()
  two = again.rows('--n=2')
  assert by_draw(again.rows('--n=3')) == by_draw(read(drawn.output)[1])
  assert read(again.output)[1][:6] == two
  fewer = again.run('--n=2')
  assert fewer.status == 2 and 'expected --n=2 --keep=all; found --n=3' in fewer.stderr
  again.done.unlink()
  fewer = again.run('--n=2')
  assert fewer.status == 2 and 'more samples per prompt than are asked for' in fewer.stderr


@pytest.mark.parametrize('more, field', [
    (('--seed=1',), 'seed; expected 1; found 0'),
    (('--temperature=1',), 'temperature; expected 1.0; found 0.8'),
    (('--stop=x',), "stop_strings; expected \\['x'\\]; found \\[\\]"),
    (('--ban=3',), 'logit_bias; expected \\[\\[3, \'ban\'\\]\\]')])
def test_other_settings_are_refused(drawn, more, field):
  before = drawn.output.read_bytes()
  ended = drawn.run('--n=3', *more)
  assert ended.status == 2
  assert re.search(f'out.jsonl: the file was begun with another {field}', ended.stderr)
  assert drawn.output.read_bytes() == before


def test_other_prompts_and_changed_outputs_are_refused(drawn, case):
  again = case(ROWS[:2])
  again.output.write_bytes(drawn.output.read_bytes())
  ended = again.run('--n=3')
  assert ended.status == 2 and 'begun with another prompts' in ended.stderr
  small_model.write_problems(again.source, ROWS)
  again.done.write_bytes(drawn.done.read_bytes())
  again.output.write_bytes(drawn.output.read_bytes()[:-10])
  ended = again.run('--n=3')
  assert ended.status == 2 and 'the output has changed since it was finished' in ended.stderr


def test_stops_prefixes_and_prompt_logprobs(drawn, case, parts):
  """Settings reach the engine; log-probs of the prompt come from scoring."""
  tokenizer = parts[2]
  every = by_draw(read(drawn.output)[1])
  pieces = ((draw, decode(tokenizer, [i]).strip())
            for draw, row in every.items() for i in row['response_ids'][1:4])
  draw, stop = next((draw, text) for draw, text in pieces if text and text.isascii())
  first = every[draw]
  rows = by_draw(case().rows('--n=3', f'--stop={stop}', '--prompt_logprobs', '--batch_size=8'))
  row = rows[draw]
  end = next(n for n in range(1, 7) if stop in decode(tokenizer, first['response_ids'][:n]))
  assert row['finish_reason'] == 'stop' and row['response_ids'] == first['response_ids'][:end]
  assert row['logprobs'] == first['logprobs'][:end] and stop in row['response']
  assert row['prompt_logprobs'][0] is None
  assert len(row['prompt_logprobs']) == len(row['prompt_ids'])
  assert all(x < 0 for x in row['prompt_logprobs'][1:])


def test_prefix_ban_and_short_prompts(case):
  made = case([{'prompt': 'x' * n} for n in range(1, 4)])
  rows = made.rows('--forced_prefix=Score: ', '--temperature=0', '--max_new_tokens=12')
  assert len(rows) == 3 and all(row['response'].startswith('Score: ') for row in rows)
  last = rows[0]['response_ids'][-1]
  made.output.unlink(), made.done.unlink()
  banned = made.rows('--forced_prefix=Score: ', '--temperature=0', '--max_new_tokens=12',
                     f'--ban={last}')
  assert not any(last in row['response_ids'] for row in banned)


def test_long_prompts_are_errors_in_place_of_samples(drawn, case):
  long = {'id': 'long', 'prompt': 'x' * 200}
  made = case([ROWS[0], long, *ROWS[1:]])
  rows = [row for row in made.rows('--n=3', '--over_length=drop') if row['prompt_id'] != 'in-3']
  error, = (row for row in rows if 'error' in row)
  assert error['prompt_id'] == 'long' and 'in.jsonl, row 2: ' in error['error']
  expected = by_draw(read(drawn.output)[1])
  others = by_draw(row for row in rows if row is not error)
  assert others == {draw: expected[draw] for draw in expected if draw[0] != 'in-2'}
  assert json.loads(made.done.read_text())['refused'] == 1


# Choosing and scoring


def test_the_best_of_n(drawn, case):
  made = case()
  rows = made.rows('--n=3', '--keep=best')
  every = by_draw(read(drawn.output)[1])
  assert by_draw(read(made.output.with_suffix('.all.jsonl'))[1]) == every
  assert sorted(row['prompt_id'] for row in rows) == sorted(IDS)
  for row in rows:
    means = [np.mean(np.float32(every[row['prompt_id'], n]['logprobs']), dtype=np.float64)
             for n in range(3)]
    assert row['sample_index'] == int(np.argmax(means))
    assert abs(row['logprob_mean'] - max(means)) < 1e-9
  assert json.loads(made.done.read_text())['keep'] == 'best'


def test_the_answer_most_samples_give(case, monkeypatch):
  """The engine's samples with texts that have answers: 4, 4, 5 of each prompt."""
  made = case([small_model.problem(1), small_model.problem(2)])
  texts = ['Final answer: 5', 'Final answer: 4', 'Final answer: 4.0']
  given = itertools.cycle(texts)
  monkeypatch.setattr(sample, 'decode', lambda tokenizer, ids: next(given))
  monkeypatch.setattr(sample, 'generate', lambda *args, **options: iter(
      sorted(generate(*args, **options), key=lambda each: each.request)))
  rows = made.rows('--n=3', '--keep=majority', '--task=gsm8k', '--template={question}')
  assert [(row['answer'], row['votes']) for row in rows] == [('4', 2)] * 2
  assert all(row['response'] in texts[1:] for row in rows)


def test_choices_are_scored(case, parts, model):
  rows = [{'id': n, 'prompt': 'How many?', 'options': ['Two.', 'x' * (n + 1)]} for n in range(3)]
  made = case(rows)
  source = made.folder / 'pairs.jsonl'
  small_model.write_problems(source, [
      {'prompt': 'How many?', 'response': text} for row in rows for text in row['options']])
  scored = made.folder / 'scored.jsonl'
  ended = in_process.run(
      sample.score, f'--model={model}', f'--data={source}', f'--output={scored}',
      '--compute_dtype=float32', '--batch_size=8')
  assert ended.status == 0, ended.stderr
  expected = [json.loads(line) for line in scored.read_text().splitlines()]
  fast = ('--choices_field=options', '--batch_size=8', '--compute_dtype=float32')
  arguments = (f'--model={model}', f'--data={made.source}', f'--output={made.output}', *fast)
  assert run(*arguments).status == 0
  found = read(made.output)[1]
  assert [row['prompt_id'] for row in found] == ['0', '1', '2']
  for n, row in enumerate(found):
    for choice, theirs in zip(row['choices'], expected[2 * n:2 * n + 2], strict=True):
      assert choice['response_ids'] == theirs['response_ids']
      np.testing.assert_allclose(choice['logprobs'], theirs['logprobs'], rtol=1e-5)
      assert abs(choice['logprob_sum'] - theirs['logprob_sum']) < 1e-4
    assert row['best_by_sum'] == int(np.argmax([c['logprob_sum'] for c in row['choices']]))
    assert row['best_by_mean'] == int(np.argmax([c['logprob_mean'] for c in row['choices']]))
  lines = made.output.read_bytes().splitlines(keepends=True)
  made.output.write_bytes(b''.join(lines[:2]))
  made.done.unlink()
  assert run(*arguments).status == 0
  again = read(made.output)[1]
  assert again[0] == found[0] and [row['prompt_id'] for row in again] == ['0', '1', '2']


# What stops it

BAD_ROWS = {
    'no prompt': ({'text': 'hi'}, "row 2: field 'prompt' is missing"),
    'empty': ({'prompt': ' '}, "row 2: field 'prompt' is empty"),
    'type': ({'prompt': 3}, "row 2: field 'prompt' has the wrong type"),
    'assistant': ({'messages': [USER, ASSISTANT]}, "row 2: field 'messages' does not end with the"),
    'twice': ({'id': 'a', 'prompt': 'x'}, "row 2, field 'id': the id 'a' occurs twice"),
    'not JSON': ('{"prompt": ', 'row 2: invalid JSON at column'),
    'too long': ({'prompt': 'x' * 200}, 'row 2: prompt and response do not fit'),
}


@pytest.mark.parametrize('bad', BAD_ROWS)
def test_bad_rows_are_named_before_the_model_is_read(bad, case, monkeypatch):
  row, expected = BAD_ROWS[bad]
  made = case([ROWS[0], row])
  monkeypatch.setattr(sample.score, 'load_model', None)
  ended = made.run()
  assert ended.status == 2 and ended.stderr.count('\n') == 1
  assert ended.stderr.startswith(f'error: {made.source}, {expected}'), ended.stderr
  assert sorted(p.name for p in made.folder.iterdir()) == ['in.jsonl']


def test_bad_choices_are_named(case, monkeypatch):
  monkeypatch.setattr(sample.score, 'load_model', None)
  for value, expected in (
      ([], 'has no choices'), ('x', 'has no choices'),
      (['a', ''], "choice 2 of field 'o' is empty"),
      (['x' * 99], 'prompt and response do not fit')):
    made = case([{'prompt': 'hi', 'o': value}])
    ended = run(f'--model={made.model}', f'--data={made.source}', f'--output={made.output}',
                '--choices_field=o')
    assert ended.status == 2 and 'row 1' in ended.stderr and expected in ended.stderr


BAD_FLAGS = [
    (('--n=0',), '--n: nothing would be sampled'),
    (('--n=2', '--temperature=0'), '--temperature: all samples of a prompt would be the same'),
    (('--n=2', '--top_k=1'), '--top_k: all samples of a prompt would be the same'),
    (('--n=2', '--top_p=0'), '--top_p: all samples of a prompt would be the same'),
    (('--temperature=-1',), '--temperature: temperature out of range'),
    (('--temperature=1,2',), '--temperature: the list does not fit'),
    (('--temperature=0', '--top_p=0.5'), '--top_p: the flag would have no effect'),
    (('--temperature=0', '--seed=3'), '--seed: the flag would have no effect'),
    (('--min_new_tokens=9', '--max_new_tokens=8'), '--min_new_tokens: min_new_tokens out of range'),
    (('--max_new_tokens=0',), 'max_new_tokens'),
    (('--keep=best',), '--keep: there would be nothing to choose from'),
    (('--keep=majority', '--n=4'), '--keep: nothing says how answers are read'),
    (('--over_length=truncate',), '--over_length: prompts are never cut'),
    (('--stop=',), '--stop: a stop string is empty'),
    (('--stop_token_ids=x',), '--stop_token_ids: not a list of ids'),
    (('--stop_token_ids=3,3',), '--stop_token_ids: an id is there twice'),
    (('--stop_token_ids=400',), '--stop_token_ids: the vocabulary has no such token'),
    (('--ban=-1',), 'the vocabulary has no such token'),
    (('--ban=3', '--logit_bias=3:1'), '--logit_bias: an id that is never drawn'),
    (('--ban=3', '--stop_token_ids=3'), '--stop_token_ids: an id that is never drawn'),
    (('--logit_bias=3',), '--logit_bias: the bias cannot be read'),
    (('--logit_bias=3:inf',), '--logit_bias: the bias is no number'),
    (('--repetition_penalty=0',), '--repetition_penalty: the penalty cannot be used'),
    (('--presence_penalty=nan',), '--presence_penalty'),
    (('--forced_prefix=',), '--forced_prefix: the forced prefix has no ids'),
    (('--forced_prefix=aaaaaaa',), '--forced_prefix: the forced prefix leaves nothing to draw'),
    (('--forced_prefix=ab', '--stop=b'), '--forced_prefix: every response would stop'),
    (('--choices_field=o', '--n=2'), '--n: the flag would have no effect'),
    (('--choices_field=o', '--stop=x'), '--stop: the flag would have no effect'),
    (('--noend_of_response',), '--end_of_response: the flag would have no effect'),
    (('--batch_size=8',), '--batch_size: the flag would have no effect'),
    (('--template={question}',), '--template: the flag would have no effect'),
    (('--learning_rate=1',), '--learning_rate: the flag would have no effect'),
    (('--samples_per_prompt=4',), '--samples_per_prompt: the flag would have no effect'),
    (('--run_dir=x',), '--run_dir: the flag would have no effect'),
    (('--slots=7',), '--slots: slots must divide evenly over the devices'),
    (('--output=x.parquet',), '--output: samples are written as JSON lines'),
    (('--output=none/x.jsonl',), 'the folder of the output does not exist'),
    (('--data=none.jsonl',), 'no such file'),
    (('--data=',), '--data: sampling needs this flag'),
    (('--model=none',), 'not a model folder'),
]


@pytest.mark.parametrize('more, expected', BAD_FLAGS)
def test_bad_flags_are_named(more, expected, case, monkeypatch):
  made = case()
  monkeypatch.setattr(sample, 'generate', None)
  choices = any('choices' in flag for flag in more)
  ended = run(f'--model={made.model}', f'--data={made.source}', f'--output={made.output}',
              *(() if choices else FAST), *more)
  assert ended.status == 2 and ended.stderr.count('\n') == 1, ended.stderr
  assert expected in ended.stderr, ended.stderr
  assert not made.done.exists()


def test_every_flag_is_documented():
  for flag in FLAGS.get_flags_for_module(sample_flags):
    text = re.sub(r'^<[\w|]+>: ', '', flag.help or '').partition(';\n')[0]
    assert text.endswith('.') and len(text) > 10, flag.name


def test_every_flag_of_the_lenders_acts_or_is_refused():
  with flagsaver.flagsaver():
    FLAGS.unparse_flags()
    FLAGS(['sample'])
    idle = sample_flags.without_effect()
    lent = {f.name for m in sample_flags.LENDERS for f in FLAGS.get_flags_for_module(m)}
    assert {*sample_flags.USED} <= lent
    assert lent - {*sample_flags.USED} <= idle.keys()
    with pytest.raises(InputError, match='--model: sampling needs this flag'):
      sample_flags.check()
    FLAGS.mark_as_parsed()
