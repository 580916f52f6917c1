"""Stage: what the run read from outside, so that a restart on changed data is refused."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping

from etils import epath

from jaxrl.errors import InputError
from jaxrl.runs.session import Session


def input_stage(session: Session, paths: Mapping[str, epath.Path]) -> None:
  """Writes `inputs.json`, the SHA-256 of each file by its role; compares on every start.

  Raises:
    InputError: a file cannot be read, or is not the one that the run was started with.
  """
  found = {}
  for role, path in paths.items():
    try:
      with path.open('rb') as file:
        found[role] = hashlib.file_digest(file, 'sha256').hexdigest()
    except OSError as error:
      raise InputError(f'the {role} file cannot be read', where=path,
                       found=error.strerror or error) from error

  def produce(scratch: epath.Path) -> dict:
    (scratch / 'inputs.json').write_text(json.dumps(found, indent=1))
    return found

  recorded = session.run.stage('inputs', ('inputs.json',), produce).counts
  for role, path in paths.items():
    if found[role] != recorded.get(role):
      raise InputError(
          f'the {role} file changed since the run was started', where=path,
          expected=f'SHA-256 {str(recorded.get(role))[:12]}', found=found[role][:12],
          fix='Restore the file, or give another --run_dir')
