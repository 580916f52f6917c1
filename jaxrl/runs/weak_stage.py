"""Stages: log-probs of stored responses under frozen models, and what alignment did to a weak one.

The log-ratio of an aligned weak model to its base, per response id, is what WSPO teaches a strong
model. Each model is in memory alone, and only until its stage is finished.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import jax
import numpy as np
import pyarrow as pa
from etils import epath

from jaxrl.data.batches import TokenRow
from jaxrl.errors import InputError
from jaxrl.runs import tables
from jaxrl.runs.session import Model, Session, load_model, open_model_folder
from jaxrl.tokens.tokenizer import Tokenizer, encode_text
from jaxrl.training.score import identity, score_rows

# One row per response; the metadata key `identity` is the hash of (parameters, ids, dtype policy).
LOGPS: pa.Schema = pa.schema([
    pa.field('prompt_id', pa.string(), False),
    pa.field('logps', pa.list_(pa.float32()), False)])   # one per response id
ROLES = ('base', 'aligned')


@dataclasses.dataclass(frozen=True)
class Responses:
  """What is scored: rows of ids with their prompts' ids, and how they are batched."""

  prompt_ids: Sequence[str]
  rows: Sequence[TokenRow]
  lengths: Sequence[int]
  batch_size: int


def logps_stage(
    session: Session, name: str, model: Model, responses: Responses
) -> list[np.ndarray]:
  """Stage 'iteration_01/NAME': log-probs of every response under `model`, stored and read back.

  Raises:
    InputError: what is stored belongs to other parameters, ids or compute dtype, or does not fit
      the responses; a log-prob is not finite.
  """
  stage = f'iteration_01/{name}'
  expected = identity(model.identity, responses.rows, session.compute)

  def score(scratch: epath.Path) -> list[np.ndarray]:
    del scratch
    with session.progress.stage(name.replace('_', ' '), len(responses.rows), 'responses') as bar:
      return score_rows(
          model.params, responses.rows, session.model, session.compute, mesh=session.mesh,
          lengths=responses.lengths, batch_size=responses.batch_size,
          pad_id=session.tokenizer.pad_id, on_rows=bar.advance)

  def produce(scratch: epath.Path, scored: list[np.ndarray]) -> dict:
    for prompt_id, logps in zip(responses.prompt_ids, scored, strict=True):
      if not np.isfinite(logps).all():
        raise InputError('a log-prob is not a finite number', where=f'{model.folder}, response '
                         f'to {prompt_id}', expected='finite numbers',
                         found=float(logps[~np.isfinite(logps)][0]),
                         fix='Check the checkpoint, or give --compute_dtype=float32')
    tables.write_table(scratch / f'{name}.parquet', [
        {'prompt_id': prompt_id, 'logps': logps.tolist()}
        for prompt_id, logps in zip(responses.prompt_ids, scored, strict=True)],
        LOGPS, metadata={'identity': expected})
    return {'responses': len(scored), 'tokens': sum(map(len, scored)), 'model': model.identity}

  session.run.stage(stage, (f'{stage}.parquet',), produce, together=score)
  path = session.run.path(stage, f'{stage}.parquet')
  table = tables.read_table(path, LOGPS)
  found = (table.schema.metadata or {}).get(b'identity', b'none').decode()
  if found != expected:
    raise InputError('the stored log-probs were computed for something else', where=path,
                     expected=f'identity {expected}', found=found,
                     fix='Delete the run folder, or run with the models and flags it was made with')
  stored = [np.asarray(logps, np.float32) for logps in table['logps'].to_pylist()]
  check_lengths(path, responses, stored)
  return stored


def check_lengths(
    where: object, responses: Responses, logps: Sequence[np.ndarray]
) -> None:
  """Raises InputError unless there is one log-prob per response id of every row."""
  if len(logps) != len(responses.rows):
    raise InputError('the log-probs are of other responses', where=where,
                     expected=f'{len(responses.rows)} rows', found=len(logps))
  for prompt_id, row, numbers in zip(responses.prompt_ids, responses.rows, logps, strict=True):
    if len(numbers) != len(row.response_ids):
      raise InputError('the log-probs do not fit the response', where=f'{where}, {prompt_id}',
                       expected=f'{len(row.response_ids)} numbers, one per response id',
                       found=len(numbers))


