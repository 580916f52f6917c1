"""The common beginning of prompts."""

import os

from hypothesis import given
from hypothesis import strategies as st

from jaxrl.sampling.header import common_header

ids = st.lists(st.integers(0, 1), max_size=6).map(tuple)


@given(st.lists(ids, max_size=5), ids, st.integers(0, 4))
def test_it_is_the_longest_that_leaves_every_prompt_an_id(rests, start, least):
  prompts = [start + rest for rest in rests]
  longest = os.path.commonprefix(prompts) if prompts else ()
  longest = tuple(longest)[:max(min(map(len, prompts), default=0) - 1, 0)]
  assert common_header(prompts, least=least) == (longest if len(longest) >= least else ())


def test_short_beginnings_are_no_header():
  assert common_header([(1,) * 64 + (2,), (1,) * 64 + (3,)]) == (1,) * 64
  assert common_header([(1,) * 63 + (2,), (1,) * 63 + (3,)]) == ()
