"""The archive of `make bundle`, of this working copy."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.conftest import require

ROOT = Path(__file__).resolve().parents[1]


def bundled(folder: Path) -> Path:
    """The archive, made in that folder; needs the network."""
    done = subprocess.run([ROOT / ".ci/bundle", sys.executable, folder], capture_output=True, text=True, check=False)
    require(done.returncode == 0, f"the wheels could not be had: {done.stderr[-300:]}")
    return Path(done.stdout.strip())
