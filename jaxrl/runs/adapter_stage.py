"""Stage: an adapter folder merged into the model that a run starts from."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import jax
from etils import epath

from jaxrl.models.identity import identity
from jaxrl.models.lora import adapter_shardings, attach, merge
from jaxrl.models.peft_folder import read_adapter
from jaxrl.runs.session import Session, clear, counts_of, load_model, write_model


def adapter_stage(session: Session, model: epath.Path, adapter: epath.Path) -> epath.Path:
  """Stage 'start/merge'; returns the merged model's folder, `start/model`.

  Raises:
    InputError: the adapter folder cannot be used, see `read_adapter`.
  """
  def merge_both(scratch: epath.Path) -> Mapping:
    lora, factors = read_adapter(adapter, session.model)
    adapted = dataclasses.replace(session.model, lora=lora)
    factors = jax.device_put(factors, adapter_shardings(adapted, session.mesh))
    base = load_model(session, model)

    def merged_with(params, factors):
      return merge(attach(params, factors), adapted)

    # Donated: the start and the merged model need not exist at one time.
    merged = jax.jit(merged_with, donate_argnums=0)(base.params, factors)
    clear(scratch / 'model')
    write_model(session, scratch / 'model', merged, model)
    return {'before': base.identity, 'after': identity(merged), 'rank': lora.rank,
            'targets': ','.join(lora.targets)}

  session.run.stage('start/merge', ('start/model',), counts_of, together=merge_both)
  return session.run.path('start/merge', 'start/model')
