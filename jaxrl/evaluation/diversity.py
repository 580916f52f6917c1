"""How different the responses to one question are (Qin et al. 2025, DIVE, section 4 and after).

Every metric grows with diversity. `by_side` averages them over questions, apart for right
(`positive`) and wrong (`negative`) responses.
"""

from __future__ import annotations

import collections
import re
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from jaxrl.rewards.checking import Verdict

ORDERS = (1, 2, 3, 4, 5)      # lengths of the n-grams
ANNOTATION = re.compile(r'<<(.*?)>>')                                    # GSM8K: <<48/2=24>>
EQUATION = re.compile(r'-?\d[\d.]*(?:\s*[-+*/]\s*\d[\d.]*)+\s*=\s*-?\d+(?:\.\d+)?')


def words(text: str) -> list[str]:
  """The tokens that n-grams are made of: lower-cased, split at white space."""
  return text.lower().split()


def ngram_counts(texts: Sequence[str]) -> list[tuple[int, int]]:
  """Per order 1..5 (different n-grams of the set, all of them); none crosses from text to text."""
  split = [words(text) for text in texts]
  counts = []
  for n in ORDERS:
    grams = [tuple(w[i:i + n]) for w in split for i in range(len(w) - n + 1)]
    counts.append((len(set(grams)), len(grams)))
  return counts


def distinct_n(texts: Sequence[str]) -> float:
  """Mean over the orders that occur of different / all n-grams, in [0, 1]; 0 without any."""
  rates = [distinct / total for distinct, total in ngram_counts(texts) if total]
  return float(np.mean(rates)) if rates else 0.0


def ead(texts: Sequence[str], vocabulary: int) -> float:
  """distinct_n with all n-grams replaced by how many different ones chance would give.

  Per order distinct / (V (1 - ((V-1)/V)^total)), V = `vocabulary`: longer responses are not
  punished for repeating words (Liu et al. 2022).

  Raises:
    ValueError: `vocabulary` is below 1.
  """
  if vocabulary < 1:
    raise ValueError(f'vocabulary must be at least 1; found {vocabulary!r}')
  rates = [
      # expm1 and log1p: 1 - (1 - 1/V)^total would lose its digits for large V.
      distinct / (-vocabulary * np.expm1(total * np.log1p(-1 / vocabulary)))
      if vocabulary > 1 else float(distinct)
      for distinct, total in ngram_counts(texts) if total]
  return float(np.mean(rates)) if rates else 0.0


def embedding_diversity(embeddings: np.ndarray | Sequence[Sequence[float]]) -> float:
  """1 - mean cosine over unordered pairs of rows [n, d]; 0 for fewer than two.

  A zero vector has cosine 0 with everything.

  Raises:
    ValueError: rows of different width, or a number that is not finite.
  """
  rows = np.asarray(embeddings, np.float64)
  if not np.isfinite(rows).all():
    raise ValueError('embeddings must be finite')
  n = len(rows)
  if n < 2:
    return 0.0
  if rows.ndim != 2:
    raise ValueError(f'embeddings must be [n, d]; found shape {rows.shape}')
  norms = np.linalg.norm(rows, axis=1)[:, None]
  unit = rows / np.where(norms > 0, norms, 1.0)
  cosines = unit @ unit.T
  return float(1.0 - cosines[np.triu_indices(n, 1)].mean())


def equation_chain(text: str, pattern: re.Pattern[str] = ANNOTATION) -> tuple[str, ...]:
  """The equations of a response in order, white space removed; empty where it has none.

  `ANNOTATION` finds GSM8K's calculator marks; `EQUATION` finds equations written in plain text, as
  in the embedded world, whose responses have no marks.
  """
  return tuple(
      re.sub(r'\s', '', found[1] if pattern.groups else found[0])
      for found in pattern.finditer(text))


def distinct_equation_chains(
    texts: Sequence[str], pattern: re.Pattern[str] = ANNOTATION
) -> int:
  """How many different chains of equations; a response without equations is not counted."""
  return len({equation_chain(text, pattern) for text in texts} - {()})


