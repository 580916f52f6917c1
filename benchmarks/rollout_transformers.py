"""`transformers.generate` as a contender of the rollout benchmark.

Its best case: a batch ends as soon as its longest row does, rows draw no log-probs, and the pad
rows that a real EOS needs are not written.
"""

from __future__ import annotations

import os

import torch
import transformers

from benchmarks.rollout_worker import Contender
from benchmarks.rollout_workload import Workload


class _RowLengths(transformers.StoppingCriteria):
  """Ends row n once it has `lengths[n]` tokens after `start`."""

  def __init__(self, lengths: list[int], start: int):
    self.last = torch.tensor(lengths) + start

  def __call__(self, input_ids, scores, **kwargs):
    return input_ids.shape[1] >= self.last


def _pad_left(prompts: tuple[tuple[int, ...], ...]) -> dict[str, torch.Tensor]:
  width = max(map(len, prompts))
  ids = torch.tensor([(width - len(p)) * (0,) + p for p in prompts])
  mask = torch.tensor([(width - len(p)) * (0,) + len(p) * (1,) for p in prompts])
  return {'input_ids': ids, 'attention_mask': mask}


def load(folder: str, dtype: str, batch: int, workload: Workload) -> Contender:
  """`batch` rows at a time; prompts are repeated for their draws by generate itself."""
  torch.set_num_threads(len(os.sched_getaffinity(0)))
  model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))
  model.generation_config = transformers.GenerationConfig(pad_token_id=0)   # no EOS, no top-k 50

  def generate(inputs, **options) -> list[list[int]]:
    out = model.generate(**inputs, top_k=0, **options)
    return out[:, inputs['input_ids'].shape[1]:].tolist()

  def sample(workload: Workload, seed: int) -> list[list[int]]:
    torch.manual_seed(seed)
    responses = []
    for part in workload.batches(batch):
      lengths = [n for row in part.lengths for n in row]
      inputs = _pad_left(part.prompts)
      criteria = transformers.StoppingCriteriaList(
          [_RowLengths(lengths, inputs['input_ids'].shape[1])])
      responses += generate(
          inputs, do_sample=True, temperature=1.0, top_p=workload.top_p,
          num_return_sequences=len(part.lengths[0]), max_new_tokens=workload.max_new_tokens,
          stopping_criteria=criteria)
    return responses

  def greedy(prompt: tuple[int, ...], tokens: int) -> list[int]:
    return generate(_pad_left((prompt,)), do_sample=False, max_new_tokens=tokens)[0]

  return Contender(sample, greedy, (
      f'transformers {transformers.__version__}, torch {torch.__version__}: weights, products and '
      f'cache {dtype}, attention {model.config._attn_implementation}, {batch} rows'))
