"""The embedded world: reproducible, right, and split without overlap."""

import dataclasses
import hashlib
import itertools
import json
import re

import pytest
from absl import flags
from absl.testing import flagsaver

from experiments import world as world_command
from jaxrl.data.world import LARGEST, SPLITS, STYLES, net_change, problems
from jaxrl.evaluation.diversity import EQUATION, distinct_equation_chains, equation_chain

VERBS = {'finds': 1, 'buys': 1, 'gets': 1, 'loses': -1, 'sells': -1, 'gives': -1}


def made(split, count=300, seed=0, **steps):
  return list(problems(split, count, seed=seed, **steps))


def answer_to(question):
  """(answer, steps), worked from the words alone."""
  story = question.removesuffix('. How many now?')
  assert story != question
  start, *clauses = story.split(', ')
  total = int(re.fullmatch(r'\w+ has (\d+) \w+', start)[1])
  for clause in clauses:
    verb, amount = clause.split(' ')
    total += VERBS[verb] * int(amount)
  return total, len(clauses)


@pytest.mark.parametrize('split', SPLITS)
def test_answers_and_reasoning_are_right(split):
  for p in made(split, min_steps=1, max_steps=6):
    total, steps = answer_to(p.question)
    assert p.answer == total
    *lines, final = p.reasoning.split('\n')
    assert final == f'Final answer: {p.answer}' and len(lines) == steps
    before = int(re.search(r'has (\d+)', p.question)[1])
    for line in lines:
      a, sign, b, c = re.fullmatch(r'(\d+)([+-])(\d+)=(\d+)', line).groups()
      assert int(a) == before and int(c) == int(a) + (int(b) if sign == '+' else -int(b))
      assert 2 <= int(b) <= 5 and 0 <= int(c) <= LARGEST
      before = int(c)
    assert before == p.answer


def test_the_same_seed_gives_the_same_problems_and_a_longer_list_begins_alike():
  for split in SPLITS:
    assert made(split, 50) == made(split, 80)[:50]
    assert made(split, 50) != made(split, 50, seed=1)


def test_splits_share_no_problem_and_repeat_none():
  """Across seeds as well: a text belongs to one split whatever it was drawn from."""
  one_step = {'min_steps': 1, 'max_steps': 1}      # so few texts that draws meet by chance
  texts = {split: {p.question for seed in (0, 1) for p in made(split, seed=seed, **one_step)}
           for split in SPLITS}
  for a, b in itertools.combinations(SPLITS, 2):
    assert not texts[a] & texts[b]
  for split in SPLITS:
    one = made(split, 600, **one_step)
    assert len({p.question for p in one}) == len({p.id for p in one}) == len(one)


def test_numbers_of_steps():
  steps = [answer_to(p.question)[1] for p in made('train', min_steps=2, max_steps=4)]
  assert set(steps) == {2, 3, 4}
  assert {answer_to(p.question)[1] for p in made('dev', 20, min_steps=3, max_steps=3)} == {3}


def test_both_directions_occur_as_often():
  signs = ''.join(re.findall(r'\d([+-])\d', ' '.join(p.reasoning for p in made('train', 1000))))
  assert 0.45 < signs.count('+') / len(signs) < 0.55


def test_problems_of_one_style_are_those_that_runs_were_made_with():
  """Run folders hold such problems; the hash was taken before there were any styles."""
  digest = hashlib.sha256()
  for split in SPLITS:
    for seed in (0, 7):
      for p in made(split, 200, seed, min_steps=1, max_steps=6):
        digest.update(json.dumps(dataclasses.astuple(p)).encode())
  assert digest.hexdigest() == '4128af985ec60d9122564c74a464ad54b5e1c8c3f8bc09ece0c98b1d3d1ea8e7'


def test_styles_change_the_reasoning_of_a_problem_and_nothing_else():
  one, several = made('sft'), made('sft', styles=len(STYLES))
  assert [dataclasses.replace(p, reasoning='') for p in one] == [
      dataclasses.replace(p, reasoning='') for p in several]
  assert made('sft', styles=len(STYLES)) == several
  alike = sum(a.reasoning == b.reasoning for a, b in zip(one, several, strict=True)) / len(one)
  assert 0.2 < alike < 0.4            # the first style, one of four


