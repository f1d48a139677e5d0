"""`aio-trace demo`: the whole story, and nothing left of it, also when it is interrupted."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.qemu.hanging import askable, communicate
from tests.qemu.tracing import PATIENCE_S, ROOT


@pytest.fixture
def folder() -> Iterator[Path]:
    """Where the demo's temporary files go; a short path, since QEMU's sockets are in it."""
    with tempfile.TemporaryDirectory(prefix="t-", dir="/tmp") as path:
        yield Path(path)


DEMO = (sys.executable, str(ROOT / "cli.py"), "demo")


def left_of(folder: Path) -> list[str]:
    """Processes that still use the folder, and what is still in it."""
    users = []
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            command = Path(f"/proc/{name}/cmdline").read_bytes().decode(errors="replace").replace("\0", " ")
        except OSError:
            continue
        if str(folder) in command:
            users.append(command)
    return users + [path.name for path in folder.iterdir()]


#: Without --drain it is the same story with an earlier end: that is seen in the long form.
STORIES = [("--drain",), *([()] if "AIO_TRACE_SOAK_S" in os.environ else [])]


@pytest.mark.parametrize("options", STORIES, ids=lambda options: " ".join(options) or "plain")
def test_the_whole_story(folder: Path, options: tuple[str, ...]) -> None:
    """Alert, cause, standstill, freed, goes on; --drain with a dead monitor and the call inside QEMU."""
    done = subprocess.run(
        [*DEMO, *options],
        env=os.environ | {"TMPDIR": str(folder)},
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
    )
    assert done.returncode == 0, done.stderr
    assert "ALERT lost-wakeup" in done.stdout
    assert "resolved" in done.stdout
    assert "it hangs" in done.stderr
    assert "the guest goes on" in done.stderr
    assert ("--force" in done.stderr) == bool(options)
    assert left_of(folder) == []


@pytest.mark.parametrize(
    ("number", "after_s"), [(signal.SIGINT, 1.0), (signal.SIGTERM, 2.0), (signal.SIGINT, 5.0), (signal.SIGTERM, 9.0)]
)
def test_interrupted(folder: Path, tmp_path: Path, number: signal.Signals, after_s: float) -> None:
    """Any moment will do: it ends by itself, without a traceback, and leaves nothing."""
    tracebacks = tmp_path / "tracebacks"
    demo = subprocess.Popen(
        askable(tracebacks, DEMO),
        env=os.environ | {"TMPDIR": str(folder)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    time.sleep(after_s)
    demo.send_signal(number)
    _, errors = communicate(demo, PATIENCE_S, tracebacks)
    assert "Traceback" not in errors
    assert "Exception" not in errors
    assert left_of(folder) == []
