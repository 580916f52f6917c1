"""Where the answer is read: the specification's examples, any text, and a megabyte of it."""

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxrl.rewards.canonical import canonical_math
from jaxrl.rewards.extraction import (
    boxed_content,
    extract_choice,
    extract_json_answer,
    extract_math,
    extract_number,
    marked_math,
)


@pytest.mark.parametrize('text, marker, expected', [
    ('#### 1,234', '####', '1234'),
    ('#### $5.50', '####', '11/2'),
    ('#### 3.0', '####', '3'),
    ('#### 6/4', '####', '3/2'),
    ('#### 12 + 6 = 18 dollars', '####', '18'),
    ('####\n42', '####', '42'),
    ('####  \n \r\n 42\n43', '####', '42'),
    ('#### 18\nQ: more\n#### 20', '####', '20'),
    ('no marker 7', '####', None),
    ('Final answer: 72 clips.', 'Final answer:', '72'),
    ('FINAL ANSWER: 50%', 'Final answer:', '50'),
    ('**Final answer:** 72', 'Final answer:', '72'),
    ('Final answer: seventy\n72', 'Final answer:', None),
    ('\u0130\u0130 Final answer: 7', 'Final answer:', '7'),   # a letter that grows in lower case
    ('Final answer:', 'Final answer:', None),
])
def test_number(text, marker, expected):
  assert extract_number(text, marker) == expected


def test_number_falls_back_only_when_asked_and_only_without_a_marker():
  assert extract_number('so 3 and then 7', '####', fallback='last_number') == '7'
  assert extract_number('so 3 #### none', '####', fallback='last_number') is None


@pytest.mark.parametrize('text, expected', [
    (r'\boxed{\frac12}', '1/2'),
    (r'\boxed{0.5}', '1/2'),
    (r'\boxed{\dfrac{1}{2}}', '1/2'),
    (r'\boxed{x=3}', '3'),
    (r'\boxed{12\text{ miles}}', '12'),
    (r'\boxed{1{,}000}', '1000'),
    (r'\boxed{(1,234)}', '(1,234)'),
    (r'\boxed{\left(3,\frac{\pi}{2}\right)}', r'(3,\frac{\pi}{2})'),
    (r'\boxed{90^\circ}', '90'),
    (r'\boxed{2\sqrt3}', r'2\sqrt{3}'),
    (r'\boxed{1} and then \boxed{2}', '2'),
    (r'\boxed{1} and then \fbox{2}', '2'),
    (r'\boxed{3', None),
    (r'\boxed{2} or \boxed{3', None),
    (r'\boxed{}', None),
    (r'$\boxed 7$ apples', '7'),
    ('\\boxed 7\nand on', '7'),
    (r'\boxed {8}', '8'),
    (r'\boxed{\boxed{9}}', '9'),
    (r'\boxed{\{1, 2\}}', r'\{1,2\}'),
    (r'\boxed{\left\{ 1 \right.}', r'\{1.'),
    ('no box 7', None),
    (r'\boxedtext{3}', None),
])
def test_math(text, expected):
  assert extract_math(text) == expected


def test_math_passes_strict_fractions_on():
  assert extract_math(r'\boxed{\frac{2}{4}}', strict_fractions=True) == '2/4'


@pytest.mark.parametrize('text, expected', [
    ('Final answer: $\\frac12$.', '1/2'),
    ('**Final answer:** \\(x = 3\\)', '3'),
    ('Final answer: \\boxed{3', None),
    ('The answer is 3', None),
])
def test_math_on_the_marker_line(text, expected):
  latex = marked_math(text, 'Final answer:')
  assert (latex and canonical_math(latex)) == expected


