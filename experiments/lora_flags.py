"""Flags of adapters: which one is trained, and which one is merged into the model at the start."""

from __future__ import annotations

import dataclasses

from absl import flags
from etils import epath

from jaxrl.errors import InputError
from jaxrl.models.config import Lora, ModelConfig
from jaxrl.models.lora import TARGETS, check_lora, possible_targets
from jaxrl.runs.adapter_stage import adapter_stage
from jaxrl.runs.session import Session

FLAGS = flags.FLAGS

flags.DEFINE_integer('lora_rank', None, 'Train an adapter of this rank on the frozen model, a '
                     'fresh one in each iteration; default: train the model itself.',
                     lower_bound=1)
flags.DEFINE_float('lora_alpha', None, 'What the adapter is multiplied by, divided by its rank; '
                   'default: twice the rank.')
flags.DEFINE_list('lora_targets', None, 'Projections with an adapter; default: '
                  f'{",".join(TARGETS)} (q,k,v,o for a mixture of experts).')
flags.DEFINE_bool('lora_rslora', False, 'Divide alpha by the root of the rank in place of the '
                  'rank (rank-stabilised LoRA).')
flags.DEFINE_string('adapter', None, 'PEFT folder of an adapter on --model, merged into it before '
                    'anything else.')


def without_effect() -> dict[str, str]:
  """Flags that the values of the others leave without effect, and why."""
  idle: dict[str, str] = {}
  if FLAGS.lora_rank is None:
    idle |= dict.fromkeys(('lora_alpha', 'lora_targets', 'lora_rslora'), 'no --lora_rank')
  if FLAGS.model is None:
    idle['adapter'] = 'no --model that it belongs to'
  return idle


def check() -> None:
  """Raises InputError for values that no model could be trained with."""
  if FLAGS.lora_alpha is not None and FLAGS.lora_alpha <= 0:
    raise InputError('the adapter would have no effect', where='--lora_alpha',
                     expected='a number > 0', found=FLAGS.lora_alpha)
  targets = FLAGS.lora_targets
  if targets is not None and (
      not targets or len({*targets}) < len(targets) or not {*targets} <= {*TARGETS}):
    raise InputError('the projections cannot be used', where='--lora_targets',
                     expected=f'some of {",".join(TARGETS)}, each once', found=','.join(targets))


def adapted(model: ModelConfig) -> ModelConfig | None:
  """The configuration with the adapter to train; None where the model itself is trained.

  Raises:
    InputError: the model has no such projections.
  """
  if FLAGS.lora_rank is None:
    return None
  chosen = FLAGS.lora_targets or possible_targets(model)
  targets = tuple(name for name in TARGETS if name in chosen)   # one order, whatever was typed
  made = dataclasses.replace(model, lora=Lora(
      FLAGS.lora_rank, FLAGS.lora_alpha or 2.0 * FLAGS.lora_rank, targets, FLAGS.lora_rslora))
  check_lora(made)
  return made


def start_from(session: Session, model: epath.Path) -> epath.Path:
  """The model folder, or with --adapter one that holds the two merged."""
  return adapter_stage(session, model, epath.Path(FLAGS.adapter)) if FLAGS.adapter else model
