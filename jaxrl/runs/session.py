"""What every stage of a run needs, opened once: folder, model, tokenizer, mesh, logs."""

from __future__ import annotations

import contextlib
import dataclasses
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence

import jax
import jax.numpy as jnp
from etils import epath
from rich.console import Console

from jaxrl.errors import InputError
from jaxrl.models.config import ModelConfig
from jaxrl.models.frozen import load_frozen
from jaxrl.models.hugging_face import load_params, read_config, save_model
from jaxrl.models.identity import identity
from jaxrl.models.params import count_params
from jaxrl.parallel import hosts
from jaxrl.runs.metrics import MetricsLog
from jaxrl.runs.progress import Progress
from jaxrl.runs.report import write_report
from jaxrl.runs.stages import Run
from jaxrl.sampling.requests import Request
from jaxrl.tokens.prompts import EncodedPrompt
from jaxrl.tokens.tokenizer import Tokenizer, load_tokenizer
from jaxrl.training.logps import ComputePolicy

# Streams of random numbers; each stage that draws has its own, so none repeats another's.
SAMPLE_STREAM, VOTE_STREAM, PAIR_STREAM, TRAIN_STREAM, ADAPTER_STREAM, WRITE_STREAM = range(6)


class NoMetrics:
  """The log of a process that does not write: all have the same numbers, and one records them."""

  def write(self, iteration: int, stage: str, step: int, values: Mapping[str, float]) -> None:
    pass

  def rewind(self, iteration: int, stage: str, step: int | None) -> None:
    pass

  def sync(self) -> None:
    pass


@contextlib.contextmanager
def open_metrics(run: Run) -> Iterator[MetricsLog | NoMetrics]:
  """The log of the run's numbers, in the process that writes."""
  if not run.writes:
    yield NoMetrics()
    return
  with MetricsLog(run.folder / 'metrics.jsonl') as metrics:
    yield metrics


def open_progress() -> Progress:
  """What a person sees, of several processes from one alone."""
  return Progress(None if hosts.is_writer() else Console(quiet=True))


def report(run: Run) -> None:
  """Writes the page of all that is finished."""
  if run.writes:
    write_report(run.folder)


@dataclasses.dataclass(frozen=True)
class Session:
  """An open run; passed to every stage, changed by none."""

  run: Run
  metrics: MetricsLog | NoMetrics
  progress: Progress
  mesh: jax.sharding.Mesh
  model: ModelConfig
  tokenizer: Tokenizer
  compute: ComputePolicy
  seed: int
  programs: Callable[[], int]   # XLA programs compiled by this process so far
  param_dtype: str = 'float32'  # of the parameters between steps

  def stream_seed(self, iteration: int, stream: int) -> int:
    """A seed of 32 bits for one kind of draw in one iteration."""
    return zlib.crc32(f'{self.seed} {iteration} {stream}'.encode())

  def record(self, iteration: int, stage: str, numbers: Mapping[str, float]) -> None:
    """One metrics record of a stage that has no steps, in place of what a killed attempt left."""
    self.metrics.rewind(iteration, stage, None)
    self.metrics.write(iteration, stage, 0, numbers)
    self.metrics.sync()


@dataclasses.dataclass(frozen=True)
class Model:
  """Parameters with the name and the hash that logs and records carry."""

  folder: epath.Path
  params: dict
  identity: str


def open_model_folder(folder: str) -> tuple[ModelConfig, Tokenizer]:
  """Configuration and tokenizer of a Hugging Face folder, checked against each other."""
  config = read_config(folder)
  return config, load_tokenizer(folder, vocab_size=config.vocab_size)


def _same_config(session: Session, folder: epath.Path) -> ModelConfig:
  config = read_config(folder)
  if config != session.model:
    changed = [
        f.name for f in dataclasses.fields(config)
        if getattr(config, f.name) != getattr(session.model, f.name)]
    raise InputError('the model differs from the one the run started with', where=folder,
                     expected='the same config.json', found=f'other {", ".join(changed)}')
  return config


def load_model(session: Session, folder: epath.Path) -> Model:
  """Master parameters on the mesh, in the type that the session keeps them in.

  Raises:
    InputError: the folder holds another architecture than the run started with.
  """
  config = _same_config(session, folder)
  params = load_params(folder, config, mesh=session.mesh, dtype=jnp.dtype(session.param_dtype))
  return Model(folder, params, identity(params))


def master_bytes(session: Session) -> int:
  """Bytes that the parameters of training will take on each device."""
  parts = session.mesh.size // session.mesh.shape['data']
  return count_params(session.model) * jnp.dtype(session.param_dtype).itemsize // parts


def load_reference(session: Session, folder: epath.Path, storage: str) -> Model:
  """A model that is only read, stored as `storage`; its identity is that of what is stored.

  Raises:
    InputError: the folder holds another architecture than the run started with.
  """
  config = _same_config(session, folder)
  params = load_frozen(folder, config, mesh=session.mesh, storage=storage)
  return Model(folder, params, identity(params))


def write_model(session: Session, folder: epath.Path, params: dict, source: epath.Path) -> None:
  """A Hugging Face folder in float32, so that the next iteration starts from these very bits."""
  save_model(folder, params, session.model, tokenizer_from=source, dtype=jnp.float32)


def clear(*folders: epath.Path) -> None:
  """Removes what an attempt that was killed left there; all processes find it gone."""
  for folder in folders:
    if hosts.is_writer() and folder.exists():
      folder.rmtree()
  hosts.barrier('what was left is removed')


def counts_of(scratch: epath.Path, counts: Mapping) -> Mapping:
  """`produce` of a stage whose outputs all processes have written together."""
  del scratch
  return counts


def sampling_requests(
    prompts: list[EncodedPrompt], temperatures: Sequence[float]
) -> list[Request]:
  """One request per prompt and temperature, those of a prompt together; keyed by its id."""
  return [
      Request(zlib.crc32(p.prompt_id.encode()), draw, p.ids, temperature)
      for p in prompts for draw, temperature in enumerate(temperatures)
  ]
