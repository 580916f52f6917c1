"""One way to use the devices."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Layout:
  """How training and scoring use the devices; sizes of the mesh in its order."""

  data: int
  fsdp: int
  sequence: int
  tensor: int
  micro_batches: int
  remat: str
  score_batch: int

  @property
  def sizes(self) -> dict[str, int]:
    return {'data': self.data, 'fsdp': self.fsdp, 'sequence': self.sequence, 'tensor': self.tensor}

  @property
  def ways(self) -> int:
    """Parts that the rows of a batch are split into."""
    return self.data * self.fsdp

  def flags(self) -> list[str]:
    """What to give the run."""
    mesh = [self.data, self.fsdp, self.tensor] + ([self.sequence] if self.sequence > 1 else [])
    return [f'--mesh={",".join(map(str, mesh))}', f'--micro_batches={self.micro_batches}',
            f'--remat={self.remat}', f'--score_batch={self.score_batch}']
