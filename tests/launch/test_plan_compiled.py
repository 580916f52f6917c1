"""Programs compiled for TPUs that are not there: memory and collectives of 8B and 70B held.

They need libtpu (`pip install --target=FOLDER libtpu==0.0.42.1`, FOLDER on PYTHONPATH). The numbers
are those of that version and jax 0.10.2; another compiler may move them, which is worth knowing.
"""

import importlib.util
import math

import pytest

from jaxrl.errors import InputError
from jaxrl.sampling.requests import SamplingConfig
from jaxrl.sampling.sizes import EngineConfig
from jaxrl.training.logps import ComputePolicy
from jaxrl.training.optimizer import OptimizerConfig
from launch.planning import programs
from launch.planning.chips import parse_topology
from launch.planning.device_bytes import parameter_bytes, train_bytes
from launch.planning.figures import compile_figures, traffic
from launch.planning.layout import Layout
from launch.planning.plan import rollout_programs
from launch.planning.published import model_config
from launch.planning.setting import Lengths, Setting
from launch.planning.workload import training_rows

GIB = 2**30
pytestmark = pytest.mark.skipif(
    importlib.util.find_spec('libtpu') is None,
    reason='libtpu, which compiles for TPUs, is not installed')


def setting(model, **fields):
  """IRPO with rows as long as on GSM8K."""
  return Setting(**dict(
      model=model_config(model), adapted=None, compute=ComputePolicy(), param_dtype='float32',
      optimizer=OptimizerConfig(7e-7), offloads=False, loss='irpo',
      loss_options={'beta': 0.1, 'alpha': 1.0, 'nll_reduction': 'seq'}, layout='packed',
      batch_size=16, pack_multiple=64, buckets=(1024,), score_batch=32,
      sampling=SamplingConfig(512), engine=EngineConfig(slots=256), max_prompt=512, draws=8,
      looks=False, lengths=Lengths(512, 512)) | fields)


def counts(figures, topology, mesh):
  """(kind, axis) -> how many of them a call has."""
  return {(t.kind, t.axis): round(t.count) for t in traffic(figures, topology, mesh)}


@pytest.mark.parametrize('name, fsdp, working', [('v5e:4x4', 16, 1.33), ('v5p:2x2x1', 4, 3.77)])
def test_scoring_8b(name, fsdp, working):
  """All there is between devices is each weight of a layer gathered once, the output matrix block
  by block, and features of the tokens exchanged; GiB beside the masters are held."""
  topology, layout = parse_topology(name, 1), Layout(1, fsdp, 1, 1, 1, 'attn', 32)
  s, mesh = setting('Llama-3.1-8B'), programs.training_mesh(topology, layout)
  figures = compile_figures(
      programs.lower_score(s, layout, mesh), topology, unknown=4.5, store=None)
  assert figures.refused is None
  masters = parameter_bytes(s.model, 'float32', layout.sizes)
  assert abs(figures.arguments / masters - 1) < 0.001
  assert abs((figures.needed - masters) / GIB / working - 1) < 0.1
  # Of every layer 7 matrices and 2 norms; ids, last norm, and blocks of the output matrix.
  blocks = 32 // fsdp * 1024 // s.compute.chunk
  assert counts(figures, topology, mesh) == {
      ('all-gather', 'fsdp'): 9 * 32 + 2 + blocks, ('all-to-all', 'fsdp'): 1}


def test_only_data_lies_between_slices():
  topology = parse_topology('v5e:2x2', 2)
  mesh = programs.training_mesh(topology, Layout(4, 2, 1, 1, 1, 'attn', 32))
  slices = [[d.slice_index for d in row.flat] for row in mesh.devices]
  assert slices == [[0, 0], [0, 0], [1, 1], [1, 1]]
  with pytest.raises(InputError, match='mesh: parameters would be split between slices'):
    programs.training_mesh(topology, Layout(1, 8, 1, 1, 1, 'attn', 32))


def test_a_program_too_large_is_told_by_the_compiler(tmp_path):
  """And is not compiled again: what the compiler said is kept."""
  topology, layout = parse_topology('v5e:2x2', 1), Layout(1, 4, 1, 1, 1, 'attn', 32)
  s, mesh = setting('Llama-3.1-70B', param_dtype='bfloat16'), programs.training_mesh(
      topology, layout)
  lowered = programs.lower_score(s, layout, mesh)
  first, again = (compile_figures(lowered, topology, unknown=4.5, store=tmp_path) for _ in range(2))
  assert first == again and 'hbm' in first.refused.lower()
  assert first.needed > parameter_bytes(s.model, 'bfloat16', layout.sizes)


@pytest.mark.slow
@pytest.mark.parametrize('model, name, layout', [
    ('Llama-3.1-8B', 'v5p:2x2x4', Layout(1, 16, 1, 1, 1, 'attn', 32)),
    ('Llama-3.1-8B', 'v5e:4x4', Layout(1, 16, 1, 1, 1, 'nothing', 32)),
    ('Llama-2-70b-chat-hf', 'v5p:4x4x4', Layout(1, 8, 1, 8, 1, 'attn', 32)),
])
def test_training(model, name, layout):
  """The arithmetic of resting bytes is exact; that of the rest is within a third."""
  topology = parse_topology(name, 1)
  s, mesh = setting(model), programs.training_mesh(topology, layout)
  figures = compile_figures(
      programs.lower_train(s, layout, mesh), topology, unknown=12.5, store=None)
  rows = training_rows(s, layout)
  expected = train_bytes(s, layout, rows)
  assert abs(figures.arguments / (expected.parameters + expected.optimizer) - 1) < 0.02
  assert abs(figures.needed / (expected.total - expected.start) - 1) < 1 / 3
  found, layers = counts(figures, topology, mesh), s.model.n_layers
  # Seven matrices and two norms of every layer and the blocks of the output matrix, in both passes,
  # and what is at the ends.
  blocks = math.ceil(rows.tokens_per_device(layout) / s.compute.chunk)
  assert 14 * layers <= found['all-gather', 'fsdp'] <= 18 * layers + 2 * blocks + 8
  reduced = found.get(('reduce-scatter', 'fsdp'), 0) + found.get(('all-reduce', 'fsdp'), 0)
  assert 0 < reduced <= 9 * layers + 16


@pytest.mark.slow
def test_rollouts_of_8b():
  topology = parse_topology('v5e:2x2', 1)
  prefill, decode = rollout_programs(
      setting('Llama-3.1-8B', param_dtype='bfloat16'), topology,
      Layout(1, 4, 1, 1, 1, 'attn', 32), 4, compiles=True, store=None)
  assert decode.compiled and prefill.compiled
  kinds = {(t.kind, t.axis) for t in decode.traffic}
  assert kinds == {('all-reduce', 'tensor'), ('all-gather', 'tensor')}
  (reduced,) = [t for t in decode.traffic if t.kind == 'all-reduce']
  # Two sums per layer, and the embedding's.
  assert reduced.count == 2 * 32 + 1
