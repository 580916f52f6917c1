"""One canonical string per answer, so that equal answers are equal strings.

The same string serves rewards and votes: comparing strings is transitive, instant and the same on
every machine, which symbolic equivalence is not. Everything here takes time linear in the text
and returns for any text whatever.
"""

from __future__ import annotations

import re
from fractions import Fraction

# Longer numbers are refused: converting digits to an integer takes quadratic time, and Python
# itself raises above 4300 digits. No answer of any benchmark comes near.
MAX_DIGITS = 1000

_UNSIGNED = r'(?:[0-9]++(?:\.[0-9]++)?|\.[0-9]++)'
_NUMBER = re.compile(rf'([-+]?)({_UNSIGNED})(?:[ \t]*+/[ \t]*+([0-9]++))?')
# Removed wholesale before a number is read: currency, percent, thousands marks, TeX thin spaces.
_NUMBER_NOISE = re.compile(r'\{,\}|\\[,!:;]|[$€£%,]')

_DECIMAL = re.compile(r'([-+]?)([0-9]++(?:\.[0-9]*+)?|\.[0-9]++)')
_FRACTION = re.compile(r'([-+]?)\\frac\{([-+]?)([0-9]++)\}\{([-+]?)([0-9]++)\}')
_SLASH = re.compile(r'([-+]?[0-9]++)/([-+]?[0-9]++)')
_THOUSANDS = re.compile(r'(?<![0-9.,])[0-9]{1,3}(?:,[0-9]{3})+(?![0-9,])')
_MATH_NOISE = re.compile(
    r'\n|\r|\\!|\\left(?![A-Za-z])|\\right(?![A-Za-z])|\^\\circ|\^\{\\circ\}|\\?\$'
)
_LATEX_PIECE = re.compile(r'\\.|[{}]', re.DOTALL)
_NEEDS_ARGUMENTS = re.compile(r'\\(frac|sqrt)')
_BARE_ARGUMENT = re.compile(r'\\[A-Za-z]++|[^\\{}\[]')
# Rounds of normalisation before a text is called hopeless; real answers settle in one or two.
_MAX_ROUNDS = 8


def rational_string(value: Fraction) -> str:
  """'3' for 3, '11/2' for 5.5; the canonical form of a number."""
  if value.denominator == 1:
    return str(value.numerator)
  return f'{value.numerator}/{value.denominator}'


def is_rational(canonical: str) -> bool:
  """True for the strings that `rational_string` makes."""
  return re.fullmatch(r'-?[0-9]++(?:/[0-9]++)?', canonical) is not None


def canonical_number(segment: str) -> str | None:
  """First number in `segment`, after the last '=' if there is one, as an exact rational.

  '$5.50' -> '11/2', '12 + 6 = 18 dollars' -> '18', '6/4' -> '3/2'; None where there is no number,
  where the denominator is 0, or where a number has more than `MAX_DIGITS` digits.
  """
  segment = clean_number(segment)
  match = _NUMBER.search(segment, segment.rfind('=') + 1)
  return None if match is None else _matched_number(match)


def last_number(text: str) -> str | None:
  """Last number anywhere in `text`; a sign right after a digit, letter or ')' is an operator."""
  text = clean_number(text)
  last = None
  for match in _NUMBER.finditer(text):
    last = match
  if last is None:
    return None
  before = text[last.start() - 1 : last.start()]
  return _matched_number(last, signed=not (before.isalnum() or before == ')'))


def count_numbers(segment: str) -> int:
  """How many numbers `canonical_number` had to choose from."""
  segment = clean_number(segment)
  return sum(1 for _ in _NUMBER.finditer(segment, segment.rfind('=') + 1))


def clean_number(segment: str) -> str:
  """`segment` without currency, percent and thousands marks, its minus signs in ASCII."""
  return _NUMBER_NOISE.sub('', segment).replace('\N{MINUS SIGN}', '-')


def _matched_number(match: re.Match[str], signed: bool = True) -> str | None:
  sign, number, denominator = match.groups()
  value = _rational(number, denominator or '1')
  if value is None:
    return None
  return rational_string(-value if signed and sign == '-' else value)


def _rational(number: str, denominator: str) -> Fraction | None:
  """Exact value of ASCII digits with at most one point, over digits; None if zero or too long."""
  if len(number) > MAX_DIGITS or len(denominator) > MAX_DIGITS or not int(denominator):
    return None
  whole, _, decimals = number.partition('.')
  return Fraction(int((whole + decimals) or '0'), 10 ** len(decimals) * int(denominator))


