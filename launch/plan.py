"""Plans a run for devices that are not rented yet: does it fit, how fast can it be, laid out how?

  python -m launch.plan --topology=v5p:4x4x4 --flagfile=experiments/flags/irpo_llama2_70b.flags

The flags of the run itself follow. Its own programs for training, scoring, prefill and decoding are
compiled by the TPU's compiler on this host (libtpu on PYTHONPATH, no TPU); what the flags leave
open of --mesh, --micro_batches, --remat and --rollout_tensor is searched for. GPUs are planned by
arithmetic. docs/planning.md explains the tables. The status is 1 where nothing fits.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from absl import app, flags
from rich.console import Console

from experiments import common_flags
from jaxrl.errors import InputError
from jaxrl.models.params import count_params
from launch.planning.advice import advice
from launch.planning.chips import Topology, parse_topology
from launch.planning.layout import Layout
from launch.planning.plan import Program, rollout_programs, score_program, train_program
from launch.planning.report import show
from launch.planning.search import Estimate, estimates, rollout_tensors
from launch.planning.setting import Given, Setting, read_setting

FLAGS = flags.FLAGS
EXPERIMENTS = ('irpo', 'scpo', 'dive')

flags.DEFINE_string('topology', None, 'Chip and sides of a slice, as v5p:4x4x4, v5e:4x8, v6e:8x8; '
                    'of GPUs nodes x GPUs, as h100:4x8.')
flags.DEFINE_integer('num_slices', 1, 'Slices, joined by the network.', lower_bound=1)
flags.DEFINE_enum('experiment', 'irpo', EXPERIMENTS, 'Whose flags follow.')
flags.DEFINE_integer('prompt_tokens', None, 'Ids of every prompt; default: as many as the run '
                     'allows.', lower_bound=1)
flags.DEFINE_integer('response_tokens', None, 'Ids of every response; default: as many as the run '
                     'allows.', lower_bound=1)
flags.DEFINE_bool('compile', True, 'Compile the programs; else plan by arithmetic alone.')
flags.DEFINE_integer('most_compiled', 3, 'Layouts of training that are compiled at most, the best '
                     'by arithmetic first.', lower_bound=1)
flags.DEFINE_string('plan_cache', '~/.cache/jaxrl/plans', 'Folder that keeps what was compiled, so '
                    'that a plan goes on where it stopped; empty: none.')
flags.DEFINE_string('json', None, 'File for the plan as JSON.')


def make_plan(setting: Setting, given: Given, topology: Topology, console: Console) -> dict:
  """The best layout that fits, with every program's figures, as JSON.

  Raises:
    InputError: the run accepts no layout on these devices.
  """
  compiles = FLAGS.compile and topology.compiles
  store = Path(FLAGS.plan_cache).expanduser() if FLAGS.plan_cache else None
  found = estimates(setting, given, topology)
  memory = topology.chip.memory
  tried: list[tuple[Estimate, Program]] = []
  for estimate in found:
    if len(tried) == (FLAGS.most_compiled if compiles else 1) or not _worth_more(
        tried, estimate, topology):
      break
    if any(_alike(estimate.layout, e.layout) for e, _ in tried):
      continue
    # An estimate errs by a fifth; what was compiled with the same policy says how much.
    if estimate.bytes.total * _error(tried, estimate.layout.remat) > memory * (
        1.2 if compiles and estimate.layout.remat not in {e.layout.remat for e, _ in tried}
        else 1.0):
      continue
    if compiles:
      console.print(f'compiling train: {" ".join(estimate.layout.flags())}', highlight=False)
    tried.append((estimate, train_program(
        setting, topology, estimate, compiles=compiles, store=store)))
  fitting = [(e, p) for e, p in tried if p.fits(topology)]
  best = min(fitting or tried, key=lambda pair: (
      pair[1].seconds(topology) if fitting else pair[1].needed), default=None)
  programs: list[Program] = []
  problems: list[str] = []
  flags_found: list[str] = []
  if best is not None:
    estimate, train = best
    flags_found = estimate.layout.flags()
    if compiles:
      console.print('compiling score', highlight=False)
    programs = [train, score_program(
        setting, topology, estimate.layout, compiles=compiles, store=store)]
    rollout, tensor, why = _rollouts(setting, given, topology, estimate, compiles, store, console)
    programs += rollout
    flags_found += [f'--rollout_tensor={tensor}'] if tensor else []
    problems += [why] if why else []
    problems += [f'{p.name} needs {p.needed / 2**30:.1f} GiB of {memory / 2**30:.2f}'
                 for p in programs if not p.fits(topology)]
  else:
    least = min(found, key=lambda e: e.bytes.total)
    problems = [f'training needs {least.bytes.total / 2**30:.1f} GiB per device of '
                f'{memory / 2**30:.2f} by arithmetic, laid out as {" ".join(least.layout.flags())}']
  fits = not problems
  verdict = (f'FITS. Add to the run: {" ".join(flags_found)}' if fits
             else f'DOES NOT FIT: {"; ".join(problems)}.')
  return {
      'topology': {'name': str(topology), 'chips': topology.chips, 'memory': memory},
      'setting': {
          'model': FLAGS.model, 'parameters': count_params(setting.model),
          'experiment': FLAGS.experiment, 'batch_size': setting.batch_size,
          'prompt_tokens': setting.lengths.prompt, 'response_tokens': setting.lengths.response},
      'fits': fits, 'verdict': verdict, 'flags': flags_found,
      'advice': [] if fits else advice(setting, given, topology),
      'layouts': len(found),
      'candidates': [_candidate(e, tried, topology) for e in found[:8]
                     ] + [_candidate(e, tried, topology) for e, _ in tried if e not in found[:8]],
      'programs': [p.to_json(topology) for p in programs]}


def _worth_more(
    tried: Sequence[tuple[Estimate, Program]], next_one: Estimate, topology: Topology
) -> bool:
  """Whether a layout could be faster than the best compiled one that fits."""
  fitting = [p.seconds(topology) for _, p in tried if p.fits(topology)]
  return not fitting or max(next_one.compute, next_one.links) < min(fitting)


def _alike(one: Layout, other: Layout) -> bool:
  """Whether two split parameters, rows and products alike, but for rows that devices share."""
  return all(getattr(one, name) == getattr(other, name)
             for name in ('data', 'tensor', 'micro_batches', 'remat'))


def _error(tried: Sequence[tuple[Estimate, Program]], remat: str) -> float:
  """What estimates of layouts with this policy have to be multiplied by."""
  return max((p.needed / e.bytes.total for e, p in tried if e.layout.remat == remat), default=1.0)


def _rollouts(
    setting: Setting, given: Given, topology: Topology, estimate: Estimate, compiles: bool,
    store: Path | None, console: Console,
) -> tuple[list[Program], int | None, str | None]:
  """(programs, devices per copy, what is wrong): what decodes fastest by arithmetic."""
  options: dict[int, list[Program]] = {}
  error = 'no division of the devices suits the model'
  for tensor in rollout_tensors(setting.model, given, topology):
    try:
      options[tensor] = rollout_programs(
          setting, topology, estimate.layout, tensor, compiles=False, store=None)
    except InputError as refused:
      error = str(refused)
  if not options:
    return [], None, error

  def rate(tensor: int) -> float:
    decode = options[tensor][-1]
    return decode.tokens / decode.seconds(topology)

  best = max(options, key=rate)
  if not compiles:
    return options[best], best, None
  console.print(f'compiling prefill and decode: --rollout_tensor={best}', highlight=False)
  return rollout_programs(
      setting, topology, estimate.layout, best, compiles=True, store=store), best, None


def _candidate(
    estimate: Estimate, tried: Sequence[tuple[Estimate, Program]], topology: Topology
) -> dict:
  found = {'flags': estimate.layout.flags(), 'estimated_bytes': estimate.bytes.total,
           'estimated_seconds': estimate.seconds, 'said': ''}
  for other, program in tried:
    if other is estimate:
      said = 'fits' if program.fits(topology) else 'too large'
      return found | {'bytes': program.needed, 'said': said,
                      'seconds': None if program.refused else program.seconds(topology)}
  if estimate.bytes.total > topology.chip.memory:
    found['said'] = 'too large'
  return found


def parse(argv: list[str]) -> list[str]:
  """Reads the flags with the parser of the experiment that they are for."""
  name = next((text.partition('=')[2] for text in argv if text.startswith('--experiment=')), 'irpo')
  module = importlib.import_module(
      f'experiments.{name if name in EXPERIMENTS else EXPERIMENTS[0]}_flags')
  return module.parse(argv)


def main(argv: Sequence[str]) -> None:
  del argv
  if FLAGS.topology is None:
    raise InputError('there is nothing to plan for', where='--topology',
                     expected='a chip and the sides of a slice, as v5p:4x4x4', found='none')
  os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '2')      # the compiler's own log
  topology = parse_topology(FLAGS.topology, FLAGS.num_slices)
  setting, given = read_setting(
      importlib.import_module(f'experiments.{FLAGS.experiment}_flags'),
      prompt_tokens=FLAGS.prompt_tokens, response_tokens=FLAGS.response_tokens)
  start = time.perf_counter()
  plan = make_plan(setting, given, topology, Console(stderr=True))
  plan['seconds'] = time.perf_counter() - start
  if FLAGS.json:
    Path(FLAGS.json).write_text(json.dumps(plan, indent=2))
  show(plan, Console(width=None if sys.stdout.isatty() else 132))
  if not plan['fits']:
    sys.exit(1)


if __name__ == '__main__':
  app.run(common_flags.ends_with_sentence(main), flags_parser=common_flags.ends_with_sentence(
      lambda argv: common_flags.only_flags(parse(argv))))