def weak_stage(
    session: Session, folders: Mapping[str, epath.Path], responses: Responses
) -> list[np.ndarray]:
  """Per response the log-ratio of the aligned weak model to its base, one float32 per response id.

  `folders` has 'base' and 'aligned', each a model of its own architecture. Stages
  'iteration_01/weak_base' and 'iteration_01/weak_aligned'. On a restart the models are loaded
  again, for their identities alone.

  Raises:
    InputError: the two models are the same, or as `logps_stage`.
  """
  logps, identities = {}, {}
  for role in ROLES:
    weak = session_for(session, folders[role])
    model = load_model(weak, folders[role])
    identities[role] = model.identity
    if identities[role] == identities.get('base') and role == 'aligned':
      raise InputError('the weak models have the same parameters, so there is nothing to learn',
                       where=folders[role], expected=f'a model trained from {folders["base"]}',
                       found='its very parameters', fix='Give the aligned model')
    logps[role] = logps_stage(weak, f'weak_{role}', model, responses)
    # Nothing else may hold on to the arrays: the strong model needs the memory.
    jax.tree.map(lambda x: x.delete(), model.params)
  return [aligned - base for aligned, base in zip(logps['aligned'], logps['base'], strict=True)]


def session_for(session: Session, folder: epath.Path) -> Session:
  """The session of another model: its architecture and its tokenizer."""
  model, tokenizer = open_model_folder(str(folder))
  return dataclasses.replace(session, model=model, tokenizer=tokenizer)


def check_tokenizers(ours: Tokenizer, theirs: Tokenizer, texts: Sequence[str]) -> None:
  """Raises InputError naming the first difference between two tokenizers.

  Ids of one are fed to the model of the other, so all of them must mean the same: the vocabulary
  id by id, the special ids, the chat template, and the ids of `texts`, which say that merges and
  normalisation agree. The id that pads is never read, and embeddings may be padded differently.
  """
  def refuse(what: str, mine: object, found: object):
    raise InputError(f'the tokenizers differ in {what}', where=theirs.folder,
                     expected=f'{mine}, as in {ours.folder}', found=found,
                     fix='Strong and weak models must share one tokenizer')

  mine, found = ({i: token for token, i in t.hf.get_vocab().items()} for t in (ours, theirs))
  for i in sorted(mine.keys() | found.keys()):
    if mine.get(i) != found.get(i):
      refuse(f'id {i}', repr(mine[i]) if i in mine else 'none',
             repr(found[i]) if i in found else 'none')
  special: Mapping[str, Callable[[Tokenizer], object]] = {
      'the ids that end a response': lambda t: sorted(t.eos_ids),
      'the id that ends a turn': lambda t: t.end_id,
      'the id that starts a text': lambda t: t.bos_id,
      'the ids before a text': lambda t: list(t.prefix_ids),
      'the special ids': lambda t: sorted(t.special_ids),
      'the ids of thinking tags': lambda t: sorted(t.thinking.values()),
      'what the template writes before a response': lambda t: t.response_lead}
  for what, read in special.items():
    if read(ours) != read(theirs):
      refuse(what, read(ours), read(theirs))
  templates = [t.hf.chat_template or '' for t in (ours, theirs)]
  if templates[0] != templates[1]:
    a, b = map(str, templates)
    at = next((n for n, (x, y) in enumerate(zip(a, b, strict=False)) if x != y),
              min(len(a), len(b)))
    refuse(f'the chat template, from character {at}', repr(a[at:at + 30]), repr(b[at:at + 30]))
  for text in texts:
    a_ids, b_ids = (encode_text(t, text) for t in (ours, theirs))
    if a_ids != b_ids:
      at = next((n for n, (x, y) in enumerate(zip(a_ids, b_ids, strict=False)) if x != y),
                min(len(a_ids), len(b_ids)))
      refuse(f'how they split text, from id {at} of {text[:30]!r}', a_ids[at:at + 5],
             b_ids[at:at + 5])
