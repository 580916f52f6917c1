"""Canonical forms: the specification's examples, and what must hold for any text."""

from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxrl.rewards.canonical import (
    MAX_DIGITS,
    canonical_math,
    canonical_number,
    is_rational,
    last_number,
    rational_string,
)

# Pieces that the normalisation treats specially, so that random strings of them reach every rule.
PIECES = [
    '\\frac', '\\dfrac', '\\sqrt', '\\text{', '\\text{ ', '\\left', '\\right', '\\le', 'ft', '\\!',
    '\\$', '$', '\\%', '%', '^\\circ', '^{\\circ}', '\\\\', '\\', '{', '}', '{,}', ',', '.', '=',
    '<', '(', ')', '[', ']', ' ', '\n', '-', '+', '/', '0', '1', '12', '345', '1,234', 'x', 'k',
]
latex_like = st.lists(st.sampled_from(PIECES), max_size=12).map(''.join)


@pytest.mark.parametrize('segment, expected', [
    ('1,234', '1234'),
    ('$5.50', '11/2'),
    ('3.0', '3'),
    ('6/4', '3/2'),
    ('12 + 6 = 18 dollars', '18'),
    ('72 clips.', '72'),
    ('50%', '50'),
    ('\u22127', '-7'),
    ('-.5', '-1/2'),
    ('+4', '4'),
    ('€1{,}000', '1000'),
    ('1\\,000\\!000', '1000000'),
    ('-0', '0'),
    ('4/0', None),
    ('no number', None),
    ('18 =', None),
    ('', None),
    ('٣', None),   # only ASCII digits count
    ('9' * MAX_DIGITS, '9' * MAX_DIGITS),
    ('9' * (MAX_DIGITS + 1), None),
])
def test_number(segment, expected):
  assert canonical_number(segment) == expected


@pytest.mark.parametrize('text, expected', [
    ('16 - 3 = 13 eggs', '13'),
    ('pages 5-10', '10'),
    ('it fell to -10', '-10'),
    ('nothing', None),
])
def test_last_number_takes_a_minus_after_a_digit_for_an_operator(text, expected):
  assert last_number(text) == expected


@pytest.mark.parametrize('latex, expected', [
    (r'\frac12', '1/2'),
    ('0.5', '1/2'),
    (r'\dfrac{1}{2}', '1/2'),
    ('1/2', '1/2'),
    (r'-\frac{2}{4}', '-1/2'),
    (r'\frac{-2}{-4}', '1/2'),
    ('x=3', '3'),
    ('x = 3', '3'),
    ('xyz=3', 'xyz=3'),
    ('x<=3', 'x<=3'),
    ('a=b=3', 'a=b=3'),
    (r'12\text{ miles}', '12'),
    (r'\text{Monday}', 'Monday'),
    (r'\text{ Monday }', 'Monday'),
    (r'\text{A} or \text{B}', r'\text{A}or\text{B}'),
    ('1{,}000', '1000'),
    (r'\$4,\!000', '4000'),
    ('1,234,567', '1234567'),
    ('(1,234)', '(1,234)'),
    ('1,2,100,200', '1,2,100,200'),
    (r'\left(3,\frac{\pi}{2}\right)', r'(3,\frac{\pi}{2})'),
    (r'90^\circ', '90'),
    (r'90^{\circ}', '90'),
    (r'50\%', '50'),
    (r'2\sqrt3', r'2\sqrt{3}'),
    (r'\sqrt[3]{2}', r'\sqrt[3]{2}'),
    (r'\frac1{72}', '1/72'),
    (r'\frac{1}2', '1/2'),
    (r'\frac 59', '5/9'),
    (r'\frac\pi2', r'\frac{\pi}{2}'),
    (r'\frac{\sqrt2}2', r'\frac{\sqrt{2}}{2}'),
    ('.5', '1/2'),
    ('x+.5', 'x+.5'),
    ('{.5}', '{0.5}'),
    ('3.', '3'),
    (r'\frac{1}{0}', r'\frac{1}{0}'),
    (r'\leftarrow', r'\leftarrow'),
    ('', None),
    (' $ ', None),
])
def test_math(latex, expected):
  assert canonical_math(latex) == expected


@pytest.mark.parametrize('latex, expected', [
    (r'\frac{2}{4}', '2/4'), ('2/4', '2/4'), (r'-\frac{02}{4}', '-2/4'), ('0.5', '1/2'), ('6', '6'),
])
def test_strict_fractions_leaves_a_fraction_unreduced(latex, expected):
  assert canonical_math(latex, strict_fractions=True) == expected


@given(latex_like | st.text(), st.booleans())
def test_math_is_idempotent(latex, strict):
  once = canonical_math(latex, strict)
  if once is not None:
    assert canonical_math(once, strict) == once


@given(latex_like | st.text())
def test_number_is_idempotent(segment):
  once = canonical_number(segment)
  if once is not None:
    assert canonical_number(once) == once
    assert is_rational(once)


@given(st.fractions(max_denominator=10**6), st.integers(1, 1000))
def test_equal_rationals_have_one_form(value, factor):
  over, under = value.numerator * factor, value.denominator * factor
  expected = rational_string(value)
  assert canonical_number(f'{over}/{under}') == expected
  assert canonical_math(f'{over}/{under}') == expected
  assert canonical_math(f'\\dfrac{{{over}}}{{{under}}}') == expected


@given(st.integers(-10**9, 10**9), st.integers(0, 6))
def test_a_decimal_is_the_rational_it_writes(digits, places):
  value = Fraction(digits, 10**places)
  written = f'{"-" if digits < 0 else ""}{abs(digits) // 10**places:,}'
  if places:
    written += f'.{abs(digits) % 10**places:0{places}d}'
  assert canonical_number(written) == rational_string(value)
  assert canonical_math(written) == rational_string(value)


@given(st.fractions(), st.fractions())
@settings(max_examples=50)
def test_different_rationals_have_different_forms(left, right):
  assert (rational_string(left) == rational_string(right)) == (left == right)
