"""Flags of the commands that run an experiment over several seeds and print verdicts."""

from __future__ import annotations

from absl import flags

flags.DEFINE_list('seeds', ['0', '1', '2'], 'Seeds of the world, the models and the draws.')
flags.DEFINE_multi_string(
    'with_flag', [], 'A flag for every run, as --with_flag=--iterations=1; may be repeated.')
flags.DEFINE_multi_string(
    'with_world_flag', [], 'A flag for the runs that make a world, as '
    '--with_world_flag=--world_test=100; may be repeated.')
