"""Nothing that comes from outside makes a traceback, takes five seconds or 300 MiB: see tests/fuzzing.

AIO_TRACE_FUZZ sets how many inputs of each kind are tried; a failure's number makes its input again:
`python -m tests.fuzzing KIND 1 SEED FOLDER NUMBER`.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import require
from tests.fuzzing import KINDS

ROOT = Path(__file__).resolve().parents[2]
COUNT = int(os.environ.get("AIO_TRACE_FUZZ", "60"))
#: A long run has other inputs than the short one, which would be the same each time.
SEED = 1 if COUNT < 1000 else 2


@pytest.mark.timeout(120 + 2 * COUNT)
@pytest.mark.parametrize("kind", KINDS)
def test_whatever_comes(kind: str, tmp_path: Path) -> None:
    require(shutil.which("gcc"), "gcc is not installed")
    command = [sys.executable, "-m", "tests.fuzzing", kind, str(COUNT), str(SEED), str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    print({name: value for name, value in found.items() if name != "failures"})
    assert not found["failures"], "\n".join(found["failures"])
    assert found["count"] == COUNT
    assert len(found["outcomes"]) > 1, "or nothing of it was tried"
