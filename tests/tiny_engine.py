"""A small rollout engine, and what it has to draw: whole forward passes, and a loop in numpy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from scipy import special

from jaxrl.models.decoder import forward
from jaxrl.models.decoder import logits as decoder_logits
from jaxrl.parallel.mesh import make_mesh
from jaxrl.sampling.engine import make_engine
from jaxrl.sampling.generate import engine_params, generate
from jaxrl.sampling.requests import Request, SamplingConfig
from jaxrl.sampling.sizes import EngineConfig
from tests.tiny_model import CONFIG, random_params

EOS = (3, 17, 41)
MAX_PROMPT, MAX_NEW = 8, 6
PAD = 0


def one_device():
  return make_mesh(devices=jax.devices()[:1])


def config(slots=8, cadence=3, prefill_tokens=16, **others):
  return EngineConfig(
      slots, cadence, prefill_tokens, **{'prompt_multiple': 4, 'dtype': 'float32'} | others)


def build(
    sizes=None, mesh=None, *, model=CONFIG, params=None, max_prompt=MAX_PROMPT, eos_ids=EOS,
    header=(), decode_text=None, max_new_tokens=MAX_NEW, **settings
):
  """(engine, its parameters)."""
  engine = make_engine(
      model, SamplingConfig(max_new_tokens, **settings), sizes or config(),
      one_device() if mesh is None else mesh, max_prompt=max_prompt, eos_ids=eos_ids, pad_id=PAD,
      header=header, decode_text=decode_text)
  return engine, engine_params(engine, random_params(model) if params is None else params)


def run(built, requests, seed=0, **options):
  """Samples in the order of the requests, a list; each is answered exactly once."""
  engine, params = built
  samples = sorted(generate(engine, params, requests, seed=seed, **options),
                   key=lambda s: s.request)
  assert [s.request for s in samples] == list(range(len(requests)))
  return samples


def random_requests(rng, count, draws=1, temperature=None, longest=MAX_PROMPT):
  """`count` prompts of 1 to `longest` ids, `draws` of each."""
  made = []
  for key in range(count):
    ids = tuple(rng.integers(0, CONFIG.vocab_size, rng.integers(1, longest + 1)).tolist())
    t = rng.choice([0.0, 0.7, 1.0, 1.5]) if temperature is None else temperature
    made += [Request(key, draw, ids, float(t)) for draw in range(draws)]
  return made


@functools.cache
def _params(model):
  return jax.tree.map(jnp.asarray, random_params(model))


@functools.cache
def _whole_forward(model):
  @jax.jit
  def last_logits(params, ids, last):         # [T] -> [V]
    return decoder_logits(params, forward(params, ids[None], model)[0, last], model)

  return last_logits


@functools.cache
def _noise_of(vocabulary, length):
  def of_token(seed, key, draw, new):
    folded = jax.random.key(seed)
    for n in (key, draw, new):
      folded = jax.random.fold_in(folded, n)
    return jax.random.gumbel(folded, (vocabulary,), jnp.float32)

  return jax.jit(lambda seed, key, draw: jax.vmap(
      lambda new: of_token(seed, key, draw, new))(jnp.arange(length, dtype=jnp.uint32)))


def next_logits(ids, params=None, model=CONFIG):
  """[V] float64 of the token after `ids`, by a whole forward pass without a cache."""
  padded = np.zeros(model.max_length, np.int32)
  padded[:len(ids)] = ids
  return np.asarray(_whole_forward(model)(
      _params(model) if params is None else params, padded, np.int32(len(ids) - 1)), np.float64)


def log_probs_of(prompt_ids, response_ids, params=None, model=CONFIG):
  """The log-prob of each response id at temperature 1, by whole forward passes."""
  ids, n = [*prompt_ids, *response_ids], len(prompt_ids)
  logits = [next_logits(ids[:n + m], params, model) for m in range(len(response_ids))]
  return [special.log_softmax(x)[token] for x, token in zip(logits, response_ids, strict=True)]


def naive_sample(engine, request, seed=0, params=None):
  """(response ids, log-probs, finish reason) that a request must get, one token at a time."""
  sampling, model, ids, logprobs = engine.sampling, engine.model, [], []
  noise = _noise_of(model.vocab_size, sampling.max_new_tokens)(
      *np.array([seed, request.key, request.draw], np.uint32))
  cap = request.max_new_tokens or sampling.max_new_tokens
  while True:
    raw = next_logits([*request.prompt_ids, *ids], params, model)
    new = len(ids)
    if new < len(sampling.forced_ids):
      token = sampling.forced_ids[new]
    else:
      token = _choose(_adjusted(raw, request.prompt_ids, ids, engine), request.temperature,
                      np.asarray(noise[new], np.float64), sampling)
    ids.append(token)
    logprobs.append(special.log_softmax(raw)[token])
    if any(stop in engine.decode_text(ids) for stop in sampling.stop_strings):
      return ids, logprobs, 'stop'
    if token in (*engine.eos_ids, *sampling.stop_ids):
      return ids, logprobs, 'eos' if token in engine.eos_ids else 'stop'
    if len(ids) == cap:
      return ids, logprobs, 'length'


def _adjusted(logits, prompt_ids, response_ids, engine):
  sampling, logits = engine.sampling, logits.copy()
  for token, bias in sampling.logit_bias:
    logits[token] += bias
  for token in {*prompt_ids, *response_ids}:
    p = sampling.repetition_penalty
    logits[token] = logits[token] / p if logits[token] > 0 else logits[token] * p
  for token in {*response_ids}:
    logits[token] -= sampling.presence_penalty
  if len(response_ids) < sampling.min_new_tokens:
    logits[[*engine.eos_ids, *sampling.stop_ids]] = -np.inf
  return logits


def _choose(logits, temperature, noise, sampling):
  """The draw by Gumbel noise among the tokens that the filters keep."""
  if temperature == 0:
    return int(np.argmax(logits))
  scaled = logits / temperature
  order = np.argsort(-scaled)[:sampling.top_k]
  share = special.softmax(scaled[order])
  kept = np.cumsum(share) - share < sampling.top_p      # what comes before has not reached it
  kept[0] = True
  kept &= share >= sampling.min_p * share[0]
  return int(order[kept][np.argmax((scaled + noise)[order[kept]])])


def check_against_naive(built, requests, seed=0, params=None, **options):
  """Every sample is what the naive loop draws; returns the samples."""
  samples = run(built, requests, seed, **options)
  for request, sample in zip(requests, samples, strict=True):
    ids, logprobs, reason = naive_sample(built[0], request, seed, params)
    assert (sample.response_ids, sample.finish_reason) == (ids, reason), request
    np.testing.assert_allclose(sample.logprobs, logprobs, rtol=1e-5, atol=1e-5)
  return samples
