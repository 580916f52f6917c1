"""--output, which several commands share."""

from __future__ import annotations

from absl import flags

flags.DEFINE_string('output', None, 'File or folder to write.')