@pytest.mark.parametrize('style', STYLES)
def test_every_style_gets_there_by_right_equations(style):
  for p in made('train', 200):
    start, *amounts = map(int, re.findall(r'\d+', p.question))
    verbs = re.findall('|'.join(VERBS), p.question)
    changes = [VERBS[verb] * n for verb, n in zip(verbs, amounts, strict=True)]
    lines = style(start, changes)
    assert len(lines) == len(changes)
    for line in lines:
      assert re.fullmatch(EQUATION, line.removeprefix('+')), line
      left, right = line.split('=')
      assert eval(left) == int(right)
    if style.__name__ != 'turned_round':         # whose last line may end with what was before
      assert lines[-1].endswith(f'={p.answer}')
    else:
      assert str(p.answer) in re.findall(r'\d+', lines[-1])


def test_styles_by_hand():
  assert {style.__name__: ', '.join(style(12, [3, -4])) for style in STYLES} == {
      'step_by_step': '12+3=15, 15-4=11', 'turned_round': '3+12=15, 11+4=15',
      'net_change': '3-4=-1, 12-1=11', 'last_first': '12-4=8, 8+3=11'}
  assert net_change(12, [3, -3]) == ['3-3=0', '12+0=12']


def test_styles_are_different_chains_of_equations():
  """Unless the steps are alike: the last first is then the first first."""
  chains = [distinct_equation_chains(['\n'.join(style(12, changes)) for style in STYLES], EQUATION)
            for changes in ([3, -4], [3, 4], [-5, -2, 4], [3, 3])]
  assert chains == [4, 4, 4, 3]
  assert equation_chain('-3-4=-7\n12-7=5', EQUATION) == ('-3-4=-7', '12-7=5')


@pytest.mark.parametrize(('arguments', 'message'), [
    (('valid', 5), "one of .*'test'.*found 'valid'"),
    (('train', 5, 0, 3), 'found 0 and 3'),
    (('train', 5, 4, 3), 'found 4 and 3'),
])
def test_bad_arguments(arguments, message):
  split, count, *steps = arguments
  with pytest.raises(ValueError, match=message):
    made(split, count, **dict(zip(('min_steps', 'max_steps'), steps, strict=False)))


@pytest.mark.parametrize('styles', [0, len(STYLES) + 1])
def test_there_are_not_so_many_styles(styles):
  with pytest.raises(ValueError, match=f'from 1 to 4; found {styles}'):
    made('sft', 5, styles=styles)


def test_only_the_sft_file_holds_reasoning(tmp_path):
  if not flags.FLAGS.is_parsed():
    flags.FLAGS.mark_as_parsed()
  with flagsaver.flagsaver(world_sft=60, world_train=20, world_dev=20, world_test=20):
    world_command.write_world(world_command.epath.Path(tmp_path), seed=0)
  for split in SPLITS:
    text = (tmp_path / f'{split}.jsonl').read_text()
    fields = {frozenset(json.loads(line)) for line in text.splitlines()}
    solution = {'solution'} if split == 'sft' else set()
    assert fields == {frozenset({'id', 'question', 'answer'} | solution)}
    assert ('=' in text) == ('Final answer' in text) == (split == 'sft')


def test_styles_are_in_the_sft_file_only(tmp_path):
  if not flags.FLAGS.is_parsed():
    flags.FLAGS.mark_as_parsed()
  written = {}
  for styles in (None, 1, 4):
    folder = world_command.epath.Path(tmp_path / str(styles))
    folder.mkdir()
    with flagsaver.flagsaver(world_sft=60, world_train=20, world_dev=20, world_test=20,
                             world_styles=styles):
      world_command.write_world(folder, seed=0)
    written[styles] = {split: (folder / f'{split}.jsonl').read_text() for split in SPLITS}
  assert written[None] == written[1]
  assert {split for split in SPLITS if written[4][split] != written[1][split]} == {'sft'}
