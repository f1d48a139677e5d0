"""The command `nudge`, run as a user would, and QEMU's own trace as the witness of what its monitor was sent."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tracer.lab import faults
from tracer.lab.guest import RECHECK, Guest, Workload, guest
from tracer.lab.qemu import Drive, Qemu

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


def free_a_guest(
    folder: Path,
    image_format: str,
    iothread: str | None,
    ways: Sequence[Callable[[Qemu], Nudge]],
    rounds: int,
    chroot: Path | None = None,
) -> None:
    """Lose a guest's own requests so many times for each way of freeing it, and see that its disk lost nothing.

    The guest reads back all that it wrote and compares checksums, round after round. `folder` holds the image,
    which is looked at when the guest has ended; in `chroot`, if QEMU is in one.
    """
    image = folder / "disk"
    subprocess.run(["qemu-img", "create", "-q", "-f", image_format, str(image), "64M"], check=True)
    inside = Path("/") / image.relative_to(chroot) if chroot else image
    workload = Workload(mix=("write", "verify", "flush", "read", RECHECK), pause=0, blocks=4)
    with guest(workload, Drive(format=image_format, iothread=iothread, file=inside), chroot=chroot) as machine:
        for way in ways:
            for _ in range(rounds):
                _free(machine, way, image_format == "qcow2")
        assert machine.failures() == []
        counts = machine.trace_counts()
        assert counts.submitted - counts.completed <= 1
        if image_format == "raw":  # and the guest would have seen it: spoil what it wrote
            image.write_bytes(bytes(64 << 20))
            machine.wait_until(machine.failures, what="the guest to see spoiled data")
    if image_format == "qcow2":
        check = subprocess.run(["qemu-img", "check", str(image)], capture_output=True, text=True, check=False)
        assert check.returncode == 0, check.stdout


def _free(machine: Guest, way: Callable[[Qemu], Nudge], metadata: bool) -> None:
    faults.lose_guest_io(machine)
    stands_at = machine.progress()
    done = way(machine)
    # What was lost may be the image's metadata, for whose lock the monitor's read waits, too.
    if done.status == 3 and metadata and way is by_monitor:
        done = by_force(machine)
    assert done.status == 0, done.errors
    assert all(event["freed"] for event in done.nudges)
    assert machine.wait_progress(3) >= stands_at + 3
