"""The output of a sampling command: whole or not, and which samples of a prompt it keeps.

While samples are drawn they go into a log (`sample_log`). With `keep='all'` the log is the output;
else the output is chosen from it at the end and it stays beside the output as NAME.all.jsonl.
NAME.done.json says that the output is whole, and what it is: counts, bytes, hash.
"""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from typing import Any

from etils import epath

from jaxrl.errors import InputError
from jaxrl.rewards.best_of import best_of, logprob_mean, majority
from jaxrl.rewards.checking import AnswerRule
from jaxrl.runs.durable import open_atomic, remove, write_file
from jaxrl.runs.sample_log import HEADER, check_header, read_header, read_log


@dataclasses.dataclass(frozen=True)
class Asked:
  """What an output has when it is whole."""

  output: epath.Path
  header: Mapping[str, Any]    # of the log
  prompts: int                 # with samples
  refused: int                 # prompts with an error in place of samples
  draws: int | None            # samples per prompt; None: one row per prompt, without samples
  keep: str                    # 'all', 'best' or 'majority'

  @property
  def log_path(self) -> epath.Path:
    return self.output if self.keep == 'all' else self.output.with_suffix('.all.jsonl')

  @property
  def done_path(self) -> epath.Path:
    return self.output.with_name(f'{self.output.name}.done.json')


def finished_before(asked: Asked) -> bool:
  """Whether an earlier command has made this very output.

  One with fewer draws of each prompt counts as begun: it goes on, and is not whole meanwhile.

  Raises:
    InputError: what is there is another output, has changed since, or is damaged.
  """
  if not asked.done_path.exists():
    if asked.keep != 'all' and asked.output.exists():    # made, but a kill came before its mark
      check_header(os.fspath(asked.output), read_header(asked.output), _kept_header(asked))
    return False
  where = os.fspath(asked.done_path)
  try:
    done = json.loads(asked.done_path.read_bytes())
    header, draws, keep, digest = (done[key] for key in (HEADER, 'draws', 'keep', 'sha256'))
  except (ValueError, TypeError, KeyError) as error:
    raise InputError('the file is damaged', where=where, expected='what a sampling command writes',
                     found=repr(error),
                     fix='Remove it, and the output is looked at again') from error
  check_header(os.fspath(asked.output), header, asked.header)
  if not asked.output.exists() or _hash(asked.output) != digest:
    raise InputError('the output has changed since it was finished', where=asked.output,
                     expected=f'the bytes that {asked.done_path.name} describes',
                     found='others' if asked.output.exists() else 'no such file',
                     fix=f'Restore it, or remove {asked.done_path.name} to go on from there')
  if (draws, keep) == (asked.draws, asked.keep):
    return True
  if keep != asked.keep or keep != 'all' or draws > asked.draws:
    raise InputError('the output was made with other flags', where=asked.output,
                     expected=f'--n={asked.draws} --keep={asked.keep}',
                     found=f'--n={draws} --keep={keep}', fix='Give another --output')
  remove(asked.done_path)
  return False


def keep_chosen(asked: Asked, rule: AnswerRule | None) -> None:
  """Writes the output: one row per prompt, chosen from the log, in the order the log ends them.

  'best' is the sample with the highest mean log-prob (`logprob_mean`); 'majority' one that gives
  the most frequent answer (`answer`, `votes`), of those the one with the highest mean log-prob.
  """
  chosen: dict[str, tuple[int, dict]] = {}
  for prompt_id, rows in _by_prompt(asked):
    scores = [logprob_mean(row['logprobs']) for row in rows]
    if asked.keep == 'best':
      place = best_of(range(len(rows)), scores.__getitem__)
      added: dict[str, Any] = {}
    else:
      assert rule is not None
      found = majority([row['response'] for row in rows], rule, labels=rows[0].get('labels'),
                       scores=scores)
      place, added = found.chosen, {'answer': found.answer, 'votes': found.votes}
    chosen[prompt_id] = rows[place]['sample_index'], {'logprob_mean': scores[place]} | added
  with open_atomic(asked.output) as file:
    file.write(json.dumps({HEADER: _kept_header(asked)}).encode() + b'\n')
    for row in read_log(asked.log_path):
      index, more = chosen.get(row['prompt_id'], (None, {}))
      if row['sample_index'] == index:       # None: the error of a prompt without samples
        file.write(json.dumps(row | more, allow_nan=False).encode() + b'\n')


def finish(asked: Asked) -> dict[str, int]:
  """Checks that all is there and says so in NAME.done.json; returns what the output has.

  Raises:
    InputError: samples are missing.
  """
  counts = collections.Counter({'prompts': asked.prompts, 'refused': asked.refused})
  reasons: collections.Counter[str] = collections.Counter()
  rows = 0
  for row in read_log(asked.output):
    rows += 1
    if row.get('finish_reason') is not None:
      counts['samples'] += 1
      counts['tokens'] += len(row['response_ids'])
      reasons[row['finish_reason']] += 1
  per_prompt = asked.draws if asked.draws is not None and asked.keep == 'all' else 1
  expected = asked.prompts * per_prompt + asked.refused
  if rows != expected:
    raise InputError('the output is not whole', where=asked.output, expected=f'{expected} rows',
                     found=rows, fix='Give the same command again')
  content = {
      HEADER: dict(asked.header), 'draws': asked.draws, 'keep': asked.keep, 'rows': rows, **counts,
      'finish_reasons': dict(sorted(reasons.items())),
      'bytes': os.path.getsize(asked.output), 'sha256': _hash(asked.output)}
  write_file(asked.done_path, json.dumps(content, indent=2).encode() + b'\n')
  return {'rows': rows, **{name: n for name, n in counts.items() if n}}


def _kept_header(asked: Asked) -> dict[str, Any]:
  return {**asked.header, 'draws': asked.draws, 'keep': asked.keep}


def _by_prompt(asked: Asked) -> Iterator[tuple[str, list[dict]]]:
  """All samples of each prompt in the order of their draws; a prompt is given as it is complete."""
  waiting: dict[str, list[dict]] = collections.defaultdict(list)
  for row in read_log(asked.log_path):
    if row['sample_index'] is None:
      continue
    rows = waiting[row['prompt_id']]
    rows.append({key: row[key] for key in ('sample_index', 'response', 'logprobs', 'labels')
                 if key in row})
    if len(rows) == asked.draws:
      yield row['prompt_id'], sorted(
          waiting.pop(row['prompt_id']), key=lambda each: each['sample_index'])


def _hash(path: epath.Path) -> str:
  with open(path, 'rb') as file:
    return hashlib.file_digest(file, 'sha256').hexdigest()
