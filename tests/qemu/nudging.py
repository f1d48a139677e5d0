"""The command `nudge`, run as a user would, and QEMU's own trace as the witness of what its monitor was sent."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tracer.lab.qemu import Qemu

ROOT = Path(__file__).resolve().parents[2]
#: QEMU writes every command that a monitor gets to the lab's trace log.
WITNESS = ("-trace", "handle_qmp_command", "-trace", "handle_hmp_command")


@dataclass(frozen=True)
class Nudge:
    """What the command did: exit status, its events, what it said."""

    status: int
    events: tuple[dict[str, Any], ...]
    errors: str

    @property
    def nudges(self) -> list[dict[str, Any]]:
        """The nudge events."""
        return [event for event in self.events if event["event"] == "nudge"]


def nudge(pid: int, *options: str, environment: Mapping[str, str] | None = None, before: tuple[str, ...] = ()) -> Nudge:
    """`aio-trace nudge --json` on a process, without a terminal; `before` are words ahead of the command."""
    command = [*before, sys.executable, str(ROOT / "cli.py"), "nudge", "--pid", str(pid), "--json", *options]
    done = subprocess.run(
        command, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=60, check=False, env=environment
    )
    assert "Traceback" not in done.stderr, done.stderr
    return Nudge(done.returncode, tuple(json.loads(line) for line in done.stdout.splitlines()), done.stderr)


def by_monitor(qemu: Qemu, *options: str) -> Nudge:
    """Through the lab's spare monitor."""
    return nudge(qemu.pid, "--qmp", str(qemu.spare_monitor), *options)


def by_force(qemu: Qemu) -> Nudge:
    """Without any monitor."""
    return nudge(qemu.pid, "--force", "--yes")


def commands(qemu: Qemu) -> list[str]:
    """What QEMU's monitors were sent so far, by QEMU's own trace; see WITNESS."""
    text = (qemu.folder / "trace").read_text(errors="replace")
    return re.findall(r"handle_(?:qmp|hmp)_command mon \S+ (?:req: |cmdline: )(.*)", text)
