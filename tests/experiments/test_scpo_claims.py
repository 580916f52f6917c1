"""Verdicts follow from figures; nothing is run here."""

import pytest

from experiments import claim_runs, scpo_claims, scpo_flags


def seed(gain=0.2, to_irpo=-0.01, to_unweighted=0.02, correlation=0.6, rise=0.1):
  return {
      name: {'value': value, 'low': value - 0.03, 'high': value + 0.03}
      for name, value in (('gain', gain), ('to_irpo', to_irpo), ('to_unweighted', to_unweighted))
  } | {'votes': [{'correlation': correlation, 'top': 0.5},
                 {'correlation': correlation / 2, 'top': 0.5 + rise}]}


def said(*rows):
  return [v['verdict'] for v in scpo_claims.verdicts(rows).values()]


def test_all_hold():
  assert said(seed(), seed(gain=0.22, correlation=0.62, rise=0.11), seed()) == ['holds'] * 5
  assert said(seed()) == ['holds'] * 5   # one seed: its own interval


@pytest.mark.parametrize('place, change', [
    (0, {'gain': -0.1}), (1, {'to_irpo': -0.2}), (2, {'to_unweighted': -0.1}),
    (3, {'correlation': -0.2}), (4, {'rise': -0.1})])
def test_each_claim_can_fail(place, change):
  found = said(seed(**change), seed(**change))
  assert found.pop(place) == 'does not hold' and set(found) == {'holds'}


def test_seeds_that_differ_leave_it_undecided():
  assert said(seed(gain=0.4), seed(gain=-0.1))[0] == 'undecided'
  assert said(seed(to_irpo=-0.05))[1] == 'undecided'


def test_a_run_with_a_model_gets_no_flags_of_the_world():
  found = claim_runs.without_world(scpo_flags.WORLD_FLAGS)
  assert '--beta=0.1' in found and all(line.startswith('--') for line in found)
  assert not [line for line in found if line.startswith(('--world', '--seed'))]
