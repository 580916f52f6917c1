"""Stage: N responses per prompt from the current model, written in parts that survive a kill."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping, Sequence

import pyarrow as pa
from etils import epath

from jaxrl.errors import InputError
from jaxrl.runs import tables
from jaxrl.runs.progress import Bar
from jaxrl.runs.session import Model, Session, sampling_requests
from jaxrl.sampling.engine import Engine
from jaxrl.sampling.generate import engine_params, generate
from jaxrl.tokens.prompts import EncodedPrompt
from jaxrl.tokens.tokenizer import decode


@dataclasses.dataclass(frozen=True)
class Draws:
  """How many responses each prompt gets, and how."""

  count: int
  temperature: float
  seed: int
  part_prompts: int           # prompts per part; a kill loses at most the part it interrupts
  extra: tuple[float, ...] = ()   # temperatures of further responses, which have no vote

  @property
  def temperatures(self) -> tuple[float, ...]:
    """Of every response of a prompt, by `sample_index`."""
    return (self.temperature,) * self.count + self.extra


def draw_rows(
    session: Session, engine: Engine, params: dict, prompts: Sequence[EncodedPrompt], draws: Draws,
    bar: Bar,
) -> list[dict]:
  """Rows of (prompt, draw) in order, without what only the stage knows (iteration, model)."""
  each = len(draws.temperatures)
  requests = sampling_requests(list(prompts), draws.temperatures)
  rows: list[dict] = [{}] * len(requests)
  for sample in generate(engine, params, requests, seed=draws.seed):
    prompt = prompts[sample.request // each]
    rows[sample.request] = {
        'prompt_id': prompt.prompt_id,
        'sample_index': sample.request % each,
        'prompt': prompt.text,
        'response': decode(session.tokenizer, sample.response_ids),
        'prompt_ids': list(prompt.ids),
        'response_ids': sample.response_ids,
        'logprobs': sample.logprobs,
        'finish_reason': sample.finish_reason,
    }
    bar.advance()
  return rows


def sample_stage(
    session: Session, iteration: int, engine: Engine, model: Model,
    prompts: Sequence[EncodedPrompt], draws: Draws, *, name: str = 'samples',
) -> Mapping:
  """Writes `NAME.parquet`, a table of samples, and one metrics record; returns counts."""
  label = name.removesuffix('s')
  file, name = f'{name}.parquet', f'iteration_{iteration:02d}/{name}'

  def produce(scratch: epath.Path) -> dict:
    params = engine_params(engine, model.params)
    parts = []
    tokens, seconds = 0, 0.0   # of this attempt; parts of an earlier one took it no time
    total = len(prompts) * len(draws.temperatures)
    with session.progress.stage(f'iteration {iteration}: {label}', total, 'samples') as bar:
      for start in range(0, len(prompts), draws.part_prompts):
        group = prompts[start:start + draws.part_prompts]
        part = scratch / f'part_{start:08d}.parquet'
        table = _finished_part(session, part, group, len(draws.temperatures))
        if table is not None:
          bar.advance(table.num_rows)
        else:
          start_time = time.perf_counter()
          rows = draw_rows(session, engine, params, group, draws, bar)
          seconds += time.perf_counter() - start_time
          tokens += sum(len(row['response_ids']) for row in rows)
          common = {
              'top_p': engine.sampling.top_p, 'iteration': iteration,
              'source_model': model.identity}
          tables.write_table(part, [
              row | common | {'temperature': draws.temperatures[row['sample_index']]}
              for row in rows], tables.SAMPLES)
          table = tables.read_table(part, tables.SAMPLES)
        parts.append(table)
    table = pa.concat_tables(parts)
    tables.write_table(scratch / file, table, tables.SAMPLES)
    reasons = table['finish_reason'].to_pylist()
    counts = {
        'prompts': len(prompts), 'samples': table.num_rows,
        'tokens': sum(len(ids) for ids in table['response_ids'].to_pylist()),
        'truncated': reasons.count('length'),
    }
    speed = {'perf/tokens_per_second': tokens / seconds} if tokens else {}
    session.record(iteration, label, counts | speed)
    return counts

  return session.run.stage(name, (f'{name}.parquet',), produce).counts


def _finished_part(
    session: Session, part: epath.Path, group: Sequence[EncodedPrompt], count: int
) -> pa.Table | None:
  """What an earlier attempt drew for these prompts; None where it has to be drawn.

  A damaged part is named and drawn again, which gives the same responses.

  Raises:
    InputError: the part was drawn for other prompts.
  """
  if not part.exists():
    return None
  try:
    table = tables.read_table(part, tables.SAMPLES)
  except InputError as error:
    session.progress.line(f'{str(error).rstrip(".")}; drawing it again')
    return None
  if table['prompt_ids'].to_pylist() != [list(p.ids) for p in group for _ in range(count)]:
    raise InputError('the prompts have changed since this part was drawn', where=part,
                     fix='Restore the file of problems, or start with another --run_dir')
  return table


def read_samples(session: Session, iteration: int, name: str = 'samples') -> list[dict]:
  """Rows of the finished stage, verified against the manifest."""
  name = f'iteration_{iteration:02d}/{name}'
  return tables.read_table(session.run.path(name, f'{name}.parquet'), tables.SAMPLES).to_pylist()
