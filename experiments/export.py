"""Writes the model of a run as a Hugging Face folder that `transformers` and vLLM load.

    python -m experiments.export --run_dir=RUN --output=DIR [--iteration=N] [--dtype=bfloat16]

The model is that of the last finished iteration, or of --iteration; its files are checked against
the run's manifest first. A run that another process is working on can be exported from: what is
finished does not change, and no lock is taken. Tokenizer, chat template and generation settings are
copied along.

Runs keep float32. The default --dtype is that of the checkpoint the run started from, or float32
where the run made its own model.
"""

from __future__ import annotations

import math
import os
import re
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from etils import epath

from experiments import common_flags, output_flag
from jaxrl.errors import InputError
from jaxrl.models.hugging_face import load_params, read_config, save_model
from jaxrl.models.model_folder import existing_folder, find_tensors, local_path
from jaxrl.models.params import count_params
from jaxrl.runs import durable
from jaxrl.runs.folder import FLAGS as RECORDED
from jaxrl.runs.folder import decode_flags, read_run
from jaxrl.runs.progress import Progress
from jaxrl.runs.stages import Run

FLAGS = flags.FLAGS
flags.DEFINE_integer('iteration', None, 'Whose model; default: the last finished one. 0: the model '
                     'that the run itself made to start from.', lower_bound=0)
flags.DEFINE_enum('dtype', None, ['float32', 'bfloat16', 'float16'],
                  'Type of the weights; default: that of the checkpoint the run started from.')
flags.DEFINE_string('max_shard_size', '5GB', 'Largest file of weights: a number with KB, MB or GB '
                    '(powers of 1000) or KiB, MiB or GiB.')
USED = ('run_dir', 'mesh')
flags.adopt_module_key_flags(output_flag)
for key in USED:
  flags.declare_key_flag(key)

STORED_TYPES = {'F32': 'float32', 'BF16': 'bfloat16', 'F16': 'float16'}
# Stages that make the model a run starts from; the later of two is the one.
STARTS = ('sft/data', 'seed/train', 'start/merge')
UNITS = {'': 1, 'K': 10**3, 'M': 10**6, 'G': 10**9, 'Ki': 2**10, 'Mi': 2**20, 'Gi': 2**30}


def check() -> None:
  """Raises InputError for a flag that is missing or has no effect, and an output that exists."""
  for flag in FLAGS.get_flags_for_module(common_flags):
    common_flags.refuse(flag.name not in USED and flag.present > 0, flag.name, 'nothing is trained')
  for name, expected in (('run_dir', 'the folder of a run'), ('output', 'a folder to write')):
    if not FLAGS[name].value:
      raise InputError('exporting needs this flag', where=f'--{name}', expected=expected,
                       found='none')
  output = local_path(FLAGS.output)
  if os.path.lexists(output):
    raise InputError('the output already exists', where=f'--output={output}',
                     expected='a new name', fix='Choose another name, or remove the folder first')


def open_finished(folder: epath.Path) -> Run:
  """The run, for reading; no lock is taken.

  Raises:
    InputError: this is not a run folder, or its manifest is damaged.
  """
  if not os.path.isfile(folder / RECORDED):
    raise InputError('this is not a run folder', where=f'--run_dir={folder}',
                     expected=f'a folder with {RECORDED}',
                     found='a folder without it' if os.path.isdir(folder) else 'no folder',
                     fix='Give the --run_dir of a run')
  return Run(folder)


def find_model(run: Run, iteration: int | None) -> tuple[str, str]:
  """Stage and output of a finished model, such as 'iteration_01/train', 'iteration_01/model'.

  Raises:
    InputError: that iteration, or every one, has not finished training.
  """
  models = {
      stage: output.path for stage, entry in run.entries.items() for output in entry.outputs
      if stage in (*STARTS, 'sft/train') or re.fullmatch(r'iteration_\d+/train', stage)
      if output.path.endswith(('/model', '/start'))}
  fix = 'Wait until it has finished training, or give another --iteration'
  if iteration is None:
    stages = [stage for stage in models if stage not in STARTS] or ['iteration_01/train']
  elif iteration:
    stages = [f'iteration_{iteration:02d}/train']
  else:
    stages = [stage for stage in models if stage in STARTS] or [STARTS[1]]
    fix = 'A run that was given a --model starts from that: use its folder'
  stage = stages[-1]
  if stage not in models:
    raise InputError(
        'there is no such model', where=run.folder, expected=f'a finished stage {stage}',
        found='models of ' + (', '.join(models) or 'no stage'), fix=fix)
  return stage, models[stage]


