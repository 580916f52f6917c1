"""Eight CPU devices and no implicit rank promotion, in every test."""

import os

os.environ['JAX_PLATFORMS'] = 'cpu'
_flags = os.environ.get('XLA_FLAGS', '')
if 'xla_force_host_platform_device_count' not in _flags:
  os.environ['XLA_FLAGS'] = f'{_flags} --xla_force_host_platform_device_count=8'.strip()

import jax  # reads the environment when it is imported

jax.config.update('jax_numpy_rank_promotion', 'raise')
