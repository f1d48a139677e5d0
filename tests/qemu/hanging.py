"""Where a command of ours hangs, told in the test's failure before the command is killed.

Knows: how to start a Python program so that it can be asked for every thread's traceback, whatever its
standard streams are at that moment, and what /proc tells of a process and its children.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import pytest

ASK = signal.SIGUSR1
ANSWER_S = 5.0
LAUNCHER = f"""
import faulthandler, os, runpy, sys
faulthandler.register({ASK:d}, file=open(sys.argv[1], "w"), all_threads=True)
del sys.argv[:2]
sys.path.insert(0, os.path.dirname(sys.argv[0]))
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def askable(tracebacks: Path, command: Sequence[str]) -> list[str]:
    """The command line of a Python script, changed so that ASK makes it write to `tracebacks`."""
    python, *script = command
    return [python, "-c", LAUNCHER, str(tracebacks), *script]


def communicate(process: subprocess.Popen[str], timeout: float, tracebacks: Path) -> tuple[str, str]:
    """As Popen's, but one that has not ended by then is asked where it hangs, killed, and fails the test."""
    __tracebackhide__ = True
    try:
        return process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        where = "\n".join([*kernel_side(process.pid), python_side(process, tracebacks)])
        process.kill()
        printed: object = "unknown: somebody else still holds its streams"
        with suppress(subprocess.TimeoutExpired):
            printed = process.communicate(timeout=ANSWER_S)
        pytest.fail(f"process {process.pid} has not ended within {timeout:g} s\n{where}\nit printed: {printed}")


def kernel_side(pid: int) -> Iterator[str]:
    """Each thread of the process and of its children: state, and where it sleeps in the kernel."""
    children = set()
    for task in sorted(Path(f"/proc/{pid}/task").glob("*")):
        yield f"process {pid}, thread {task.name}"
        for name in ("status", "wchan", "syscall", "stack"):
            with suppress(OSError):
                text = (task / name).read_text(errors="replace")
                yield f"  {name}: {_state(text) if name == 'status' else text.strip()}"
        with suppress(OSError):
            children |= set((task / "children").read_text().split())
    for child in sorted(children, key=int):
        yield from kernel_side(int(child))


def _state(status: str) -> str:
    wanted = ("Name", "State", "SigPnd", "ShdPnd", "SigIgn", "SigCgt")
    return ", ".join(line.replace("\t", " ") for line in status.splitlines() if line.split(":")[0] in wanted)


def python_side(process: subprocess.Popen[str], tracebacks: Path) -> str:
    """Every Python thread's traceback, if the process can still give it."""
    if process.poll() is not None:
        return f"it ended with status {process.returncode}; somebody else still holds its streams"
    process.send_signal(ASK)
    end = time.monotonic() + ANSWER_S
    before = ""
    while time.monotonic() < end:
        text = tracebacks.read_text() if os.path.exists(tracebacks) else ""
        if text and text == before:
            return text
        before = text
        time.sleep(0.1)
    return before or "it gave no traceback"
