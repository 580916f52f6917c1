"""Random-weight checkpoints written by transformers, and what its forward pass makes of them."""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers

from jaxrl.models import decoder

torch = pytest.importorskip('torch', reason='transformers needs PyTorch for its forward pass')

torch.set_num_threads(1)               # the models are too small to share
transformers.utils.logging.disable_progress_bar()

LLAMA3_ROPE = {
    'rope_type': 'llama3', 'factor': 8.0, 'low_freq_factor': 1.0, 'high_freq_factor': 4.0,
    'original_max_position_embeddings': 32,
}
SMALL = dict(
    vocab_size=101, hidden_size=32, intermediate_size=56, num_hidden_layers=3,
    num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256,
    bos_token_id=1, eos_token_id=2, pad_token_id=0)


def make_llama(seed: int = 0, **settings) -> transformers.LlamaForCausalLM:
  """A float32 Llama whose weights are large enough for every one of them to matter."""
  config = transformers.LlamaConfig(**(SMALL | settings))
  model = transformers.LlamaForCausalLM(config).eval()
  generator = torch.Generator().manual_seed(seed)
  with torch.no_grad():
    for p in model.parameters():
      noise = torch.randn(p.shape, generator=generator)
      p.copy_(1 + 0.2 * noise if p.ndim == 1 else noise * 1.2 / p.shape[1] ** 0.5)
  return model


def save_llama(folder: Path, seed: int = 0, dtype=torch.float32, shard='5GB', **settings):
  model = make_llama(seed, **settings)
  model.to(dtype).save_pretrained(folder, max_shard_size=shard)
  return model


def torch_logits(model, tokens: np.ndarray, mask: np.ndarray | None = None) -> np.ndarray:
  """[B, T, V] float32."""
  with torch.no_grad():
    mask = None if mask is None else torch.from_numpy(mask.astype(np.int64))
    ids = torch.from_numpy(tokens.astype(np.int64))
    return model(input_ids=ids, attention_mask=mask).logits.float().numpy()


def torch_greedy(model, prompt: np.ndarray, steps: int) -> list[int]:
  """The next `steps` tokens of one unpadded prompt [T], never stopping."""
  with torch.no_grad():
    out = model.generate(
        torch.from_numpy(prompt[None].astype(np.int64)), max_new_tokens=steps, do_sample=False,
        min_new_tokens=steps, eos_token_id=None, pad_token_id=0,
        attention_mask=torch.ones(1, len(prompt), dtype=torch.int64))
  return out[0, len(prompt):].tolist()


@functools.partial(jax.jit, static_argnums=2)
def _prefill(params, tokens, c):
  hidden, kv = decoder.forward(params, tokens, c, keep_kv=True)
  return _logits(hidden, params, c), kv


@functools.partial(jax.jit, static_argnums=4)
def _decode(params, tokens, positions, cache, c):
  hidden, cache = decoder.decode_step(params, tokens, positions, cache, c)
  return jnp.argmax(_logits(hidden[:, None], params, c)[:, 0], axis=-1).astype(jnp.int32), cache


def _logits(hidden, params, c):
  head = decoder.output_matrix(params, c)
  return jnp.einsum('btd,dv->btv', hidden, head, preferred_element_type=jnp.float32)


def our_logits(params, tokens: np.ndarray, c) -> np.ndarray:
  """[B, T, V] float32."""
  return np.asarray(_prefill(params, jnp.asarray(tokens, jnp.int32), c)[0])


def our_greedy(params, prompts: list[np.ndarray], c, steps: int) -> list[list[int]]:
  """The next `steps` tokens of each prompt: right-padded prefill, then `decode_step`."""
  lengths = np.array([len(p) for p in prompts], np.int32)
  tokens = np.zeros((len(prompts), lengths.max()), np.int32)
  for row, prompt in zip(tokens, prompts, strict=True):
    row[:len(prompt)] = prompt
  logits, kv = _prefill(params, jnp.asarray(tokens), c)
  room = [(0, 0), (0, 0), (0, steps), (0, 0), (0, 0)]
  cache = decoder.Cache(*(jnp.asarray(np.pad(x, room)) for x in kv))
  out = [np.asarray(logits)[np.arange(len(prompts)), lengths - 1].argmax(-1).astype(np.int32)]
  for n in range(steps - 1):
    newest, cache = _decode(params, jnp.asarray(out[-1]), jnp.asarray(lengths + n), cache, c)
    out.append(np.asarray(newest))
  return np.stack(out, axis=1).tolist()
