"""TRL's DPOTrainer as a contender of the DPO step benchmark.

SETTING 'default' leaves everything that bears on speed as it is: autocast to bfloat16, layers
computed again in the backward pass, the reference's log-probs in every step, pairs shuffled.
'best-DTYPE' keeps activations, precomputes the reference and groups pairs by length; `padding_free`
is not available in TRL 1.16.
"""

from __future__ import annotations

import tempfile
import time

import datasets
import torch
import transformers
import trl
from etils import epath

from benchmarks.dpo_step_worker import Pace
from benchmarks.dpo_step_workload import BETA, CLIP_NORM, LEARNING_RATE, PAIRS_A_STEP, Workload
from jaxrl.tokens.tiny import write_tokenizer


class _Order(torch.utils.data.Sampler):
  """Shuffled in the first epoch, the contender's own order in the others."""

  def __init__(self, first: tuple[int, ...], later: tuple[int, ...]):
    self.orders = [first, later]

  def __iter__(self):
    yield from self.orders[0]
    del self.orders[:-1]

  def __len__(self) -> int:
    return len(self.orders[0])


class _Trainer(trl.DPOTrainer):
  """On ids, in the order given; says how long the reference took."""

  reference_seconds: float | None = None
  order: _Order

  def _prepare_dataset(self, dataset, *args, **kwargs):
    return dataset

  def _get_train_sampler(self, *args, **kwargs):
    return self.order

  def _precompute_ref_logps(self, *args, **kwargs):
    start = time.perf_counter()
    out = super()._precompute_ref_logps(*args, **kwargs)
    self.reference_seconds = time.perf_counter() - start
    return out


class _Paced(transformers.TrainerCallback):
  """Calls `pace` before steps and hands on what is logged."""

  def __init__(self, pace: Pace):
    self.pace = pace

  def on_step_begin(self, *args, **kwargs):
    self.pace()

  def on_log(self, args, state, control, logs, **kwargs):
    if self.pace.is_first() and 'loss' in logs:
      self.pace.saw(logs['loss'], logs['grad_norm'])


def run(folder: str, setting: str, workload: Workload, pace: Pace) -> None:
  """Trains without end."""
  is_best, _, dtype = setting.partition('-')
  best = {'bf16': dtype == 'bfloat16', 'gradient_checkpointing': False,
          'precompute_ref_log_probs': True}
  # Rows lie in the order that the reference is computed in: by length.
  rows = [{'prompt_ids': list(p.prompt), 'chosen_ids': list(p.chosen),
           'rejected_ids': list(p.rejected)} for p in workload.pairs]
  with tempfile.TemporaryDirectory() as name:
    write_tokenizer(epath.Path(name), ['pairs are ids'])
    args = trl.DPOConfig(
        output_dir=name, use_cpu=True, report_to='none', save_strategy='no', disable_tqdm=True,
        dataloader_pin_memory=False, logging_steps=1, per_device_train_batch_size=PAIRS_A_STEP,
        learning_rate=LEARNING_RATE, lr_scheduler_type='constant', max_grad_norm=CLIP_NORM,
        beta=BETA, num_train_epochs=10_000, **(best if is_best == 'best' else {}))
    trainer = _Trainer(
        folder, args=args, train_dataset=datasets.Dataset.from_list(rows),
        processing_class=transformers.AutoTokenizer.from_pretrained(name),
        callbacks=[_Paced(pace)])
    later = workload.grouped if is_best == 'best' else workload.shuffled
    trainer.order = _Order(workload.shuffled, later)
    trainer.remove_callback(transformers.PrinterCallback)
    pace.ready(
        f'TRL {trl.__version__}, transformers {transformers.__version__}, torch '
        f'{torch.__version__}: masters float32, {"bfloat16 autocast" if args.bf16 else "float32"}, '
        f'{args.optim}, attention {trainer.model.config._attn_implementation}, checkpointing '
        f'{args.gradient_checkpointing}, reference precomputed {args.precompute_ref_log_probs}',
        reference_seconds=trainer.reference_seconds, own_order=later != workload.shuffled)
    trainer.train()
