"""Flags of supervised fine-tuning, checked together before anything is read."""

from __future__ import annotations

import sys

import jax
from absl import flags

from experiments import common_flags, data_flags, lora_flags, training_flags
from jaxrl.data.tasks import TASKS
from jaxrl.errors import InputError
from jaxrl.models.config import ModelConfig

FLAGS = flags.FLAGS
MODULES = (common_flags, data_flags, lora_flags, training_flags, sys.modules[__name__])

flags.DEFINE_string('response_field', None,
                    'Field of the response; default: response, or else the last message.')
flags.DEFINE_integer('max_length', None, 'Longest row, prompt and response together, in ids. '
                     'Default: the length the model was made for; 512 for a new model, which is '
                     'made for this length.', lower_bound=2)
flags.DEFINE_integer('eval_every', None, 'Steps between looks at the held-out loss, beside those '
                     'before and after training; a multiple of --save_every.', lower_bound=1)
flags.DEFINE_integer('d_model', 256, 'New model: width.', lower_bound=2)
flags.DEFINE_integer('layers', 4, 'New model: layers.', lower_bound=1)
flags.DEFINE_integer('heads', 8, 'New model: attention heads, each d_model / heads wide.',
                     lower_bound=1)
flags.DEFINE_integer('kv_heads', 4, 'New model: heads of keys and values.', lower_bound=1)
flags.DEFINE_integer('d_mlp', 640, 'New model: width inside the MLP.', lower_bound=1)
flags.DEFINE_integer('vocab_size', 2048, 'New model: most entries of its tokenizer, which is '
                     'trained on the training text.', lower_bound=261)   # bytes and special tokens

NEW_MODEL = ('d_model', 'layers', 'heads', 'kv_heads', 'd_mlp', 'vocab_size')
NEW_MODEL_LENGTH = 512
SOLVED_TASKS = tuple(sorted(name for name, task in TASKS.items() if task.gold_solution))


def parse(argv: list[str]) -> list[str]:
  """Reads the flags. Defaults that differ here: rows hold responses, not gold answers, and the
  learning rate is 1e-5 for a checkpoint, 1e-3 for a new model."""
  FLAGS.set_default('task', None)
  rest = FLAGS(argv)
  FLAGS.set_default('learning_rate', 1e-5 if FLAGS.model else 1e-3)
  return rest


def without_effect() -> dict[str, str]:
  """Flags that the values of the others leave without effect, and why."""
  idle = (lora_flags.without_effect() | training_flags.without_effect()
          | {'check_timeout': 'no answers are checked'})
  if FLAGS.test is None:
    idle |= dict.fromkeys(('test_limit', 'eval_every'), 'no --test')
  if FLAGS.task is None:
    idle |= dict.fromkeys(('answer_field', 'template'), 'no --task')
  else:
    idle['response_field'] = f'the response is the worked solution of --task={FLAGS.task}'
  if FLAGS.model is not None:
    idle |= dict.fromkeys(NEW_MODEL, '--model is given, so no new model is made')
  return idle


def check() -> None:
  """Raises InputError for a value out of range, or a flag that the others leave without effect."""
  for name, why in without_effect().items():
    common_flags.refuse(FLAGS[name].present > 0, name, why)
  common_flags.check_finite(*MODULES)
  if FLAGS.train is None:
    raise InputError('there is nothing to learn from', where='--train', expected='a file',
                     found='none')
  if FLAGS.task is not None and FLAGS.task not in SOLVED_TASKS:
    raise InputError('the task has no worked solutions', where='--task',
                     expected=f'one of {", ".join(SOLVED_TASKS)}', found=FLAGS.task,
                     fix='Leave it out and give rows with prompt and response')
  if FLAGS.epochs <= 0:
    raise InputError('there is nothing to train', where='--epochs', expected='a number > 0',
                     found=FLAGS.epochs)
  if FLAGS.eval_every is not None and FLAGS.eval_every % FLAGS.save_every:
    raise InputError('a look at the held-out loss must fall on a checkpoint, so that a restart '
                     'repeats it', where='--eval_every',
                     expected=f'a multiple of --save_every={FLAGS.save_every}',
                     found=FLAGS.eval_every)
  if FLAGS.max_steps is not None and FLAGS.max_steps <= FLAGS.warmup_steps:
    raise InputError('the warm-up leaves no step at full learning rate', where='--warmup_steps',
                     expected=f'fewer than --max_steps={FLAGS.max_steps}',
                     found=FLAGS.warmup_steps)
  if FLAGS.model is None:
    new_config(FLAGS.vocab_size)
  common_flags.optimizer_config()
  lora_flags.check()


def check_devices(mesh: jax.sharding.Mesh) -> None:
  """Raises InputError where a batch does not divide over the devices of the mesh."""
  training_flags.check_devices(mesh)


def new_config(vocab_size: int) -> ModelConfig:
  """A model shaped like Llama.

  Raises:
    InputError: sizes that do not divide.
  """
  if FLAGS.d_model % (2 * FLAGS.heads):   # rotary positions turn pairs of numbers
    raise InputError('the width does not divide into heads of even size', where='--d_model',
                     expected=f'a multiple of 2 * --heads={2 * FLAGS.heads}', found=FLAGS.d_model)
  if FLAGS.heads % FLAGS.kv_heads:
    raise InputError('the heads do not divide into groups', where='--kv_heads',
                     expected=f'a divisor of --heads={FLAGS.heads}', found=FLAGS.kv_heads)
  return ModelConfig(
      family='llama', vocab_size=vocab_size, d_model=FLAGS.d_model, n_layers=FLAGS.layers,
      n_heads=FLAGS.heads, n_kv=FLAGS.kv_heads, d_head=FLAGS.d_model // FLAGS.heads,
      d_mlp=FLAGS.d_mlp, max_length=FLAGS.max_length or NEW_MODEL_LENGTH, tie_embeddings=True)


def row_limit(model: ModelConfig) -> int:
  """Longest row in ids.

  Raises:
    InputError: more than the model was made for.
  """
  limit = FLAGS.max_length or model.max_length
  if limit > model.max_length:
    raise InputError('rows would be longer than the model was made for', where='--max_length',
                     expected=f'at most {model.max_length}, from its config.json', found=limit)
  return limit


def effective() -> dict[str, str]:
  """Flags for the run folder: all that have an effect."""
  idle = without_effect()
  return {
      name: text for name, text in common_flags.effective_flags(*MODULES).items()
      if name not in idle
  }
