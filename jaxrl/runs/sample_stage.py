"""Stage: N responses per prompt from the current model, kept as they come."""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import json
import statistics
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from etils import epath

from jaxrl.runs import tables
from jaxrl.runs.progress import Bar
from jaxrl.runs.sample_log import open_log, read_log
from jaxrl.runs.session import Model, Session, sampling_requests
from jaxrl.sampling.engine import Engine
from jaxrl.sampling.generate import engine_params, generate
from jaxrl.sampling.requests import Sample
from jaxrl.tokens.prompts import EncodedPrompt
from jaxrl.tokens.tokenizer import decode

LOG = 'drawn.jsonl'           # in the scratch folder


@dataclasses.dataclass(frozen=True)
class Draws:
  """How many responses each prompt gets, and how."""

  count: int
  temperature: float
  seed: int
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
  requests = sampling_requests(list(prompts), draws.temperatures)
  drawn = {}
  for sample in _told(bar, generate(engine, params, requests, seed=draws.seed)):
    prompt = prompts[sample.request // len(draws.temperatures)]
    drawn[prompt.prompt_id, sample.draw] = _record(sample)
  return _rows(session, prompts, draws, drawn)


def _told(bar: Bar, samples: Iterable[Sample]) -> Iterator[Sample]:
  for sample in samples:
    yield sample
    bar.advance()


def _record(sample: Sample) -> dict:
  return {'response_ids': sample.response_ids, 'logprobs': sample.logprobs,
          'finish_reason': sample.finish_reason}


def _rows(
    session: Session, prompts: Sequence[EncodedPrompt], draws: Draws,
    drawn: Mapping[tuple[str, int], Mapping],
) -> list[dict]:
  """All rows in order, from what was drawn by (prompt_id, draw)."""
  rows = []
  for prompt in prompts:
    for index in range(len(draws.temperatures)):
      record = drawn[prompt.prompt_id, index]
      rows.append({
          'prompt_id': prompt.prompt_id, 'sample_index': index, 'prompt': prompt.text,
          'response': decode(session.tokenizer, record['response_ids']),
          'prompt_ids': list(prompt.ids), **record})
  return rows


def sample_stage(
    session: Session, iteration: int, engine: Engine, model: Model,
    prompts: Sequence[EncodedPrompt], draws: Draws, *, name: str = 'samples',
) -> Mapping:
  """Writes `NAME.parquet`, a table of samples, and one metrics record; returns counts.

  Finished samples are on the disk as they come, in the stage's scratch folder: a kill costs what
  was in flight, and the same command draws the missing (prompt, draw) pairs, to the same bits.

  Raises:
    InputError: an earlier attempt was made with other prompts, draws or parameters.
  """
  label = name.removesuffix('s')
  file, name = f'{name}.parquet', f'iteration_{iteration:02d}/{name}'
  temperatures = draws.temperatures

  def produce(scratch: epath.Path) -> dict:
    params = engine_params(engine, model.params)
    asked = [(prompt.prompt_id, n) for prompt in prompts for n in range(len(temperatures))]
    before = _lengths_before(session, iteration, file.removesuffix('.parquet'))
    requests = {
        draw: dataclasses.replace(request, expected_tokens=before.get(draw[0]))
        for draw, request in zip(
            asked, sampling_requests(list(prompts), temperatures), strict=True)}
    tokens, start = 0, time.perf_counter()
    with (session.progress.stage(
        f'iteration {iteration}: {label}', len(requests), 'samples') as bar,
        open_log(scratch / LOG, _header(engine, model, prompts, draws),
                 say=session.progress.line) as log):
      bar.advance(len(log))
      missing = [draw for draw in asked if draw not in log]
      samples = generate(engine, params, [requests[draw] for draw in missing], seed=draws.seed,
                         draws=len(temperatures))
      for sample in _told(bar, samples):
        tokens += len(sample.response_ids)
        log.append([{'prompt_id': missing[sample.request][0], 'sample_index': sample.draw}
                    | _record(sample)])
    seconds = time.perf_counter() - start
    drawn = {(row['prompt_id'], row['sample_index']): {
        field: row[field] for field in ('response_ids', 'logprobs', 'finish_reason')}
        for row in read_log(scratch / LOG)}
    common = {'top_p': engine.sampling.top_p, 'iteration': iteration,
              'source_model': model.identity}
    rows = [row | common | {'temperature': temperatures[row['sample_index']]}
            for row in _rows(session, prompts, draws, drawn)]
    tables.write_table(scratch / file, rows, tables.SAMPLES)
    counts = {
        'prompts': len(prompts), 'samples': len(rows),
        'tokens': sum(len(row['response_ids']) for row in rows),
        'truncated': sum(row['finish_reason'] == 'length' for row in rows),
    }
    speed = {'perf/tokens_per_second': tokens / seconds} if tokens else {}
    session.record(iteration, label, counts | speed)
    return counts

  return session.run.stage(name, (f'{name}.parquet',), produce).counts


def _lengths_before(session: Session, iteration: int, name: str) -> dict[str, int]:
  """Mean response length of each prompt in the iteration before, where that drew for it."""
  if f'iteration_{iteration - 1:02d}/{name}' not in session.run.entries:
    return {}
  lengths = collections.defaultdict(list)
  for row in read_samples(session, iteration - 1, name):
    lengths[row['prompt_id']].append(len(row['response_ids']))
  return {prompt: round(statistics.fmean(of)) for prompt, of in lengths.items()}


def _header(
    engine: Engine, model: Model, prompts: Sequence[EncodedPrompt], draws: Draws
) -> dict[str, Any]:
  """What the samples depend on."""
  ids = json.dumps([[p.prompt_id, list(p.ids)] for p in prompts]).encode()
  sampling = dataclasses.asdict(engine.sampling)
  return {'model': model.identity, 'prompts': hashlib.sha256(ids).hexdigest(),
          'seed': draws.seed, 'temperatures': list(draws.temperatures),
          'sampling': json.dumps(sampling), 'dtype': engine.config.dtype}


def read_samples(session: Session, iteration: int, name: str = 'samples') -> list[dict]:
  """Rows of the finished stage, verified against the manifest."""
  name = f'iteration_{iteration:02d}/{name}'
  return tables.read_table(session.run.path(name, f'{name}.parquet'), tables.SAMPLES).to_pylist()
