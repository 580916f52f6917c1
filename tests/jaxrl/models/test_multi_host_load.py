"""Two processes over loopback: each reads what its devices need, and all agree on the values."""

import json
import math
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.load_checkpoint import write_checkpoint
from jaxrl.models.config import ModelConfig
from jaxrl.models.hugging_face import load_params
from jaxrl.models.hugging_face_tensors import tensor_shapes
from jaxrl.models.identity import identity

ROOT = Path(__file__).resolve().parents[3]
# A fused family.
C = ModelConfig(
    family='phi3', vocab_size=40, d_model=64, n_layers=2, n_heads=4, n_kv=2, d_head=8, d_mlp=48,
    max_length=64)

PROCESS = '''
import collections, contextlib, json, sys
import jax
jax.config.update('jax_cpu_collectives_implementation', 'gloo')
address, index, folder, out, sizes = sys.argv[1:]
index, sizes = int(index), json.loads(sizes)
jax.distributed.initialize(address, 2, index, initialization_timeout=60)
import numpy as np
from jaxrl.models import load, model_folder
from jaxrl.models.hugging_face import read_config, save_model
from jaxrl.models.identity import identity
from jaxrl.parallel.mesh import make_mesh
assert jax.process_count() == 2 and len(jax.devices()) == 4
load.PAGE_BYTES = 32
total = collections.Counter()

@contextlib.contextmanager
def spy(tensors):
  with model_folder.open_files(tensors) as read:
    def counted(name, offset, out):
      total[name] += len(out)
      read(name, offset, out)
    yield counted

load.open_files = spy
# The devices of one process are next to each other along the axis that is split.
params = load.load_params(folder, read_config(folder), mesh=make_mesh(**sizes))
found = {'identity': identity(params), 'bytes': total}
save_model(out, params, read_config(folder), tokenizer_from=None, like=folder)
with open(f'{out}.{index}.json', 'w') as f:            # stdout belongs to the collectives' log
  json.dump(found, f)
'''


@pytest.mark.parametrize('sizes', [{'fsdp': 4}, {'fsdp': 1, 'tensor': 4}])
def test_two_hosts(tmp_path, sizes):
  c = C if sizes.get('tensor') != 4 else ModelConfig(**(vars(C) | {'n_kv': 4}))
  folder, out = tmp_path / 'model', tmp_path / 'out'
  write_checkpoint(folder, c)
  with socket.socket() as s:
    s.bind(('127.0.0.1', 0))
    address = f'127.0.0.1:{s.getsockname()[1]}'
  environment = os.environ | {
      'XLA_FLAGS': '--xla_force_host_platform_device_count=2', 'JAX_PLATFORMS': 'cpu',
      'PYTHONPATH': str(ROOT)}
  processes = [
      subprocess.Popen(
          [sys.executable, '-c', PROCESS, address, str(n), str(folder), str(out),
           json.dumps(sizes)],
          env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
      for n in range(2)]
  try:
    said = [process.communicate(timeout=120)[0] for process in processes]
  finally:
    for process in processes:
      process.kill()
  assert [p.returncode for p in processes] == [0, 0], [text[-3000:] for text in said]
  found = [json.loads((tmp_path / f'out.{n}.json').read_text()) for n in range(2)]

  assert {x['identity'] for x in found} == {identity(load_params(folder, c))}
  assert (out / 'model.safetensors').read_bytes() == (folder / 'model.safetensors').read_bytes()
  split_by_fsdp = sizes['fsdp'] > 1
  for name, shape in tensor_shapes(c).items():
    whole = 2 * math.prod(shape)
    # Norms are split over fsdp alone; what is not split is read by both.
    is_split = split_by_fsdp or (len(shape) == 2 and 'embed' not in name and 'lm_head' not in name)
    for host in found:
      assert host['bytes'][name] == (whole // 2 if is_split else whole), name
