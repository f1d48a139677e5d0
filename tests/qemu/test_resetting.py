"""The usual end: the guest resets the disk that hangs, and a virtual processor drains with the big lock held."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.qemu.cores import inspect
from tests.qemu.nudging import ROOT, nudge
from tests.qemu.resetting import free_resetting_guests, resetting
from tests.qemu.tracing import traced

ROUNDS = int(os.environ.get("AIO_TRACE_NUDGE_ROUNDS", "2"))


@pytest.mark.timeout(120 + 20 * ROUNDS)
def test_freed_by_force_in_the_thread_that_drains(tmp_path: Path) -> None:
    free_resetting_guests(tmp_path, ROUNDS)


def test_nobody_was_told_wherever_the_home_thread_is(tmp_path: Path) -> None:
    with resetting(tmp_path) as guest:
        pid = guest.qemu.pid
        found = inspect("--pid", str(pid))
        assert (found["verdict"], found["draining"]) == ("lost-wakeup", "blk_drain")
        (request,) = [request for pool in found["pools"] for request in pool["requests"]]
        evidence = request["evidence"]
        assert evidence["home_thread"]["syscall"] == "futex"
        assert evidence["draining"] == "blk_drain"
        assert evidence["polled_by"]["tid"] == guest.vcpu
        assert f"thread {guest.vcpu} (" in found["explanation"]
        with traced(pid, "--deadline", "200ms") as trace:
            alert = trace.expect("alert")
            assert (alert["cause"], alert["draining"]) == ("lost-wakeup", "blk_drain")
            done = nudge(pid, "--qmp", str(guest.qemu.spare_monitor), "--timeout", "500ms", "--force", "--yes")
            assert done.status == 0, done.errors
            assert "by monitor: " in done.errors
            assert trace.expect("resolved")["request"] == hex(guest.lost.request)
        guest.check()


def test_the_alerts_advice_is_force_where_something_drains(tmp_path: Path) -> None:
    with resetting(tmp_path) as guest:
        command = [sys.executable, str(ROOT / "cli.py"), "--pid", str(guest.qemu.pid)]
        trace = [*command, "--deadline", "200ms", "--duration", "3s", "--interval", "0"]
        done = subprocess.run(trace, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 3, done.stderr
        assert f"sudo aio-trace nudge --pid {guest.qemu.pid} --force" in done.stdout
        assert "--qmp" not in done.stdout
        assert "waits in blk_drain" in done.stdout
