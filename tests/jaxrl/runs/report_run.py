"""Writes a made-up run folder that looks like a real one, for the tests of the report."""

from __future__ import annotations

import json
import math
import pathlib
import random
from typing import Any

from jaxrl.runs import manifest, tables

HOSTILE = (
    '<script>window.harmed = true</script>',
    '</script><img src=x onerror="window.harmed = true">',
    '<!-- <script> ]]> -->  & &lt;b&gt; \u2028\u2029 {{data}}',
    'hidden \x00 NUL, \x1b[31m escape, \u202eright to left\u202c, \ufeff, \u05e9\u05dc\u05d5\u05dd',
    'a_very_long_word_' * 30 + ' and $\\frac{' + '9' * 200 + '}{2}$',
)
_NAMES = ('Natalia', 'Weng', 'Betty', 'Julie', 'James', 'Mark', 'Albert', 'Ken', 'Alexis', 'Tina')
_THINGS = ('clips', 'pencils', 'apples', 'stickers', 'marbles', 'cookies', 'books', 'tickets')


def problem(rng: random.Random) -> tuple[str, int, tuple[int, int, int]]:
  """A word problem, its answer and its three numbers."""
  a, b, c = rng.randint(3, 40), rng.randint(2, 9), rng.randint(2, 30)
  name, thing = rng.choice(_NAMES), rng.choice(_THINGS)
  question = (
      f'{name} packs {thing} into boxes. Each box holds {a} {thing}, and {name} fills {b} boxes on '
      f'Monday. On Tuesday {name} gives away {c} {thing} to a friend. How many {thing} are left?'
  )
  return question, a * b - c, (a, b, c)


def response(rng: random.Random, numbers: tuple[int, int, int], answer: int | None) -> str:
  a, b, c = numbers
  steps = rng.choice((
      f'On Monday there are {a} * {b} = <<{a}*{b}={a * b}>>{a * b} in the boxes.\n',
      f"Let's go step by step. Each box holds {a}, so {b} boxes hold {a} x {b} = {a * b}.\n",
      f'First find the total:\n\n  {a} + {a} + ... ({b} times) = {a * b}\n\n',
  ))
  if answer is None:
    return steps + 'Then we have to think about Tuesday. ' * 8 + 'So the friend'
  return steps + f'After giving away {c}: {a * b} - {c} = {answer}.\n#### {answer}'


def _draw(rng, numbers, gold, skill):
  """(response, answer, verdict, finish_reason) of one sample."""
  kind = rng.random()
  if kind < skill:
    return response(rng, numbers, gold), str(gold), 'correct', 'eos'
  if kind > 0.95:
    return response(rng, numbers, None), None, 'unparseable_answer', 'length'
  wrong = gold + rng.choice((-10, -1, 1, 2, 10))
  return response(rng, numbers, wrong), str(wrong), 'wrong', 'eos'


def _prompt(question: str) -> str:
  return (
      '<|im_start|>user\nSolve the problem and end with "#### answer".\n\n'
      f'{question}<|im_end|>\n<|im_start|>assistant\n'
  )


def _evaluation(rng, problems, skills, iteration, hostile):
  rows = []
  for number, (question, gold, numbers) in enumerate(problems):
    for index in range(5):
      text, answer, verdict, finish = _draw(rng, numbers, gold, skills[number])
      if hostile and number == 1 and index == 0:
        text = HOSTILE[0]
      rows.append({
          'prompt_id': f'test-{number:04d}', 'kind': 'greedy' if index == 0 else 'vote',
          'sample_index': max(0, index - 1), 'prompt': _prompt(question), 'response': text,
          'gold': str(gold), 'answer': answer, 'verdict': verdict, 'finish_reason': finish,
          'length': len(text) // 3,
      })  # fmt: skip
  return rows


