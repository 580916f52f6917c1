"""Several processes as one run: start together, wait for each other, end together.

Collectives of one process wait for all others, some of them for ever. So each process of a run has
threads that ask the service of `jax.distributed` who is alive, and its store whether one has
failed; then all others write one sentence and leave, whatever native code they are in. Signs of
life are sent by native code: a process is alive while something holds the interpreter's lock for
minutes. With one process everything here does nothing.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import faulthandler
import itertools
import json
import math
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

import jax
from jax._src import distributed  # neither the store nor the address has a public name

from jaxrl.errors import InputError

COORDINATOR, PROCESSES, PROCESS_ID, LOST_AFTER = (
    'JAXRL_COORDINATOR', 'JAXRL_PROCESSES', 'JAXRL_PROCESS_ID', 'JAXRL_LOST_AFTER')
EXIT_LOST = 75            # "try again later" in sysexits.h: the same command goes on
_ENDED, _LAST, _VERDICT = 'ended', 'last round', 'verdict'   # under _WATCH in the store
_WATCH = 'jaxrl/watch'
_AGAIN = 'the same command goes on from the last checkpoint'
_BROKEN = 'process 0 was lost (the connection to it broke)'
_FOREVER_MS = 1 << 31
_PIECE = 1 << 20           # characters of a text that go into the store at once
_STUCK_AFTER = 1800.0     # seconds that Python may stand still; longer than any compilation
_ROOT = Path(__file__).resolve().parents[2]


@dataclasses.dataclass(frozen=True)
class HostsConfig:
  """Where the processes of a run meet, and how long one may be silent."""

  coordinator: str            # HOST:PORT that process 0 listens on; 'auto' asks the cluster
  processes: int | None = None       # None with 'auto'
  process_id: int | None = None      # None with 'auto'
  lost_after: float = 40.0    # seconds without a sign of life after which a process is lost
  start_within: float = 300.0        # seconds until all processes must have come


class HostLost(RuntimeError):
  """Another process of the run is gone, or did not come where it was waited for."""


def config_from_environment(environ: Mapping[str, str] = os.environ) -> HostsConfig | None:
  """What `launch` puts into the environment of each process; None is a run of one process.

  JAXRL_COORDINATOR is HOST:PORT, with JAXRL_PROCESSES and JAXRL_PROCESS_ID beside it, or 'auto' on
  Cloud TPU, GKE, SLURM and Open MPI, where JAX finds all three. JAXRL_LOST_AFTER is in seconds.

  Raises:
    InputError: a variable is missing, or is not what it should be.
  """
  coordinator = environ.get(COORDINATOR)
  if not coordinator:
    for name in (PROCESSES, PROCESS_ID):
      if environ.get(name):
        raise InputError('the processes cannot meet', where=COORDINATOR,
                         expected=f'an address, for {name} is given', found='nothing',
                         fix=f'Set {COORDINATOR}=HOST:PORT, or take {name} away')
    return None
  lost_after = _number(environ, LOST_AFTER, float, 'seconds, at least 1', low=1.0)
  common = {} if lost_after is None else {'lost_after': lost_after}
  if coordinator == 'auto':
    for name in (PROCESSES, PROCESS_ID):
      if environ.get(name):
        raise InputError('the variable would have no effect', where=name,
                         found=f'{COORDINATOR}=auto', fix='Take it away')
    return HostsConfig(coordinator, **common)
  host, _, port = coordinator.rpartition(':')
  if not host or not port.isdecimal() or not 0 < int(port) < 65536:
    raise InputError('the address cannot be read', where=COORDINATOR,
                     expected='HOST:PORT or auto', found=coordinator)
  processes = _number(environ, PROCESSES, int, 'a whole number, at least 1', low=1)
  process_id = _number(environ, PROCESS_ID, int, 'a whole number, counted from 0', low=0)
  for name, value in ((PROCESSES, processes), (PROCESS_ID, process_id)):
    if value is None:
      raise InputError('the variable is missing', where=name,
                       expected=f'a number beside {COORDINATOR}={coordinator}')
  assert processes is not None and process_id is not None
  if process_id >= processes:
    raise InputError('there is no such process', where=PROCESS_ID,
                     expected=f'0 to {processes - 1}', found=process_id)
  return HostsConfig(coordinator, processes, process_id, **common)


def _number(environ: Mapping[str, str], name: str, kind: type, expected: str, *, low: float):
  text = environ.get(name)
  if not text:
    return None
  try:
    value = kind(text)
  except ValueError:
    value = None
  if value is None or not low <= value < float('inf'):
    raise InputError('the value cannot be used', where=name, expected=expected, found=text)
  return value


@contextlib.contextmanager
def start(config: HostsConfig | None) -> Iterator[None]:
  """The run of several processes, from here to the end of the block; None is a run of one.

  To be entered before JAX is asked for devices. At the end of the block a process waits for all
  others to come to theirs. A process that leaves it by an exception (or `sys.exit` with a status)
  ends at once, and so do all others, naming it; `HostLost` and what collectives raise
  when a peer is gone become the one sentence that names the lost process, with status EXIT_LOST.

  Raises:
    InputError: the processes could not meet.
  """
  if config is None:
    yield
    return
  _initialize(config)
  if distributed.global_state.num_processes == 1:
    yield
    return
  watch = _Watch(config)    # before devices are asked for, which waits for all as well
  watch.start()
  try:
    yield
    status: Any = 0
  except SystemExit as error:
    status = error.code
  except HostLost as error:
    watch.say_first(_VERDICT, str(error).rstrip('.'))
    watch.leave(str(error), EXIT_LOST)
  except KeyboardInterrupt:
    watch.fail('was interrupted', 128 + signal.SIGINT)
  except BaseException as error:
    if _from_a_device(error):   # the watch may be about to learn why
      watch.raised = error
      time.sleep(config.lost_after + 5 * watch.pause)
    watch.fail(f'stopped with {type(error).__name__}; see what it wrote', 1,
               traceback.format_exc())
  if status not in (None, 0):
    if not isinstance(status, int):   # a text, which Python would print
      watch.fail('ended with status 1; see what it wrote', 1, f'{status}\n')
    watch.fail(f'ended with status {status}; see what it wrote', status)
  with waiting('the end of the other processes'):
    watch.finish()


def alone() -> bool:
  """True where `start` has joined no other process; asks no device."""
  return distributed.global_state.num_processes == 1


def is_writer() -> bool:
  """True in the one process that writes files."""
  return jax.process_index() == 0


def barrier(name: str, seconds: float | None = None) -> None:
  """Waits until all processes are here; for ever where `seconds` is None and all are alive.

  All processes pass the same barriers in the same order, from one thread.

  Raises:
    HostLost: the time has passed; it names who did not come.
  """
  if jax.process_count() == 1:
    return
  key = f'jaxrl/barrier/{next(_count)}/{name}'
  store, me = _store(), jax.process_index()
  try:
    with waiting(f'the barrier "{name}"'):
      store.key_value_set(f'{key}/{me}', '')
      store.wait_at_barrier(key, _FOREVER_MS if seconds is None else int(1000 * seconds))
  except jax.errors.JaxRuntimeError as error:
    if 'DEADLINE_EXCEEDED' not in str(error):
      raise
    came = {int(entry.rpartition('/')[2]) for entry, _ in store.key_value_dir_get(f'{key}/')}
    missing = sorted(set(range(jax.process_count())) - came)
    raise HostLost(
        f'process {me} of {jax.process_count()} waited {seconds:g} s at the barrier "{name}", '
        f'where {_named(missing)} did not come.') from None


def broadcast(value: Any) -> Any:
  """What process 0 passed, in every process, as JSON holds it.

  All processes call it in the same order, from one thread; it is no device program.
  """
  if jax.process_count() == 1:
    return json.loads(json.dumps(value))
  key = f'jaxrl/broadcast/{next(_count)}'
  if is_writer():
    text = json.dumps(value)
    _leave(key, text)
    return json.loads(text)
  with waiting('what process 0 says'):
    return json.loads(_found(key))


def gather(value: Any, what: str) -> list[Any] | None:
  """In process 0 what all processes passed, in their order, as JSON holds it; None in the others.

  Process 0 waits for all, named `what`; the others go on. Called as `broadcast` is.
  """
  if jax.process_count() == 1:
    return [json.loads(json.dumps(value))]
  key = f'jaxrl/gather/{next(_count)}'
  if not is_writer():
    _leave(f'{key}/{jax.process_index()}', json.dumps(value))
    return None
  found = [json.loads(json.dumps(value))]
  for process in range(1, jax.process_count()):
    with waiting(f'{what} of process {process}'):
      found.append(json.loads(_found(f'{key}/{process}')))
  _store().key_value_delete(key)      # it may be most of what the store holds
  return found


def _leave(key: str, text: str) -> None:
  """Puts a text into the store, in pieces that one message holds."""
  pieces = [text[n:n + _PIECE] for n in range(0, len(text), _PIECE)]
  for n, piece in enumerate(pieces):
    _store().key_value_set(f'{key}/{n}', piece)
  _store().key_value_set(f'{key}/pieces', str(len(pieces)))    # last: all are there


def _found(key: str) -> str:
  """Waits for what `_leave` left."""
  count = int(_store().blocking_key_value_get(f'{key}/pieces', _FOREVER_MS))
  return ''.join(
      _store().blocking_key_value_get(f'{key}/{n}', _FOREVER_MS) for n in range(count))


@contextlib.contextmanager
def waiting(what: str) -> Iterator[None]:
  """Names what the main thread waits for, in the sentence of a lost process."""
  _waiting.append(what)
  try:
    yield
  except jax.errors.JaxRuntimeError:
    raise         # of a peer that is gone: what was waited for stays named until the end
  except BaseException:
    _waiting.pop()
    raise
  _waiting.pop()


_waiting: list[str] = []
_handlers: list[Any] = []
_count = itertools.count()


def _store():
  return distributed.global_state.client


def _named(processes: list[int]) -> str:
  *some, last = map(str, processes)
  return f'processes {", ".join(some)} and {last}' if some else f'process {last}'


def _from_a_device(error: BaseException | None) -> bool:
  """Whether JAX's native code raised it, or what it was raised from."""
  while error is not None:
    if isinstance(error, jax.errors.JaxRuntimeError):
      return True
    error = error.__cause__ or error.__context__
  return False


