"""Reads the Parquet tables of one iteration for the report page.

Figures (outcomes, lengths) are taken over every row. Text is kept for a bounded number of
prompts only, chosen evenly in file order, because one page cannot carry a million responses.
Tables that are not there yet are simply absent from the result; damage is put into `notes`.
"""

from __future__ import annotations

import collections
import json
import math
import zlib
from collections.abc import Iterable
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from etils import epath

OUTCOMES = ('all_correct', 'mixed', 'all_wrong', 'no_answer', 'no_gold')
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
_DIGITS = 6  # significant digits kept of a float: more than a person reads off a page

Table = dict[str, list[Any]]


def finite(value: Any) -> float | int | None:
  """`value` as a short finite number, or None where it is missing, infinite or not a number."""
  if isinstance(value, bool) or not isinstance(value, (int, float)):
    return None
  if isinstance(value, int):
    return value
  return float(f'{value:.{_DIGITS}g}') if math.isfinite(value) else None


def read_table(
    path: epath.Path,
    notes: list[str],
    *,
    values: Iterable[str] = (),
    lengths: Iterable[str] = (),
    sums: Iterable[str] = (),
    digests: Iterable[str] = (),
    keep: set[str] | None = None,
) -> Table | None:
  """Columns of a Parquet file as Python lists, streamed so that memory follows what is kept.

  Args:
    path: the file; None is returned where it does not exist or cannot be read.
    notes: sentences for the reader of the page; unreadable files and columns are added here.
    values: columns taken as they are. Text that is not UTF-8 gets replacement characters.
    lengths: list columns, of which the number of elements is taken.
    sums: list columns, of which the sum in float64 is taken, under the name `NAME_sum`.
    digests: list columns of ids, of which a checksum is taken, under the name `NAME_digest`.
    keep: only rows whose `prompt_id` is in this set; None keeps all.
  """
  if not path.exists():
    return None
  where = f'{path.parent.name}/{path.name}'
  values, lengths, sums, digests = list(values), list(lengths), list(sums), list(digests)
  columns = values + lengths + sums + digests
  names = values + lengths + [f'{n}_sum' for n in sums] + [f'{n}_digest' for n in digests]
  table: Table = {name: [] for name in names}
  try:
    with path.open('rb') as stream:
      file = pq.ParquetFile(stream)
      present = set(file.schema_arrow.names)
      absent = [n for n in dict.fromkeys(columns) if n not in present]
      if absent:
        notes.append(f'{where} lacks the column{_s(absent)} {", ".join(absent)}.')
      wanted = [n for n in dict.fromkeys(columns) if n in present]
      if keep is not None and 'prompt_id' in present:
        wanted.append('prompt_id')
      ids = None if keep is None else pa.array(sorted(keep), pa.string())
      for batch in file.iter_batches(batch_size=2048, columns=list(dict.fromkeys(wanted))):
        if ids is not None and 'prompt_id' in present:
          batch = batch.filter(pc.is_in(batch.column('prompt_id').cast(pa.string()), ids))
        none = [None] * batch.num_rows
        for name in values:
          table[name] += _values(batch.column(name)) if name in present else none
        for name in lengths:
          found = name in present
          table[name] += pc.list_value_length(batch.column(name)).to_pylist() if found else none
        for name in sums:
          table[f'{name}_sum'] += _sums(batch.column(name)) if name in present else none
        for name in digests:
          table[f'{name}_digest'] += _digests(batch.column(name)) if name in present else none
  except (pa.ArrowException, OSError) as error:
    notes.append(f'{where} could not be read ({type(error).__name__}); it is left out.')
    return None
  return table


def _s(items: list[Any]) -> str:
  return '' if len(items) == 1 else 's'


def _values(column: pa.Array) -> list[Any]:
  if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
    raw = column.cast(pa.large_binary()).to_pylist()  # Parquet does not promise valid UTF-8
    return [None if v is None else v.decode('utf-8', 'replace') for v in raw]
  return column.to_pylist()


def _sums(column: pa.Array) -> list[float | None]:
  """Sum of each list in float64; None for a null list."""
  rows = pc.list_parent_indices(column).to_numpy(zero_copy_only=False)
  flat = pc.list_flatten(column).to_numpy(zero_copy_only=False)
  totals = np.bincount(rows, weights=flat.astype(np.float64), minlength=len(column))
  known = column.is_valid().to_pylist()
  return [float(t) if valid else None for t, valid in zip(totals, known, strict=True)]


