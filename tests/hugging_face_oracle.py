"""Random-weight checkpoints written by transformers, and what its forward pass makes of them."""

import copy
import dataclasses
import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers

from jaxrl.models import decoder
from jaxrl.models.config import ModelConfig
from jaxrl.models.hugging_face import load_params, read_config
from jaxrl.parallel.mesh import make_mesh
from jaxrl.sampling.engine import make_engine
from jaxrl.sampling.generate import engine_params, generate
from jaxrl.sampling.requests import Request, SamplingConfig
from jaxrl.sampling.sizes import EngineConfig
from tests.family_shapes import LLAMA3_ROPE, SHAPES, SMALL
from tests.tiny_model import QUICK

__all__ = [
    'LLAMA3_ROPE', 'Answers', 'answers', 'greedy', 'load', 'make_llama', 'make_model',
    'our_greedy', 'our_logits', 'relative_gap', 'save_llama', 'save_model', 'torch',
    'torch_greedy', 'torch_logits']

torch = pytest.importorskip('torch', reason='transformers needs PyTorch for its forward pass')

torch.set_num_threads(1)               # the models are too small to share
transformers.utils.logging.disable_progress_bar()

STEPS = 64
PROMPTS = (48, 17, 3)                  # tokens
LENGTH = max(PROMPTS) + STEPS          # of every array; the longest prompt needs no padding


def make_model(family: str, seed: int = 0, **settings):
  """A float32 model whose weights are large enough for every one of them to matter."""
  config = transformers.AutoConfig.for_model(family, **copy.deepcopy(SMALL | settings))
  config._experts_implementation = 'eager'
  model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation='eager').eval()
  generator = torch.Generator().manual_seed(seed)
  with torch.no_grad():
    for name, p in model.named_parameters():
      noise = torch.randn(p.shape, generator=generator)
      if p.ndim == 1:
        # Weights of norms stay around the value under which they do nothing. What Gemma's layers
        # add must outweigh its large embeddings, or every token would be followed by itself.
        louder = 2.0 if family.startswith('gemma') and '.post_' in name else 0.0
        p.copy_(0.3 * noise if name.endswith('bias') else p.round() + louder + 0.2 * noise)
      else:
        scale = 2.5 if '.gate.weight' in name else 1.2           # routers choose clearly
        p.copy_(noise * scale / p.shape[-1] ** 0.5)
  return model


def save_model(folder: Path, family: str, seed: int = 0, dtype=torch.float32, **settings):
  """Writes a random model with `save_pretrained` and returns it."""
  model = make_model(family, seed, **settings)
  model.to(dtype).save_pretrained(folder)
  return model


def make_llama(seed: int = 0, **settings) -> transformers.LlamaForCausalLM:
  return make_model('llama', seed, **settings)


def save_llama(folder: Path, seed: int = 0, dtype=torch.float32, shard='5GB', **settings):
  model = make_llama(seed, **settings)
  model.to(dtype).save_pretrained(folder, max_shard_size=shard)
  return model


@dataclasses.dataclass(frozen=True)
class Answers:
  """What transformers says about one model, and the model as we read it."""

  model: transformers.PreTrainedModel
  params: dict
  c: ModelConfig
  sequences: np.ndarray       # [B, LENGTH] int64: prompts with their greedy continuations
  lengths: np.ndarray         # [B] of the sequences; zeros follow
  logits: np.ndarray          # [B, LENGTH, V] float32

  @property
  def real(self) -> np.ndarray:                # [B, LENGTH] bool, False on padding
    return np.arange(LENGTH)[None] < self.lengths[:, None]

  @property
  def continuations(self) -> list[list[int]]:
    return [list(map(int, row[n - STEPS:n]))
            for row, n in zip(self.sequences, self.lengths, strict=True)]


def answers(folder: Path, family: str, shape: str, seed: int = 3) -> Answers:
  """Writes the model into `folder`, asks transformers, and reads the folder back."""
  model = save_model(folder, family, seed, **SHAPES[family][shape])
  rng = np.random.default_rng(seed)
  # Neither padding nor the ends of a text, which could mean something to `generate`.
  prompts = [rng.integers(3, model.config.vocab_size, n) for n in PROMPTS]
  continued = greedy(model, prompts, STEPS)
  lengths = np.array([n + STEPS for n in PROMPTS])
  sequences = np.zeros((len(prompts), LENGTH), np.int64)
  for row, prompt, more in zip(sequences, prompts, continued, strict=True):
    row[:len(prompt) + STEPS] = [*prompt, *more]
  mask = np.arange(LENGTH)[None] < lengths[:, None]
  c = read_config(folder)
  return Answers(
      model, load_params(folder, c), c, sequences, lengths, torch_logits(model, sequences, mask))


def load(folder: Path) -> tuple[dict, ModelConfig]:
  c = read_config(folder)
  return load_params(folder, c), c


def relative_gap(ours: np.ndarray, theirs: np.ndarray) -> float:
  """Largest difference over largest magnitude."""
  return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


def torch_logits(model, tokens: np.ndarray, mask: np.ndarray | None = None) -> np.ndarray:
  """[B, T, V] float32."""
  with torch.no_grad():
    mask = None if mask is None else torch.from_numpy(mask.astype(np.int64))
    ids = torch.from_numpy(tokens.astype(np.int64))
    return model(input_ids=ids, attention_mask=mask).logits.float().numpy()


def greedy(model, prompts: list[np.ndarray], steps: int) -> list[list[int]]:
  """The next `steps` tokens of each prompt by transformers, padded on the left, never stopping."""
  width = max(map(len, prompts))
  tokens = np.stack([np.pad(p, (width - len(p), 0)) for p in prompts]).astype(np.int64)
  mask = np.stack([np.arange(width) >= width - len(p) for p in prompts]).astype(np.int64)
  with torch.no_grad():
    out = model.generate(
        torch.from_numpy(tokens), attention_mask=torch.from_numpy(mask), max_new_tokens=steps,
        min_new_tokens=steps, do_sample=False, eos_token_id=None, pad_token_id=0)
  return out[:, width:].tolist()


def torch_greedy(model, prompt: np.ndarray, steps: int) -> list[int]:
  """The next `steps` tokens of one unpadded prompt [T]."""
  return greedy(model, [prompt], steps)[0]


@functools.partial(jax.jit, static_argnums=2, compiler_options=QUICK)
def _logits(params, tokens, c):
  return decoder.logits(params, decoder.forward(params, tokens, c), c)


def our_logits(params, tokens: np.ndarray, c) -> np.ndarray:
  """[B, T, V] float32."""
  return np.asarray(_logits(params, jnp.asarray(tokens, jnp.int32), c))


def our_greedy(params, prompts: list[np.ndarray], c, steps: int) -> list[list[int]]:
  """The next `steps` tokens of each prompt, drawn by the rollout engine at temperature 0."""
  mesh = make_mesh(devices=jax.devices()[:1])
  engine = make_engine(
      c, SamplingConfig(steps), EngineConfig(slots=len(prompts), prompt_multiple=16,
                                             dtype='float32'),
      mesh, max_prompt=max(map(len, prompts)), eos_ids=(c.vocab_size,), pad_id=0)
  requests = [Request(n, 0, tuple(p.tolist()), 0.0) for n, p in enumerate(prompts)]
  samples = generate(engine, engine_params(engine, params), requests, seed=0)
  return [s.response_ids for s in sorted(samples, key=lambda s: s.request)]
