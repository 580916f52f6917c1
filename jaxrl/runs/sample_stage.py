"""Stage: N responses per prompt from the current model, kept as they come.

Of several processes each draws the responses of its own share of the prompts on its own devices.
"""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import itertools
import json
import statistics
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
from etils import epath

from jaxrl.parallel import hosts
from jaxrl.runs import tables
from jaxrl.runs.progress import Bar
from jaxrl.runs.sample_log import read_log
from jaxrl.runs.sample_parts import LOG, join_parts, own_part, shares
from jaxrl.runs.session import Model, Session, sampling_requests
from jaxrl.sampling.engine import Engine
from jaxrl.sampling.generate import engine_params, generate
from jaxrl.sampling.requests import Sample
from jaxrl.tokens.prompts import EncodedPrompt
from jaxrl.tokens.tokenizer import decode


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
  """Rows of (prompt, draw) in order, without what only the stage knows (iteration, model).

  Of several processes all call this, and process 0 is given the rows, the others none.
  """
  own = _own(prompts)
  requests = sampling_requests(own, draws.temperatures)
  drawn = [
      {'prompt_id': own[sample.request // len(draws.temperatures)].prompt_id,
       'sample_index': sample.draw} | _record(sample)
      for sample in _told(bar, generate(engine, params, requests, seed=draws.seed))]
  shared = hosts.gather(drawn, 'the samples')
  return [] if shared is None else _rows(session, prompts, draws, itertools.chain(*shared))


def _own(prompts: Sequence[EncodedPrompt]) -> list[EncodedPrompt]:
  """The prompts that this process draws for."""
  return list(prompts)[jax.process_index()::jax.process_count()]


def share_of(prompts: Sequence[EncodedPrompt]) -> int:
  """How many of the prompts this process draws for in `draw_rows`."""
  return len(_own(prompts))


def _told(bar: Bar, samples: Iterable[Sample]) -> Iterator[Sample]:
  for sample in samples:
    yield sample
    bar.advance()


def _record(sample: Sample) -> dict:
  return {'response_ids': sample.response_ids, 'logprobs': sample.logprobs,
          'finish_reason': sample.finish_reason}


def _rows(
    session: Session, prompts: Sequence[EncodedPrompt], draws: Draws, records: Iterable[Mapping]
) -> list[dict]:
  """All rows in order, from what was drawn."""
  drawn = {(row['prompt_id'], row['sample_index']): {
      field: row[field] for field in ('response_ids', 'logprobs', 'finish_reason')}
      for row in records}
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

  def draw(scratch: epath.Path) -> float | None:
    """Draws what is missing, each process its share; tokens per second of all, if there were any.
    """
    params = engine_params(engine, model.params)
    asked = [(prompt.prompt_id, n) for prompt in prompts for n in range(len(temperatures))]
    before = _lengths_before(session, iteration, file.removesuffix('.parquet'))
    requests = [
        dataclasses.replace(request, expected_tokens=before.get(prompt_id))
        for (prompt_id, _), request in zip(
            asked, sampling_requests(list(prompts), temperatures), strict=True)]
    tokens, start = 0, time.perf_counter()
    with own_part(scratch, _header(engine, model, prompts, draws), session.progress.line) as log:
      missing = hosts.broadcast([n for n, draw in enumerate(asked) if draw not in log])
      own = shares(missing, [prompt_id for prompt_id, _ in asked])[jax.process_index()]
      total = len(asked) - len(missing) + len(own)
      with session.progress.stage(f'iteration {iteration}: {label}', total, 'samples') as bar:
        bar.advance(len(log))
        samples = generate(engine, params, [requests[n] for n in own], seed=draws.seed,
                           draws=len(temperatures))
        for sample in _told(bar, samples):
          tokens += len(sample.response_ids)
          log.append([{'prompt_id': asked[own[sample.request]][0], 'sample_index': sample.draw}
                      | _record(sample)])
    drawn = sum(hosts.gather(tokens, 'the samples') or ())
    return drawn / (time.perf_counter() - start) if drawn else None

  def produce(scratch: epath.Path, speed: float | None) -> dict:
    join_parts(scratch, _header(engine, model, prompts, draws), expected=jax.process_count())
    common = {'top_p': engine.sampling.top_p, 'iteration': iteration,
              'source_model': model.identity}
    rows = [row | common | {'temperature': temperatures[row['sample_index']]}
            for row in _rows(session, prompts, draws, read_log(scratch / LOG))]
    tables.write_table(scratch / file, rows, tables.SAMPLES)
    counts = {
        'prompts': len(prompts), 'samples': len(rows),
        'tokens': sum(len(row['response_ids']) for row in rows),
        'truncated': sum(row['finish_reason'] == 'length' for row in rows),
    }
    perf = {'perf/tokens_per_second': speed} if speed is not None else {}
    session.record(iteration, label, counts | perf)
    return counts

  return session.run.stage(name, (f'{name}.parquet',), produce, together=draw).counts


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
