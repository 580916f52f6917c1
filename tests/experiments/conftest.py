"""One finished run on the embedded world, which the tests of this folder share."""

import dataclasses
import pathlib

import pytest

from tests.experiments import irpo_runs


@dataclasses.dataclass(frozen=True)
class Finished:
  folder: pathlib.Path
  cache: pathlib.Path      # compiled programs of this run, for processes that follow
  ended: irpo_runs.Ended


@pytest.fixture(scope='session')
def finished(tmp_path_factory) -> Finished:
  base = tmp_path_factory.mktemp('irpo')
  folder, cache = base / 'whole', base / 'cache'
  ended = irpo_runs.run(f'--run_dir={folder}', *irpo_runs.WORLD, cache=cache)
  assert ended.status == 0, ended.stderr[-600:]
  return Finished(folder, cache, ended)
