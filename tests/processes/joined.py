"""One process of a small run, for tests of how processes start, wait and end: `joined.py WHAT`."""

import ctypes
import os
import signal
import sys
import time

import jax
import numpy as np

from jaxrl.errors import InputError
from jaxrl.parallel import hosts


def collective():
  """A sum over all devices of the run; a process whose peer is gone may wait in it for ever."""
  mesh = jax.make_mesh((jax.device_count(),), ('x',))
  rows = jax.sharding.NamedSharding(mesh, jax.P('x'))
  x = jax.make_array_from_callback((jax.device_count(),), rows, lambda i: np.arange(1e3)[i])
  total = jax.jit(lambda x: x.sum(), out_shardings=jax.sharding.NamedSharding(mesh, jax.P()))
  return float(total(x))


def main(what, victim):
  """`what` happens once all have met; the victim then kills itself, fails, or is late."""
  with hosts.start(hosts.config_from_environment()):
    me = jax.process_index()
    print('devices', jax.device_count(), 'sum', collective(), flush=True)
    print('told', hosts.broadcast({'from': me}), 'writer', hosts.is_writer(), flush=True)
    long = hosts.broadcast(f'{me}' * 3_000_000)      # more than the store takes at once
    gathered = hosts.gather([me, f'{me}' * (2_000_000 * me)], 'it')
    print('long', {*long}, len(long), 'gathered', gathered and [
        (process, {*text}, len(text)) for process, text in gathered], flush=True)
    hosts.barrier('all here', 30)
    if me == victim:
      {'collective': lambda: os.kill(os.getpid(), signal.SIGKILL),
       'idle': lambda: os.kill(os.getpid(), signal.SIGKILL),
       'suspended': lambda: os.kill(os.getpid(), signal.SIGSTOP),
       'barrier': lambda: os.kill(os.getpid(), signal.SIGKILL),
       'stopped': lambda: ctypes.PyDLL(None).sleep(8),    # with the interpreter's lock held
       'late': lambda: time.sleep(30),
       'error': lambda: {}['no such key'],
       'status': lambda: sys.exit(2)}[what]()
    if what in ('collective', 'stopped', 'error', 'status'):
      collective()
    if what in ('idle', 'suspended'):
      time.sleep(30)
    if what in ('barrier', 'late'):
      hosts.barrier('the end of the stage', 1 if what == 'late' else None)
    print('end', flush=True)


if __name__ == '__main__':
  try:
    main(sys.argv[1], int(sys.argv[2]))
  except InputError as error:
    sys.exit(f'error: {error}')
