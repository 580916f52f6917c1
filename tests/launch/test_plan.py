"""The command: what it refuses, what it prints, and that it plans the run that its flags say."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from absl import flags
from absl.testing import flagsaver

from experiments import irpo_flags
from launch import plan

ROOT = Path(__file__).resolve().parents[2]
FLAGS = flags.FLAGS
TINY = dict(
    model_type='llama', vocab_size=512, hidden_size=64, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, intermediate_size=128, max_position_embeddings=1024, rms_norm_eps=1e-5,
    hidden_act='silu', rope_theta=10000.0, tie_word_embeddings=False)
PAPER = f'--flagfile={ROOT}/experiments/flags/irpo_llama2_70b.flags'


@pytest.fixture(autouse=True)
def restored_flags(monkeypatch):
  assert irpo_flags.MODULES      # imported, or `flagsaver` would forget the flags they define
  monkeypatch.chdir(ROOT)        # the flag file names another one
  with flagsaver.flagsaver():
    yield
    FLAGS.mark_as_parsed()


@pytest.fixture
def model(tmp_path):
  """A folder with a configuration and no weights."""
  (tmp_path / 'config.json').write_text(json.dumps(TINY))
  return tmp_path


def run(tmp_path, *arguments):
  """(exit status, the plan as JSON)."""
  path, status = tmp_path / 'plan.json', 0
  plan.parse(['plan', f'--json={path}', '--nocompile', *arguments])
  try:
    plan.main([])
  except SystemExit as ended:
    status = ended.code
  return status, json.loads(path.read_text())


def test_a_tiny_model_fits(tmp_path, model, capsys):
  status, made = run(tmp_path, f'--model={model}', '--topology=v5e:2x2', '--max_new_tokens=64',
                     '--max_prompt_length=64')
  assert status == 0 and made['fits'] and made['verdict'].startswith('FITS')
  assert [p['program'] for p in made['programs']] == ['train', 'score', 'prefill', 'decode']
  for program in made['programs']:
    held = dict(program['bytes_per_device'])
    assert held.pop('total') == sum(held.values())
    assert program['seconds']['roofline'] == max(
        program['seconds'][name] for name in ('compute', 'memory', 'links'))
  assert {flag.partition('=')[0] for flag in made['flags']} == {
      '--mesh', '--micro_batches', '--remat', '--score_batch', '--rollout_tensor'}
  assert made['verdict'] in capsys.readouterr().out


def test_flags_that_are_given_are_kept(tmp_path, model):
  given = ('--mesh=2,1,2', '--micro_batches=4', '--remat=nothing', '--rollout_tensor=1')
  _, made = run(tmp_path, f'--model={model}', '--topology=v5e:2x2', *given)
  assert {*given} <= {*made['flags']} and made['layouts'] == 1


def test_lengths_are_those_of_the_run_unless_given(tmp_path, model):
  common = (f'--model={model}', '--topology=v5e:2x2', '--max_new_tokens=64')
  longest, short = (run(tmp_path, *common, *more)[1]['programs'][0]
                    for more in ((), ('--prompt_tokens=10', '--response_tokens=20')))
  assert longest['tokens'] == 16 * (511 + 128) and short['tokens'] == 16 * (9 + 40)


def test_the_papers_setting_fits_a_cube_of_v5p(tmp_path):
  status, made = run(tmp_path, PAPER, '--topology=v5p:4x4x4')
  assert status == 0
  assert made['setting']['parameters'] == 68_976_648_192 and made['setting']['batch_size'] == 16
  held = made['programs'][0]['bytes_per_device']
  masters = 4 * 68_976_648_192 / 64      # the vocabulary is split over fewer
  assert masters < held['parameters'] < 1.1 * masters
  assert abs(held['optimizer'] / held['parameters'] - 2) < 0.001


def test_what_does_not_fit_is_said_with_what_to_change(tmp_path, capsys):
  status, made = run(tmp_path, PAPER, '--topology=v5e:4x4')
  assert status == 1 and not made['fits']
  assert 'DOES NOT FIT' in made['verdict'] and 'GiB per device of 15.75' in made['verdict']
  assert any(line.startswith('take v5e:') for line in made['advice'])
  assert made['advice'][0] in capsys.readouterr().out


def test_gpus_are_planned_by_arithmetic(tmp_path):
  _, made = run(tmp_path, PAPER, '--topology=h200:8x8')
  assert made['fits'] and not any(p['compiled'] for p in made['programs'])


@pytest.mark.parametrize('arguments, message', [
    (('--topology=v5e:2x2',), 'error: --model: there is no model to plan for'),
    (('--model=Llama-3.1-8B',), 'error: --topology: there is nothing to plan for'),
    (('--model=Llama-3.1-8B', '--topology=v5e:2x2', '--prompt_tokens=9999'),
     'error: --prompt_tokens: the run allows no such length; expected 1 to 512'),
    (('--model=Llama-3.1-8B', '--topology=v5e:2x2', '--nll_alpha=0', '--nll_reduction=sum'),
     'error: --nll_reduction: the flag would have no effect'),
])
def test_one_sentence_for_what_a_user_can_mend(arguments, message):
  done = subprocess.run([sys.executable, '-m', 'launch.plan', *arguments], cwd=ROOT, text=True,
                        capture_output=True, check=False)
  assert done.returncode == 2 and message in done.stderr and 'Traceback' not in done.stderr