def _before_abort(call: Callable[[], None]) -> None:
  """Has the thread that aborts this process call `call` first; the abort goes on when it returns.

  JAX's client ends the process by abort(), without an exception: the only chance to say why.
  """
  handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(lambda _: call())
  _handlers.append(handler)     # what C calls must not be collected
  set_handler = ctypes.CDLL(None).signal
  set_handler.restype = ctypes.c_void_p
  set_handler(signal.SIGABRT, handler)


def _initialize(config: HostsConfig) -> None:
  auto = config.coordinator == 'auto'

  def not_met(found: object) -> InputError:
    of = '' if auto else f'{config.processes} processes '
    return InputError(
        'the processes could not meet', where=COORDINATOR if auto else config.coordinator,
        expected=f'{of}within {config.start_within:g} s', found=found,
        fix='See what the other processes wrote, and whether the port is free and can be reached')

  def aborted() -> None:
    print(f'error: {not_met("not all of them")}', file=sys.stderr, flush=True)
    os._exit(EXIT_LOST)

  # SIGTERM stays with Python, where a run that is told to stop saves first; JAX's service for it
  # would swallow it.
  jax.config.update('jax_enable_preemption_service', False)
  jax.config.update('jax_cpu_collectives_implementation', 'gloo')
  # JAX would abort all others, with a page of text, before they can say what they waited for.
  jax.config.update('jax_enable_recoverability', True)
  _before_abort(aborted)
  try:
    jax.distributed.initialize(
        None if auto else config.coordinator, config.processes, config.process_id,
        cluster_detection_method=None if auto else 'deactivate',
        initialization_timeout=int(config.start_within),
        heartbeat_timeout_seconds=math.ceil(config.lost_after),
        shutdown_timeout_seconds=int(config.lost_after) + 1)
  except ValueError as error:
    raise InputError('no cluster was found', where=COORDINATOR,
                     expected='Cloud TPU, GKE, SLURM or Open MPI', found=error,
                     fix=f'Set {COORDINATOR}=HOST:PORT, {PROCESSES} and {PROCESS_ID}') from error
  except RuntimeError as error:
    raise not_met(error) from error


