"""What a run does, read from its own flags: all that decides which programs it compiles."""

from __future__ import annotations

import dataclasses
from types import ModuleType

from absl import flags

from experiments import common_flags, engine_flags, lora_flags, rounds_flags
from jaxrl.errors import InputError
from jaxrl.models.config import ModelConfig
from jaxrl.models.decoder import REMAT
from jaxrl.sampling.requests import SamplingConfig
from jaxrl.sampling.sizes import EngineConfig
from jaxrl.training.logps import ComputePolicy
from jaxrl.training.optimizer import OptimizerConfig
from launch.planning.published import model_config

FLAGS = flags.FLAGS


@dataclasses.dataclass(frozen=True)
class Lengths:
  """Ids of every prompt and of every response that a plan reckons with."""

  prompt: int
  response: int


@dataclasses.dataclass(frozen=True)
class Setting:
  """A run of one of the iterated methods, apart from its data and devices."""

  model: ModelConfig
  adapted: ModelConfig | None       # with the adapter that is trained in place of the model
  compute: ComputePolicy
  param_dtype: str
  optimizer: OptimizerConfig
  offloads: bool                    # the optimizer's state rests in the memory of the host
  loss: str
  loss_options: dict
  layout: str
  batch_size: int                   # pairs
  pack_multiple: int
  buckets: tuple[int, ...]          # lengths that rows are padded to
  score_batch: int                  # rows
  sampling: SamplingConfig
  engine: EngineConfig
  max_prompt: int
  draws: int
  looks: bool                       # whether training stops to sample, see --dev_prompts
  lengths: Lengths


@dataclasses.dataclass(frozen=True)
class Given:
  """What the flags settle; None is left to the search."""

  mesh: tuple[int, int, int, int] | None   # data, fsdp, sequence, tensor
  micro_batches: int | None
  remat: str | None
  score_batch: int | None
  rollout_tensor: int | None

  @property
  def remats(self) -> tuple[str, ...]:
    return tuple(REMAT) if self.remat is None else (self.remat,)


def read_setting(
    experiment: ModuleType, *, prompt_tokens: int | None, response_tokens: int | None
) -> tuple[Setting, Given]:
  """The run that the flags describe, after `experiment.parse`, as `experiment.check` sees it.

  Problems are not read. All prompts and responses count as long as they may be, or as given.

  Raises:
    InputError: no model, a flag that the run itself would refuse, or lengths beyond its limits.
  """
  if FLAGS.model is None:
    raise InputError('there is no model to plan for', where='--model',
                     expected='a folder with a config.json, or the name of a published model')
  for name in ('train', 'test'):      # `check` wants them named; nobody reads them
    if FLAGS[name].value is None:
      FLAGS[name].value = 'unread'
  config = experiment.check()
  model = model_config(FLAGS.model)
  lengths = Lengths(_within('prompt_tokens', prompt_tokens, FLAGS.max_prompt_length),
                    _within('response_tokens', response_tokens, FLAGS.max_new_tokens))
  setting = Setting(
      model=model, adapted=lora_flags.adapted(model), compute=common_flags.compute_policy(),
      param_dtype=FLAGS.param_dtype, optimizer=common_flags.optimizer_config(),
      offloads=FLAGS.offload_optimizer, loss=config.loss, loss_options=config.loss_options,
      layout=FLAGS.layout, batch_size=FLAGS.batch_size,
      pack_multiple=FLAGS.pack_multiple,
      buckets=common_flags.length_buckets(rounds_flags.longest_row()),
      score_batch=FLAGS.score_batch, sampling=config.sampling,
      engine=engine_flags.engine_config(FLAGS.compute_dtype), max_prompt=FLAGS.max_prompt_length,
      draws=FLAGS.samples_per_prompt, looks=FLAGS.dev_prompts > 0, lengths=lengths)

  def given(name):
    return FLAGS[name].value if FLAGS[name].present else None

  sizes = common_flags.mesh_sizes()
  mesh = None if sizes is None else (
      sizes['data'], sizes['fsdp'], sizes['sequence'], sizes['tensor'])
  return setting, Given(mesh, given('micro_batches'), given('remat'),
                        given('score_batch'), given('rollout_tensor'))


def _within(name: str, value: int | None, most: int) -> int:
  if value is None:
    return most
  if not 1 <= value <= most:
    raise InputError('the run allows no such length', where=f'--{name}',
                     expected=f'1 to {most}', found=value)
  return value
