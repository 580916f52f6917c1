"""Both ways of writing new keys do the same."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl.sampling.cache import scatter_keys, write_blocks


@pytest.mark.parametrize('head', [(), (3,)], ids=['scales', 'values'])
def test_blocks_are_written_as_by_a_scatter(head):
  rng = np.random.default_rng(0)
  x = jnp.asarray(rng.normal(size=(2, 3, 5, 2, 4, *head)), jnp.float32)
  new = jnp.asarray(rng.normal(size=(5, 2, *head)), jnp.float32)
  for place in ([0, 3, 4, 11, 12], [12] * 5, [7, 7, 7, 12, 7], [11, 0, 12, 5, 5]):
    place = jnp.asarray(place, jnp.int32)
    expected = np.array(x)
    for slot, n in enumerate(place.tolist()):
      if n < 12:
        expected[1, n // 4, slot, :, n % 4] = new[slot]
    for write in (scatter_keys, write_blocks):
      found = jax.jit(write)(x, new, jnp.int32(1), place)
      np.testing.assert_array_equal(found, expected)
