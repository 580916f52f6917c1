"""Running `python -m experiments.irpo` as a user does, and what its folder must hold then."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import pathlib
import subprocess
import sys

from absl import flags
from absl.testing import flagsaver

ROOT = pathlib.Path(__file__).resolve().parents[2]
KILLED = pathlib.Path(__file__).parent / 'killed_irpo.py'
# A world so small that a run takes seconds. Problems of one operation, so that a seed model of 60
# steps already gets some answers right and some wrong.
WORLD = (
    '--world_sft=600', '--world_train=24', '--world_test=16', '--world_dev=8',
    '--world_min_steps=1', '--world_max_steps=1', '--seed_accuracy=0', '--seed_check_every=20',
    '--seed_first_check=60', '--seed_batch_size=32', '--seed_learning_rate=5e-3',
    '--max_prompt_length=24', '--max_new_tokens=20', '--length_buckets=44', '--iterations=1',
    '--samples_per_prompt=12', '--batch_size=8', '--warmup_steps=0', '--votes=2', '--slots=64',
    '--log_every=1', '--save_every=1')


@dataclasses.dataclass(frozen=True)
class Ended:
  """How a command ended and what it said."""

  status: int
  stdout: str
  stderr: str


def environment(cache: pathlib.Path | None) -> dict[str, str]:
  """Of a fresh process with one CPU device; `cache` keeps compiled programs between processes."""
  env = {k: v for k, v in os.environ.items() if not k.startswith(('JAX_', 'XLA_'))}
  env |= {'PYTHONPATH': str(ROOT), 'JAX_PLATFORMS': 'cpu', 'PYTHONUNBUFFERED': '1'}
  if cache is not None:
    env |= {
        'JAX_COMPILATION_CACHE_DIR': str(cache),
        'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0',
        'JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES': '-1'}
  return env


def command(*arguments: object, kill: tuple[str, str] | None = None) -> list[str]:
  """`python -m experiments.irpo ARGUMENTS`; `kill` says where it dies, see killed_irpo.py."""
  start = ['-m', 'experiments.irpo'] if kill is None else [str(KILLED), *kill]
  return [sys.executable, *start, *map(str, arguments)]


def run(
    *arguments: object, cache: pathlib.Path | None, kill: tuple[str, str] | None = None
) -> Ended:
  """Runs the command to its end in a process of its own."""
  done = subprocess.run(
      command(*arguments, kill=kill), cwd=ROOT, env=environment(cache), capture_output=True,
      text=True, check=False)
  return Ended(done.returncode, done.stdout, done.stderr)


def run_here(capsys, *arguments: object) -> Ended:
  """The same in this process, without what `absl.app` does once per process."""
  from experiments import common_flags, irpo, irpo_flags

  capsys.readouterr()
  status = 0
  with flagsaver.flagsaver(), contextlib.ExitStack() as stack:
    flags.FLAGS.unparse_flags()
    stack.callback(flags.FLAGS.mark_as_parsed)   # flagsaver reads values when it restores them
    try:
      common_flags.ends_with_sentence(lambda: irpo.main(common_flags.only_flags(
          irpo_flags.parse(['irpo', *map(str, arguments)]))))()
    except SystemExit as end:
      status = int(end.code or 0)
  return Ended(status, *capsys.readouterr())


def contents(folder: pathlib.Path) -> dict[str, object]:
  """Everything in a run folder that neither a kill nor the clock may change, by path."""
  found: dict[str, object] = {}
  for path in sorted(folder.rglob('*')):
    name = path.relative_to(folder).as_posix()
    if name == 'manifest.json':
      stages = json.loads(path.read_text())['stages']
      found[name] = {stage: entry | {'seconds': None} for stage, entry in stages.items()}
    elif name == 'metrics.jsonl':
      found[name] = [
          {k: v for k, v in json.loads(line).items() if not k.startswith('perf/')}
          for line in path.read_text().splitlines()]
    elif name in ('report.html', 'events'):   # hold the seconds; that they are there must not vary
      found[name] = True
    elif not name.startswith('events/') and name != 'lock':
      found[name] = path.read_bytes() if path.is_file() else None
  return found


def differences(a: dict[str, object], b: dict[str, object]) -> list[str]:
  """Paths that are in one alone or differ."""
  return [name for name in sorted(a | b) if a.get(name, 'absent') != b.get(name, 'absent')]
