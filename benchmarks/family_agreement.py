"""How closely every family of models agrees with transformers; writes docs/families.md.

    python -m benchmarks.family_agreement [--output=docs/families.md]

The models are those of `tests/family_shapes.py`: a random checkpoint of each is written by
transformers and read by this project, and both run it in float32 on the CPU.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import jax
import transformers

from tests import hugging_face_oracle as oracle
from tests.family_shapes import SHAPES

PAGE = """# Model families

    python -m benchmarks.family_agreement

wrote this page (jax {jax}, transformers {transformers}, PyTorch {torch}, CPU, float32).

A family is the `model_type` of `config.json`. For every shape transformers wrote a checkpoint with
random weights and continued {rows} prompts of {prompts} tokens greedily by {steps} tokens (eager
attention, padded on the left). The difference is the largest |ours - theirs| over the largest
|theirs| of the logits of these sequences of up to {length} tokens, padded on the right here; the
tests bound it by 2e-5. Greedy tokens are compared through the cached decode path.

| family | shapes | largest difference | greedy tokens |
|---|---|---|---|
{table}
"""


def agreement(family: str, shape: str) -> tuple[float, bool]:
  """(largest relative difference of logits, whether the greedy tokens are the same)."""
  with tempfile.TemporaryDirectory() as folder:
    a = oracle.answers(Path(folder), family, shape)
    ours = oracle.our_logits(a.params, a.sequences, a.c)
    prompts = [row[:n] for row, n in zip(a.sequences, oracle.PROMPTS, strict=True)]
    tokens = oracle.our_greedy(a.params, prompts, a.c, oracle.STEPS, width=oracle.LENGTH)
    return oracle.relative_gap(ours[a.real], a.logits[a.real]), tokens == a.continuations


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--output', type=Path, default=Path('docs/families.md'))
  args = parser.parse_args()
  rows = []
  for family, shapes in SHAPES.items():
    found = {shape: agreement(family, shape) for shape in shapes}
    gap = max(gap for gap, _ in found.values())
    same = all(same for _, same in found.values())
    names = ', '.join(shape.replace('_', ' ') for shape in shapes)
    rows.append(f'| `{family}` | {names} | {gap:.1e} | {"identical" if same else "DIFFERENT"} |')
    print(rows[-1], flush=True)
  args.output.write_text(PAGE.format(
      jax=jax.__version__, transformers=transformers.__version__,
      torch=oracle.torch.__version__.partition('+')[0], rows=len(oracle.PROMPTS),
      prompts=', '.join(map(str, oracle.PROMPTS[:-1])) + f' and {oracle.PROMPTS[-1]}',
      steps=oracle.STEPS, length=oracle.LENGTH, table='\n'.join(rows)))


if __name__ == '__main__':
  main()
