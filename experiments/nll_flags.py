"""The weight of the NLL term, for the losses that add one to DPO."""

from __future__ import annotations

from absl import flags

flags.DEFINE_float('nll_alpha', 1.0, 'Weight of the NLL of chosen responses; 0 is plain DPO.',
                   lower_bound=0.0)