def distinct_answers(answers: Sequence[str | None]) -> int:
  """How many different canonical answers; None is none."""
  return len(set(answers) - {None})


def difficulty_level(correct: int, total: int) -> int:
  """1 (at least 0.8 of the responses are right) to 5 (fewer than 0.2).

  Raises:
    ValueError: no response, or not 0 <= correct <= total.
  """
  if total < 1 or not 0 <= correct <= total:
    raise ValueError(f'need 0 <= correct <= total, total >= 1; found {correct} and {total}')
  return max(1, 5 - 5 * correct // total)       # whole numbers: 0.6 is not rounded


def levels(rows: Sequence[Mapping]) -> dict[str, int]:
  """Per question its difficulty level by the share of right responses among all its `rows`."""
  verdicts: dict[str, list[str]] = collections.defaultdict(list)
  for row in rows:
    verdicts[row['prompt_id']].append(row['verdict'])
  return {prompt_id: difficulty_level(each.count(Verdict.CORRECT), len(each))
          for prompt_id, each in verdicts.items()}


def solved_share(rows: Sequence[Mapping]) -> float:
  """Share of questions with at least one right response, @50 with 50 each; 0 without rows."""
  solved: dict[str, bool] = {}
  for row in rows:
    solved[row['prompt_id']] = solved.get(row['prompt_id'], False) or (
        row['verdict'] == Verdict.CORRECT)
  return sum(solved.values()) / max(len(solved), 1)


def by_side(
    rows: Sequence[Mapping],
    embeddings: np.ndarray | None = None,       # [rows, d]
    *,
    pattern: re.Pattern[str] = ANNOTATION,
    vocabulary: int | None = None,
) -> dict[str, float]:
  """Metrics averaged over questions: `positive/NAME`, `negative/NAME` and `distinct_answers`.

  A question counts on a side where it has at least two such responses; `SIDE/questions` says how
  many do, and a side without any has no other number. `embedding` is there with `embeddings`, `ead`
  with `vocabulary`. `rows` have `prompt_id`, `response`, `answer` and `verdict`; responses that are
  neither right nor wrong (a timeout, gold that cannot be parsed) are left out.
  """
  metrics: dict[str, Callable[[list[int]], float]] = {
      'distinct_n': lambda ns: distinct_n([rows[n]['response'] for n in ns]),
      'equation_chains': lambda ns: distinct_equation_chains(
          [rows[n]['response'] for n in ns], pattern)}
  if embeddings is not None:
    if len(embeddings) != len(rows):
      raise ValueError(f'{len(embeddings)} embeddings for {len(rows)} responses')
    metrics['embedding'] = lambda ns: embedding_diversity(embeddings[ns])
  if vocabulary is not None:
    metrics['ead'] = lambda ns: ead([rows[n]['response'] for n in ns], vocabulary)
  found: dict[str, float] = {}
  everyone: dict[str, list[int]] = collections.defaultdict(list)
  for side, verdicts in SIDES.items():
    groups: dict[str, list[int]] = collections.defaultdict(list)
    for n, row in enumerate(rows):
      if row['verdict'] in verdicts:
        groups[row['prompt_id']].append(n)
        everyone[row['prompt_id']].append(n)
    counted = [group for group in groups.values() if len(group) > 1]
    found[f'{side}/questions'] = len(counted)
    if counted:
      found |= {f'{side}/{name}': float(np.mean([metric(group) for group in counted]))
                for name, metric in metrics.items()}
  several = [group for group in everyone.values() if len(group) > 1]
  if several:
    found['distinct_answers'] = float(np.mean(
        [distinct_answers([rows[n]['answer'] for n in group]) for group in several]))
  return found


SIDES = {
    'positive': (Verdict.CORRECT,),
    'negative': (Verdict.WRONG, Verdict.UNPARSEABLE_ANSWER)}
