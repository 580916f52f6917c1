r"""Where a response says its final answer: a marker line, a box, an option letter, a JSON field.

Every function takes any text, returns None where there is no answer to read, never raises, and
takes time linear in the text.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from typing import Literal

from jaxrl.rewards.canonical import canonical_math, canonical_number, last_number

FINAL_ANSWER = 'Final answer:'

_BOX = re.compile(r'\\(?:boxed|fbox)(?![A-Za-z])\s*+')
_LATEX_PIECE = re.compile(r'\\.|[{}]', re.DOTALL)
_BOLD_OR_MATH_MARKS = re.compile(r'\*\*|\\[()\[\]]')
_CHOICE_IN_PARENTHESES = re.compile(r'\(([A-Ea-e1-5])\)')
_PUNCTUATION = '.,:;!?()[]{}<>"\'`*_$'
_ANSWER_FIELD = re.compile(r'"answer"\s*+:\s*+')
_JSON_STRING = re.compile(r'"([^"\\]*+(?:\\.[^"\\]*+)*+)"', re.DOTALL)
# Models also write a bare amount such as $2050, which JSON does not allow.
_BARE_NUMBER = re.compile(
    r'[-+]?[$€£]?[0-9]++(?:,[0-9]{3}(?![0-9]))*+(?:\.[0-9]++)?%?(?=\s*+(?:,\s*+["}]|}|$))'
)
_JSON_ESCAPE = re.compile(r'\\(?:(["\\/])|u([0-9a-fA-F]{4})|[nrt](?![a-z]))')


@functools.lru_cache(maxsize=64)
def _marker_pattern(marker: str) -> re.Pattern[str]:
  # ASCII case folding only: str.lower() changes the length of some other letters.
  return re.compile(re.escape(marker), re.IGNORECASE | re.ASCII)


def marked_segment(text: str, marker: str) -> str | None:
  """Rest of the line after the last `marker`, or the next line that is not blank."""
  end = None
  for match in _marker_pattern(marker).finditer(text):
    end = match.end()
  if end is None:
    return None
  return text[end:].lstrip().partition('\n')[0].partition('\r')[0].rstrip()


def extract_number(
    text: str, marker: str, fallback: Literal['last_number'] | None = None
) -> str | None:
  """Canonical number after the last `marker` (case-insensitive); GSM8K.

  Without the marker: None, or the last number of the text with fallback='last_number', which is
  for evaluation only; pairs built from it would reward answers that were never given.
  """
  segment = marked_segment(text, marker)
  if segment is not None:
    return canonical_number(segment)
  return last_number(text) if fallback == 'last_number' else None


def boxed_content(text: str) -> str | None:
  r"""Inside of the last \boxed{...} or \fbox{...}; for '\boxed X', what precedes the next '$'.

  None without a box, or when the last one is never closed (the response was cut).
  """
  start = None
  for match in _BOX.finditer(text):
    start = match.end()
  if start is None:
    return None
  if not text.startswith('{', start):
    return text[start:].partition('\n')[0].partition('$')[0]
  depth = 0
  for piece in _LATEX_PIECE.finditer(text, start):
    depth += {'{': 1, '}': -1}.get(piece.group(), 0)
    if depth == 0:
      return text[start + 1 : piece.start()] if piece.group() == '}' else None
  return None


def extract_math(text: str, strict_fractions: bool = False) -> str | None:
  """Canonical form of the last box; MATH."""
  content = boxed_content(text)
  return None if content is None else canonical_math(content, strict_fractions)


def marked_math(text: str, marker: str) -> str | None:
  """LaTeX on the marker line, for responses without a box that can be read."""
  segment = marked_segment(text, marker)
  if segment is None or _BOX.search(segment):
    return None
  return _BOLD_OR_MATH_MARKS.sub('', segment).strip().removesuffix('.')


def choice_letter(label: str) -> str:
  """'1'..'5' -> 'A'..'E', letters upper-cased: some items label their options with digits."""
  return 'ABCDE'[int(label) - 1] if label in ('1', '2', '3', '4', '5') else label.upper()


def extract_choice(
    text: str, labels: Sequence[str] | None, marker: str = FINAL_ANSWER
) -> str | None:
  """Option letter 'A'..'E' after the last `marker`; ARC.

  The first parenthesised option, as in '(B) magnets', else the first word if it is an option on
  its own, as in 'B.'. An option that is not among the item's `labels` is no answer; labels=None
  allows all five.
  """
  segment = marked_segment(text, marker)
  if segment is None:
    return None
  found = _CHOICE_IN_PARENTHESES.search(segment)
  token = found.group(1) if found else segment.partition(' ')[0].strip(_PUNCTUATION)
  # Outside parentheses a lower-case 'a' is an article, not an option.
  if re.fullmatch('[A-Ea-e1-5]' if found else '[A-E1-5]', token) is None:
    return None
  letter = choice_letter(token)
  if labels is not None and letter not in [choice_letter(label) for label in labels]:
    return None
  return letter


def extract_json_answer(text: str) -> str | None:
  r"""Raw text of the last "answer" field, for responses asked for as {"reasoning", "answer"}.

  The surrounding JSON may be broken in any way (raw line breaks, prose around it, missing commas,
  unescaped LaTeX): only the field itself must be whole, a closed string or a bare number.
  Backslashes that JSON does not need stay: '\frac' and '\text' are LaTeX, no form feed and no tab.
  """
  start = None
  for match in _ANSWER_FIELD.finditer(text):
    start = match.end()
  if start is None:
    return None
  if string := _JSON_STRING.match(text, start):
    return _JSON_ESCAPE.sub(_unescape, string.group(1))
  number = _BARE_NUMBER.match(text, start)
  return number.group() if number else None


def _unescape(match: re.Match[str]) -> str:
  character, code = match.groups()
  return character or (chr(int(code, 16)) if code else ' ')
