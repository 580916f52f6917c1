"""The lease of a run on gs://: one owner, whatever becomes of it."""

import json
import os
import subprocess
import sys
import threading
import time

import pytest

from jaxrl import objects
from jaxrl.errors import InputError
from jaxrl.runs import lease
from jaxrl.runs.lease import Times, hold_lease

# An owner here never ends itself, however slow the machine is.
TIMES = Times(renew=0.1, end=60.0, take_over=1.2)


@pytest.fixture
def url(bucket):
  return f'{bucket.url}/run/lock'


def owner(bucket):
  """(number, content) of what decides."""
  name = bucket.names('run/lock/')[-1]
  return int(name.rpartition('/')[2]), json.loads(bucket.content(name))


def leave(bucket, **changes):
  """Makes the last owner one of another machine that ended without a word."""
  name = bucket.names('run/lock/')[-1]
  content = json.loads(bucket.content(name)) | {'machine': 'another', 'released': False} | changes
  bucket.objects[name] = json.dumps(content).encode(), 1


def test_an_owner_renews_and_releases(bucket, url):
  with hold_lease(url, times=TIMES):
    assert owner(bucket)[0] == 1 and not owner(bucket)[1].get('released')
    time.sleep(0.5)
    assert owner(bucket)[1]['renewals'] >= 1
  assert owner(bucket)[1]['released']
  with hold_lease(url, times=TIMES):
    assert owner(bucket)[0] == 2
    assert len(bucket.names('run/lock/')) == 1      # what came before is tidied up


def test_a_second_one_is_refused_and_told_who_has_it(bucket, url, monkeypatch):
  with hold_lease(url, times=TIMES):
    with pytest.raises(InputError, match=f'/run: .* in use by process {os.getpid()} on host'):
      with hold_lease(url, times=TIMES):
        pass
    monkeypatch.setattr(lease, '_machine', lambda: 'elsewhere')   # now it has to wait and see
    with pytest.raises(InputError, match='in use by'):
      with hold_lease(url, times=TIMES, say=lambda text: None):
        pass
  assert owner(bucket)[0] == 1


def test_an_owner_that_is_silent_is_followed_after_the_stated_time(bucket, url):
  with hold_lease(url, times=TIMES):
    pass
  leave(bucket)
  said, began = [], time.monotonic()
  with hold_lease(url, times=TIMES, say=said.append):
    assert time.monotonic() - began >= TIMES.take_over
    assert owner(bucket)[0] == 2
  assert 'goes on in 1 s if nothing is heard' in said[0] and len(said) == 1


def test_an_owner_that_died_on_this_machine_is_followed_at_once(bucket, url):
  script = ('import os, sys; from jaxrl.runs.lease import hold_lease\n'
            'with hold_lease(sys.argv[1]): os.kill(os.getpid(), 9)')
  subprocess.run([sys.executable, '-c', script, url], check=False)
  assert not owner(bucket)[1].get('released')
  began = time.monotonic()
  with hold_lease(url):
    assert time.monotonic() - began < 10 and owner(bucket)[0] == 2


def test_a_process_number_that_is_anothers_now_is_no_owner(bucket, url):
  with hold_lease(url, times=TIMES):
    pass
  leave(bucket, machine=lease._machine(), pid=os.getpid(), born='1')
  with hold_lease(url):
    assert owner(bucket)[0] == 2


def test_an_owner_that_was_followed_is_told(bucket, url):
  lost = []
  with hold_lease(url, times=TIMES, on_lost=lost.append):
    objects.write(f'{url}/00000002', b'{}')
    wait_for(lambda: lost)
  assert 'another process has taken the run over; the same command goes on' in lost[0]
  assert owner(bucket) == (2, {})                   # and it does not touch what is not its own


def test_an_owner_that_cannot_renew_is_told_before_another_may_follow(bucket, url):
  lost, stuck = [], threading.Event()
  with hold_lease(url, times=Times(renew=0.1, end=0.6, take_over=9), on_lost=lost.append):
    bucket.before = lambda verb, name: stuck.wait(20) if verb == 'PUT' else None
    wait_for(lambda: lost)    # while a request of it hangs
    assert 'it could not say for 0.6 s that it is alive' in lost[0]
    stuck.set()
  assert Times().end < Times().take_over


def test_the_default_is_to_end_the_process(url):
  script = ('import sys, time; from jaxrl.runs.lease import Times, hold_lease\n'
            'from jaxrl import objects\n'
            'with hold_lease(sys.argv[1], times=Times(0.1, 5, 10)):\n'
            '  objects.write(sys.argv[1] + "/00000002", b"{}")\n'
            '  time.sleep(60)\n')
  done = subprocess.run(
      [sys.executable, '-c', script, url], capture_output=True, text=True, check=False)
  assert done.returncode == 75
  assert done.stderr.endswith('the run stopped here, because another process has taken the run '
                              'over; the same command goes on\n'), done.stderr


def test_of_many_that_ask_at_once_one_gets_it(bucket, url):
  """Also when each has looked before any of them creates its number."""
  got, refused = [], []
  all_looked = threading.Barrier(4)

  def before(verb, name):
    if verb == 'PUT' and name.endswith('00000001') and not bucket.objects:
      with_suppressed_timeout(all_looked)

  def ask():
    try:
      with hold_lease(url, times=TIMES):
        got.append(1)
        done.wait(20)
    except InputError as error:
      refused.append(str(error))

  def with_suppressed_timeout(barrier):
    try:
      barrier.wait(5)
    except threading.BrokenBarrierError:
      pass

  bucket.before, done = before, threading.Event()
  threads = [threading.Thread(target=ask) for _ in range(4)]
  for thread in threads:
    thread.start()
  wait_for(lambda: len(refused) == 3)
  done.set()
  for thread in threads:
    thread.join()
  assert len(got) == 1


def test_a_number_that_was_deleted_is_not_taken_again(bucket, url, monkeypatch):
  """A process looks at number 1, and meanwhile 2 has come and gone, and 3 owns the run."""
  objects.write(f'{url}/00000001', json.dumps({'released': True}).encode())
  create = objects.create

  def late(name, content):
    if name.endswith('2'):
      objects.delete(f'{url}/00000001')
      objects.write(f'{url}/00000003', json.dumps(
          {'machine': lease._machine(), 'pid': os.getpid(), 'born': lease._born(os.getpid()),
           'host': 'h', 'start': 's'}).encode())
    return create(name, content)

  monkeypatch.setattr(objects, 'create', late)
  with pytest.raises(InputError, match='in use'):
    with hold_lease(url, times=TIMES):
      pass


def wait_for(happened):
  end = time.monotonic() + 20
  while not happened():
    assert time.monotonic() < end
    time.sleep(0.02)
