"""launch.on_host: which host this is, whose lines are whose, and that nothing stays behind."""

import http.server
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from launch import on_host

SCRIPT = Path(on_host.__file__)


def started(*words, **more):
  return subprocess.Popen(
      [sys.executable, '-S', str(SCRIPT), *words], stdout=subprocess.PIPE, text=True,
      env={'PATH': os.environ['PATH'], 'PYTHONUNBUFFERED': '1', 'SLURM_PROCID': '3'}, **more)


def python(source):
  return ('--', sys.executable, '-S', '-c', source)


@pytest.mark.parametrize(('environ', 'number'), [
    ({'SLURM_PROCID': '11', 'TPU_WORKER_ID': '2'}, 11),
    ({'TPU_WORKER_ID': '2'}, 2),
    ({'TPU_WORKER_ID': '2', 'MEGASCALE_SLICE_ID': '3'}, 14)])
def test_the_number_of_a_host_by_its_variables(environ, number):
  assert on_host.host_number(4, environ) == number


def test_the_number_of_a_tpu_vm_is_in_its_metadata():
  attributes = {'agent-worker-number': '1', 'tpu-env': "ZONE: 'z'\nMEGASCALE_SLICE_ID: '2'\n"}

  class Metadata(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
      assert self.headers['Metadata-Flavor'] == 'Google'
      found = attributes.get(self.path.removeprefix('/computeMetadata/v1/instance/attributes/'))
      self.send_response(404 if found is None else 200)
      self.end_headers()
      self.wfile.write((found or '').encode())

    def log_message(self, *_):
      pass

  server = http.server.HTTPServer(('127.0.0.1', 0), Metadata)
  threading.Thread(target=server.serve_forever, daemon=True).start()
  environ = {'GCE_METADATA_IP': f'127.0.0.1:{server.server_port}'}
  assert on_host.host_number(4, environ) == 9
  del attributes['tpu-env']
  assert on_host.host_number(4, environ) == 1
  attributes.clear()
  assert on_host.host_number(4, environ) == 0
  server.shutdown()


@pytest.mark.parametrize(('source', 'status', 'noted'), [
    ('print(1)', 0, ''), ('import sys; sys.exit(7)', 7, '7\n'),
    ('import sys; sys.exit(75)', 75, ''),
    ('import os; os.kill(os.getpid(), 9)', 137, '137\n')])
def test_lines_status_and_what_is_noted_of_a_failure(tmp_path, source, status, noted):
  failures = tmp_path / 'failures'
  child = started(f'--failures={failures}', *python(source))
  out, _ = child.communicate()
  assert child.returncode == status
  assert out.splitlines()[-1] == f'[3] on_host: ended with status {status}'
  assert (failures.read_text() if failures.exists() else '') == noted


def test_a_second_run_ends_the_first(tmp_path):
  lock = f'--lock={tmp_path / "lock"}'
  first = started(lock, *python('import time\nprint("up")\nwhile True: time.sleep(0.02)'))
  assert first.stdout.readline() == '[3] up\n'
  second = started(lock, *python('print("mine")'))
  assert second.communicate()[0].startswith('[3] mine\n')
  assert first.wait(timeout=200) == 143
  assert started(lock, '--stop').wait(timeout=200) == 0


def test_what_does_not_end_is_killed_after_the_grace_period():
  child = started('--grace=1', *python(
      'import signal, time\nsignal.signal(15, signal.SIG_IGN)\nprint("up")\n'
      'while True: time.sleep(0.02)'))
  assert child.stdout.readline() == '[3] up\n'
  child.send_signal(signal.SIGTERM)
  assert child.wait(timeout=200) == 137


def test_a_lost_connection_ends_the_run():
  child = started(*python('import os, time\nprint(os.getpid())\nwhile True:\n  print("x")\n'
                          '  time.sleep(0.02)'))
  pid = int(child.stdout.readline().split()[1])
  child.stdout.close()
  assert child.wait(timeout=200) == 143
  time.sleep(0.05)
  with pytest.raises(ProcessLookupError):
    os.kill(pid, 0)