def _digests(column: pa.Array) -> list[int | None]:
  """Checksum of the ids of each list; None for a null list."""
  flat = pc.list_flatten(column).to_numpy(zero_copy_only=False).astype(np.int64)
  found: list[int | None] = []
  start = 0
  for length in pc.list_value_length(column).to_pylist():
    if length is None:
      found.append(None)
      continue
    found.append(zlib.crc32(flat[start : start + length].tobytes()))
    start += length
  return found


def outcome(verdicts: list[str | None]) -> str | None:
  """One word for the samples of a prompt, of `OUTCOMES`; None when none of them is scored.

  `no_gold`: the gold answer cannot be read, so nothing is right or wrong. `no_answer`: no sample
  has an answer that could be checked. `mixed`: at least one is correct and at least one is not.
  """
  verdicts = [v for v in verdicts if v is not None]
  if not verdicts:
    return None
  if 'unparseable_gold' in verdicts:
    return 'no_gold'
  if not any(v in ('correct', 'wrong') for v in verdicts):
    return 'no_answer'
  correct = sum(v == 'correct' for v in verdicts)
  if correct == len(verdicts):
    return 'all_correct'
  return 'mixed' if correct else 'all_wrong'


def tags(verdicts: list[str | None], finish: list[str | None], has_pairs: bool) -> list[str]:
  """The filters of the browser that a prompt belongs to."""
  found = [outcome(verdicts)]
  if 'length' in finish:
    found.append('truncated')
  if has_pairs:
    found.append('pairs')
  if any(v in ('unparseable_answer', 'unparseable_gold') for v in verdicts):
    found.append('unparseable')
  if 'timeout' in verdicts:
    found.append('timeout')
  return [tag for tag in found if tag]


def quantiles(lengths: list[int | None]) -> dict[str, Any] | None:
  """`QUANTILES` of the lengths in tokens, with their count, mean and maximum."""
  known = [n for n in lengths if n is not None]
  if not known:
    return None
  return {
      'n': len(known),
      'mean': finite(float(np.mean(known))),
      'max': max(known),
      'quantiles': [finite(float(q)) for q in np.quantile(known, QUANTILES)],
  }