class _Watch:
  """Threads that end this process where another one is lost or has failed."""

  def __init__(self, config: HostsConfig):
    self.config = config
    state = distributed.global_state
    self.me, self.processes = state.process_id, state.num_processes
    self.pause = min(config.lost_after / 12, 1.0)
    self.leaving = threading.Lock()
    self.ending = threading.Event()
    self.answered = time.monotonic()   # when the store last did
    self.raised: BaseException | None = None   # what ends the main thread
    self.threads = [threading.Thread(target=target, name=f'hosts: {target.__name__}', daemon=True)
                    for target in (self.count_the_living, self.read_the_verdict)]
    # When process 0 goes, the connection to its store breaks, and JAX aborts this process from a
    # thread of its own in the same millisecond.
    _before_abort(self.aborted)

  def start(self) -> None:
    for thread in self.threads:
      thread.start()

  def count_the_living(self) -> None:
    """Rounds that end when every process has come, or has sent no sign of life for too long."""
    last = None
    for n in itertools.count():
      try:
        living = _store().get_live_nodes(list(range(self.processes)))
        told = self.told()
        if len(living) == self.processes and last is None and _LAST in told:
          last = int(told[_LAST])
        if last is None and sum(key.startswith(f'{_ENDED}/') for key in told) == self.processes:
          # Who sees that all have ended names the round after next; all see it after the next one.
          last = int(self.say_first(_LAST, str(n + 2)))
      except jax.errors.JaxRuntimeError:
        time.sleep(self.pause)    # the other thread finds out what it is
        continue
      lost = sorted(set(range(self.processes)) - set(living))
      if lost:
        who = f'{_named(lost)} {"was" if len(lost) == 1 else "were"} lost'
        if self.me in lost:
          who = 'it was itself taken for lost, for its machine stood still'
        verdict = self.say_first(
            _VERDICT, f'{who} (no sign of life for {self.config.lost_after:g} s); {_AGAIN}')
        self.leave(self.sentence(verdict), EXIT_LOST)
      if n == last:
        return
      if self.ending.wait(self.pause):
        time.sleep(0.1)

  def read_the_verdict(self) -> None:
    counting = self.threads[0]
    while counting.is_alive():
      # A native timer: what remains where the interpreter has stopped for good.
      faulthandler.dump_traceback_later(_STUCK_AFTER, exit=True)
      try:
        verdict = self.told().get(_VERDICT)
        self.answered = time.monotonic()
      except jax.errors.JaxRuntimeError:
        verdict = None
        if self.coordinator_is_gone():
          self.leave(self.sentence(f'{_BROKEN}; {_AGAIN}'), EXIT_LOST)
      if verdict:
        time.sleep(self.pause)    # a process that ends for the same reason says so by itself
        self.leave(self.sentence(verdict), EXIT_LOST)
      counting.join(self.pause)
    faulthandler.cancel_dump_traceback_later()

  def told(self) -> dict[str, str]:
    return {key.removeprefix(f'{_WATCH}/'): value
            for key, value in _store().key_value_dir_get(_WATCH)}

  def say_first(self, key: str, text: str) -> str:
    """What all are told under `key`: the text of the process that said it first."""
    with contextlib.suppress(jax.errors.JaxRuntimeError):   # there is one, or no store any more
      _store().key_value_set(f'{_WATCH}/{key}', text)
    with contextlib.suppress(jax.errors.JaxRuntimeError):
      return _store().key_value_try_get(f'{_WATCH}/{key}')
    return text

  def sentence(self, verdict: str) -> str:
    return (f'process {self.me} of {self.processes} stopped while it {self.place()}, because '
            f'{verdict}.')

  def place(self) -> str:
    """What the main thread waits for, or else where it is in our code."""
    if _waiting:
      return f'waited for {_waiting[-1]}'
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    stack = traceback.walk_stack(frame) if self.raised is None else reversed(
        list(traceback.walk_tb(self.raised.__traceback__)))
    for frame, line in stack:
      path = Path(frame.f_code.co_filename)
      if path == Path(__file__) or not path.is_relative_to(_ROOT):
        continue
      inside = path.relative_to(_ROOT)
      if 'site-packages' not in inside.parts:    # a virtual environment may lie in the repository
        return f'was in {frame.f_code.co_name} ({inside}, line {line})'
    return 'was in code of other packages'

  def coordinator_is_gone(self) -> bool:
    if self.me == 0:
      return False
    if time.monotonic() - self.answered > self.config.lost_after / 2:
      return True     # a process that is stopped still has its connections accepted
    address = distributed.global_state.coordinator_address
    assert address is not None
    host, _, port = address.rpartition(':')
    try:
      socket.create_connection((host.strip('[]'), int(port)), timeout=5).close()
    except OSError:
      return True
    return False

  def aborted(self) -> None:
    with self.leaving:    # where a thread is about to leave, it does, and this waits for it
      pass
    if self.coordinator_is_gone():
      self.leave(self.sentence(f'{_BROKEN}; {_AGAIN}'), EXIT_LOST)

  def finish(self) -> None:
    """Waits until every process has come to its end."""
    _store().key_value_set(f'{_WATCH}/{_ENDED}/{self.me}', '')
    self.ending.set()
    for thread in self.threads:
      thread.join()
    if self.me == 0:      # the service goes with this process: the others leave first
      while len(_store().get_live_nodes(list(range(self.processes)))) > 1:
        time.sleep(0.1)
    jax.distributed.shutdown()

  def fail(self, what: str, status: int, text: str = '') -> NoReturn:
    """Ends the whole run because of this process, which writes `text`."""
    with self.leaving:
      sys.stderr.write(text)
      self.say_first(_VERDICT, f'process {self.me} {what}')
      self.exit(status)

  def leave(self, sentence: str, status: int) -> NoReturn:
    with self.leaving:
      print(f'error: {sentence}', file=sys.stderr)
      self.exit(status)

  def exit(self, status: int) -> NoReturn:
    """Leaves without the clean-up of Python and JAX, which would wait for the lost process."""
    for stream in (sys.stdout, sys.stderr):
      with contextlib.suppress(OSError, ValueError):
        stream.flush()
    if self.me == 0:   # the store goes with this process: the others first read why
      time.sleep(4 * self.pause)
    os._exit(status)
