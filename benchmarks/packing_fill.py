"""How full packed batches are at the lengths of GSM8K, by pairs per step, rows and shapes.

    python -m benchmarks.packing_fill
"""

from __future__ import annotations

from benchmarks.dpo_step_workload import draw_pairs
from jaxrl.data.packing import Packed, Unit, pack_batches

PAIRS, MULTIPLE = 1200, 64
STEPS = ((8, 1), (16, 1), (128, 8), (128, 16))       # pairs of a step, rows they are packed into
SHAPES = (1, 2, 4, 6)


def packed(batch_size: int, rows: int, shapes: int) -> Packed:
  """Batches of two passes over the pairs."""
  units = [Unit(p.prompt, (p.chosen, p.rejected), {}, {}) for p in draw_pairs(PAIRS, seed=0)]
  return pack_batches(
      units, lambda unit: unit, batch_size=batch_size, seed=0, steps=2 * PAIRS // batch_size,
      into=rows, shapes=shapes, multiple=MULTIPLE, pad_id=0)


def main() -> None:
  print('| pairs x rows | ' + ' | '.join(f'{n} shapes' for n in SHAPES) + ' |')
  print('|---' * (1 + len(SHAPES)) + '|')
  for batch_size, rows in STEPS:
    filled = ' | '.join(f'{packed(batch_size, rows, n).filled:.1%}' for n in SHAPES)
    print(f'| {batch_size} x {rows} | {filled} |', flush=True)


if __name__ == '__main__':
  main()
