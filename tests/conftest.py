"""Eight CPU devices and no implicit rank promotion, in every test."""

import gc
import importlib.metadata
import os
import pathlib

os.environ['JAX_PLATFORMS'] = 'cpu'
_flags = os.environ.get('XLA_FLAGS', '')
# Programs here are compiled once and run a few times: quick compiling saves most of the time.
_wanted = ['--xla_force_host_platform_device_count=8', '--xla_backend_optimization_level=0',
           '--xla_llvm_disable_expensive_passes=true']
if importlib.metadata.version('jaxlib').startswith('0.10.'):
  _wanted.append('--xla_cpu_use_fusion_emitters=false')   # later versions abort on it
for _flag in _wanted:
  if _flag.split('=')[0] not in _flags:
    _flags = f'{_flags} {_flag}'.strip()
os.environ['XLA_FLAGS'] = _flags
# gcsfs reads this when it makes a file system, and would ask another service what a bucket is.
os.environ['GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT'] = 'false'

import jax  # reads the environment when it is imported
import pytest

from tests import bucket as stand_in

MOST_MAPS = 25_000

jax.config.update('jax_numpy_rank_promotion', 'raise')


@pytest.fixture(autouse=True, scope='module')
def _few_memory_maps():
  """Forgets compiled programs before their memory maps reach the system's limit (65,530 on Linux).

  Every program on a CPU holds several; past the limit the compiler aborts the process.
  """
  yield
  maps = pathlib.Path('/proc/self/maps')
  if maps.exists() and maps.read_bytes().count(b'\n') > MOST_MAPS:
    jax.clear_caches()
    gc.collect()


@pytest.fixture
def bucket(monkeypatch):
  """A stand-in for a bucket on gs://, for this process and those it starts."""
  with stand_in.serve() as (served, environment):
    for name, value in environment.items():
      monkeypatch.setenv(name, value)
    pytest.importorskip('gcsfs', reason='gcsfs is not installed: pip install jaxrl[gcs]')
    import fsspec
    monkeypatch.setitem(fsspec.config.conf.setdefault('gcs', {}), 'token', 'anon')
    # Those of this thread may have been made for another address.
    fsspec.get_filesystem_class('gcs').clear_instance_cache()
    yield served