def canonical_math(latex: str, strict_fractions: bool = False) -> str | None:
  r"""Canonical string of a LaTeX answer; None when nothing is left of it.

  Numbers become rationals as in `canonical_number`: '\frac12', '0.5', '\dfrac{1}{2}' -> '1/2'.
  Anything else becomes a normalised string: '2\sqrt3' -> '2\sqrt{3}'. With `strict_fractions` an
  unreduced fraction stays as written: '\frac{2}{4}' -> '2/4'.

  The form is idempotent: normalising repeats until nothing changes, and a text that will not
  settle is returned as it came, stripped.
  """
  stripped = latex.strip()
  current = stripped
  for _ in range(_MAX_ROUNDS):
    following = _numeric_key(_normalise(current), strict_fractions)
    if following == current:
      return current or None
    current = following
  return stripped or None


def _normalise(latex: str) -> str:
  """One round of the MATH graders' normalisation; the order of the steps matters."""
  text = _unwrap_text(latex.strip())
  text = re.sub(r'\\{2,}', lambda _: '\\', text)
  text = _MATH_NOISE.sub('', text)
  text = text.replace(r'\tfrac', r'\frac').replace(r'\dfrac', r'\frac')
  text = text.partition(r'\text{ ')[0]   # a space after the brace: units, not a word answer
  text = text.replace(r'\%', '').replace('%', '')
  text = re.sub(r'(?<![^ {])\.(?=[0-9])', '0.', text)
  left, equals, right = text.partition('=')
  # 'x<=3' is no definition of x: what precedes a defining '=' does not end in a comparison sign.
  if equals and len(left.strip()) <= 2 and '=' not in right and left[-1:] not in ('<', '>', '!'):
    text = right
  text = _brace_bare_arguments(text).replace(' ', '')
  return _SLASH.sub(r'\\frac{\1}{\2}', text) if _SLASH.fullmatch(text) else text


def _unwrap_text(text: str) -> str:
  r"""'\text{Monday}' -> 'Monday', only where the braces enclose the whole rest of the string."""
  start, end = 0, len(text)
  close = _closing_braces(text) if text.startswith(r'\text{') else {}
  while text.startswith(r'\text{', start) and close.get(start + 5) == end - 1:
    start, end = start + 6, end - 1
    while start < end and text[start].isspace():
      start += 1
    while start < end and text[end - 1].isspace():
      end -= 1
  return text[start:end]


def _closing_braces(text: str) -> dict[int, int]:
  r"""Position of each unescaped '{' that is closed -> position of its '}'."""
  closing, open_positions = {}, []
  for match in _LATEX_PIECE.finditer(text):
    if match.group() == '{':
      open_positions.append(match.start())
    elif match.group() == '}' and open_positions:
      closing[open_positions.pop()] = match.start()
  return closing


def _brace_bare_arguments(text: str) -> str:
  r"""'\frac1{72}' -> '\frac{1}{72}', '\sqrt3' -> '\sqrt{3}'; '\sqrt[3]{2}' stays."""
  commands = list(_NEEDS_ARGUMENTS.finditer(text))
  if not commands:
    return text
  closing = _closing_braces(text)
  pieces, done = [], 0
  for command in commands:
    position = command.end()
    for _ in range(2 if command.group(1) == 'frac' else 1):
      while text[position : position + 1].isspace():
        position += 1
      if position in closing:
        position = closing[position] + 1
        continue
      bare = _BARE_ARGUMENT.match(text, position)
      # A command that takes arguments itself cannot be an argument without braces.
      if bare is None or bare.group().startswith((r'\frac', r'\sqrt')):
        break
      pieces.append((bare.start(), bare.end()))
      position = bare.end()
  braced = []
  for start, end in sorted(set(pieces)):   # an argument can lie inside another command's braces
    braced.append(f'{text[done:start]}{{{text[start:end]}}}')
    done = end
  return ''.join(braced) + text[done:]


def _numeric_key(text: str, strict_fractions: bool) -> str:
  text = text.replace('{,}', ',')
  if not text.startswith(('(', '[')):
    text = _THOUSANDS.sub(lambda match: match.group().replace(',', ''), text)
  if decimal := _DECIMAL.fullmatch(text):
    sign, number = decimal.groups()
    value = _rational(number, '1')
    return text if value is None else rational_string(-value if sign == '-' else value)
  if fraction := _FRACTION.fullmatch(text):
    *signs, over, under = (fraction.group(i) for i in (1, 2, 4, 3, 5))
    value = _rational(over, under)
    if value is None:
      return text
    minus = '-' if signs.count('-') % 2 else ''
    if strict_fractions:
      return f'{minus}{int(over)}/{int(under)}'
    return rational_string(-value if minus else value)
  return text
