"""The QEMUs of other Debian releases, live, each in a root of its own: counts, and lost completions."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.matrix.roots import Release
from tests.qemu.tracing import ROOT, Trace, traced
from tracer.lab import faults
from tracer.lab.qemu import STORAGE_DAEMON, SYSTEM, Qemu
from tracer.sites.model import SITE_NAMES

KINDS = ("write", "read", "flush", "discard")

# Making a root takes a minute or two where the network is slow.
pytestmark = pytest.mark.timeout(1500)


def check(*arguments: str) -> dict[str, Any]:
    command = [sys.executable, str(ROOT / "cli.py"), "check", "--json", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize("program", [SYSTEM, STORAGE_DAEMON, "qemu-nbd", "qemu-img", "qemu-io"])
def test_every_program_can_be_traced(root: Path, release: Release, program: str) -> None:
    found = check("--exe", str(root / "usr/bin" / program))
    assert found["version"].startswith(release.qemu)
    assert {site["site"] for site in found["sites"]} == set(SITE_NAMES)
    assert all(site["cheap"] for site in found["sites"])
    assert found["barrier_fixed"] is True
    assert found["ready"] is True


def test_the_running_one_says_the_same(machine: Qemu, root: Path) -> None:
    running = check("--pid", str(machine.pid))
    assert Path(running["exe"]).is_relative_to(root)
    file = check("--exe", running["exe"])
    assert running["pid"] == machine.pid
    for field in ("version", "build_id", "sites", "layout", "known_bugs", "barrier_fixed"):
        assert running[field] == file[field]


def test_counts_are_those_of_qemus_own_trace(machine: Qemu) -> None:
    """Hundreds of requests of all kinds, several at once; QEMU's own trace is the witness."""
    with traced(machine.pid) as trace:
        before = machine.trace_counts()
        for start in range(0, 400, 8):
            handles = [machine.submit("d0", KINDS[i % 4], i % 64 * 4096) for i in range(start, start + 8)]
            for handle in handles:
                machine.finish("d0", handle)
        assert trace.finish() == 0
        after = machine.trace_counts()
    requests = trace.summary["requests"]
    assert requests["submitted"] == after.submitted - before.submitted > 200
    assert requests["completed"] == after.completed - before.completed == requests["submitted"]
    assert requests["done"] == requests["submitted"]
    assert (requests["in_flight"], trace.summary["lost_records"], trace.summary["alerts"]) == (0, 0, 0)


@pytest.mark.parametrize("kind", ["write", "flush"])
def test_a_completion_lost_under_our_eyes(machine: Qemu, kind: str) -> None:
    with traced(machine.pid, "--deadline", "500ms") as trace:
        lost = faults.lose(machine, "d0", kind)
        alert = trace.expect("alert")
        assert (alert["cause"], alert["kind"], alert["state"]) == ("lost-wakeup", kind, "THREAD_DONE")
        assert (alert["seen_from"], alert["ret"]) == ("probes", 0)
        assert int(alert["request"], 16) == lost.request
        assert int(alert["pool"], 16) == lost.pool.pool
        assert os.path.basename(alert["file"]) == "d0.img"
        assert 0 <= alert["overdue_s"] <= 0.1
        lost.free()
        assert trace.expect("resolved")["request"] == alert["request"]
        assert trace.finish() == 3
    assert trace.summary["alerts"] == 1
    assert trace.summary["requests"]["in_flight"] == 0


def test_a_completion_lost_before_we_came(machine: Qemu) -> None:
    lost = faults.lose(machine, "d0", "write")
    with Trace(machine.pid, "--deadline", "300ms") as trace:
        assert trace.expect("attached")["in_flight"] == 1
        alert = trace.expect("alert")
        assert (alert["cause"], alert["seen_from"]) == ("lost-wakeup", "memory")
        assert int(alert["request"], 16) == lost.request
        lost.free()
        trace.expect("resolved")
        assert trace.finish() == 3
