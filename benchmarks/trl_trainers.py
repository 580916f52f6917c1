"""Loss and gradients of KTO, CPO and ORPO beside TRL's trainers of these names, on the same batch.

    pip install trl==1.16.0
    python -m benchmarks.trl_trainers

As `trl_agreement` does for DPOTrainer: TRL collates a batch of texts, and the very ids and masks go
through our objective, in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers
import trl
from trl.experimental.cpo import CPOConfig, CPOTrainer
from trl.experimental.orpo import ORPOConfig, ORPOTrainer

from benchmarks.trl_agreement import (
    POLICY,
    TEXTS,
    Case,
    our_batch,
    our_loss,
    print_table,
    table_row,
)
from jaxrl.losses.pairs import PairOptions
from jaxrl.losses.preference import pref_loss
from jaxrl.models.config import ModelConfig
from jaxrl.training.logps import target_logps
from jaxrl.training.objectives import kto_objective, mixed_objective

FREE = PairOptions(reference_free=True)
NLL = {'nll_reduction': 'token'}
CPO = {
    'sigmoid': Case({'beta': 0.1}, {'cpo': (1.0, {'beta': 0.1})}),
    'sigmoid, label_smoothing': Case(
        {'beta': 0.1, 'label_smoothing': 0.1, 'cpo_alpha': 0.5},
        {'cpo': (1.0, {'beta': 0.1, 'label_smoothing': 0.1, 'alpha': 0.5})}),
    'hinge, cpo_alpha=0': Case({'loss_type': 'hinge', 'beta': 0.05, 'cpo_alpha': 0.0},
                               {'hinge': (1.0, {'beta': 0.05})}, FREE),
    'ipo, cpo_alpha=0': Case({'loss_type': 'ipo', 'beta': 0.1, 'cpo_alpha': 0.0},
                             {'ipo': (1.0, {'beta': 0.1})}, FREE),
    'simpo, cpo_alpha=0': Case(
        {'loss_type': 'simpo', 'beta': 2.0, 'simpo_gamma': 0.5, 'cpo_alpha': 0.0},
        {'simpo': (1.0, {'beta': 2.0, 'gamma': 0.5})}),
    'simpo': Case({'loss_type': 'simpo', 'beta': 2.0, 'simpo_gamma': 0.5},
                  {'simpo': (1.0, {'beta': 2.0, 'gamma': 0.5}), 'nll': (1.0, NLL)}),
    'alphapo': Case({'loss_type': 'alphapo', 'beta': 2.5, 'simpo_gamma': 0.1, 'alpha': 0.25},
                    {'simpo': (1.0, {'beta': 2.5, 'gamma': 0.1, 'reward_alpha': 0.25})}),
}
# The mean log-ratio of mismatched responses is above 0 this way round, and below it the other.
KTO: dict[str, tuple[tuple[str, str], dict[str, Any]]] = {
    'KTO, z0 > 0': (('policy', 'reference'), {'beta': 0.1}),
    'KTO, z0 = 0': (('reference', 'policy'), {'beta': 0.1}),
    'KTO, weights': (('policy', 'reference'), {
        'beta': 0.2, 'desirable_weight': 1.33, 'undesirable_weight': 0.5}),
}


def shared(folder: Path, rows: int) -> dict[str, Any]:
  return {'output_dir': str(folder / 'out'), 'per_device_train_batch_size': rows,
          'report_to': 'none', 'use_cpu': True, 'bf16': False, 'gradient_checkpointing': False,
          'disable_dropout': True, 'dataloader_pin_memory': False}


def load(folder: Path, name: str) -> torch.nn.Module:
  return transformers.AutoModelForCausalLM.from_pretrained(folder / name, dtype=torch.float32)


def gradients(model: torch.nn.Module, loss: torch.Tensor) -> dict[str, np.ndarray]:
  model.zero_grad()
  loss.backward()
  return {name: p.grad.numpy().copy() for name, p in model.named_parameters()}


def message(role: str, text: str) -> list[dict]:
  return [{'role': role, 'content': text}]


# CPO and ORPO: pairs without a reference


def pair_trainer(trainer: type, config: type, folder: Path, **options):
  """(trainer, model, TRL's batch, its ids and masks as DPOTrainer has them)."""
  model = load(folder, 'policy')
  rows = [{'prompt': message('user', q), 'chosen': message('assistant', w),
           'rejected': message('assistant', loser)} for q, w, loser in TEXTS]
  made = trainer(
      model, args=config(max_length=128, **shared(folder, len(rows)), **options),
      processing_class=transformers.AutoTokenizer.from_pretrained(folder / 'policy'),
      train_dataset=datasets.Dataset.from_list(rows))
  batch = next(iter(made.get_train_dataloader()))
  both = {key: x.numpy() for key, x in made.concatenated_inputs(batch).items()}
  return made, model, batch, {
      'input_ids': both['concatenated_input_ids'],
      'completion_mask': both['concatenated_labels'] != -100,
      'attention_mask': both['concatenated_attention_mask']}


def cpo_row(label: str, case: Case, folder: Path, c: ModelConfig, params: dict) -> str:
  made, model, batch, ids = pair_trainer(CPOTrainer, CPOConfig, folder, **case.trl)
  loss, _ = made.get_batch_loss_metrics(model, batch)
  grads = gradients(model, loss)
  objective = mixed_objective(case.ours, c, POLICY, pair_options=case.variant)
  found = our_loss(objective, params['policy'], our_batch(ids, c, params['reference']))
  return table_row(f'CPO {label}', float(loss), grads, *found, c)


def orpo_rows(folder: Path, c: ModelConfig, params: dict) -> list[str]:
  """TRL's likelihood term is over prompt and response, ours over the response."""
  made, model, batch, ids = pair_trainer(ORPOTrainer, ORPOConfig, folder, beta=0.1)
  loss, _ = made.get_batch_loss_metrics(model, batch)
  grads = gradients(model, loss)
  chosen_logps, rejected_logps, *_ = made.concatenated_forward(model, batch)
  odds = -made.odds_ratio_loss(chosen_logps, rejected_logps)[0].mean()
  odds_grads = gradients(model, odds)
  arrays = our_batch(ids, c, params['reference'])
  pairs = len(TEXTS)
  prompt_too = jnp.asarray(ids['attention_mask'][:pairs, 1:] != 0)

  def library(term: Callable) -> tuple[float, dict]:
    def loss(params):
      rows = {key: arrays[key].reshape(2 * pairs, -1) for key in ('inputs', 'targets')}
      logps = target_logps(params, rows['inputs'], rows['targets'], c, POLICY)
      logps = logps.reshape(pairs, 2, -1)
      return term({
          'policy_chosen': logps[:, 0], 'policy_rejected': logps[:, 1],
          'chosen_mask': arrays['mask'][:, 0], 'rejected_mask': arrays['mask'][:, 1]})

    value, found = jax.jit(jax.value_and_grad(loss))(params['policy'])
    return float(value), found

  def whole(batch):
    return pref_loss('orpo', batch)[0]

  def odds_alone(batch):
    return whole(batch) - pref_loss('orpo', batch, lam=0.0)[0]

  def with_prompt(batch):
    return whole({**batch, 'nll_mask': prompt_too})

  return [
      table_row('ORPO, odds-ratio term', float(odds), odds_grads, *library(odds_alone), c),
      table_row('ORPO, `nll_mask` of prompt and response', float(loss), grads,
                *library(with_prompt), c),
      table_row('ORPO, `--loss=orpo` (another definition)', float(loss), grads,
                *library(whole), c)]


# KTO: labelled responses


def kto_row(label: str, names: tuple[str, str], options: dict, folder: Path, c: ModelConfig,
            params: dict) -> str:
  policy, reference = (load(folder, name) for name in names)
  rows = [{'prompt': message('user', q), 'completion': message('assistant', text),
           'label': n == 0}
          for q, *texts in TEXTS for n, text in enumerate(texts)]
  trainer = trl.KTOTrainer(
      policy, reference,
      processing_class=transformers.AutoTokenizer.from_pretrained(folder / 'policy'),
      train_dataset=datasets.Dataset.from_list(rows), args=trl.KTOConfig(
          train_sampling_strategy='sequential', **shared(folder, len(rows)), **options))
  batch = next(iter(trainer.get_train_dataloader()))
  policy.train()
  loss = trainer._compute_loss(trainer.model, batch, False)
  grads = gradients(policy, loss)
  z0 = trainer._metrics['train']['kl'][-1]
  assert (z0 > 0) == ('z0 = 0' not in label), z0
  arrays = {'label': jnp.asarray(batch['label'].numpy(), jnp.float32)}
  for ours, theirs in (('', ''), ('kl_', 'KL_')):
    ids = batch[f'{theirs}input_ids'].numpy().astype(np.int32)
    inputs, targets = ids[:, :-1], ids[:, 1:]
    logps = target_logps(params[names[1]], inputs, targets, c, POLICY)
    mask = batch[f'{theirs}completion_mask'].numpy().astype(bool)
    arrays |= {f'{ours}inputs': inputs, f'{ours}targets': targets, f'{ours}mask': mask[:, 1:],
               f'{ours}ref_logps': logps}
  arrays = {key: jnp.asarray(x) for key, x in arrays.items()}
  found = our_loss(kto_objective(options, c, POLICY), params[names[0]], arrays)
  return table_row(label, float(loss), grads, *found, c)


def rows(folder: Path, c: ModelConfig, params: dict) -> Iterator[str]:
  for label, (names, options) in KTO.items():
    yield kto_row(label, names, options, folder, c, params)
  for label, case in CPO.items():
    yield cpo_row(label, case, folder, c, params)
  yield from orpo_rows(folder, c, params)


def main() -> None:
  print_table(rows)


if __name__ == '__main__':
  main()