def _iteration(rng, problems, skills, iteration, n_samples, hostile):
  samples, scores, pairs, reference = [], [], [], []
  for number, (question, gold, numbers) in enumerate(problems):
    prompt_id = f'train-{number:04d}'
    drawn = [_draw(rng, numbers, gold, skills[number]) for _ in range(n_samples)]
    no_gold = hostile and number == 7
    if hostile and number < len(HOSTILE):
      drawn[0] = (HOSTILE[number], HOSTILE[number][:60], 'wrong', 'eos')
      drawn[1] = ('', None, 'unparseable_answer', 'eos')
      question += ' ' + HOSTILE[number]
    if hostile and number == 6:
      question = '\n'.join(f'Example {i}: {problem(rng)[0]}' for i in range(8)) + '\n' + question
      drawn[2] = (drawn[2][0], drawn[2][1], 'timeout', 'stop')
    for index, (text, answer, verdict, finish) in enumerate(drawn):
      length = len(text) // 3 + 1
      logprobs = [-rng.expovariate(6) for _ in range(length)]
      samples.append({
          'prompt_id': prompt_id, 'sample_index': index, 'prompt': _prompt(question),
          'response': text, 'prompt_ids': [1, 2, 3], 'response_ids': [7] * length,
          'logprobs': logprobs, 'finish_reason': finish, 'temperature': 0.8, 'top_p': 0.95,
          'iteration': iteration, 'source_model': f'{iteration:064x}',
      })  # fmt: skip
      scores.append({
          'prompt_id': prompt_id, 'sample_index': index, 'answer': answer,
          'gold': None if no_gold else str(gold),
          'verdict': 'unparseable_gold' if no_gold else verdict,
          'votes': 0 if answer is None else sum(other[1] == answer for other in drawn),
      })  # fmt: skip
    if no_gold:
      continue
    right = [i for i, d in enumerate(drawn) if d[2] == 'correct']
    wrong = [i for i, d in enumerate(drawn) if d[2] != 'correct']
    for pair, rejected in enumerate(wrong[:4] if right else wrong[:1]):
      chosen = right[pair % len(right)] if right else None
      lengths = [40 if chosen is None else len(drawn[chosen][0]) // 3 + 1,
                 len(drawn[rejected][0]) // 3 + 1]  # fmt: skip
      pairs.append({
          'prompt_id': prompt_id, 'pair_index': pair, 'chosen_index': chosen,
          'rejected_index': rejected, 'prompt_ids': [1, 2, 3], 'chosen_ids': [7] * lengths[0],
          'rejected_ids': [7] * lengths[1], 'weight': 1.0 if pair < 3 else 0.5,
          'chosen_why': 'no sample is correct, so the gold solution stands in' if chosen is None
          else 'correct answer, drawn with the highest mean log-prob',
          'rejected_why': f'answer {drawn[rejected][1]} is wrong', 'method': 'irpo',
          'iteration': iteration,
      })  # fmt: skip
      reference.append({
          'chosen_logps': [-0.21] * lengths[0], 'rejected_logps': [-0.34] * lengths[1],
      })  # fmt: skip
  return samples, scores, pairs, reference


def training_records(rng: random.Random, iteration: int, steps: int) -> list[dict[str, Any]]:
  """Curves of a preference run; steps start again in each iteration."""
  records = []
  for step in range(steps):
    t, noise = step / steps, rng.gauss(0, 0.05)
    margin = 1.6 * (1 - math.exp(-3 * t)) + 3 * noise
    records.append({
        'iteration': iteration, 'stage': 'train', 'step': step,
        'loss': 0.69 * math.exp(-1.2 * t) + 0.35 + noise,
        'loss/preference': 0.69 * math.exp(-1.2 * t) + noise, 'loss/nll': 0.35 + noise / 4,
        'rewards/margins': margin, 'rewards/chosen': 0.35 * margin + noise,
        'rewards/rejected': -0.65 * margin + noise,
        'rewards/accuracies': min(1.0, max(0.0, 0.5 + 0.42 * t + noise)),
        'logps/chosen': -42 - 6 * t + 20 * noise, 'logps/rejected': -48 - 30 * t + 20 * noise,
        'length/chosen': 92.0, 'grad_norm': 1.4 + 6 * abs(noise), 'learning_rate': 5e-6,
        'perf/tokens_per_second': 1800.0,
    })  # fmt: skip
  return records


def write_run(
    run_dir: pathlib.Path,
    *,
    iterations: int = 3,
    prompts: int = 60,
    n_samples: int = 8,
    steps: int = 60,
    hostile: bool = True,
) -> pathlib.Path:
  """Writes the folder of a finished run and returns it."""
  rng = random.Random(0)
  run_dir.mkdir(parents=True)
  (run_dir / 'flags.flags').write_text(
      '--beta=0.1\n--iterations=3\n--learning_rate=5e-06\n--method=irpo\n'
      f'--model=/models/Llama-3.2-1B-Instruct\n--n_samples={n_samples}\n--nll_coefficient=1.0\n'
      '--seed=0\n--test_file=/data/gsm8k/test.jsonl\n--train_file=/data/gsm8k/train.jsonl\n'
  )
  versions = {'python': '3.11.9', 'jax': '0.10.2', 'jaxrl': '0.1.0', 'devices': '8 x TPU v5p'}
  (run_dir / 'versions.json').write_text(json.dumps(versions))
  train = [problem(rng) for _ in range(prompts)]
  test = [problem(rng) for _ in range(prompts)]
  ease = [rng.betavariate(0.9, 1.1) for _ in range(prompts)]
  records, entries = [], {}
  for number in range(iterations + 1):
    folder = run_dir / f'iteration_{number:02d}'
    folder.mkdir()
    skills = [min(0.97, e * (0.85 + 0.2 * number)) for e in ease]
    rows = {'evaluation': _evaluation(rng, test, skills, number, hostile)}
    if number:
      parts = _iteration(rng, train, skills, number, n_samples, hostile and number == 1)
      rows = dict(zip(('samples', 'scores', 'pairs', 'reference'), parts, strict=True)) | rows
      records += training_records(rng, number, steps)
    for name, found in rows.items():
      schema = getattr(tables, name.upper())
      tables.write_table(folder / f'{name}.parquet', found, schema)
      path = f'iteration_{number:02d}/{name}.parquet'
      seconds = {'samples': 182.0, 'scores': 4.1, 'pairs': 1.2, 'reference': 61.0}.get(name, 48.0)
      counts = {'rows': len(found)}
      if name == 'pairs':
        counts |= {'prompts_all_correct': 9, 'prompts_no_gold': 1, 'dropped_identical': 2}
      entry = manifest.Entry(
          (manifest.describe(run_dir / path, path),), seconds * (1 + 0.1 * number), counts
      )
      entries[f'iteration_{number:02d}/{name}'] = entry
      if name == 'reference':
        entries[f'iteration_{number:02d}/train'] = manifest.Entry((), 403.0, {'steps': steps})
    greedy = [row for row in rows['evaluation'] if row['kind'] == 'greedy']
    rate = sum(row['verdict'] == 'correct' for row in greedy) / len(greedy)
    records.append({
        'iteration': number, 'stage': 'evaluate', 'step': 0, 'greedy_accuracy': rate,
        'majority_accuracy': min(1.0, rate + 0.06), 'n': len(greedy),
    })  # fmt: skip
  (run_dir / 'metrics.jsonl').write_text(''.join(json.dumps(r) + '\n' for r in records))
  manifest.write_manifest(run_dir, entries)
  return run_dir
