"""How far our verdicts agree with the correctness recorded in public sets of model responses.

  python -m experiments.check_answers --data_dir=DIR [--list_disagreements]

Prints one row per set: responses, agreement, counts of verdicts. docs/answer_checking.md quotes it.
"""

from __future__ import annotations

import gzip
import json
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from absl import app, flags

from jaxrl.errors import InputError
from jaxrl.rewards.canonical import canonical_math
from jaxrl.rewards.checking import AnswerRule, Check, Verdict, check_answers


@dataclass(frozen=True)
class Recorded:
  """One response with what its origin recorded about it; None where it recorded nothing."""

  id: str
  model: str
  response: str
  gold: str
  is_correct: bool | None
  answer: str | None


@dataclass(frozen=True)
class ResponseSet:
  path: str
  rule: AnswerRule
  expand: Callable[[dict], Iterator[Recorded]]   # one line of the file -> its responses


def _zero_eval_responses(row: dict) -> Iterator[Recorded]:
  for each in row['responses']:
    yield Recorded(
        row['id'], each['model'], each['response'], row['gold'],
        each.get('is_correct'), each['parsed_answer'],
    )


def _finetuned_solutions(row: dict) -> Iterator[Recorded]:
  for each in row['solutions']:
    yield Recorded(
        row['id'], each['model'], each['solution'], row['ground_truth'], each['is_correct'], None
    )


def _sampled_solutions(row: dict) -> Iterator[Recorded]:
  for i, (response, answer, score) in enumerate(
      zip(row['code'], row['pred'], row['score'], strict=True)
  ):
    yield Recorded(f'math-votes-{row["idx"]}', f'sample-{i}', response, row['gt'], score, answer)


SETS = {
    'gsm8k model_responses': ResponseSet(
        'gsm8k/model_responses.jsonl.gz',
        AnswerRule('number', marker=None, layout='json'),
        _zero_eval_responses,
    ),
    'gsm8k example_model_solutions': ResponseSet(
        'gsm8k/example_model_solutions.jsonl.gz',
        AnswerRule('number', marker='A:'),
        _finetuned_solutions,
    ),
    'math_votes': ResponseSet(
        'math_votes/math_cot_8_responses.jsonl',
        AnswerRule('math', symbolic=True, workers=2),
        _sampled_solutions,
    ),
    'math model_responses_level5': ResponseSet(
        'math/model_responses_level5.jsonl.gz',
        AnswerRule('math', marker=None, layout='json', symbolic=True, workers=2),
        _zero_eval_responses,
    ),
}


def read_recorded(data_dir: Path, responses: ResponseSet) -> list[Recorded]:
  """All responses of one set. Raises InputError where the file is absent or not as described."""
  path = data_dir / responses.path
  if not path.is_file():
    raise InputError(
        'the file is absent', where=path, expected='the folder of public records',
        found=f'{data_dir} without {responses.path}', fix='Point --data_dir at that folder',
    )
  opened = gzip.open if path.suffix == '.gz' else open
  recorded: list[Recorded] = []
  with opened(path, 'rt', encoding='utf-8') as lines:
    for number, line in enumerate(lines, start=1):
      try:
        recorded.extend(responses.expand(json.loads(line)))
      except (ValueError, KeyError, TypeError) as error:
        raise InputError(
            'the line cannot be read', where=f'{path}:{number}',
            expected='one JSON object with the fields that README.md of the data lists',
            found=f'{type(error).__name__}: {error}', fix='Restore the file from its origin',
        ) from error
  return recorded


def check_recorded(rule: AnswerRule, recorded: Sequence[Recorded]) -> list[Check]:
  return check_answers(rule, [r.response for r in recorded], [r.gold for r in recorded])


def disagreements(
    recorded: Sequence[Recorded], checks: Sequence[Check]
) -> list[tuple[Recorded, Check]]:
  """Responses whose verdict contradicts the recorded correctness; for a set without recorded
  correctness, those whose answer is not the recorded one."""
  differ = []
  for record, check in zip(recorded, checks, strict=True):
    if record.is_correct is None:
      parsed = None if record.answer is None else canonical_math(str(record.answer))
      agrees = check.answer == parsed
    else:
      agrees = (check.verdict is Verdict.CORRECT) == record.is_correct
    if not agrees:
      differ.append((record, check))
  return differ


def _table_row(name: str, checks: Sequence[Check], n_differ: int, seconds: float) -> str:
  counts = Counter(check.verdict for check in checks)
  agreement = 100 * (1 - n_differ / len(checks))
  cells = [len(checks), n_differ, f'{agreement:.2f}%', *(counts[v] for v in Verdict)]
  return f'| {name} | ' + ' | '.join(map(str, cells)) + f' | {seconds:.1f} |'


def main(argv: Sequence[str]) -> None:
  if len(argv) > 1:
    raise app.UsageError(f'unexpected arguments: {" ".join(argv[1:])}')
  try:
    loaded = {
        name: read_recorded(Path(flags.FLAGS.data_dir), each) for name, each in SETS.items()
    }
    print('| set | responses | disagree | agreement | '
          + ' | '.join(v.value for v in Verdict) + ' | seconds |')
    print('|---' * (5 + len(Verdict)) + '|')
    differing = {}
    for name, recorded in loaded.items():
      start = time.monotonic()
      checks = check_recorded(SETS[name].rule, recorded)
      differing[name] = disagreements(recorded, checks)
      print(_table_row(
          name, checks, len(differing[name]), time.monotonic() - start), flush=True)
  except InputError as error:
    print(f'check_answers: {error}', file=sys.stderr)
    sys.exit(2)
  if flags.FLAGS.list_disagreements:
    for name, pairs in differing.items():
      print(f'\n{name}')
      for record, check in pairs:
        print(json.dumps({
            'id': record.id, 'model': record.model, 'gold': record.gold[-60:],
            'recorded_correct': record.is_correct, 'recorded_answer': record.answer,
            'answer': check.answer, 'verdict': check.verdict.value, 'end': record.response[-160:],
        }, ensure_ascii=False))


if __name__ == '__main__':
  flags.DEFINE_string(
      'data_dir', None, 'Folder with gsm8k/, math/ and math_votes/ as README.md there describes.',
      required=True,
  )
  flags.DEFINE_boolean(
      'list_disagreements', False,
      'Also print every response whose verdict contradicts the record, one JSON object a line.',
  )
  app.run(main)
