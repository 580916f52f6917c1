"""Eight CPU devices and no implicit rank promotion, in every test."""

import os

os.environ['JAX_PLATFORMS'] = 'cpu'
_flags = os.environ.get('XLA_FLAGS', '')
# Programs here are compiled once and run a few times: quick compiling saves most of the time.
for _flag in (
    '--xla_force_host_platform_device_count=8', '--xla_cpu_use_fusion_emitters=false',
    '--xla_backend_optimization_level=0', '--xla_llvm_disable_expensive_passes=true'):
  if _flag.split('=')[0] not in _flags:
    _flags = f'{_flags} {_flag}'.strip()
os.environ['XLA_FLAGS'] = _flags

import jax  # reads the environment when it is imported

jax.config.update('jax_numpy_rank_promotion', 'raise')