def choose_evenly(ids: list[str], count: int) -> list[str]:
  """`count` of the ids, spread evenly over their order; all of them when there are fewer."""
  count = min(count, len(ids))
  return [ids[i * len(ids) // count] for i in range(count)]


def rows_by_prompt(table: Table) -> dict[str, list[int]]:
  """prompt_id -> row numbers, in order of first appearance."""
  rows: dict[str, list[int]] = collections.defaultdict(list)
  for row, prompt_id in enumerate(table['prompt_id']):
    rows[prompt_id].append(row)
  return dict(rows)


def _fit(prompts: list[dict[str, Any]], max_bytes: int) -> list[dict[str, Any]]:
  """As many prompts, evenly chosen, as fit into `max_bytes` of JSON; at least one."""
  sizes = [len(json.dumps(p, ensure_ascii=False).encode('utf-8', 'replace')) for p in prompts]
  count = len(prompts)
  while count > 1:
    rows = [i * len(prompts) // count for i in range(count)]
    size = sum(sizes[i] for i in rows)
    if size <= max_bytes:
      return [prompts[i] for i in rows]
    count = max(1, min(count - 1, count * max_bytes // size))
  return prompts[:count]


def _choice(label, name, rows, row_tags, prompts, max_bytes) -> dict[str, Any]:
  """One entry of the browser's iteration selector: its prompts and how many there are in all."""
  shown = _fit(prompts, max_bytes)
  counts = collections.Counter(tag for found in row_tags.values() for tag in found)
  return {
      'id': name,
      'label': label,
      'total': len(rows),
      'shown': len(shown),
      'counts': dict(sorted(counts.items())),
      'prompts': shown,
  }


def _pairs(folder: epath.Path, notes: list[str]) -> Table | None:
  """pairs.parquet with the reference log-probs of the same row, where they are stored."""
  pairs = read_table(
      folder / 'pairs.parquet',
      notes,
      values=(
          'prompt_id', 'pair_index', 'chosen_index', 'rejected_index', 'weight',
          'chosen_why', 'rejected_why', 'method',
      ),
      lengths=('chosen_ids', 'rejected_ids'),
      digests=('chosen_ids', 'rejected_ids'),
  )  # fmt: skip
  if pairs is None:
    return None
  count = len(pairs['prompt_id'])
  empty: list[Any] = [None] * count
  pairs |= {'chosen_reference': empty, 'rejected_reference': empty}
  reference = read_table(
      folder / 'reference.parquet', notes, sums=('chosen_logps', 'rejected_logps')
  )
  if reference is None:
    return pairs
  if len(reference['chosen_logps_sum']) != count:
    notes.append(
        f'{folder.name}/reference.parquet has {len(reference["chosen_logps_sum"])} rows for the '
        f'{count} of pairs.parquet; its log-probs are left out.'
    )
    return pairs
  return pairs | {
      'chosen_reference': reference['chosen_logps_sum'],
      'rejected_reference': reference['rejected_logps_sum'],
  }


def _pair_record(
    pairs: Table, row: int, digests: dict[tuple[str, int], int | None]
) -> dict[str, Any]:
  """One pair; `digests` are those of this iteration's samples by (prompt_id, sample_index).

  A response of an earlier iteration has an index that another sample has here: it is under
  `SIDE_earlier`, not `SIDE`.
  """
  places: dict[str, int | None] = {}
  for side in ('chosen', 'rejected'):
    index, digest = pairs[f'{side}_index'][row], pairs[f'{side}_ids_digest'][row]
    here = digests.get((pairs['prompt_id'][row], index), digest)
    # Without ids on both sides there is nothing to tell by.
    is_here = None in (here, digest) or here == digest
    places |= {side: index if is_here else None, f'{side}_earlier': None if is_here else index}
  return places | {
      'pair': pairs['pair_index'][row],
      'weight': finite(pairs['weight'][row]),
      'chosen_why': pairs['chosen_why'][row],
      'rejected_why': pairs['rejected_why'][row],
      'chosen_length': pairs['chosen_ids'][row],
      'rejected_length': pairs['rejected_ids'][row],
      'chosen_reference': finite(pairs['chosen_reference'][row]),
      'rejected_reference': finite(pairs['rejected_reference'][row]),
  }


def read_samples(
    folder: epath.Path, iteration: int, notes: list[str], *, max_prompts: int, max_bytes: int
) -> dict[str, Any]:
  """Samples, scores and pairs of one iteration, joined on (prompt_id, sample_index).

  Returns a dict with any of: `choice` (prompts for the browser), `outcomes` (prompts per
  outcome), `lengths` (group name -> `quantiles`), `method`, `n_samples`, `n_pairs`.
  """
  result: dict[str, Any] = {'lengths': {}}
  pairs = _pairs(folder, notes)
  pair_rows: dict[str, list[int]] = {}
  if pairs is not None:
    pair_rows = rows_by_prompt(pairs)
    result['n_pairs'] = len(pairs['prompt_id'])
    result['method'] = next((m for m in pairs['method'] if m), None)
  samples = read_table(
      folder / 'samples.parquet',
      notes,
      values=('prompt_id', 'sample_index', 'finish_reason'),
      lengths=('response_ids',),
      digests=('response_ids',),
  )
  groups = {'all': samples and samples['response_ids']}
  groups |= {side: pairs and pairs[f'{side}_ids'] for side in ('chosen', 'rejected')}
  for name, lengths in groups.items():
    if lengths and (found := quantiles(lengths)):
      result['lengths'][name] = found
  if samples is None:
    return result

  scores = read_table(
      folder / 'scores.parquet',
      notes,
      values=('prompt_id', 'sample_index', 'gold', 'answer', 'verdict', 'votes'),
  )
  scored = {}
  if scores is not None:
    keys = zip(scores['prompt_id'], scores['sample_index'], strict=True)
    scored = {key: row for row, key in enumerate(keys)}
    keys = zip(samples['prompt_id'], samples['sample_index'], strict=True)
    unscored = sum(key not in scored for key in keys)
    if unscored:
      notes.append(f'{folder.name}: {unscored:,} samples have no row in scores.parquet.')

  def score(key: tuple[str, int], column: str) -> Any:
    return scores[column][scored[key]] if scores is not None and key in scored else None

  rows = rows_by_prompt(samples)
  row_tags = {}
  for prompt_id, mine in rows.items():
    verdicts = [score((prompt_id, samples['sample_index'][r]), 'verdict') for r in mine]
    finish = [samples['finish_reason'][r] for r in mine]
    row_tags[prompt_id] = tags(verdicts, finish, prompt_id in pair_rows)
  if strangers := sum(prompt_id not in rows for prompt_id in pair_rows):
    notes.append(f'{folder.name}: {strangers:,} prompts of pairs.parquet have no samples.')
  result['n_samples'] = len(samples['prompt_id'])
  result['outcomes'] = _outcome_counts(row_tags)

  text = read_table(
      folder / 'samples.parquet',
      [],
      values=('prompt_id', 'sample_index', 'prompt', 'response', 'finish_reason'),
      lengths=('response_ids',),
      sums=('logprobs',),
      keep=set(choose_evenly(list(rows), max_prompts)) if rows else set(),
  ) or {'prompt_id': []}  # fmt: skip
  keys = zip(samples['prompt_id'], samples['sample_index'], strict=True)
  digests = dict(zip(keys, samples['response_ids_digest'], strict=True))
  prompts = []
  for prompt_id, mine in rows_by_prompt(text).items():
    records = []
    for r in mine:
      key = (prompt_id, text['sample_index'][r])
      total, length = text['logprobs_sum'][r], text['response_ids'][r]
      records.append({
          'index': text['sample_index'][r],
          'response': text['response'][r],
          'answer': score(key, 'answer'),
          'verdict': score(key, 'verdict'),
          'votes': score(key, 'votes'),
          'finish': text['finish_reason'][r],
          'length': length,
          'sum': finite(total),
          'mean': finite(total / length) if total is not None and length else None,
      })
    prompts.append({
        'id': prompt_id,
        'prompt': text['prompt'][mine[0]],
        'gold': score((prompt_id, text['sample_index'][mine[0]]), 'gold'),
        'tags': row_tags[prompt_id],
        'samples': records,
        'pairs': [_pair_record(pairs or {}, r, digests) for r in pair_rows.get(prompt_id, ())],
    })
  label = f'Iteration {iteration}: samples'
  name = f'samples-{iteration}'
  result['choice'] = _choice(label, name, rows, row_tags, prompts, max_bytes)
  return result


def _outcome_counts(row_tags: dict[str, list[str]]) -> dict[str, int] | None:
  counts = collections.Counter(t for found in row_tags.values() for t in found)
  known = {name: counts[name] for name in OUTCOMES}
  return known if any(known.values()) else None


def read_evaluation(
    folder: epath.Path, iteration: int, notes: list[str], *, max_prompts: int, max_bytes: int
) -> dict[str, Any]:
  """Evaluation rows of one iteration.

  Returns a dict with `choice` (prompts for the browser), `greedy` and `votes`: prompt_id -> the
  (verdict, answer) of its greedy row, and the list of those of its vote rows. Empty where there
  is no evaluation yet.
  """
  path = folder / 'evaluation.parquet'
  table = read_table(
      path,
      notes,
      values=('prompt_id', 'kind', 'sample_index', 'answer', 'verdict', 'finish_reason'),
  )
  if table is None:
    return {}
  rows = rows_by_prompt(table)
  greedy: dict[str, tuple[str | None, str | None]] = {}
  votes: dict[str, list[tuple[str | None, str | None]]] = collections.defaultdict(list)
  row_tags = {}
  for prompt_id, mine in rows.items():
    row_tags[prompt_id] = tags(
        [table['verdict'][r] for r in mine], [table['finish_reason'][r] for r in mine], False
    )
    for r in mine:
      found = (table['verdict'][r], table['answer'][r])
      if table['kind'][r] == 'greedy':
        greedy[prompt_id] = found
      else:
        votes[prompt_id].append(found)

  text = read_table(
      path,
      [],
      values=(
          'prompt_id', 'kind', 'sample_index', 'prompt', 'response', 'gold', 'answer', 'verdict',
          'finish_reason', 'length',
      ),
      keep=set(choose_evenly(list(rows), max_prompts)) if rows else set(),
  ) or {'prompt_id': []}  # fmt: skip
  prompts = []
  for prompt_id, mine in rows_by_prompt(text).items():
    counted = collections.Counter(
        text['answer'][r] for r in mine if text['kind'][r] == 'vote' and text['answer'][r]
    )
    prompts.append({
        'id': prompt_id,
        'prompt': text['prompt'][mine[0]],
        'gold': text['gold'][mine[0]],
        'tags': row_tags[prompt_id],
        'pairs': [],
        'samples': [{
            'index': text['sample_index'][r],
            'kind': text['kind'][r],
            'response': text['response'][r],
            'answer': text['answer'][r],
            'verdict': text['verdict'][r],
            'votes': counted[text['answer'][r]] if text['kind'][r] == 'vote' else None,
            'finish': text['finish_reason'][r],
            'length': text['length'][r],
        } for r in mine],
    })  # fmt: skip
  label = f'Iteration {iteration}: evaluation'
  choice = _choice(label, f'evaluation-{iteration}', rows, row_tags, prompts, max_bytes)
  return {'choice': choice, 'greedy': greedy, 'votes': dict(votes)}