@pytest.mark.parametrize('text, labels, expected', [
    ('Final answer: (B) magnets', 'ABCD', 'B'),
    ('Final answer: (b)', 'ABCD', 'B'),
    ('Final answer: C. iron', 'ABCD', 'C'),
    ('Final answer: **D**', 'ABCD', 'D'),
    ('Final answer: (2)', '1234', 'B'),
    ('Final answer: B', '1234', 'B'),
    ('Final answer: 2', 'ABCD', 'B'),
    ('Final answer: (E)', 'ABCD', None),
    ('Final answer: (D)', 'ABC', None),
    ('Final answer: (E)', 'ABCDE', 'E'),
    ('Final answer: (E)', None, 'E'),
    ('Final answer: F', None, None),
    ('Final answer: A, the rock(s)', 'ABCD', 'A'),
    ('Final answer: a rock', 'ABCD', None),   # an article, not an option
    ('Final answer: rock', 'ABCD', None),
    ('Final answer: (A)\nFinal answer: (C)', 'ABCD', 'C'),
    ('Final answer:\n\n(A)', 'ABCD', 'A'),
    ('(A)', 'ABCD', None),
])
def test_choice(text, labels, expected):
  assert extract_choice(text, labels) == expected


@pytest.mark.parametrize('text, expected', [
    ('{"reasoning": "3 + 4", "answer": "$18"}', '$18'),
    ('```json\n{"reasoning": "a raw\nline break", "answer": "7"}\n```</s></s>', '7'),
    ('{"reasoning": "no comma"\n "answer": "3"}', '3'),
    ('{"answer": "10"}\nWait.\n{"answer": "11 bags"} So 12.', '11 bags'),
    ('{"reasoning": "I said \\"answer\\": \\"5\\"", "answer": 6}', '6'),
    ('{"answer": $2,050}', '$2,050'),
    ('{"answer": 2,05}', None),   # a number that ended at the comma would be another answer
    ('{"answer": 2050, "unit": "$"}', '2050'),
    ('{"answer": $2050\n}', '$2050'),
    ('{"answer": -3.5}', '-3.5'),
    ('{"answer": 12 * 3}', None),
    ('{"answer": null}', None),
    ('{"answer": {"x": 1}}', None),
    ('{"answer": ["1"]}', None),
    ('{"answer": "18', None),   # cut in the middle
    ('{"answer": ', None),
    ('the answer is 5', None),
    (r'{"answer": "\frac{1}{2}"}', r'\frac{1}{2}'),   # LaTeX, not a form feed
    (r'{"answer": "\\frac{1}{2}"}', r'\frac{1}{2}'),
    (r'{"answer": "say \"5\"\n"}', 'say "5" '),
    (r'{"answer": "25\u03c0"}', '25π'),
    (r'{"answer": "1.\nSo 2"}', '1. So 2'),
])
def test_json_answer(text, expected):
  assert extract_json_answer(text) == expected


EXTRACTORS = [
    lambda text: extract_number(text, '####'),
    lambda text: extract_number(text, 'Final answer:', 'last_number'),
    extract_math,
    lambda text: extract_math(text, strict_fractions=True),
    lambda text: marked_math(text, 'Final answer:'),
    lambda text: extract_choice(text, ['A', 'B', 'C']),
    extract_json_answer,
    boxed_content,
]
HOSTILE = [
    '\\boxed{', '{', '}', '\\frac', '\\frac{', '\\frac1', '\\sqrt{', '"answer": ', '"answer": "',
    '####\n', '1', '1,', '1/', '1,000,', '.', '-', '=', 'x=', ' ', '\n', '\\text{', '\\', '\\"',
    '$', '\\le', '(A', '\u2212', 'Final answer:', '\x00', '\ud800',
]


@given(st.lists(st.sampled_from(HOSTILE) | st.text(max_size=3), max_size=15).map(''.join))
def test_no_text_raises(text):
  for extract in EXTRACTORS:
    assert extract(text) is None or isinstance(extract(text), str)


@pytest.mark.parametrize('piece', ['\\frac1', '\\boxed{', '1,000,', '"answer": "', '\\text{', ' '])
def test_a_megabyte_takes_seconds(piece):
  """Quadratic code would take hours on these; the slowest of them takes about six seconds."""
  text = piece * (10**6 // len(piece))
  wrapped = f'Final answer: "answer": "{text}" \\boxed{{{text}}}'
  start = time.process_time()
  for extract in EXTRACTORS:
    extract(wrapped)
  assert time.process_time() - start < 60
