"""Model folders on gs://: their files on this machine, brought once and kept for the next start.

They lie where the system has temporary files (TMPDIR), under a name that changes when the folder in
the bucket does, and are shared by all processes of a user. Weights come when they are asked for.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from jaxrl import objects
from jaxrl.errors import InputError

PICKLE_SUFFIXES = ('.bin', '.pt', '.pth', '.ckpt', '.pkl')    # never loaded, and so not brought
_WEIGHTS = '.safetensors'
_urls: dict[Path, str] = {}        # of the copies this process has asked for


def local_copy(url: str | os.PathLike) -> Path:
  """A folder of this machine with what lies directly in a folder on gs://, but for weights.

  Raises:
    InputError: there is nothing at `url`, or the bucket cannot be read.
  """
  url = os.fspath(url).rstrip('/')
  found = _files_in(url)
  if not found:
    raise InputError(
        'this is not a model folder', where=url,
        expected='a Hugging Face folder with config.json and *.safetensors',
        found='nothing there', fix='Give the path of the folder that holds config.json')
  version = hashlib.sha256(json.dumps([url, sorted(found.items())]).encode()).hexdigest()[:16]
  folder = _base() / f'{url.rpartition("/")[2]}-{version}'
  _urls[folder] = url
  _bring(folder, [name for name in found if not name.endswith((_WEIGHTS, *PICKLE_SUFFIXES))])
  for name in found:
    if name.endswith(PICKLE_SUFFIXES):
      (folder / name).touch()      # who looks for weights says that they are of no use
  return folder


def fetch_weights(folder: Path) -> None:
  """Brings the weights of a `local_copy`; does nothing for other folders."""
  if folder in _urls:
    _bring(folder, [name for name in _files_in(_urls[folder]) if name.endswith(_WEIGHTS)])


def _files_in(url: str) -> dict[str, tuple[int, str]]:
  return {name: about for name, about in objects.stored(url).items() if name and '/' not in name}


def _base() -> Path:
  base = Path(tempfile.gettempdir()) / f'jaxrl-models-{os.getuid()}'
  base.mkdir(mode=0o700, exist_ok=True)
  if base.stat().st_uid != os.getuid():
    raise InputError('the folder for copies of models is not yours', where=base,
                     fix='Remove it, or set TMPDIR to a folder of your own')
  return base


def _bring(folder: Path, names: list[str]) -> None:
  with _one_process_at_a_time(folder):
    missing = [name for name in names if not (folder / name).exists()]
    objects.download(_urls[folder], folder, missing)


@contextlib.contextmanager
def _one_process_at_a_time(folder: Path) -> Iterator[None]:
  with open(folder.with_name(f'.{folder.name}.lock'), 'wb') as file:
    fcntl.flock(file, fcntl.LOCK_EX)
    yield
