"""Stop strings: where the text of a response first contains one, found on the host while it grows.

Text is matched, not ids: a stop string may begin in the middle of a token and end in the middle of
another, and a character may be spread over several tokens. A look decodes the new ids and the few
before them that a stop string could begin in, not the whole response.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

from jaxrl.errors import InputError

DecodeText = Callable[[Sequence[int]], str]

# What decoders write in place of bytes that are no whole character (yet).
REPLACEMENT = '\N{REPLACEMENT CHARACTER}'


def check_stop_strings(stops: Sequence[str]) -> None:
  """Raises InputError for a stop string that is empty, or that only damaged text contains."""
  for stop in stops:
    if not isinstance(stop, str) or not stop:
      raise InputError('a stop string is empty', where='--stop', expected='some text',
                       found=repr(stop))
    if REPLACEMENT in stop:
      raise InputError('a stop string holds the mark of damaged text', where='--stop',
                       expected='text without U+FFFD', found=repr(stop))


def first_stop(
    ids: Sequence[int], start: int, stops: Sequence[str], decode_text: DecodeText
) -> int | None:
  """The smallest n > start for which `decode_text(ids[:n])` contains one of `stops`, or None.

  Nothing is said of the first `start` ids: earlier looks have found no stop string in them.

  `decode_text` may write text that is not the texts of its ids one after another, as long as it
  differs in two ways only: white space at the start of a text may be left out, and bytes that make
  no whole character are U+FFFD, as is the whole run of single-byte ids around them in sentencepiece
  vocabularies. Every n that is returned has been checked on the whole text.

  Args:
    ids: response ids so far.
    start: how many of them earlier looks have covered.
    stops: as `check_stop_strings` takes them.
    decode_text: hashable; texts of single ids are remembered for it.
  """
  if not stops or start >= len(ids):
    return None

  def stopped(text: str) -> bool:
    return any(stop in text for stop in stops)

  begin = _window(ids, start, max(map(len, stops)) - 1, _text_of_one(decode_text))
  whole = decode_text(ids[begin:])
  if begin == 0 and (not start or not decode_text(ids[:start]).strip()):
    # White space that a template writes before responses is left out once it is all there, so
    # that only texts without anything else can lose a match as they grow.
    for n in range(start + 1, len(ids) + 1):
      text = decode_text(ids[:n])
      if stopped(text):
        return n
      if text.strip():
        break
  if REPLACEMENT not in whole and not stopped(whole):
    return None      # texts of fewer ids begin this one, or hold U+FFFD where they do not
  for n in range(start + 1, len(ids) + 1):
    if stopped(decode_text(ids[begin:n])) and (begin == 0 or stopped(decode_text(ids[:n]))):
      return n
  return None


def _window(ids: Sequence[int], start: int, before: int, text_of: Callable[[int], str]) -> int:
  """Where to begin decoding so that `before` characters in front of `start` are as they should be.

  The first id is one whose own text is whole characters, something but white space among them: cut
  there, the rest decodes to what it is in the whole text, or to more where the whole has U+FFFD.
  """
  found = 0
  for begin in range(start - 1, -1, -1):
    text = text_of(ids[begin])
    if REPLACEMENT in text:
      continue
    inner = text.strip()
    if inner and found + len(inner) >= before:
      return begin
    found += len(text)
  return 0


@functools.lru_cache(maxsize=4)
def _text_of_one(decode_text: DecodeText) -> Callable[[int], str]:
  return functools.cache(lambda i: decode_text([i]))
