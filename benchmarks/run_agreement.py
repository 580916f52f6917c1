"""How far two runs of one experiment agree: `python -m benchmarks.run_agreement RUN_DIR RUN_DIR`.

For runs of the same flags in other processes or on other devices. One line for each output that
both have: the same bytes, or which columns of a table differ in how many rows and by how much, or
the largest difference of a parameter.
"""

from __future__ import annotations

import argparse
import pathlib

import numpy as np
import pyarrow.parquet as pq
import safetensors.numpy

from jaxrl.runs.manifest import read_manifest


def largest(a: list, b: list) -> float | None:
  """The largest difference of numbers, or of lists of them; None where they cannot be compared."""
  try:
    return max((float(np.abs(np.subtract(x, y)).max()) for x, y in zip(a, b, strict=True)),
               default=0.0)
  except (TypeError, ValueError):
    return None


def tables(a: pathlib.Path, b: pathlib.Path) -> str:
  ours, theirs = pq.read_table(a), pq.read_table(b)
  if ours.num_rows != theirs.num_rows:
    return f'{ours.num_rows} and {theirs.num_rows} rows'
  found = []
  for column in ours.column_names:
    x, y = ours[column].to_pylist(), theirs[column].to_pylist()
    count = sum(p != q for p, q in zip(x, y, strict=True))
    if count:
      most = largest(x, y)
      found.append(f'{column} in {count} of {len(x)} rows'
                   + ('' if most is None else f', by at most {most:.2g}'))
  return '; '.join(found) or 'the same values'


def models(a: pathlib.Path, b: pathlib.Path) -> str:
  ours, theirs = ({name: x for file in sorted(path.glob('*.safetensors'))
                   for name, x in safetensors.numpy.load_file(file).items()} for path in (a, b))
  most = max(float(np.abs(ours[name] - theirs[name]).max()) for name in theirs)
  scale = max(float(np.abs(x).max()) for x in theirs.values())
  return f'parameters by at most {most:.2g}, the largest is {scale:.3g}'


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('runs', nargs=2, type=pathlib.Path)
  a, b = parser.parse_args().runs
  ours, theirs = read_manifest(a), read_manifest(b)
  for stage in [name for name in ours if name in theirs]:
    for x, y in zip(ours[stage].outputs, theirs[stage].outputs, strict=True):
      if x.sha256 == y.sha256:
        said = 'the same bytes'
      elif x.path.endswith('.parquet'):
        said = tables(a / x.path, b / y.path)
      elif list((a / x.path).glob('*.safetensors')):
        said = models(a / x.path, b / y.path)
      else:
        said = 'other bytes'
      print(f'{x.path}: {said}')


if __name__ == '__main__':
  main()
