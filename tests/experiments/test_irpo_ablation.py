"""Verdicts are computed from the figures; each can come out either way."""

import pytest

from experiments.irpo_ablation import verdicts


def _seed(base=0.45, gain=0.25, low=0.2, rise=0.1, fall=-2.0, effect=0.3):
  def variant(change, gain, low):
    return {'gain': gain, 'gain_low': low, 'gain_high': gain + 0.05,
            'shifts': [{'chosen/change': change}, {'chosen/change': change / 2}]}

  return {'seed_accuracy': base, 'with NLL': variant(rise, gain, low),
          'without NLL': variant(fall, gain - effect, low - effect),
          'nll_effect': {'value': effect, 'low': effect - 0.05, 'high': effect + 0.05}}


def _verdicts(*changes):
  seeds = [_seed(**({'rise': 0.1 + 0.01 * n, 'fall': -2.0 - 0.1 * n} | changes[n]))
           for n in range(len(changes))]
  return [v['verdict'] for v in verdicts(seeds).values()]


def test_all_hold():
  assert _verdicts({}, {}, {}) == ['holds'] * 5


@pytest.mark.parametrize(('change', 'claim'), [
    ({'base': 0.7}, 0), ({'base': 0.2}, 0), ({'gain': 0.14}, 1), ({'low': -0.01}, 1),
    ({'rise': -0.5}, 2), ({'fall': 4.0}, 3)])
def test_one_seed_can_break_a_claim(change, claim):
  found = _verdicts({}, change, {})
  assert found[claim] == 'does not hold'
  assert found.count('does not hold') == 1


def test_accuracy_without_nll_must_be_lower_beyond_chance():
  assert _verdicts({'effect': 0.3}, {'effect': -0.3}, {'effect': 0.01})[4] == 'does not hold'
