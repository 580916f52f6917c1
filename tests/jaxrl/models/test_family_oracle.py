"""transformers is the oracle: logits and greedy tokens of random checkpoints of every family."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers

from jaxrl.models import decoder
from jaxrl.models.hugging_face import load_params, read_config, save_model
from tests import hugging_face_oracle as oracle
from tests.family_shapes import CASES, SHAPES
from tests.hugging_face_oracle import PROMPTS, STEPS, relative_gap

# Largest |difference| / largest |logit|; docs/families.md has what is measured, at most 4e-6.
TOLERANCE = 2e-5


@pytest.fixture(scope='module')
def answers_of(tmp_path_factory):
  """(family, shape) -> Answers, made once."""
  return functools.cache(lambda family, shape: oracle.answers(
      tmp_path_factory.mktemp(family), family, shape))


@pytest.mark.parametrize('family, shape', CASES)
def test_logits_match(answers_of, family, shape):
  """Of rows padded on the right, and of one that is not; what padding holds does not matter."""
  a = answers_of(family, shape)
  assert a.logits[a.real].std() > 0.3                         # the weights matter
  for padding in (0, 7):
    ours = oracle.our_logits(a.params, np.where(a.real, a.sequences, padding), a.c)
    assert relative_gap(ours[a.real], a.logits[a.real]) < TOLERANCE
  assert a.real[0].all() and not a.real[1:].all(axis=1).any()


@pytest.mark.parametrize('family, shape', CASES)
def test_greedy_tokens_match_without_the_cache(answers_of, family, shape):
  """All at once: after every prefix of the sequence the likeliest token is the next one."""
  a = answers_of(family, shape)
  best = oracle.our_logits(a.params, a.sequences, a.c).argmax(-1)
  ours = [row[n - 1:n - 1 + STEPS].tolist() for row, n in zip(best, PROMPTS, strict=True)]
  assert ours == a.continuations


@pytest.mark.parametrize('family, shape', CASES)
def test_greedy_tokens_match_through_the_cache(answers_of, family, shape):
  a = answers_of(family, shape)
  prompts = [row[:n] for row, n in zip(a.sequences, PROMPTS, strict=True)]
  ours = oracle.our_greedy(a.params, prompts, a.c, STEPS)
  assert ours == a.continuations
  assert len(set(ours[0])) > 2                                # not one token over and over


@pytest.mark.parametrize('family', SHAPES)
def test_greedy_tokens_match_without_padding(answers_of, family):
  a = answers_of(family, next(iter(SHAPES[family])))
  prompts = [a.sequences[0, :PROMPTS[0]]]
  assert oracle.our_greedy(a.params, prompts, a.c, STEPS) == a.continuations[:1]


@pytest.mark.parametrize('family', SHAPES)
def test_every_weight_of_every_layer_matters(answers_of, family):
  """Agreement would say nothing about a weight that both leave out."""
  a = answers_of(family, next(iter(SHAPES[family])))
  before = oracle.our_logits(a.params, a.sequences, a.c)
  leaves, treedef = jax.tree.flatten_with_path(a.params)
  rng = np.random.default_rng(0)
  for n, (path, leaf) in enumerate(leaves):
    stacked = 2 if 'expert_' in path[-1].key else 1 if path[0].key == 'layers' else 0
    for place in np.ndindex(leaf.shape[:stacked]):
      changed = [x for _, x in leaves]
      # Not one factor for all of it, which a norm would take back.
      changed[n] = leaf.at[place].multiply(rng.uniform(0.5, 1.5, leaf.shape[stacked:]))
      after = oracle.our_logits(treedef.unflatten(changed), a.sequences, a.c)
      assert relative_gap(after[a.real], before[a.real]) > 1e-4, (path, place)


def ablations():
  """(family, shape, fields of the configuration without one of its particulars)."""
  first = {family: next(iter(shapes)) for family, shapes in SHAPES.items()}
  gemma2, gemma3 = first['gemma2'], first['gemma3_text']
  return [
      ('llama', 'llama3_rope', dict(rope_scaling=None)),
      ('llama', 'linear_rope', dict(rope_scaling=None)),
      ('qwen2', 'yarn', dict(rope_scaling=None)),
      ('mistral', first['mistral'], dict(windows=())),
      ('qwen2', 'window_in_later_layers', dict(windows=(9, 9, 9))),
      ('gemma2', gemma2, dict(windows=())),
      ('gemma2', gemma2, dict(attention_softcap=None)),
      ('gemma2', gemma2, dict(final_softcap=None)),
      ('gemma2', gemma2, dict(attention_scale=None)),
      ('gemma2', gemma2, dict(embedding_scale=1.0)),
      ('gemma2', gemma2, dict(norm_offset=False)),
      ('gemma2', gemma2, dict(activation='silu')),
      ('gemma3_text', gemma3, dict(local_rope_theta=None)),
      ('phi3', 'longrope_partial_tied', dict(rope_scaling=None)),
      ('qwen3_moe', 'normalised', 'norm_topk_prob'),
  ]


@pytest.mark.parametrize('family, shape, without', ablations())
def test_particulars_change_the_numbers(answers_of, family, shape, without):
  """Agreement would say nothing about a particular that makes no difference at this size."""
  a = answers_of(family, shape)
  if without == 'norm_topk_prob':
    without = dict(experts=dataclasses.replace(a.c.experts, normalise=False))
  ours = oracle.our_logits(a.params, a.sequences, dataclasses.replace(a.c, **without))
  assert relative_gap(ours[a.real], a.logits[a.real]) > 1e-3


@pytest.mark.parametrize('family', SHAPES)
def test_forward_runs_with_strict_dtype_promotion(answers_of, family):
  a = answers_of(family, next(iter(SHAPES[family])))
  with jax.numpy_dtype_promotion('strict'):
    for dtype in (jnp.float32, jnp.bfloat16):
      hidden = jax.eval_shape(
          lambda p, t, dtype=dtype: decoder.forward(
              decoder.cast(p, dtype), t, a.c, remat='nothing'),
          a.params, jnp.zeros((1, 3), jnp.int32))
      assert hidden.dtype == dtype


@pytest.mark.parametrize('family', SHAPES)
def test_export_after_an_update_gives_our_numbers_in_transformers(answers_of, family, tmp_path):
  a = answers_of(family, list(SHAPES[family])[-1])
  rng = np.random.default_rng(0)
  params = jax.tree.map(
      lambda x: x + jnp.asarray(0.05 * rng.normal(size=x.shape), x.dtype), a.params)
  save_model(tmp_path / 'out', params, a.c, tokenizer_from=None)
  assert read_config(tmp_path / 'out') == a.c
  model, notes = transformers.AutoModelForCausalLM.from_pretrained(
      tmp_path / 'out', dtype=oracle.torch.float32, attn_implementation='eager',
      output_loading_info=True)
  assert not any(notes.values()), notes
  theirs = oracle.torch_logits(model.eval(), a.sequences, a.real)[a.real]
  ours = oracle.our_logits(params, a.sequences, a.c)[a.real]
  assert relative_gap(ours, theirs) < TOLERANCE
  assert relative_gap(a.logits[a.real], theirs) > 0.01
  again = load_params(tmp_path / 'out', a.c)
  jax.tree.map(np.testing.assert_array_equal, again, params)


def test_export_in_bfloat16_gives_the_rounded_numbers(answers_of, tmp_path):
  a = answers_of('llama', next(iter(SHAPES['llama'])))
  save_model(tmp_path / 'out', a.params, a.c, tokenizer_from=None, dtype=jnp.bfloat16)
  model = transformers.AutoModelForCausalLM.from_pretrained(
      tmp_path / 'out', dtype=oracle.torch.float32, attn_implementation='eager')
  rounded = jax.tree.map(lambda x: x.astype(jnp.bfloat16).astype(jnp.float32), a.params)
  ours = oracle.our_logits(rounded, a.sequences, a.c)[a.real]
  theirs = oracle.torch_logits(model.eval(), a.sequences, a.real)[a.real]
  assert relative_gap(ours, theirs) < TOLERANCE
  assert relative_gap(a.logits[a.real], theirs) > 1e-4
