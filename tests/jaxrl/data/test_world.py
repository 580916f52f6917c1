"""The embedded world: reproducible, right, and split without overlap."""

import itertools
import json
import re

import pytest
from absl import flags
from absl.testing import flagsaver

from experiments import world as world_command
from jaxrl.data.world import LARGEST, SPLITS, problems

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


@pytest.mark.parametrize(('arguments', 'message'), [
    (('valid', 5), "one of .*'test'.*found 'valid'"),
    (('train', 5, 0, 3), 'found 0 and 3'),
    (('train', 5, 4, 3), 'found 4 and 3'),
])
def test_bad_arguments(arguments, message):
  split, count, *steps = arguments
  with pytest.raises(ValueError, match=message):
    made(split, count, **dict(zip(('min_steps', 'max_steps'), steps, strict=False)))


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
