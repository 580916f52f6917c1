"""transformers is the oracle: logits and greedy tokens of random-weight Llama checkpoints."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers

from jaxrl.models import decoder
from jaxrl.models.hugging_face import load_params, read_config, save_model
from tests import hugging_face_oracle as oracle

# Largest |difference| / largest |logit| over these shapes, as measured: 3.1e-6.
TOLERANCE = 2e-5

SHAPES = {
    'gqa_2': {},
    'mha_llama2': dict(num_key_value_heads=4, rms_norm_eps=1e-5),
    'mqa_odd_heads': dict(
        num_attention_heads=3, num_key_value_heads=1, hidden_size=36, head_dim=10,
        num_hidden_layers=1),
    'heads_wider_than_model': dict(num_attention_heads=2, num_key_value_heads=2, head_dim=32),
    'llama3_rope': dict(rope_parameters=oracle.LLAMA3_ROPE | {'rope_theta': 500_000.0}),
    'llama3_rope_tied': dict(
        rope_parameters=oracle.LLAMA3_ROPE | {'rope_theta': 10_000.0}, tie_word_embeddings=True,
        num_attention_heads=6, num_key_value_heads=2, hidden_size=24, head_dim=16, vocab_size=131),
    'linear_rope': dict(rope_parameters={'rope_type': 'linear', 'factor': 4.0, 'rope_theta': 1e4}),
}


def relative_gap(ours, theirs):
  return np.abs(ours - theirs).max() / np.abs(theirs).max()


@pytest.fixture(scope='module', params=sorted(SHAPES))
def loaded(request, tmp_path_factory):
  """(transformers model, our params, our configuration) of one checkpoint."""
  folder = tmp_path_factory.mktemp('llama') / request.param
  model = oracle.save_llama(folder, seed=3, **SHAPES[request.param])
  c = read_config(folder)
  return model, load_params(folder, c), c


def test_logits_match(loaded):
  model, params, c = loaded
  tokens = np.random.default_rng(0).integers(0, c.vocab_size, (3, 70))
  theirs = oracle.torch_logits(model, tokens)
  assert theirs.std() > 0.3                                   # the weights matter
  gap = relative_gap(oracle.our_logits(params, tokens, c), theirs)
  print(f'relative gap {gap:.1e}')
  assert gap < TOLERANCE


def test_right_padding_changes_no_real_position(loaded):
  model, params, c = loaded
  lengths = np.array([23, 9, 1])
  tokens = np.random.default_rng(1).integers(0, c.vocab_size, (3, 23))
  real = np.arange(23)[None] < lengths[:, None]
  theirs = oracle.torch_logits(model, np.where(real, tokens, 0), real)
  ours = oracle.our_logits(params, np.where(real, tokens, 5), c)
  assert relative_gap(ours[real], theirs[real]) < TOLERANCE


def test_greedy_tokens_match_through_the_cache(loaded):
  model, params, c = loaded
  rng = np.random.default_rng(2)
  prompts = [rng.integers(0, c.vocab_size, n) for n in (6, 11, 1)]
  theirs = [oracle.torch_greedy(model, prompt, 26) for prompt in prompts]
  assert oracle.our_greedy(params, prompts, c, 26) == theirs             # padded on the right
  assert oracle.our_greedy(params, prompts[:1], c, 26) == theirs[:1]     # without padding


def test_forward_runs_with_strict_dtype_promotion(loaded):
  _, params, c = loaded
  with jax.numpy_dtype_promotion('strict'):
    for dtype in (jnp.float32, jnp.bfloat16):
      hidden, _ = jax.eval_shape(
          lambda p, t, dtype=dtype: decoder.forward(decoder.cast(p, dtype), t, c, remat=True),
          params, jnp.zeros((1, 3), jnp.int32))
      assert hidden.dtype == dtype


def test_rope_changes_the_numbers(tmp_path):
  """The oracle test of scaled positions would pass unscaled if scaling did not matter here."""
  oracle.save_llama(tmp_path / 'm', seed=3, **SHAPES['llama3_rope'])
  c = read_config(tmp_path / 'm')
  params = load_params(tmp_path / 'm', c)
  tokens = np.random.default_rng(0).integers(0, c.vocab_size, (1, 70))
  plain = dataclasses.replace(c, rope_scaling=None)
  ours, unscaled = (oracle.our_logits(params, tokens, x) for x in (c, plain))
  assert relative_gap(unscaled, ours) > 0.01


@pytest.mark.parametrize('shape, dtype', [
    ('gqa_2', 'bfloat16'), ('llama3_rope_tied', 'float32'), ('linear_rope', 'float32')])
def test_export_after_an_update_gives_our_numbers_in_transformers(tmp_path, shape, dtype):
  """Invariant 21. In bfloat16 the exported values are compared, computed in float32."""
  oracle.save_llama(tmp_path / 'in', seed=4, **SHAPES[shape])
  c = read_config(tmp_path / 'in')
  before = load_params(tmp_path / 'in', c)
  rng = np.random.default_rng(0)
  params = jax.tree.map(
      lambda x: x + jnp.asarray(0.05 * rng.normal(size=x.shape), x.dtype), before)
  save_model(tmp_path / 'out', params, c, tokenizer_from=None, dtype=jnp.dtype(dtype))
  params = jax.tree.map(lambda x: x.astype(dtype).astype(jnp.float32), params)

  model, notes = transformers.LlamaForCausalLM.from_pretrained(
      tmp_path / 'out', dtype=oracle.torch.float32, output_loading_info=True)
  assert not any(notes.values()), notes
  assert read_config(tmp_path / 'out') == c
  tokens = np.random.default_rng(0).integers(0, c.vocab_size, (2, 50))
  theirs = oracle.torch_logits(model.eval(), tokens)
  assert relative_gap(oracle.our_logits(params, tokens, c), theirs) < TOLERANCE
  assert relative_gap(oracle.our_logits(before, tokens, c), theirs) > 0.01
  prompts = [tokens[0, :5], tokens[1, :12]]
  assert oracle.our_greedy(params, prompts, c, 24) == [
      oracle.torch_greedy(model, prompt, 24) for prompt in prompts]
