"""GB/s of `load_params` beside reading the same file raw, and the host memory it takes.

  python -m benchmarks.load_checkpoint /tmp --gigabytes=2

writes a Llama-shaped bfloat16 checkpoint of random finite weights in a private folder there,
measures every row in its own process, and removes it. Every row finds the file in the page cache
as the one before left it, and is in bytes of the file per second.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import ml_dtypes
import numpy as np

READ_BYTES = 32 * 2**20
# The zeros are as many as the parameters: what memory costs that nothing has touched before.
ROWS = ('raw', 'load float32', 'zeros float32', 'load bfloat16', 'zeros bfloat16')


def write_checkpoint(folder: Path, c, seed: int = 0) -> int:
  """Random finite bfloat16 weights of `c`, tensor by tensor; returns the size of the file."""
  from jaxrl.models.hugging_face_config import write_config
  from jaxrl.models.hugging_face_tensors import tensor_shapes
  from jaxrl.models.safetensors_file import write_file

  rng = np.random.default_rng(seed)
  shapes = tensor_shapes(c)
  bfloat16 = np.dtype(ml_dtypes.bfloat16)

  def value(name):
    bits = rng.integers(0, 2**16, shapes[name], np.uint16)
    # Exponents of all ones are NaN and inf; without their highest bit they are numbers.
    return np.where(bits & 0x7F80 == 0x7F80, bits & 0xBFFF, bits).astype(np.uint16).view(bfloat16)

  folder.mkdir(parents=True, exist_ok=True)
  (folder / 'config.json').write_text(json.dumps(write_config(c)))
  file = folder / 'model.safetensors'
  write_file(file, {name: (shape, bfloat16) for name, shape in shapes.items()}, value)
  return file.stat().st_size


def config_of(n_bytes: float, layers: int):
  """A Llama of about `n_bytes` in bfloat16, the shapes of an 8B model scaled down."""
  from jaxrl.models.config import ModelConfig

  width = 256
  while True:
    c = ModelConfig(
        family='llama', vocab_size=32_000, d_model=width, n_layers=layers, n_heads=width // 64,
        n_kv=width // 256, d_head=64, d_mlp=width * 7 // 2, max_length=4096)
    matrices = 2 * c.vocab_size * width + layers * width * (
        2 * c.n_heads * 64 + 2 * c.n_kv * 64 + 3 * c.d_mlp)
    if 2 * matrices >= n_bytes:
      return c
    width += 256


def status_bytes(key: str) -> int:
  """A field of /proc/self/status: VmRSS is resident now, VmHWM was at the peak."""
  for line in Path('/proc/self/status').read_text().splitlines():
    if line.startswith(f'{key}:'):
      return int(line.split()[1]) * 1024
  raise RuntimeError(f'no {key}')


def measure(row: str, folder: Path) -> dict:
  """Seconds; and for a load the peak of host memory beyond the parameters."""
  file = folder / 'model.safetensors'
  if row == 'raw':
    buffer = memoryview(bytearray(READ_BYTES))
    begin = time.perf_counter()
    with file.open('rb', buffering=0) as f:
      while f.readinto(buffer):
        pass
    return {'seconds': time.perf_counter() - begin}

  import jax

  from jaxrl.models.hugging_face import load_params, read_config
  from jaxrl.models.params import count_params

  c = read_config(folder)
  kind, _, dtype = row.partition(' ')
  if kind == 'zeros':
    fill = jax.jit(lambda: jax.numpy.zeros(count_params(c), dtype)).lower().compile()
    begin = time.perf_counter()
    jax.block_until_ready(fill())
    return {'seconds': time.perf_counter() - begin}
  jax.block_until_ready(jax.jit(lambda x: x + 1)(jax.numpy.ones(8)))
  before = status_bytes('VmRSS')
  begin = time.perf_counter()
  params = jax.block_until_ready(load_params(folder, c, dtype=jax.numpy.dtype(dtype)))
  seconds = time.perf_counter() - begin
  held = sum(x.nbytes for x in jax.tree.leaves(params)) if jax.default_backend() == 'cpu' else 0
  return {
      'seconds': seconds,
      'peak_beyond_parameters': status_bytes('VmHWM') - before - held,
      'parameters': sum(x.nbytes for x in jax.tree.leaves(params)),
      'device': jax.devices()[0].device_kind,
  }


def measure_in_process(row: str, folder: Path) -> dict:
  """`measure` in a process of its own, so that no memory is left over from another row."""
  command = [sys.executable, '-m', 'benchmarks.load_checkpoint', f'--row={row}', str(folder)]
  done = subprocess.run(
      command, check=True, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[1])
  return json.loads(done.stdout.splitlines()[-1])


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('folder', help='where to make a private folder for the checkpoint')
  parser.add_argument('--gigabytes', type=float, default=2.0, help='least size, in 1e9 bytes')
  parser.add_argument('--layers', type=int, default=8)
  parser.add_argument('--row', help='measure this row alone, of the checkpoint that FOLDER is')
  arguments = parser.parse_args()
  if arguments.row:
    print(json.dumps(measure(arguments.row, Path(arguments.folder))))
    return
  with tempfile.TemporaryDirectory(prefix='load_checkpoint_', dir=arguments.folder) as folder:
    c = config_of(arguments.gigabytes * 1e9, arguments.layers)
    size = write_checkpoint(Path(folder), c)
    largest = 2 * c.vocab_size * c.d_model
    print(f'{size / 1e9:.2f} GB bfloat16, largest tensor {largest / 2**20:.0f} MiB')
    # Twice: the first rows leave the file in the page cache as far as it fits.
    for row in ('raw', *ROWS, *ROWS):
      found = measure_in_process(row, Path(folder))
      peak = found.get('peak_beyond_parameters')
      print(f'{row:15} {size / 1e9 / found["seconds"]:6.2f} GB/s'
            + ('' if peak is None else f'  peak {peak / 2**20:5.0f} MiB beyond the parameters'
               f'  {found["device"]}'), flush=True)


if __name__ == '__main__':
  main()