def start_dtype(run: Run) -> str:
  """The type of the checkpoint that the run was given; float32 where it made its own.

  Raises:
    InputError: the checkpoint cannot be read any more.
  """
  start = decode_flags(run.folder / RECORDED).get('model')
  if start is None:
    return 'float32'
  fix = 'Give --dtype'
  try:
    stored = find_tensors(existing_folder(start))
  except (InputError, OSError) as error:
    raise InputError('the checkpoint that the run started from tells no --dtype', where=start,
                     expected='its safetensors files', found=str(error), fix=fix) from error
  sizes: Counter[str] = Counter()
  for tensor in stored.values():
    sizes[tensor.dtype] += math.prod(tensor.shape)
  found = sizes.most_common(1)[0][0]
  if found not in STORED_TYPES:
    raise InputError('the checkpoint that the run started from tells no --dtype', where=start,
                     expected=' or '.join(STORED_TYPES), found=found, fix=fix)
  return STORED_TYPES[found]


def shard_bytes(text: str) -> int:
  """Bytes that a size such as '5GB' names.

  Raises:
    InputError: it names none.
  """
  match = re.fullmatch(r'(\d+(?:\.\d+)?)\s*(|K|M|G|Ki|Mi|Gi)B?', text.strip())
  size = int(float(match[1]) * UNITS[match[2]]) if match else 0
  if size < 1:
    raise InputError('the size cannot be read', where='--max_shard_size',
                     expected='a number with KB, MB, GB, KiB, MiB or GiB', found=repr(text))
  return size


def rounding(params: dict, dtype: str) -> float:
  """Root mean square of what rounding to `dtype` changes, relative to that of the weights."""
  changed = total = 0.0
  for leaf in jax.tree.leaves(params):
    exact = np.asarray(leaf, np.float32)
    changed += float(np.sum(np.square(exact - exact.astype(jnp.dtype(dtype))), dtype=np.float64))
    total += float(np.sum(np.square(exact), dtype=np.float64))
  return math.sqrt(changed / total) if total else 0.0


def main(argv) -> None:
  del argv
  check()
  size = shard_bytes(FLAGS.max_shard_size)
  with read_run(FLAGS.run_dir) as folder:
    export(open_finished(folder), size)


def export(run: Run, size: int) -> None:
  """Writes --output, in files of at most `size` bytes."""
  progress = Progress()
  stage, model = find_model(run, FLAGS.iteration)
  dtype = FLAGS.dtype or start_dtype(run)
  folder = run.path(stage, model)
  c = read_config(folder)
  mesh = common_flags.mesh_from_flags()
  with jax.set_mesh(mesh):
    params = load_params(folder, c, mesh=mesh)
    save_model(FLAGS.output, params, c, tokenizer_from=folder, dtype=jnp.dtype(dtype),
               max_shard_bytes=size)
    progress.line(f'{durable.shared(folder)}: as it was when {stage} finished, '
                  f'{count_params(c):,} parameters')
    if dtype != 'float32':
      progress.line(f'rounding to {dtype} changed the weights by {rounding(params, dtype):.2e} of '
                    'their size (root mean square)')
  written = [path for path in epath.Path(FLAGS.output).iterdir() if path.suffix == '.safetensors']
  progress.line(f'{FLAGS.output}: {dtype}, {sum(os.path.getsize(p) for p in written):,} bytes of '
                f'weights in {len(written)} {"file" if len(written) == 1 else "files"}')


if __name__ == '__main__':
  common_flags.run(main)
