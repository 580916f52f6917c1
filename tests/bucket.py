"""A stand-in for Cloud Storage on this machine, for the clients that are used in earnest.

It speaks the part of the JSON API that gcsfs and TensorStore ask for, with the semantics that
matter: an object appears whole or not at all, each content has a generation of its own, writes and
deletes may be made conditional on it, listings are exact. Nothing can be renamed or appended to.
https://cloud.google.com/storage/docs/json_api/v1
"""

from __future__ import annotations

import base64
import contextlib
import http.server
import json
import re
import threading
import urllib.parse
import zlib


class Bucket:
  """Objects by name, and what was asked of them. `url` is what the code under test gets."""

  name = 'stand-in'

  def __init__(self):
    self.objects: dict[str, tuple[bytes, int]] = {}    # content and generation
    self.refuses: str | None = None    # puts of names with this in them
    self.asked: list[tuple[str, str]] = []             # (PUT, GET or DELETE; name), as it came
    self.before = lambda verb, name: None              # called ahead of each
    self.after = lambda verb, name: None               # called when it is done, ahead of the answer
    self._lock = threading.RLock()
    self._uploads: dict[str, tuple[str, dict, bytearray]] = {}
    self._generation = 1000

  @property
  def url(self) -> str:
    return f'gs://{self.name}'

  def names(self, prefix: str = '') -> list[str]:
    return sorted(name for name in self.objects if name.startswith(prefix))

  def content(self, name: str) -> bytes:
    return self.objects[name][0]

  def note(self, verb: str, name: str) -> None:
    self.asked.append((verb, name))
    self.before(verb, name)

  def put(self, name: str, content: bytes, query: dict) -> tuple[int, dict]:
    self.note('PUT', name)
    if self.refuses and self.refuses in name:
      return 403, {'error': {'code': 403, 'message': 'no permission to create objects'}}
    with self._lock:
      if not self._matches(name, query):
        return 412, {'error': {'code': 412, 'message': 'conditionNotMet'}}
      self._generation += 1
      self.objects[name] = bytes(content), self._generation
      self.after('PUT', name)
      return 200, self.about(name)

  def delete(self, name: str, query: dict) -> int:
    self.note('DELETE', name)
    with self._lock:
      if name not in self.objects:
        return 404
      if not self._matches(name, query):
        return 412
      del self.objects[name]
      self.after('DELETE', name)
      return 204

  def _matches(self, name: str, query: dict) -> bool:
    now = self.objects[name][1] if name in self.objects else 0
    wanted, unwanted = query.get('ifGenerationMatch'), query.get('ifGenerationNotMatch')
    return (wanted is None or int(wanted) == now) and (unwanted is None or int(unwanted) != now)

  def about(self, name: str) -> dict:
    content, generation = self.objects[name]
    return {'kind': 'storage#object', 'name': name, 'bucket': self.name, 'size': str(len(content)),
            'generation': str(generation), 'metageneration': '1', 'updated': _WHEN,
            'timeCreated': _WHEN, 'crc32c': '',
            'md5Hash': base64.b64encode(zlib.crc32(content).to_bytes(16)).decode()}

  def listing(self, query: dict) -> dict:
    """A page of names in order; `pageToken` is the name to begin with."""
    prefix, delimiter = query.get('prefix', ''), query.get('delimiter', '')
    start, end = query.get('startOffset', ''), query.get('endOffset', '')
    with self._lock:
      items, prefixes = [], set()
      for name in self.names(prefix):
        if name < start or name < query.get('pageToken', '') or (end and name >= end):
          continue
        rest = name[len(prefix):]
        if delimiter and delimiter in rest:
          prefixes.add(prefix + rest[:rest.index(delimiter) + 1])
          continue
        if len(items) == int(query.get('maxResults', 1000)):
          return {'kind': 'storage#objects', 'items': items, 'prefixes': sorted(prefixes),
                  'nextPageToken': name}
        items.append(self.about(name))
    return {'kind': 'storage#objects', 'items': items, 'prefixes': sorted(prefixes)}


_WHEN = '2026-01-01T00:00:00.000Z'


