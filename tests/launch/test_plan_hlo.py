"""Reading compiled programs: loops, bytes, and every spelling of a collective."""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxrl.parallel.mesh import make_mesh
from launch.planning.collectives import Collective, collectives, mesh_axes
from launch.planning.hlo import parse, runs
from launch.planning.hlo_bytes import loops

# A loop of 4 trips. In its body one gather goes through three fusions (start, a step, done), and an
# all-reduce is the inside of a reduce-scatter. After it comes a gather by name and a send.
PROGRAM = (Path(__file__).parent / 'plan_program.hlo').read_text()


def test_each_collective_is_counted_once_and_as_often_as_its_loop_runs():
  assert sorted(collectives(PROGRAM, 8, slices=2), key=lambda c: (c.kind, c.size)) == [
      Collective('all-gather', (0, 1, 2, 3), 1024, 4.0),
      Collective('all-gather', (0, 1, 2, 3), 8192, 1.0),
      Collective('all-reduce', (0, 4), 2048, 1.0),
      Collective('collective-permute', (1, 3), 2048, 1.0),
      Collective('reduce-scatter', (0, 2), 2048, 4.0)]


@pytest.mark.parametrize('kind, expected', [
    ('all-gather', 750.0), ('reduce-scatter', 750.0), ('all-reduce', 1500.0),
    ('collective-permute', 1000.0)])
def test_bytes_that_a_ring_of_four_sends(kind, expected):
  assert Collective(kind, (0, 1, 2, 3), 1000, 5.0).sent == expected


@pytest.mark.parametrize('groups, expected', [
    ('{{4,5},{6,7}}', (4, 5)),
    ('[2,4]<=[8]', (0, 1, 2, 3)),
    ('[4,2]<=[2,4]T(1,0)', (0, 4)),
    ("mesh['x'=2,'y'=4] {'y'}", (0, 1, 2, 3)),
    ("mesh['x'=2,'y'=4] {'x'}", (0, 4)),
    ("mesh['x'=8] {'x':(2)2}", (0, 2)),
    ("mesh['x'=2,'y'=2], device_ids=([4]<=[2,2]T(1,0)) {'y'}", (0, 2)),
    ('{}', (0, 1, 2, 3, 4, 5, 6, 7)),
])
def test_replica_groups(groups, expected):
  text = f"""ENTRY %main (a: f32[8]) -> f32[8] {{
  %a = f32[8]{{0}} parameter(0)
  ROOT %all-reduce.1 = f32[8]{{0}} all-reduce(%a), replica_groups={groups}, to_apply=%add
}}
"""
  assert collectives(text, 8)[0].group == expected


def test_groups_that_cannot_be_read_are_an_error():
  text = PROGRAM.replace('{{0,1,2,3}}', 'somehow')
  with pytest.raises(ValueError, match='replica groups'):
    collectives(text, 8, slices=2)


def test_mesh_axes():
  shape = {'data': 2, 'fsdp': 2, 'tensor': 2}
  assert mesh_axes((0, 4), shape) == 'data'
  assert mesh_axes((0, 1, 2, 3), shape) == 'fsdp+tensor'


def test_bytes_by_loop_leave_out_what_is_on_the_chip():
  program = loops(PROGRAM)
  (body,) = program.inner
  assert body.trips == 4
  # the fusions read x and g and write their results, and the copy reads g and writes to the chip
  assert body.moved == (256 + 1280) + (256 + 1024) + (2048 + 512) + 2048
  assert program.total(1) == program.moved + 4 * body.moved


def test_a_pallas_kernel_moves_what_it_estimates():
  config = '"custom_call_config":{"cost_estimate":{"flops":"8","bytes_accessed":"96"}}'
  call = 'custom-call(%a), custom_call_target='
  text = f"""ENTRY %main (a: f32[8]) -> f32[8] {{
  %a = f32[8]{{0}} parameter(0)
  %walk.3 = f32[8]{{0}} {call}"tpu_custom_call", backend_config={{{config}}}
  %walk.4 = f32[8]{{0}} {call}"tpu_custom_call", backend_config={{{config}}}
  %silent.1 = f32[8]{{0}} {call}"tpu_custom_call", backend_config={{}}
  ROOT %other = f32[8]{{0}} {call}"Sharding", backend_config={{{config}}}
}}
"""
  program = loops(text)
  assert program.kernels == (('walk', 96), ('walk', 96))
  assert program.moved == 2 * (32 + 32) and program.total(1) == 2 * 96 + 2 * 64


def test_a_loop_whose_bound_is_no_constant_runs_as_often_as_said():
  text = PROGRAM.replace('%limit = s32[] constant(4)', '%limit = s32[] add(%n.1, %n.1)')
  computations, entry = parse(text)
  assert runs(computations, entry, 2.5)['body'] == 2.5


def test_collectives_of_a_scan_on_a_real_mesh():
  """What XLA makes of gathering one layer at a time, and of the gradient, on eight devices."""
  mesh = make_mesh(fsdp=4, tensor=2)
  layers, width = 3, 64

  def loss(weights, x):
    def body(x, w):
      whole = jax.sharding.reshard(w, PartitionSpec(None, 'tensor'))
      return jnp.tanh(jnp.einsum('bd,df->bf', x, whole, out_sharding=PartitionSpec('fsdp', None))
                      ), None
    return jnp.sum(jax.lax.scan(body, x, weights)[0])

  def place(*shape, spec):
    return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, spec))

  with jax.set_mesh(mesh):
    compiled = jax.jit(loss).lower(
        place(layers, width, width, spec=PartitionSpec(None, 'fsdp', 'tensor')),
        place(16, width, spec=PartitionSpec('fsdp', None))).compile()
  found = {}
  axes = functools.partial(mesh_axes, shape=dict(mesh.shape))
  for c in collectives(compiled.as_text(), 8):
    found.setdefault((c.kind, axes(c.group)), []).append((c.size, c.runs))
  gathered = found['all-gather', 'fsdp']
  assert gathered == [(4 * width * width // 2, layers)]
  assert [n for _, n in found['all-gather', 'tensor']] == [layers]
  assert np.sum([n for _, n in found['all-reduce', 'fsdp']]) == 1   # the sum at the end


def test_an_update_in_place_writes_the_update_alone():
  """Of two results of a fusion, one a slice put into a stack of 80 layers, one an array."""
  text = """%inside (p0: f32[80,128], p1: f32[1,128], p2: s32[]) -> (f32[80,128], f32[128]) {
  %p0 = f32[80,128]{1,0} parameter(0)
  %p1 = f32[1,128]{1,0} parameter(1)
  %p2 = s32[] parameter(2)
  %put = f32[80,128]{1,0} dynamic-update-slice(%p0, %p1, %p2, %p2)
  %other = f32[128]{0} bitcast(%p1)
  ROOT %both = (f32[80,128]{1,0}, f32[128]{0}) tuple(%put, %other)
}

ENTRY %main (a: f32[80,128], b: f32[1,128], n: s32[]) -> (f32[80,128], f32[128]) {
  %a = f32[80,128]{1,0} parameter(0)
  %b = f32[1,128]{1,0} parameter(1)
  %n = s32[] parameter(2)
  ROOT %f = (f32[80,128]{1,0}, f32[128]{0}) fusion(%a, %b, %n), kind=kLoop, calls=%inside
}
"""
  update = 128 * 4
  assert loops(text).moved == update + 4 + 2 * update    # b and n are read, both results written
