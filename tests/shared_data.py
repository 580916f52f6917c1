"""Where the real records lie; tests that need them skip only where the folder is absent."""

import os
from pathlib import Path

import pytest

_BESIDE = Path(__file__).resolve().parents[2] / 'shared'
SHARED = Path(os.environ.get('JAXRL_SHARED', _BESIDE)) / 'data'
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason=f'no shared data at {SHARED}')
