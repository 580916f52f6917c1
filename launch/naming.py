"""Names of things in clouds and clusters, checked before anything is asked of them."""

from __future__ import annotations

import re

from jaxrl.errors import InputError

_LABEL = '[a-z]([-a-z0-9]*[a-z0-9])?'


def check_name(name: str, *, where: str, longest: int = 63) -> str:
  """A name as RFC 1035 and all of these systems take it.

  `longest` is what is left of 63 characters once numbers are appended.
  """
  if not re.fullmatch(_LABEL, name) or len(name) > longest:
    raise InputError('the name cannot be used', where=where, found=name or 'nothing',
                     expected=f'at most {longest} of a-z, 0-9 and -, from a letter to no -')
  return name


def check_project(project: str, *, where: str = '--project') -> str:
  # Old projects have the domain of their owner in front.
  if not re.fullmatch(r'([a-z0-9.-]+:)?[a-z][-a-z0-9]{4,28}[a-z0-9]', project):
    raise InputError('this is no project id', where=where, found=project or 'nothing',
                     expected='6 to 30 of a-z, 0-9 and -, not the display name or the number')
  return project


def check_zone(zone: str, *, where: str = '--zone') -> str:
  if not re.fullmatch(r'[a-z]+-[a-z]+\d+-[a-z0-9]+', zone):
    raise InputError('this is no zone', where=where, found=zone or 'nothing',
                     expected='a zone such as us-east5-a, not only its region')
  return zone


def check_bucket_path(path: str, *, where: str) -> str:
  """gs://BUCKET/FOLDER; the bucket as cloud.google.com/storage/docs/buckets#naming has it."""

  def wrong(what: str, expected: str) -> InputError:
    return InputError(what, where=where, expected=expected, found=path or 'nothing')

  scheme, _, rest = path.partition('://')
  bucket, _, folder = rest.partition('/')
  if scheme != 'gs':
    raise wrong('this is no path of a bucket', 'gs://BUCKET/FOLDER, which every host can reach')
  if (not 3 <= len(bucket) <= 63 or not re.fullmatch('[a-z0-9][-_.a-z0-9]*[a-z0-9]', bucket)
      or '..' in bucket or bucket.startswith('goog') or re.fullmatch(r'[\d.]+', bucket)):
    raise wrong('the bucket cannot have this name', '3 to 63 of a-z, 0-9, -, _ and .')
  parts = folder.removesuffix('/').split('/')
  if not folder or any(part in ('', '.', '..') for part in parts) or re.search(
      r'[\s*?\[\]#]', folder):
    raise wrong('the folder in the bucket cannot be used',
                'gs://BUCKET/FOLDER without empty parts, blanks and wildcards')
  return path


def bucket_of(path: str) -> str:
  return 'gs://' + path.removeprefix('gs://').partition('/')[0]


def check_image(image: str, *, where: str = '--image') -> str:
  part = r'[a-z0-9]+([._-]+[a-z0-9]+)*'
  if not re.fullmatch(rf'({part}(:\d+)?/)*{part}(:[\w][\w.-]{{0,127}})?(@sha256:[0-9a-f]{{64}})?',
                      image):
    raise InputError('this is no container image', where=where, found=image or 'nothing',
                     expected='HOST/PATH:TAG, as in us-docker.pkg.dev/project/images/jaxrl:1')
  return image