class _Handler(http.server.BaseHTTPRequestHandler):
  protocol_version = 'HTTP/1.1'
  bucket: Bucket

  def log_message(self, *unused):
    pass

  def answer(self, status: int, content: bytes | dict = b'', **headers: str) -> None:
    if isinstance(content, dict):
      content = json.dumps(content).encode()
      headers['Content-Type'] = 'application/json'
    self.send_response(status)
    for name, value in headers.items():
      self.send_header(name.replace('_', '-'), value)
    self.send_header('Content-Length', str(len(content)))
    self.end_headers()
    if self.command != 'HEAD':
      self.wfile.write(content)

  def asked(self) -> tuple[str, str | None, dict]:
    """(kind of path: '', 'upload' or 'download'; object name; query) of a request."""
    parts = urllib.parse.urlsplit(self.path)
    query = dict(urllib.parse.parse_qsl(parts.query, keep_blank_values=True))
    found = re.fullmatch(r'/(?:(upload|download)/)?storage/v1/b/([^/]+)(?:/o(?:/(.+))?)?/?',
                         parts.path)
    if found is None or urllib.parse.unquote(found[2]) != self.bucket.name:
      return 'unknown', None, query
    name = None if found[3] is None else urllib.parse.unquote(found[3])
    kind = found[1] or ('object' if name else 'list' if re.search('/o/?$', parts.path) else 'about')
    return kind, name, query

  def body(self) -> bytes:
    if self.headers.get('Transfer-Encoding') == 'chunked':
      content = bytearray()
      while size := int(self.rfile.readline(), 16):
        content += self.rfile.read(size)
        self.rfile.readline()
      self.rfile.readline()
      return bytes(content)
    return self.rfile.read(int(self.headers.get('Content-Length', 0)))

  def do_GET(self) -> None:
    kind, name, query = self.asked()
    self.body()
    if kind == 'about':
      return self.answer(200, {'kind': 'storage#bucket', 'name': self.bucket.name})
    if kind == 'list':
      return self.answer(200, self.bucket.listing(query))
    if name is None:
      return self.answer(404, {'error': {'code': 404, 'message': 'no such bucket'}})
    self.bucket.note('GET', name)
    with self.bucket._lock:
      if name not in self.bucket.objects:
        return self.answer(404, {'error': {'code': 404, 'message': f'No such object: {name}'}})
      content, generation = self.bucket.objects[name]
      about = self.bucket.about(name)
    if 'ifGenerationNotMatch' in query and int(query['ifGenerationNotMatch']) == generation:
      return self.answer(304)
    if 'ifGenerationMatch' in query and int(query['ifGenerationMatch']) != generation:
      return self.answer(412)
    if query.get('alt') != 'media':
      return self.answer(200, about)
    headers = {'x_goog_generation': str(generation),
               'x_goog_stored_content_length': str(len(content)),
               'Content_Type': 'application/octet-stream'}
    span = re.fullmatch(r'bytes=(\d*)-(\d*)', self.headers.get('Range', ''))
    if not span:
      return self.answer(200, content, **headers)
    first = int(span[1]) if span[1] else max(len(content) - int(span[2]), 0)
    last = min(int(span[2]), len(content) - 1) if span[1] and span[2] else len(content) - 1
    if first >= len(content):
      return self.answer(416, Content_Range=f'bytes */{len(content)}')
    return self.answer(206, content[first:last + 1],
                       Content_Range=f'bytes {first}-{last}/{len(content)}', **headers)

  def do_POST(self) -> None:
    kind, _, query = self.asked()
    content = self.body()
    if kind != 'upload':
      return self.answer(501, {'error': {'code': 501, 'message': f'not made: {self.path}'}})
    uploads = self.bucket._uploads
    if 'upload_id' in query:
      return self.receive(query['upload_id'], content)
    if query['uploadType'] == 'media':
      return self.answer(*self.bucket.put(query['name'], content, query))
    if query['uploadType'] == 'multipart':
      mark = re.search('boundary="?([^";]+)"?', self.headers['Content-Type'])[1].encode()
      parts = content.split(b'--' + mark)[1:-1]
      about, data = (re.split(rb'\r?\n\r?\n', part, maxsplit=1)[1] for part in parts)
      return self.answer(*self.bucket.put(
          json.loads(about)['name'], data.removesuffix(b'\n').removesuffix(b'\r'), query))
    upload = str(len(uploads))
    uploads[upload] = query.get('name') or json.loads(content)['name'], query, bytearray()
    host = self.headers['Host']
    return self.answer(200, {}, Location=(
        f'http://{host}/upload/storage/v1/b/{self.bucket.name}/o?upload_id={upload}'))

  do_PUT = do_POST

  def receive(self, upload: str, content: bytes) -> None:
    """A part of a resumable upload; the object is there when the last one is."""
    name, query, data = self.bucket._uploads[upload]
    first, total = re.fullmatch(
        r'bytes (?:(\d+)-\d+|\*)/(\d+|\*)', self.headers['Content-Range']).groups()
    if first is not None:
      assert int(first) == len(data), (first, len(data))
    data += content
    if total != '*' and len(data) == int(total):
      return self.answer(*self.bucket.put(name, bytes(data), query))
    return self.answer(308, Range=f'bytes=0-{len(data) - 1}')

  def do_DELETE(self) -> None:
    _, name, query = self.asked()
    self.body()
    self.answer(404 if name is None else self.bucket.delete(name, query))


@contextlib.contextmanager
def serve():
  """(bucket, environment in which the clients of a process find it); ends with the block."""
  bucket = Bucket()
  handler = type('Handler', (_Handler,), {'bucket': bucket})
  server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), handler)
  server.handle_error = lambda *unused: None     # a client that was killed, or lost interest
  server.daemon_threads = True
  threading.Thread(target=server.serve_forever, daemon=True).start()
  address = f'http://127.0.0.1:{server.server_address[1]}'
  try:
    yield bucket, {
        'STORAGE_EMULATOR_HOST': address, 'TENSORSTORE_GCS_HTTP_URL': address,
        'FSSPEC_GCS_TOKEN': 'anon', 'GOOGLE_AUTH_TOKEN_FOR_TESTING': 'none',
        'GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT': 'false'}   # which asks another service of the bucket
  finally:
    server.shutdown()
    server.server_close()
