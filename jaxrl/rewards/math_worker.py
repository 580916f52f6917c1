"""Worker process: decides whether LaTeX answers are equivalent, with math-verify.

Run by path, never imported: `python -P math_worker.py MEMORY_BYTES`. One JSON line
`[gold, answer, seconds]` on standard input gives one JSON line, true or false, on standard output.
The first line written is "ready", or an object with the reason why the worker cannot start. The
parent keeps the wall clock and kills; this process limits its own memory and processor time.
"""

from __future__ import annotations

import json
import math
import os
import resource
import sys


def main() -> None:
  # Replies go to a private copy of standard output, since a library may print on the public one.
  replies = os.fdopen(os.dup(1), 'w')
  os.dup2(2, 1)

  def reply(message: object) -> None:
    replies.write(json.dumps(message) + '\n')
    replies.flush()

  try:
    from math_verify import parse, verify
    from math_verify.parser import LatexExtractionConfig
  except ImportError as error:
    reply({'error': f'{type(error).__name__}: {error}'})
    return
  _lower_limit(resource.RLIMIT_AS, int(sys.argv[1]))
  _lower_limit(resource.RLIMIT_CORE, 0)
  config = [LatexExtractionConfig(boxed_match_priority=0)]

  def parsed(latex: str) -> list:
    # No time limit of the library's own: it is a signal that C code and `except` blocks swallow.
    return parse(f'\\boxed{{{latex}}}', config, parsing_timeout=None)

  # The first comparison takes most of a second while sympy fills its tables; not on the clock.
  verify(parsed('1+x'), parsed('x+1'), timeout_seconds=None)
  reply('ready')
  for line in sys.stdin:
    gold, answer, seconds = json.loads(line)
    # The processor limit ends a worker whose parent was killed in the middle of a comparison.
    used = resource.getrusage(resource.RUSAGE_SELF)
    _lower_limit(resource.RLIMIT_CPU, math.ceil(used.ru_utime + used.ru_stime + seconds) + 2)
    reply(bool(verify(parsed(gold), parsed(answer), timeout_seconds=None)))


def _lower_limit(kind: int, value: int) -> None:
  """Sets the soft limit only, as far as the hard one allows."""
  hard = resource.getrlimit(kind)[1]
  resource.setrlimit(kind, (value if hard == resource.RLIM_INFINITY else min(value, hard), hard))


if __name__ == '__main__':
  main()
