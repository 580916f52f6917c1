"""The objects of a bucket, `gs://BUCKET/NAME`: put whole, got whole, listed, deleted; no more.

An object appears at once and whole, or not at all. There are no folders (a name may have '/' in
it), nothing is renamed or appended to, and nothing is locked; `create` alone is a decision between
two that ask for the same name. The file system of `fsspec` that `etils.epath` uses for such paths
does the work: it retries what may pass, so that an error here is one that lasts.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import importlib.util
import os
from collections.abc import Iterator
from typing import Any

import fsspec

from jaxrl.errors import InputError

PathLike = str | os.PathLike[str]
_SCHEME = 'gs://'
_AT_ONCE = 4                  # files that are transferred at one time
# Other processes and TensorStore write as well: what was listed once says nothing about now. Set
# before any file system is made, because that of epath has no argument for it.
fsspec.config.conf.setdefault('gcs', {})['use_listings_cache'] = False


def is_url(path: PathLike) -> bool:
  """Whether the path names objects, not files of this machine."""
  return '://' in os.fspath(path)


def check(url: PathLike) -> None:
  """To be called before another library is given the path.

  Raises:
    InputError: it is not gs://BUCKET/..., or the package for it is not installed.
  """
  _files(os.fspath(url))


def stored(url: PathLike) -> dict[str, tuple[int, str]]:
  """{name relative to `url`: (bytes, version)} of all objects under it; '' is `url` itself.

  A version differs from that of every other content the name has had.
  """
  with _naming(url) as (files, path):
    path = path.rstrip('/')
    try:
      found = files.find(path, detail=True)
    except FileNotFoundError as error:
      raise InputError('there is no such bucket', where=url,
                       fix='Check its name, or make it: gcloud storage buckets create') from error
  return {
      name[len(path):].removeprefix('/'): (about['size'], str(about.get('generation')))
      for name, about in found.items() if not name.endswith('/')}   # consoles make such markers


def read(url: PathLike) -> bytes:
  """The content of one object; FileNotFoundError where there is none."""
  with _naming(url) as (files, path):
    return files.cat_file(path)


def write(url: PathLike, content: bytes) -> None:
  """Puts one object in place of what has its name."""
  with _naming(url) as (files, path):
    files.pipe_file(path, content)


def create(url: PathLike, content: bytes) -> bool:
  """Puts one object unless its name is taken; of all who try at one time one gets True.

  False is also possible for the one whose object it is, where the first answer was lost.
  """
  with _naming(url) as (files, path):
    try:
      files.pipe_file(path, content, mode='create')
    except FileExistsError:
      return False
  return True


def upload(path: PathLike, url: PathLike) -> None:
  """Puts a file, or every file under a folder."""
  source, target = os.fspath(path), os.fspath(url)
  pairs = [(source, target)]
  if os.path.isdir(source):
    pairs = [
        (os.path.join(root, name),
         f'{target}/{os.path.relpath(os.path.join(root, name), source).replace(os.sep, "/")}')
        for root, _, names in os.walk(source) for name in names]

  def put(pair: tuple[str, str]) -> None:
    with _naming(pair[1]) as (files, name):
      files.put_file(pair[0], name)

  _for_all(put, pairs)


def download(url: PathLike, path: PathLike, names: list[str]) -> None:
  """Gets the objects `names` under `url` as files under the folder `path`, each whole or not."""
  source, target = os.fspath(url), os.fspath(path)

  def get(name: str) -> None:
    full = os.path.join(target, name) if name else target
    partial = f'{full}.getting'
    os.makedirs(os.path.dirname(full), exist_ok=True)
    with _naming(f'{source}/{name}' if name else source) as (files, path):
      files.get_file(path, partial)
    os.replace(partial, full)

  _for_all(get, names)


def delete(url: PathLike) -> None:
  """Deletes the object of this name and all under it; does nothing where there are none."""
  names = sorted(stored(url))
  if not names:
    return
  with _naming(url) as (files, path), contextlib.suppress(FileNotFoundError):
    files.rm([f'{path}/{name}' if name else path for name in names])


def _for_all(transfer, items: list) -> None:
  with concurrent.futures.ThreadPoolExecutor(_AT_ONCE) as pool:
    for done in [pool.submit(transfer, item) for item in items]:
      done.result()


@contextlib.contextmanager
def _naming(url: PathLike) -> Iterator[tuple[Any, str]]:
  """The file system and the path in it; its errors become an InputError that names `url`."""
  where = os.fspath(url)
  files = _files(where)
  try:
    yield files, where.removeprefix(_SCHEME)
  except (FileNotFoundError, FileExistsError, InputError):
    raise
  except Exception as error:    # of the client, of its HTTP library, or of its credentials
    if isinstance(error, OSError) and error.errno is not None and error.filename is not None:
      raise                     # of this machine's disk
    raise InputError(
        'the bucket refused this', where=where, found=f'{type(error).__name__}: {error}',
        fix='Check its name, your credentials (gcloud auth application-default login) and the '
            'network, and give the same command again') from error


def _files(where: str) -> Any:
  if not where.startswith(_SCHEME) or not where.removeprefix(_SCHEME).partition('/')[0]:
    raise InputError('this kind of path is not supported', where=where,
                     expected='a path of this machine, or gs://BUCKET/NAME')
  if importlib.util.find_spec('gcsfs') is None:    # fsspec would name several that would do
    raise InputError('paths of a bucket need a package that is not installed', where=where,
                     expected='gcsfs', fix="Install it: pip install 'jaxrl[gcs]'")
  return fsspec.filesystem('gcs', finalize_on_close=True)    # the instance that epath makes
