"""Loss and gradients of every preference loss beside TRL's DPOTrainer, on the same batch.

    pip install trl==1.16.0
    python -m benchmarks.trl_agreement
    python -m benchmarks.trl_trainers     # the KTO, CPO and ORPO trainers

One random model of Llama's shape is the policy and another the reference; TRL collates a batch of
text pairs, and the very ids and masks go through our objective. Prints the relative difference of
the loss and of the gradient of all parameters, in float32.
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import datasets
import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers
import trl
from etils import epath

from jaxrl.losses.pairs import PLAIN, PairOptions
from jaxrl.models.config import ModelConfig
from jaxrl.models.hugging_face import load_params, read_config, save_model
from jaxrl.models.hugging_face_tensors import named_tensors
from jaxrl.models.params import init_params
from jaxrl.tokens.tiny import write_tokenizer
from jaxrl.training.logps import ComputePolicy, target_logps
from jaxrl.training.objectives import Objective, mixed_objective

POLICY = ComputePolicy('float32', 64, 'all')


@dataclasses.dataclass(frozen=True)
class Case:
  """One TRL configuration and ours."""

  trl: dict[str, Any]
  ours: dict[str, tuple[float, dict[str, Any]]]
  variant: PairOptions = PLAIN


def one(trl_name: str, name: str, variant: PairOptions = PLAIN, trl_extra: dict | None = None,
        **options) -> Case:
  shared = {k: v for k, v in options.items() if k in ('beta', 'label_smoothing')}
  return Case({'loss_type': [trl_name], **shared, **(trl_extra or {})}, {name: (1.0, options)},
              variant)


CASES = {
    'sigmoid': one('sigmoid', 'dpo', beta=0.1),
    'hinge': one('hinge', 'hinge', beta=0.05),
    'ipo': one('ipo', 'ipo', beta=0.1),
    'exo_pair': one('exo_pair', 'exo', beta=0.1, label_smoothing=1e-3),
    'nca_pair': one('nca_pair', 'nca', beta=0.01),
    'robust': one('robust', 'robust', beta=0.1, label_smoothing=0.1),
    'bco_pair': one('bco_pair', 'bco', beta=0.1, delta_mode='none'),
    'sppo_hard': one('sppo_hard', 'sppo', beta=0.1),
    'aot': one('aot', 'aot', beta=0.1),
    'aot_unpaired': one('aot_unpaired', 'aot_unpaired', beta=0.1, label_smoothing=0.1),
    'apo_zero': one('apo_zero', 'apo_zero', beta=0.1),
    'apo_down': one('apo_down', 'apo_down', beta=0.1),
    'discopop': one('discopop', 'discopop', trl_extra={'discopop_tau': 0.05}, beta=0.05, tau=0.05),
    'sft': Case({'loss_type': ['sft']}, {'nll': (1.0, {'nll_reduction': 'token'})}),
    'sigmoid_norm': one('sigmoid_norm', 'dpo_norm', beta=2.0),
    'sigmoid + bco_pair + sft': Case(
        {'loss_type': ['sigmoid', 'bco_pair', 'sft'], 'loss_weights': [0.8, 0.2, 1.0],
         'beta': 0.1},
        {'dpo': (0.8, {'beta': 0.1}), 'bco': (0.2, {'beta': 0.1, 'delta_mode': 'none'}),
         'nll': (1.0, {'nll_reduction': 'token'})}),
    'ld_alpha': one('sigmoid', 'dpo', PairOptions(ld_alpha=0.5), {'ld_alpha': 0.5}, beta=0.1),
    'use_weighting': one('sigmoid', 'dpo', PairOptions(wpo=True), {'use_weighting': True},
                         beta=0.1),
    'forward_kl': one('sigmoid', 'dpo', PairOptions(divergence='forward_kl'),
                      {'f_divergence_type': 'forward_kl'}, beta=0.1),
    'js_divergence': one('sigmoid', 'dpo', PairOptions(divergence='js'),
                         {'f_divergence_type': 'js_divergence'}, beta=0.1),
    'alpha_divergence': one(
        'sigmoid', 'dpo', PairOptions(divergence='alpha', divergence_alpha=0.5),
        {'f_divergence_type': 'alpha_divergence', 'f_alpha_divergence_coef': 0.5}, beta=0.1),
}
TEXTS = [('What is two plus three?', 'It is five.', 'It is six, I think.'),
         ('Name a colour.', 'Blue.', 'A colour is something that one sees.'),
         ('Say hello.', 'Hello there, how are you today?', 'No.'),
         ('Count to three.', 'One, two, three.', 'One, three, two, and then four.')]


def make_models(folder: Path) -> tuple[ModelConfig, dict[str, dict]]:
  """Folders `policy` and `reference` of random models with one tokenizer, and their parameters."""
  tokenizer = epath.Path(folder / 'tokenizer')
  size = write_tokenizer(tokenizer, [text for row in TEXTS for text in row], vocab_size=300)
  c = ModelConfig(family='llama', vocab_size=size, d_model=32, n_layers=2, n_heads=4, n_kv=2,
                  d_head=8, d_mlp=48, max_length=128, init_std=0.15)
  params = {}
  for n, name in enumerate(('policy', 'reference')):
    save_model(folder / name, init_params(jax.random.key(n), c), c, tokenizer_from=tokenizer)
    params[name] = load_params(folder / name, read_config(folder / name))
  return read_config(folder / 'policy'), params


def trl_loss(folder: Path, case: Case) -> tuple[dict, float, dict[str, np.ndarray]]:
  """(batch as TRL collates it, loss, gradient of every tensor by its name)."""
  policy, reference = (
      transformers.AutoModelForCausalLM.from_pretrained(folder / name, dtype=torch.float32)
      for name in ('policy', 'reference'))
  tokenizer = transformers.AutoTokenizer.from_pretrained(folder / 'policy')
  rows = [{'prompt': [{'role': 'user', 'content': q}],
           'chosen': [{'role': 'assistant', 'content': w}],
           'rejected': [{'role': 'assistant', 'content': loser}]} for q, w, loser in TEXTS]
  trainer = trl.DPOTrainer(
      policy, reference, processing_class=tokenizer,
      train_dataset=datasets.Dataset.from_list(rows),
      args=trl.DPOConfig(
          output_dir=str(folder / 'out'), per_device_train_batch_size=len(rows), report_to='none',
          use_cpu=True, bf16=False, gradient_checkpointing=False, disable_dropout=True,
          dataloader_pin_memory=False, **case.trl))
  batch = next(iter(trainer.get_train_dataloader()))
  policy.zero_grad()
  policy.train()
  loss = trainer._compute_loss(trainer.model, batch, False)
  loss = loss[0] if isinstance(loss, tuple) else loss
  loss.backward()
  grads = {name: p.grad.numpy() for name, p in policy.named_parameters()}
  return {k: v.numpy() for k, v in batch.items()}, float(loss), grads


def our_batch(batch: dict, c: ModelConfig, reference: dict) -> dict[str, jax.Array]:
  """TRL's ids and masks as our arrays [P, 2, T]; chosen rows come first in TRL's."""
  ids, mask = batch['input_ids'].astype(np.int32), batch['completion_mask'].astype(bool)
  pairs = len(ids) // 2

  def paired(x):
    return jnp.asarray(np.stack([x[:pairs], x[pairs:]], axis=1))

  inputs, targets = ids[:, :-1], ids[:, 1:]
  logps = jax.jit(lambda p, x, y: target_logps(p, x, y, c, POLICY))(reference, inputs, targets)
  return {'inputs': paired(inputs), 'targets': paired(targets), 'mask': paired(mask[:, 1:]),
          'ref_logps': paired(np.asarray(logps)), 'weights': jnp.ones(pairs)}


def our_loss(objective: Objective, params: dict, batch: dict) -> tuple[float, dict]:
  """Loss and gradients, as the training step adds the terms up."""
  if objective.survey is not None:
    state = objective.initial_state(params)
    batch, _ = objective.survey(params, batch, state, jnp.int32(0), 1)
  counts = objective.counts(batch)

  def loss(params):
    terms, _ = objective.totals(params, batch)
    return sum(total / counts[kind] for total, kind in terms.values())

  value, grads = jax.jit(jax.value_and_grad(loss))(params)
  return float(value), grads


HEADER = ('| TRL | TRL loss | loss, relative difference | gradient, relative difference |\n'
          '|---|---|---|---|')


def table_row(label: str, expected: float, grads: dict[str, np.ndarray], found: float,
              our_grads: dict, c: ModelConfig) -> str:
  """TRL's loss and gradients, and how far ours are from them."""
  named = dict(named_tensors(our_grads, c))
  gap = np.sqrt(sum(np.sum((named[k] - g) ** 2) for k, g in grads.items()))
  size = np.sqrt(sum(np.sum(g**2) for g in grads.values()))
  return (f'| {label} | {expected:.6f} | {abs(found - expected) / abs(expected):.1e} | '
          f'{gap / size:.1e} |')


def print_table(rows: Callable[[Path, ModelConfig, dict], Iterable[str]]) -> None:
  """Prints `rows(folder, c, params)` of models made for it, the libraries kept quiet."""
  transformers.utils.logging.set_verbosity_error()
  transformers.utils.logging.disable_progress_bar()
  datasets.disable_progress_bars()
  print(HEADER)
  with tempfile.TemporaryDirectory() as name:
    folder = Path(name)
    for row in rows(folder, *make_models(folder)):
      print(row, flush=True)


def rows(folder: Path, c: ModelConfig, params: dict) -> Iterator[str]:
  for label, case in CASES.items():
    batch, expected, grads = trl_loss(folder, case)
    objective = mixed_objective(case.ours, c, POLICY, pair_options=case.variant)
    found, our_grads = our_loss(
        objective, params['policy'], our_batch(batch, c, params['reference']))
    yield table_row(label, expected, grads, found, our_grads, c)


def main() -> None:
  print_table(rows)


if __name__ == '__main__':
  main()
