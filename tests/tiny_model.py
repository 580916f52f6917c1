"""A decoder that a test compiles and runs in seconds, with a peaked distribution."""

import jax
import numpy as np

from jaxrl.models.config import ModelConfig
from jaxrl.models.params import decoder_specs, is_spec

CONFIG = ModelConfig(
    family='llama', vocab_size=50, d_model=32, n_layers=2, n_heads=4, n_kv=2, d_head=8, d_mlp=48,
    max_length=64)

# For programs that are compiled once and run a few times: a fifth of the time to compile.
QUICK = {
    'xla_backend_optimization_level': '0',
    'xla_llvm_disable_expensive_passes': True,
}
if jax.__version__.startswith('0.10.'):
  QUICK['xla_cpu_use_fusion_emitters'] = False      # later versions do not know it


def random_params(c: ModelConfig = CONFIG, seed: int = 0) -> dict:
  """Numpy parameters with large weights: every prompt has its own, far from uniform, next token."""
  rng = np.random.default_rng(seed)
  return jax.tree.map(
      lambda s: np.ones(s.shape, np.float32) if s.init == 'ones'
      else rng.normal(scale=0.3, size=s.shape).astype(np.float32),
      decoder_specs(c), is_leaf=is_spec)
